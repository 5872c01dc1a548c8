import math

import datasets
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tda.artifacts import write_table
from tda.config import Curation
from tda.curate import MANIFEST, count_decisions, curate, curated_documents, drop_limit, rank_weights


def settings(**changes) -> Curation:
    values = {
        "action": "drop",
        "method": "source",
        "drop": 0.5,
        "threshold": None,
        "max_share_per_source": 1.0,
        "min_weight": 0.5,
        "max_weight": 2.0,
    }
    return Curation(**{**values, **changes})


def scores(values: list, sources: str | None = None) -> pl.DataFrame:
    ids = [f"d{number:02}" for number in range(len(values))]
    return pl.DataFrame(
        {"doc_id": ids, "content_hash": [f"h{i}" for i in ids], "source": list(sources or "a" * len(values)), "score": values},
        schema_overrides={"score": pl.Float64},
    )


def dropped(manifest: pl.DataFrame) -> set[str]:
    return set(manifest.filter(~pl.col("keep"))["doc_id"])


def test_most_harmful_go_first_with_rank_weight_and_reason():
    manifest = curate(scores([0.5, -2.0, -3.0, -1.0]), settings(drop=2))
    assert manifest.columns == MANIFEST
    assert manifest["doc_id"].to_list() == ["d02", "d01", "d03", "d00"]
    assert manifest["rank"].to_list() == [1, 2, 3, 4]
    assert manifest["weight"].to_list() == [0.0, 0.0, 1.0, 1.0]
    assert manifest["reason"].to_list() == [
        "dropped: rank 1 of 4, score -3",
        "dropped: rank 2 of 4, score -2",
        "kept, past the limit: rank 3 of 4, score -1; 2 may be dropped",
        "kept, predicted to help: rank 4 of 4, score 0.5",
    ]


def test_a_helpful_document_is_never_dropped_however_much_may_go():
    assert dropped(curate(scores([0.0, 1.0, -1.0]), settings(drop=3))) == {"d02"}


def test_a_threshold_is_the_line_and_drop_stays_the_upper_bound():
    values = scores([-3.0, -2.0, 1.0, 4.0])
    assert dropped(curate(values, settings(drop=4, threshold=-2.5))) == {"d00"}
    assert dropped(curate(values, settings(drop=4, threshold=2.0))) == {"d00", "d01", "d02"}  # asked for in so many words
    assert dropped(curate(values, settings(drop=1, threshold=2.0))) == {"d00"}
    assert "kept, above the threshold" in count_decisions(curate(values, settings(threshold=-2.5)))["outcomes"]


def test_a_source_at_its_cap_gives_way_to_the_next():
    manifest = curate(scores([-5.0, -4.0, -3.0, -2.0, -1.0], "aaaab"), settings(drop=3, max_share_per_source=0.5))
    assert dropped(manifest) == {"d00", "d01"}  # half of a's four, half of b's one is none
    assert (
        manifest.filter(doc_id="d02")["reason"].item()
        == "kept, cap of its source: rank 3 of 5, score -3; 50% of source a reached"
    )


def test_a_document_past_the_limit_is_not_said_to_be_kept_by_a_cap_that_was_not_reached():
    manifest = curate(scores([-5.0, -4.0, -3.0, -2.0, -1.0], "aabaa"), settings(drop=2, max_share_per_source=0.75))
    assert manifest["reason"].str.extract("^([^:]*)").to_list() == ["dropped"] * 2 + ["kept, past the limit"] * 3


def test_ties_are_dropped_by_id():
    assert dropped(curate(scores([-1.0, -1.0, -1.0]), settings(drop=2))) == {"d00", "d01"}


@pytest.mark.parametrize("action", ["drop", "reweight"])
def test_a_document_without_a_finite_score_is_kept_and_ranked_last(action):
    manifest = curate(scores([math.nan, -1.0, None, math.inf, -math.inf]), settings(action=action, drop=5))
    assert manifest["doc_id"].to_list() == ["d01", "d00", "d02", "d03", "d04"]
    assert manifest["keep"].to_list()[1:] == [True] * 4
    assert manifest["weight"].to_list()[1:] == [1.0] * 4
    assert manifest["reason"].str.starts_with("kept, no score").to_list() == [False] + [True] * 4


def test_drop_is_a_share_below_one_and_a_count_from_one():
    assert [drop_limit(30, drop) for drop in (0.0, 0.1, 0.99, 1.0, 7.0, 99.0)] == [0, 3, 29, 1, 7, 30]
    with pytest.raises(ValueError, match=r"expected a share below 1 or a whole number of documents; got 2.5"):
        settings(drop=2.5)


def test_reweighting_keeps_all_and_says_how_much_each_counts():
    manifest = curate(scores([3.0, -1.0, 0.1]), settings(action="reweight"))
    assert manifest["keep"].all()
    assert manifest["weight"].is_sorted()
    assert manifest["weight"].mean() == pytest.approx(1, abs=1e-12)
    assert manifest["reason"][0] == "reweighted: rank 1 of 3, score -1, weight 0.548"


def test_weights_need_bounds_around_one():
    with pytest.raises(ValueError, match=r"expected min_weight <= 1 <= max_weight; got 1.5 and 2"):
        settings(min_weight=1.5)
    assert rank_weights(np.array([1.0, 2.0]), min_weight=1.0, max_weight=2.0).tolist() == [1.0, 1.0]
    assert rank_weights(np.array([2.0, 2.0]), min_weight=0.1, max_weight=5.0) == pytest.approx([1.0, 1.0])


def test_refuses_no_documents_and_an_id_that_comes_twice():
    with pytest.raises(ValueError, match="no documents to decide on"):
        curate(scores([]), settings())
    with pytest.raises(ValueError, match="document d01 has several scores"):
        curate(pl.concat([scores([1.0, 2.0]), scores([1.0, 2.0])[1:]]), settings())


def test_counts_add_up_per_source():
    counts = count_decisions(curate(scores([-5.0, -4.0, 3.0, math.nan], "aabb"), settings(drop=1)))
    assert counts["outcomes"] == {"dropped": 1, "kept, no score": 1, "kept, past the limit": 1, "kept, predicted to help": 1}
    assert counts["sources"]["a"]["num_harmful"] == 2
    assert sum(source["num_documents"] for source in counts["sources"].values()) == counts["num_documents"] == 4


HOSTILE = ["plain", "\x00\x1f\u2028 line\r\nbreak", '<script>"\\', "\U0001f9e8 שלום", ""]


def documents() -> pl.DataFrame:
    table = scores([0.0] * len(HOSTILE))
    return table.select(
        id="doc_id",
        source="source",
        part=pl.lit("mixed"),
        text=pl.Series(HOSTILE),
        prompt=pl.lit(""),
        completion=pl.lit(""),
        content_hash="content_hash",
    )


def test_curated_files_load_with_datasets_as_they_were_written(tmp_path):
    manifest = curate(scores([1.0, 1.0, 1.0, 1.0, -1.0]), settings(drop=1))
    curated = curated_documents(documents(), manifest.sample(fraction=1.0, shuffle=True, seed=0))
    write_table(tmp_path / "curated.parquet", curated)
    curated.write_ndjson(tmp_path / "curated.jsonl")
    cache = str(tmp_path / "cache")
    loaded = {
        "jsonl": datasets.load_dataset("json", data_files=str(tmp_path / "curated.jsonl"), split="train", cache_dir=cache),
        "parquet": datasets.Dataset.from_parquet(str(tmp_path / "curated.parquet"), cache_dir=cache),
    }
    for table in loaded.values():
        assert table["text"][:] == HOSTILE[:4]
        assert_frame_equal(pl.DataFrame(table.to_list()), curated)


def test_curated_documents_refuse_another_decision_and_an_empty_result():
    manifest = curate(scores([-1.0] * len(HOSTILE)), settings(drop=5))
    with pytest.raises(ValueError, match=r"decides on 5 documents, documents.parquet has 4, 4 agree"):
        curated_documents(documents()[:4], manifest)
    with pytest.raises(ValueError, match="5, 4 agree"):
        curated_documents(documents(), manifest.with_columns(pl.col("content_hash").replace("hd03", "other")))
    with pytest.raises(ValueError, match="every document is dropped"):
        curated_documents(documents(), manifest)
