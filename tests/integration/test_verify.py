import shutil
from pathlib import Path
from types import SimpleNamespace

import lance
import polars as pl
import pytest

from tda.artifacts import Workspace, only_run, read_json, write_json, write_table
from tda.store import open_sealed, open_table, table_path
from tda.verify import collect_garbage, verify
from tests.store_rows import DIM, IDENTITY, documents_of, make_rows

IDS = [f"doc-{number}" for number in range(40)]


def write_documents(workspace: Workspace, ids: list[str], *, version: int = 0) -> None:
    documents = documents_of(ids, version)
    write_table(workspace.documents, pl.DataFrame(documents, schema=["id", "content_hash"], orient="row"))


def write_rows(workspace: Workspace, checkpoint: int, *, version: int = 0, seal: bool = True, **changes) -> dict:
    table = open_table(workspace.store, checkpoint=checkpoint, segment=0, identity=IDENTITY | changes, dim=DIM, dtype="float16")
    table.write([make_rows(IDS, version=version)])
    if not seal:
        return {"table": table.name}
    manifest = table.seal(documents_of(IDS, version))
    write_json(workspace.gradients(checkpoint), manifest)
    return manifest


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    made = Workspace(tmp_path)
    write_documents(made, IDS)
    write_json(made.training, {"checkpoint_steps": [10, 20]})
    for checkpoint in (0, 1):
        write_rows(made, checkpoint)
    return made


def data_files(workspace: Workspace, table: str) -> list[Path]:
    return sorted(table_path(workspace.store, table).glob("data/*.lance"))


def all_files(workspace: Workspace) -> set[Path]:
    return {path for path in workspace.store.rglob("*") if path.is_file()}


def test_a_store_that_fits_its_manifests_is_all_right(workspace):
    assert verify(workspace) == []


def test_one_changed_byte_is_found(workspace):
    manifest = write_rows(workspace, 1)
    (file,) = data_files(workspace, manifest["table"])
    content = bytearray(file.read_bytes())
    stored = lance.dataset(table_path(workspace.store, manifest["table"])).to_table(columns=["vector"])["vector"].chunk(0)
    at = content.index(stored.flatten().to_numpy().tobytes())
    content[at] ^= 1
    file.write_bytes(content)
    (problem,) = verify(workspace)
    assert "gradients/1.json: the rows of" in problem
    assert "the store is damaged; delete" in problem
    assert "run `dvc repro --single-item --force gradients@1`" in problem


def test_missing_tables_tags_and_files_are_found(workspace):
    write_rows(workspace, 2)
    for checkpoint, damage in enumerate((shutil.rmtree, drop_tags, drop_data)):
        table = open_sealed(workspace.store, manifest_of(workspace, checkpoint))
        damage(table_path(workspace.store, table.name))
    problems = verify(workspace)
    assert [problem.split(": ")[0] for problem in problems] == [str(workspace.gradients(checkpoint)) for checkpoint in range(3)]
    assert "is missing; the store is not versioned" in problems[0]
    assert "has no version run-" in problems[1]
    assert "is damaged: its rows cannot be read (Not found: " in problems[2]


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["data/*.lance", "_versions/*.manifest", "_refs/tags/*.json"])
def test_a_truncated_file_is_said_in_words(workspace, kind, share):
    manifest = manifest_of(workspace, 1)
    path = table_path(workspace.store, manifest["table"])
    for file in path.glob(kind):
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    (problem,) = verify(workspace)
    assert f"gradients/1.json: {path} is damaged: its rows cannot be read (" in problem
    assert problem.endswith(f"); delete {path} and run `dvc repro --single-item --force gradients@1`")
    assert "LanceError" not in problem
    assert ".rs:" not in problem
    with pytest.raises(ValueError, match="is damaged: its rows cannot be read"):
        open_sealed(workspace.store, manifest).places(IDS)
    with pytest.raises(ValueError, match="is damaged: its rows cannot be read"):
        write_rows(workspace, 1)


def test_what_the_system_refuses_is_no_damage(workspace, monkeypatch):
    table = open_sealed(workspace.store, manifest_of(workspace, 1))
    monkeypatch.setattr(table, "_dataset", SimpleNamespace(to_table=too_many_files))
    with pytest.raises(OSError, match="Too many open files"):
        table.places(IDS)


def too_many_files(**named) -> None:
    raise OSError("LanceError(IO): Too many open files (os error 24), /somewhere/local.rs:1:2")


def manifest_of(workspace: Workspace, checkpoint: int) -> dict:
    return read_json(workspace.gradients(checkpoint), stage="gradients")


def drop_tags(path: Path) -> None:
    dataset = lance.dataset(path)
    for tag in dataset.tags.list():
        dataset.tags.delete(tag)


def drop_data(path: Path) -> None:
    shutil.rmtree(path / "data")


def test_documents_changed_since_are_found(workspace):
    write_documents(workspace, IDS[:-1])
    problems = verify(workspace)
    assert len(problems) == 2
    assert "is for other documents than" in problems[0]
    assert "(it has 40, there are 39); run `dvc repro gradients@0`" in problems[0]


def test_a_changed_manifest_is_found(workspace):
    manifest = manifest_of(workspace, 0)
    write_json(workspace.gradients(0), manifest | {"digest": "0" * 32})
    write_json(workspace.gradients(1), {key: value for key, value in manifest.items() if key != "tag"})
    workspace.gradients(2).write_text("{")
    problems = verify(workspace)
    assert len(problems) == 3
    assert "the manifest says 00000000" in problems[0]
    assert "is not a manifest of gradient rows: it has no tag" in problems[1]
    assert "2.json is not JSON" in problems[2]


def test_a_checkpoint_without_a_manifest_is_found(workspace):
    workspace.gradients(1).unlink()
    (problem,) = verify(workspace)
    assert problem.endswith(
        "1.json is missing, and so are the rows of checkpoint 1; run `dvc checkout`, or `dvc repro gradients@1`"
    )


def test_no_manifest_is_a_problem(tmp_path):
    (problem,) = verify(Workspace(tmp_path))
    assert "holds no manifest" in problem


# garbage


def test_nothing_to_collect(workspace):
    before = all_files(workspace)
    assert collect_garbage(workspace) == []
    assert all_files(workspace) == before


def test_what_no_manifest_names_is_removed_and_the_rest_stays(workspace):
    old = manifest_of(workspace, 0)
    other = write_rows(workspace, 1, weights="w1")  # replaces the manifest of checkpoint 1
    first = manifest_of(workspace, 0)
    write_documents(workspace, IDS, version=1)
    for checkpoint in (0, 1):
        write_rows(workspace, checkpoint, version=1, **({"weights": "w1"} if checkpoint else {}))
    assert verify(workspace) == []
    before = all_files(workspace)

    planned = collect_garbage(workspace, dry_run=True)
    assert all_files(workspace) == before
    done = collect_garbage(workspace)

    assert [line.split(": ")[0].replace("would remove", "removed") for line in planned] == [line.split(": ")[0] for line in done]
    assert len(done) == 3  # the table of other weights, and a tag of each table that stays
    assert any(line.startswith(f"removed {first['tag']} of {first['table']}: ") for line in done)
    for said, freed in zip(planned, done, strict=True):
        assert 0 < int(said.split()[-2]) <= int(freed.split()[-2])
    assert verify(workspace) == []
    for manifest in (old, other):
        with pytest.raises(FileNotFoundError, match="has no version"):
            open_sealed(workspace.store, manifest)
    assert collect_garbage(workspace) == []


def test_rows_whose_manifest_is_to_come_stay_and_abandoned_ones_go(workspace):
    write_json(workspace.training, {"checkpoint_steps": [10, 20, 30]})
    unfinished = write_rows(workspace, 2, seal=False)["table"]
    abandoned = write_rows(workspace, 0, weights="w1", seal=False)["table"]  # its checkpoint has a manifest of other rows
    beyond = write_rows(workspace, 7, seal=False)["table"]  # the run has no such checkpoint any more
    assert [line.split(": ")[0] for line in collect_garbage(workspace)] == [f"removed {abandoned}", f"removed {beyond}"]
    assert table_path(workspace.store, unfinished).exists()
    assert not table_path(workspace.store, abandoned).exists()


def test_rows_written_since_the_last_seal_stay(workspace):
    table = open_table(workspace.store, checkpoint=0, segment=0, identity=IDENTITY, dim=DIM, dtype="float16")
    table.write([make_rows(["new"])])
    assert collect_garbage(workspace, dry_run=True) == collect_garbage(workspace) == []
    again = open_table(workspace.store, checkpoint=0, segment=0, identity=IDENTITY, dim=DIM, dtype="float16")
    assert again.present().keys() == {*IDS, "new"}


def test_a_sealed_table_whose_manifest_is_gone_stays_while_the_run_has_its_checkpoint(workspace):
    manifest = manifest_of(workspace, 1)
    workspace.gradients(1).unlink()
    assert collect_garbage(workspace) == []
    write_json(workspace.gradients(1), manifest)
    assert verify(workspace) == []
    workspace.gradients(1).unlink()
    write_json(workspace.training, {"checkpoint_steps": [10]})
    (line,) = collect_garbage(workspace)
    assert line.startswith("removed gradients_1_")
    assert verify(workspace) == []


def test_nothing_is_removed_while_a_stage_runs(workspace):
    write_rows(workspace, 0, weights="w1", seal=False)
    before = all_files(workspace)
    with (
        only_run(workspace.work / "gradients-0.lock"),
        pytest.raises(RuntimeError, match="doing this already; wait"),
    ):
        collect_garbage(workspace)
    assert all_files(workspace) == before


def test_nothing_is_removed_without_whole_manifests(workspace):
    before = all_files(workspace)
    workspace.gradients(0).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        collect_garbage(workspace)
    for checkpoint in (0, 1):
        workspace.gradients(checkpoint).unlink()
    with pytest.raises(ValueError, match="holds no manifest, so every table would go"):
        collect_garbage(workspace)
    assert all_files(workspace) == before
