import numpy as np
import pytest

from tda.nearest import extremes


def made(n: int, *, error: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, approximations and the widths of their errors, which differ from row to row."""
    draw = np.random.default_rng(seed)
    scores = draw.standard_normal(n)
    widths = np.exp(draw.standard_normal(n) / 2)
    return scores, scores + error * widths * draw.standard_normal(n), widths


class Counted:
    """Exact scores, and which were asked for."""

    def __init__(self, scores: np.ndarray):
        self.scores, self.asked = scores, []

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        assert (np.diff(rows) > 0).all()
        self.asked += rows.tolist()
        return self.scores[rows]


def shares_found(found, scores: np.ndarray, top: int) -> list[float]:
    order = np.argsort(-scores, kind="stable")
    pairs = ((found.highest, order[:top]), (found.lowest, order[::-1][:top]))
    return [len(set(ours.tolist()) & set(theirs.tolist())) / top for ours, theirs in pairs]


@pytest.mark.parametrize("error", [0.05, 0.1, 0.2])
def test_nearly_all_of_both_ends_are_found_from_few_rows(error):
    """What is missed is no more than is expected: one in a hundred on average, within five standard errors of its count."""
    top, seeds, missed, expected = 50, 20, 0.0, 0.0
    for seed in range(seeds):
        scores, approximate, widths = made(20_000, error=error, seed=seed)
        exact = Counted(scores)
        found = extremes(approximate, widths, exact, top=top)
        assert found.num_computed == len(exact.asked) == len(set(exact.asked))  # none twice
        assert found.num_computed < 6000
        assert found.expected_misses <= 0.01 * top
        np.testing.assert_array_equal(found.highest_values, scores[found.highest])
        np.testing.assert_array_equal(found.lowest_values, scores[found.lowest])
        assert (np.diff(found.highest_values) <= 0).all()
        assert (np.diff(found.lowest_values) >= 0).all()
        missed += sum(top * (1 - share) for share in shares_found(found, scores, top)) / 2
        expected += found.expected_misses
    assert missed <= expected + 5 * np.sqrt(expected + 1)


def test_worse_approximations_cost_more_rows_and_no_recall():
    computed = []
    for error in (0.02, 0.2, 3.0):
        scores, approximate, widths = made(10_000, error=error)
        found = extremes(approximate, widths, Counted(scores), top=20)
        computed.append(found.num_computed)
        assert min(shares_found(found, scores, 20)) >= 0.95
    assert computed[0] < computed[1] < computed[2] == 10_000  # of useless ones all scores are computed


def test_approximations_without_error_need_the_answer_and_a_sample():
    scores, _, widths = made(5000, error=0.0)
    found = extremes(scores, widths, Counted(scores), top=10)
    assert shares_found(found, scores, 10) == [1.0, 1.0]
    assert found.num_computed <= 256 + 2 * 40


@pytest.mark.parametrize("n", [1, 7, 300])
def test_few_rows_give_all_there_are(n):
    scores, approximate, widths = made(n, error=0.3)
    found = extremes(approximate, widths, Counted(scores), top=10)
    np.testing.assert_array_equal(found.highest, np.argsort(-scores, kind="stable")[:10])
    np.testing.assert_array_equal(found.lowest, np.argsort(scores, kind="stable")[:10])


def test_wide_errors_are_looked_into():
    """A row that looks ordinary but is not known well can be the best one, and is computed."""
    draw = np.random.default_rng(0)
    scores = draw.standard_normal(4000)
    widths = np.full(4000, 0.01)
    widths[:40] = 10.0
    approximate = scores + widths * draw.standard_normal(4000)
    approximate[:40] = 0.0
    scores[:40] = 10.0 * draw.standard_normal(40)
    found = extremes(approximate, widths, Counted(scores), top=10)
    assert shares_found(found, scores, 10) == [1.0, 1.0]
    assert set(found.highest.tolist()) <= set(range(40))


def test_rows_of_no_width_are_taken_as_they_are():
    """A row of zeros has no error, and nothing is divided by it."""
    scores = np.zeros(1000)
    found = extremes(scores, np.zeros(1000), Counted(scores), top=5)
    assert found.highest_values.tolist() == found.lowest_values.tolist() == [0.0] * 5
