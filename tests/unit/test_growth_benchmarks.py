"""What the benchmarks of cost and of plans make of what they measured."""

import numpy as np
import pytest

from benchmarks.cost_grows_as_the_work import fitted, over_documents
from benchmarks.plan_foretells import compare, memory, put, render


def measured(*, exponent: float) -> list[dict]:
    return [
        {"size": size, "work": size, "kinds": {"write": {"seconds": 1e-6 * size**exponent, "peak_rise_mib": 1 + size / 2**20}}}
        for size in (1000, 10_000, 100_000)
    ]


@pytest.mark.parametrize(("exponent", "straight"), [(1.0, True), (1.3, False)])
def test_a_line_has_the_exponent_of_its_points(exponent, straight):
    (line,) = fitted("documents", measured(exponent=exponent))
    assert line["exponent"] == line["last_exponent"] == exponent
    assert line["straight"] == straight
    assert line["bytes_per_unit"] == 1
    assert line["unit_seconds"][0] == pytest.approx(1e-6 * 1000 ** (exponent - 1))


def test_a_size_goes_through_the_store():
    found = over_documents(50)
    assert set(found["kinds"]) == {"write", "seal", "scan", "score"}
    assert all(np.isfinite(kind["seconds"]) for kind in found["kinds"].values())


def stage(name: str, **more: float) -> dict:
    return {"stage": name, "cpu_seconds": 10.0, "seconds": 8.0, "disk_bytes": 1e9, "memory_bytes": 1e9, **more}


def test_parts_are_compared_together_and_what_is_off_is_marked():
    foretold = {"stages": [stage("train"), stage("gradients", cpu_seconds=30.0)], "verification": stage("verify"), "pace": 1.0}
    done = [
        stage("train", pace=1.0),
        *(stage("gradients", cpu_seconds=10.0, disk_bytes=5e8, memory_bytes=2e9, pace=2.0) for _ in range(2)),
        stage("verify", disk_bytes=0, pace=1.0),
    ]
    found = {one["stage"]: one for one in compare(foretold, done)}
    assert all(found["train"]["judged"].values())
    assert found["gradients"]["measured"] == {"cpu_seconds": 20.0, "seconds": 16.0, "disk_bytes": 1e9, "memory_bytes": 2e9}
    assert found["gradients"]["judged"] == {"cpu_seconds": False, "seconds": False, "disk_bytes": True, "memory_bytes": False}
    assert (found["gradients"]["pace"], found["gradients"]["at_that_pace"]) == (2.0, 3.0)
    assert found["verify"]["judged"]["disk_bytes"] is None
    assert found["total"]["measured"]["cpu_seconds"] == 30.0
    assert "1.50 !" in render(list(found.values()))


def test_a_setting_that_is_not_there_is_refused():
    values = {"gradients": {"rank": 24}}
    put(values, ["gradients", "rank"], 8)
    assert values == {"gradients": {"rank": 8}}
    with pytest.raises(ValueError, match=r"--set gradients.rang: no such setting; expected one of rank"):
        put(values, ["gradients", "rang"], 8)


def test_memory_of_a_process_that_has_ended_is_none():
    assert memory(2**22 + 1) == 0
