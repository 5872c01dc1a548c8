import json
import shutil

import polars as pl
import pytest

from tda.audit import Check, audit, read_history
from tests.fake_workspace import Fake, fake_workspace, json_at, scored_documents


@pytest.fixture
def fake(tmp_path):
    return fake_workspace(tmp_path, num_documents=400)


def run(fake: Fake, scored: pl.DataFrame, date: str = "2026-01-30"):
    return audit(fake.config, fake.workspace, date=date, scored=scored, counts={}, quarantine=[])


def checks(result) -> dict[str, Check]:
    return {check.name: check for check in result.checks}


def limited(fake: Fake, **changes) -> Fake:
    config = fake.config.model_copy(update={"audit": fake.config.audit.model_copy(update=changes)})
    return Fake(fake.workspace, config)


def test_first_audit_has_nothing_to_compare_with(fake):
    result = run(fake, scored_documents(fake))
    assert result.passed
    assert result.summary.startswith("Every limit is kept. 400 documents")
    found = checks(result)
    assert found["share_harmful"].status == found["share_unscored"].status == "passed"
    assert found["share_crossed"] == Check("share_crossed", None, 0.2, None, "no earlier audit")
    assert found["source_shift"].status == "no earlier audit"
    facts = json_at(result.report.with_name("audit.json"))
    assert facts["passed"] is True
    assert facts["previous"] is None
    assert facts["checks"][0]["limit"] == 0
    page = result.report.read_text()
    assert "no earlier audit" in page and "scored by averaged influence" in page


def test_second_audit_measures_what_changed(fake):
    run(fake, scored_documents(fake))
    before = scored_documents(fake)
    result = run(fake, scored_documents(fake, flipped=0.1, num_new=5), "2026-01-31")
    found = checks(result)
    assert found["share_crossed"].value == pytest.approx(0.1)
    assert found["share_harmful"].previous == pytest.approx((before["score"] < 0).mean())
    facts = json_at(result.report.with_name("audit.json"))
    assert facts["num_crossed_to_harm"] + facts["num_crossed_to_help"] == 40
    assert facts["num_new"] == 5
    changes = [abs(row["score"] - row["previous_score"]) for row in facts["crossed"]]
    assert changes == sorted(changes, reverse=True)


def test_shift_is_in_standard_deviations_of_the_audit_before(fake):
    before = scored_documents(fake)
    run(fake, before)
    shift = 0.3 * before["score"].std()
    result = run(fake, scored_documents(fake, shift=shift), "2026-01-31")
    assert checks(result)["source_shift"].value == pytest.approx(0.3)
    assert result.passed


@pytest.mark.parametrize(
    ("limits", "changes", "name"),
    [
        ({"max_share_harmful": 0.1}, {}, "share_harmful"),
        ({"max_share_crossed": 0.05}, {"flipped": 0.2}, "share_crossed"),
        ({"max_source_shift": 0.2, "max_share_crossed": 1.0}, {"shift": 1e-6}, "source_shift"),
    ],
)
def test_each_limit_fails_the_audit_alone(fake, limits, changes, name):
    run(fake, scored_documents(fake))
    result = run(limited(fake, **limits), scored_documents(fake, **changes), "2026-01-31")
    assert not result.passed
    assert [check.name for check in result.checks if check.status == "failed"] == [name]
    assert f"limit {next(iter(limits.values())):.3g}" in result.summary
    assert "Failed: a limit was passed" in result.report.read_text()


def test_an_audit_that_allows_no_harm_and_finds_none(fake):
    result = run(limited(fake, max_share_harmful=0.0), scored_documents(fake, shift=1.0))
    assert checks(result)["share_harmful"].value == 0
    assert result.passed


def test_a_document_without_a_score_fails_the_audit(fake):
    scored = scored_documents(fake).with_columns(
        score=pl.when(pl.col("doc_id") == pl.col("doc_id").min()).then(float("nan")).otherwise("score")
    )
    result = run(fake, scored)
    assert not result.passed
    assert checks(result)["share_unscored"].value == pytest.approx(1 / 400)


def test_documents_with_new_content_are_not_said_to_have_crossed(fake):
    run(fake, scored_documents(fake))
    changed = scored_documents(fake, flipped=1.0).with_columns(content_hash=pl.lit("new"))
    result = run(limited(fake, max_share_harmful=1.0, max_source_shift=9.0), changed, "2026-01-31")
    assert checks(result)["share_crossed"] == Check("share_crossed", None, 0.2, None, "nothing in common")
    assert result.passed


def test_small_sources_are_shown_but_not_limited(fake):
    few = scored_documents(fake).group_by("source", maintain_order=True).head(5)
    run(fake, few)
    result = run(fake, few.with_columns(pl.col("score") + 1.0), "2026-01-31")
    assert checks(result)["source_shift"].status == "nothing in common"


def test_audits_of_one_date_are_kept_apart_and_the_history_grows(fake):
    names = [run(fake, scored_documents(fake)).report.parent.name for _ in range(3)]
    assert names == ["2026-01-30", "2026-01-30-2", "2026-01-30-3"]
    assert [entry["name"] for entry in read_history(fake.workspace)] == names
    lines = (fake.workspace.audits / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["passed"] for line in lines] == [True] * 3
    assert json_at(fake.workspace.audits / names[2] / "audit.json")["previous"] == names[1]


def test_a_damaged_history_is_named(fake):
    run(fake, scored_documents(fake))
    path = fake.workspace.audits / "history.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"history\.jsonl cannot be read: Unterminated.*; expected an object in each line"):
        run(fake, scored_documents(fake))


@pytest.mark.parametrize("name", ["scores.parquet", "audit.json"])
def test_a_damaged_earlier_audit_is_named_and_without_it_the_one_before_is_compared_with(fake, name):
    run(fake, scored_documents(fake))
    folder = run(fake, scored_documents(fake), "2026-01-31").report.parent
    whole = (folder / name).read_bytes()
    for spoil in (lambda path: path.write_bytes(whole[: len(whole) // 2]), lambda path: path.write_text("")):
        spoil(folder / name)
        with pytest.raises(
            ValueError, match=rf"2026-01-31/{name} cannot be read: .*; remove the folder .* with the audit before"
        ):
            run(fake, scored_documents(fake), "2026-02-01")
    shutil.rmtree(folder)
    result = run(fake, scored_documents(fake), "2026-02-01")
    assert json_at(result.report.with_name("audit.json"))["previous"] == "2026-01-30"


def test_an_audit_that_died_before_its_history_is_not_compared_with(fake):
    run(fake, scored_documents(fake))
    (fake.workspace.audits / "2026-01-31").mkdir()
    result = run(fake, scored_documents(fake), "2026-01-31")
    assert result.report.parent.name == "2026-01-31-2"
    assert json_at(result.report.with_name("audit.json"))["previous"] == "2026-01-30"


def test_equal_scores_in_another_order_give_equal_bytes(fake, tmp_path_factory):
    other = fake_workspace(tmp_path_factory.mktemp("other"), num_documents=400)
    one = run(fake, scored_documents(fake)).report.parent
    two = run(other, scored_documents(other).sample(fraction=1.0, shuffle=True, seed=0)).report.parent
    for name in ("audit.json", "index.html", "scores.parquet"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_hostile_ids_and_texts_are_text(fake):
    scored = scored_documents(fake).head(3)
    hostile = scored.with_columns(
        doc_id=pl.concat_str(pl.lit("<script>\u202e"), "doc_id"),
        score=pl.lit(-1.0),
        text=pl.lit("</div><script>alert(1)</script>"),
    )
    page = run(limited(fake, max_share_harmful=1.0), hostile).report.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\u202e" not in page


@pytest.mark.parametrize("date", ["2026-1-3", "../../etc", "20260130", "today"])
def test_refuses_what_is_not_a_date(fake, date):
    with pytest.raises(ValueError, match="expected a date as YYYY-MM-DD"):
        run(fake, scored_documents(fake), date)


def test_refuses_no_documents_and_repeated_ones(fake):
    with pytest.raises(ValueError, match="no documents to audit"):
        run(fake, scored_documents(fake).head(0))
    scored = scored_documents(fake)
    with pytest.raises(ValueError, match="has several scores"):
        run(fake, pl.concat([scored, scored.head(1)]))
    assert not fake.workspace.audits.exists()
