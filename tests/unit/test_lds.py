import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tda.lds import interval_words, lds_by_query, mean_over_queries, method_lds
from tda.make_bank import half_subsets
from tda.rank_correlation import spearman

NUM_ROWS, NUM_SUBSETS, NUM_QUERIES = 12, 20, 4


def made(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    masks = half_subsets(NUM_ROWS, NUM_SUBSETS, seed=seed)
    return random.normal(size=(NUM_QUERIES, NUM_ROWS)), masks, random.normal(size=(NUM_SUBSETS, NUM_QUERIES))


def test_lds_against_a_slow_twin():
    scores, masks, costs = made()
    expected = []
    for query in range(NUM_QUERIES):
        predicted = [-sum(scores[query, row] for row in range(NUM_ROWS) if mask[row]) for mask in masks]
        expected.append(spearmanr(predicted, costs[:, query]).statistic)
    assert np.allclose(lds_by_query(scores, masks, costs), expected, rtol=1e-12)


def test_ranks_of_ties_as_scipy_has_them():
    random = np.random.default_rng(1)
    a, b = random.integers(0, 4, size=(2, 30, 5)).astype(float)
    assert np.allclose(spearman(a, b), [spearmanr(a[:, column], b[:, column]).statistic for column in range(5)], rtol=1e-12)


def test_nothing_is_predicted_by_equal_scores():
    scores, masks, costs = made()
    assert np.array_equal(lds_by_query(np.ones_like(scores), masks, costs), np.zeros(NUM_QUERIES))


@given(st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_a_positive_scale_changes_nothing_and_a_sign_turns_it_round(seed, scale):
    scores, masks, costs = made(seed)
    before = lds_by_query(scores, masks, costs)
    assert np.allclose(lds_by_query(scale * scores, masks, costs), before, atol=1e-9)
    assert np.allclose(lds_by_query(-scores, masks, costs), -before, atol=1e-9)


@given(st.integers(0, 1000), st.floats(-3, 3))
def test_a_constant_of_a_query_changes_nothing_on_halves(seed, constant):
    """All subsets have as many rows."""
    scores, masks, costs = made(seed)
    assert np.allclose(lds_by_query(scores + constant, masks, costs), lds_by_query(scores, masks, costs), atol=1e-9)


def test_linear_effects_are_predicted_and_random_scores_predict_nothing():
    random = np.random.default_rng(0)
    masks = half_subsets(40, 100, seed=0)
    effects = random.normal(size=(50, 40))  # of leaving a row out on the query's cost
    costs = -(masks @ effects.T) + random.normal(size=(100, 50)) * 0.1
    assert lds_by_query(effects, masks, costs).mean() > 0.99
    chance = lds_by_query(random.normal(size=effects.shape), masks, costs).mean()
    assert abs(chance) < 4 * 0.1 / np.sqrt(50)  # the standard error of one query is about 1 / sqrt(100)


@pytest.mark.parametrize("wrong", ["shape", "nan"])
def test_scores_of_other_rows_or_not_finite_are_refused(wrong):
    scores, masks, costs = made()
    scores = scores[:, 1:] if wrong == "shape" else np.where(scores > 0, np.nan, scores)
    with pytest.raises(ValueError, match=r"lds: scores of shape .* expected finite scores \(4, 12\)"):
        lds_by_query(scores, masks, costs)


def test_the_interval_is_that_of_a_bootstrap_over_queries():
    values = np.random.default_rng(0).normal(size=200)
    estimate = mean_over_queries(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert estimate.mean == values.mean()
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.01)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.01)
    assert mean_over_queries(values) == estimate
    assert str(mean_over_queries(np.ones(3))) == "1.000 [1.000, 1.000]"


def test_one_query_has_no_interval():
    assert interval_words(2) == "95% percentile bootstrap over queries, 10000 resamples"
    assert interval_words(1) == "none of a single query, whose value stands at both ends"


def test_runs_and_their_ensemble():
    """Runs that err apart: the mean of the scores predicts better than the runs do on average."""
    truth, masks, _ = made()
    costs = -(masks @ truth.T)
    random = np.random.default_rng(3)
    runs = [truth + random.normal(size=truth.shape) for _ in range(5)]
    found = method_lds(runs, masks, costs)
    assert found.by_run.shape == (5, NUM_QUERIES)
    assert np.allclose(found.of_single, np.mean([lds_by_query(run, masks, costs) for run in runs], axis=0))
    assert np.allclose(found.of_ensemble, lds_by_query(sum(runs) / 5, masks, costs))
    assert found.of_ensemble.mean() > found.of_single.mean() + 0.05
    assert found.spread == pytest.approx(np.std([found.by_run[run].mean() for run in range(5)], ddof=1))
    assert method_lds(runs[:1], masks, costs).spread is None
