"""The audit of a real toy workspace: scores of training documents and of new ones, and a pipeline that is left as it was."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from tda import cli, stages
from tda.artifacts import Workspace, only_run
from tda.audit_scores import NewDocuments, audit_scores
from tda.config import Config
from tda.store import open_sealed
from tda.tokens import load_tokenizer
from tda.verify import collect_garbage, verify
from tests.toy import BY_SOURCE, run_stages, sentences, toy_config, toy_values, write_corpus, write_params

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("toy")
    write_corpus(folder)
    run_stages(toy_config(folder), Workspace(folder), "prepare", "train", "segments", "curvature", "gradients", "scores")
    return Workspace(folder)


@pytest.fixture
def toy(done, tmp_path) -> Workspace:
    shutil.copytree(done.root, tmp_path, dirs_exist_ok=True)
    return Workspace(tmp_path)


def write_new(folder: Path, rows: list[dict]) -> str:
    path = folder / "new.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def fresh(count: int) -> list[dict]:
    return [{"id": f"new-{n}", "source": "harbour", "text": sentences("harbour", 5000 + n, count=1)} for n in range(count)]


def audit_config(workspace: Workspace, rows: list[dict] | None, **changes: object) -> Config:
    location = "" if rows is None else write_new(workspace.root, rows)
    return toy_config(workspace.root, audit__documents=location, **changes)


def manifests(workspace: Workspace) -> list[bytes]:
    return [workspace.gradients(number).read_bytes() for number in range(4)]


@pytest.mark.parametrize(("changes", "column"), [({}, "score_averaged_influence"), (BY_SOURCE, "score_source")])
def test_training_documents_have_the_scores_of_the_pipeline(toy, changes, column):
    scored = audit_scores(audit_config(toy, None, **changes), toy)
    expected = pl.read_parquet(toy.scores).select("doc_id", score=column)
    assert scored.table.select("doc_id", "score").equals(expected)
    assert not scored.table["is_new"].any()
    assert scored.counts == {}


def test_scores_of_other_documents_are_refused(toy):
    scores = pl.read_parquet(toy.scores)
    for changed in (scores.head(20), scores.with_columns(content_hash=pl.lit("another"))):
        changed.write_parquet(toy.scores)
        with pytest.raises(ValueError, match=r"scores of other documents than .*; expected the same; run `dvc repro scores`"):
            audit_scores(audit_config(toy, None), toy)


def test_an_audit_by_averaged_influence_needs_no_store(toy):
    expected = audit_scores(audit_config(toy, fresh(3)), toy).table
    shutil.rmtree(toy.store)
    assert audit_scores(audit_config(toy, fresh(3)), toy).table.equals(expected)


def test_by_source_a_new_document_scores_as_a_training_document_of_average_exposure(toy, monkeypatch):
    """Training documents under other ids, given as new ones, score as the originals do where every exposure is 1/N."""
    import tda.audit_scores

    config = audit_config(toy, None, **BY_SOURCE)
    original = audit_scores(config, toy).table
    exposure, scores = pl.read_parquet(toy.exposure), toy.scores.read_bytes()
    exposure.with_columns(pl.exclude("doc_id") * 0 + 1 / len(exposure)).write_parquet(toy.exposure)
    stages.scores(config, toy)
    averaged = dict(pl.read_parquet(toy.scores).select("doc_id", "score_source").rows())
    exposure.write_parquet(toy.exposure)
    toy.scores.write_bytes(scores)
    copies = pl.read_parquet(toy.documents).head(9).with_columns(pl.concat_str(pl.lit("copy of "), "id").alias("id"))
    monkeypatch.setattr(tda.audit_scores, "new_documents", lambda *_, **__: NewDocuments(copies, {}, []))
    scored = audit_scores(config, toy).table
    for name, score in scored.filter("is_new").select("doc_id", "score").rows():
        assert score == pytest.approx(averaged[name.removeprefix("copy of ")], rel=1e-4)
    # Old documents are not touched by new ones.
    assert scored.filter(~pl.col("is_new")).equals(original)


@pytest.mark.parametrize("changes", [{}, BY_SOURCE])
def test_an_audit_leaves_the_pipeline_as_it_was(toy, changes):
    before, tags = manifests(toy), [json.loads(text)["tag"] for text in manifests(toy)]
    config = audit_config(toy, fresh(5), **changes)
    result = stages.audit(config, toy, date="2026-01-30")
    assert result.report.exists()
    assert manifests(toy) == before
    assert verify(toy) == []
    facts = json.loads(result.report.with_name("audit.json").read_text())
    assert (facts["num_new"], facts["new_documents"]["new"]) == (5, 5)
    # The stage has nothing to do, and makes the same manifest again.
    run_stages(toy_config(toy.root), toy, "gradients")
    assert [json.loads(text)["tag"] for text in manifests(toy)] == tags
    assert manifests(toy) == before
    scores = pl.read_parquet(result.report.with_name("scores.parquet"))
    assert scores["is_new"].sum() == 5
    assert "text" not in scores.columns


def test_by_source_rows_of_new_documents_are_computed_once_and_survive_garbage_collection(toy, monkeypatch):
    import tda.gradient_log

    config = audit_config(toy, fresh(5), **BY_SOURCE)
    first = audit_scores(config, toy).table
    assert any("removed run-" in line for line in collect_garbage(toy))
    assert verify(toy) == []

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a gradient was computed again")

    monkeypatch.setattr(tda.gradient_log, "gradient_rows", never)
    assert audit_scores(config, toy).table.equals(first)


def test_documents_that_are_known_are_not_new_and_are_counted(toy):
    trained, targets = pl.read_parquet(toy.documents), pl.read_parquet(toy.targets)
    rows = [
        *fresh(3),
        {"id": trained["id"][0], "source": "harbour", "text": "A text that no other document has, under a known id."},
        {"id": "another id", "source": "harbour", "text": trained["text"][1]},
        {"id": "a third id", "source": "harbour", "text": targets["text"][0]},
        {"id": "a copy", "source": "harbour", "text": fresh(1)[0]["text"]},
        {"id": "short", "source": "harbour", "text": "short"},
    ]
    assert trained["id"].str.contains("#").any()
    rows.append({
        "id": trained.filter(pl.col("id").str.contains("#"))["id"][0].split("#")[0],
        "text": "Other text of one that was split.",
    })
    scored = audit_scores(audit_config(toy, rows, audit__scope="new"), toy)
    assert scored.counts["in_training_or_targets"] == 4
    assert scored.counts["exact_duplicates"] == 1
    assert scored.counts["too_short"] == 1
    assert scored.counts["new"] == len(scored.table) == 3
    assert scored.table["is_new"].all()


def test_a_long_new_document_comes_in_parts_that_end_as_those_of_prepare(toy):
    from tda.audit_scores import new_documents

    rows = [{"id": "long", "source": "harbour", "text": sentences("harbour", 7000, count=30)}]
    config = audit_config(toy, rows)
    found = new_documents(config, toy, known=[pl.read_parquet(toy.documents)]).table
    assert set(found["id"]) == {f"long#{n + 1}" for n in range(len(found))}
    assert "".join(found.sort(pl.col("id").str.extract(r"(\d+)$").cast(pl.Int32))["text"]) == rows[0]["text"]
    end = load_tokenizer(str(toy.tokenizer)).eos_token_id
    assert found.filter(pl.col("tokens").list.contains(end))["id"].to_list() == [f"long#{len(found)}"]
    assert found["num_tokens"].max() <= config.prepare.context


def test_malformed_rows_are_put_aside_beside_the_audit(toy):
    rows = [*fresh(3), {"id": "no text", "source": "harbour"}]
    config = audit_config(toy, rows, prepare__max_bad_rows=0.5)
    result = stages.audit(config, toy, date="2026-01-30")
    (line,) = result.report.with_name("quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "field text is missing"
    assert "4 rows, 1 quarantined" in result.report.read_text()
    with pytest.raises(ValueError, match=r"audit\.documents: 1 of 4 rows .* are malformed"):
        audit_scores(audit_config(toy, rows), toy)


@pytest.mark.parametrize("rows", [None, "known"])
def test_new_documents_alone_are_asked_for_and_there_is_none(toy, rows):
    if rows == "known":
        rows = pl.read_parquet(toy.documents).select("id", "source", "text").head(2).to_dicts()
    config = audit_config(toy, rows, audit__scope="new")
    message = (
        r"audit\.documents names none" if rows is None else r"no document of .* is new \(rows: 2, in training or targets: 2\)"
    )
    with pytest.raises(ValueError, match=rf"audit\.scope: new, but {message}.*set audit\.scope to all"):
        stages.audit(config, toy, date="2026-01-30")
    assert not toy.audits.exists()


def test_new_documents_that_are_not_there(toy):
    config = toy_config(toy.root, audit__documents=str(toy.root / "nothing.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"audit\.documents: .*nothing\.jsonl does not exist"):
        audit_scores(config, toy)


def test_an_audit_by_source_and_the_gradients_stage_do_not_write_at_once(toy):
    config = audit_config(toy, fresh(2), **BY_SOURCE)
    with only_run(toy.work / "gradients-2.lock"), pytest.raises(RuntimeError, match=r"gradients-2\.lock: process \d+ is doing"):
        audit_scores(config, toy)


def test_a_store_made_with_other_weights_is_refused(toy):
    toy.checkpoint(1).joinpath("mean.safetensors").write_bytes(toy.checkpoint(0).joinpath("mean.safetensors").read_bytes())
    with pytest.raises(ValueError, match="rows made with other weights"):
        audit_scores(audit_config(toy, fresh(2), **BY_SOURCE), toy)


def test_the_command_says_by_its_exit_code_whether_a_limit_was_passed(toy, capsys, monkeypatch):
    monkeypatch.chdir(toy.root)
    values = toy_values(toy.root)
    values["audit"] |= {"documents": write_new(toy.root, fresh(4)), "max_share_harmful": 1.0}
    write_params(toy.root, values)
    assert cli.main(["audit", "--date", "2026-01-30"]) == cli.OK
    assert "PASSED: Every limit is kept." in capsys.readouterr().out
    values["audit"]["max_share_harmful"] = 0.0
    write_params(toy.root, values)
    assert cli.main(["audit", "--date", "2026-01-30"]) == cli.LIMIT_PASSED
    out = capsys.readouterr().out
    assert "FAILED: Share of documents predicted to harm" in out
    assert "2026-01-30-2" in out


def test_the_tag_of_the_pipeline_still_opens_after_many_audits(toy):
    for count in (2, 4, 3):
        audit_scores(audit_config(toy, fresh(count), **BY_SOURCE), toy)
    for text in manifests(toy):
        manifest = json.loads(text)
        assert len(open_sealed(toy.store, manifest)) == manifest["rows"]
