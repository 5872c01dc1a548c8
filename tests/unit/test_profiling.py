import gzip
import json
import time

import pytest
import torch

from tda.parallel import between_pieces, parallel_map
from tda.profiling import KINDS, kind_of, profiled


def test_a_profile_has_a_trace_and_shares_by_kind_of_work(tmp_path):
    with profiled(tmp_path / "profile"):
        a = torch.randn(64, 64)
        for _ in range(3):
            a = (a @ a).tanh()
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::mm") == 3
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert "matrix products" in table
    (row,) = [line.split() for line in table.splitlines() if line.startswith("aten::mm ")]
    assert row[3] == "3"  # calls
    assert not between_pieces


def test_recording_ends_when_it_has_lasted_long_enough_and_the_work_goes_on(tmp_path):
    def piece(number: int) -> int:
        time.sleep(0.01)
        torch.ones(2).exp() if number == 0 else torch.ones(2).erf()
        return number

    with profiled(tmp_path / "profile", seconds=0.001):
        assert list(parallel_map(piece, range(3), workers=1, description="pieces")) == [0, 1, 2]
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert "aten::exp" in table
    assert "aten::erf" not in table


def test_a_profile_of_what_fails_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no"), profiled(tmp_path / "profile"):
        raise ValueError("no")
    assert not (tmp_path / "profile").exists()
    assert not between_pieces


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::linalg_eigh", "decompositions"),
        ("aten::copy_", "copies"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("aten::index_select", "indexing"),
        ("aten::_log_softmax", "reductions"),
        ("triton_poi_fused_mul_silu_3", "elementwise"),
        ("ProfilerStep", "other"),
    ],
)
def test_kinds_of_work(name, kind):
    assert kind_of(name) == kind
    assert kind in (*KINDS, "other")
