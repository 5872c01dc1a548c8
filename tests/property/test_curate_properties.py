import math

import polars as pl
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from tda.curate import curate, drop_limit
from tests.unit.test_curate import settings

rows = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from([-2.0, -1.0, 0.0, math.nan]) | st.integers(-24, 24).map(lambda eighths: eighths / 8),
    ),
    min_size=1,
    max_size=40,
)
shares = st.floats(0, 0.99)


def table(drawn: list) -> pl.DataFrame:
    ids = [f"{number:02}" for number in range(len(drawn))]
    sources, scores = zip(*drawn, strict=True)
    return pl.DataFrame({"doc_id": ids, "content_hash": ids, "source": sources, "score": scores})


def dropped(manifest: pl.DataFrame) -> set[str]:
    return set(manifest.filter(~pl.col("keep"))["doc_id"])


@given(rows, shares, st.floats(0.01, 1))
def test_no_limit_is_passed_and_only_harmful_documents_go(drawn, drop, cap):
    manifest = curate(table(drawn), settings(drop=drop, max_share_per_source=cap))
    gone = manifest.filter(~pl.col("keep"))
    assert len(gone) <= drop_limit(len(drawn), drop)
    assert (gone["score"] < 0).all()
    for (source,), part in manifest.partition_by("source", as_dict=True).items():
        assert (~part["keep"]).sum() <= cap * len(part) + 1e-9, source


@given(rows, shares, shares, st.floats(0.01, 1))
def test_more_drop_drops_a_superset(drawn, one, other, cap):
    less, more = (dropped(curate(table(drawn), settings(drop=drop, max_share_per_source=cap))) for drop in sorted([one, other]))
    assert less <= more


@given(rows, shares, st.sampled_from(["drop", "reweight"]), st.randoms())
def test_the_order_of_the_documents_does_not_matter(drawn, drop, action, random):
    order = random.sample(range(len(drawn)), len(drawn))
    config = settings(action=action, drop=drop, max_share_per_source=0.5)
    assert_frame_equal(curate(table(drawn), config), curate(table(drawn)[order], config), check_exact=True)


@given(rows, st.floats(0, 1), st.floats(1, 10))
def test_weights_are_bounded_rise_with_the_score_and_have_mean_one(drawn, low, high):
    manifest = curate(table(drawn), settings(action="reweight", min_weight=low, max_weight=high))
    weights = manifest["weight"]
    assert weights.is_between(low, high).all()
    assert abs(weights.mean() - 1) < 1e-9
    scored = manifest.filter(pl.col("score").is_finite())
    assert scored["weight"].is_sorted()
    assert scored.group_by("score").agg(pl.col("weight").n_unique())["weight"].eq(1).all()


@given(rows, st.integers(-30, 30).map(lambda power: 2.0**power))  # exact, so that no two scores become one
def test_a_positive_rescaling_of_the_scores_changes_no_decision(drawn, factor):
    scaled = table(drawn).with_columns(pl.col("score") * factor)
    for action in ("drop", "reweight"):
        config = settings(action=action, max_share_per_source=0.5)
        columns = ["doc_id", "rank", "keep", "weight"]
        assert_frame_equal(curate(table(drawn), config).select(columns), curate(scaled, config).select(columns))
