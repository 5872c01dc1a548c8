"""The highest and the lowest of many scores of which only cheap approximations are known, and few need to be computed exactly.

The errors of the approximations are taken as normal, each with its own width; how wide they are is seen on a random sample. So
every row that was not computed has a probability to belong to the answer, and rows are computed, likeliest first, until the sum
of those that are left, which is the number of answers that one expects to have missed, is small.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtr

SAMPLE = 256  # rows that tell how wide the errors are
FIRST = 4  # times as many rows as are asked for are computed first
FARTHEST = 6.0  # widths below the answer: of a billion such rows one is in it
MOST = 0.1  # of all rows are computed one by one; beyond that it is cheaper to compute all


@dataclass(frozen=True)
class Extremes:
    """Rows with the highest and the lowest scores, the most extreme first; the earlier row of equals first."""

    highest: Int[np.ndarray, " top"]
    highest_values: Float[np.ndarray, " top"]
    lowest: Int[np.ndarray, " top"]
    lowest_values: Float[np.ndarray, " top"]
    num_computed: int  # exact scores
    expected_misses: float  # of the worse side


def extremes(
    approximate: Float[np.ndarray, " n"],
    widths: Float[np.ndarray, " n"],
    exact: Callable[[np.ndarray], np.ndarray],
    *,
    top: int,
    misses: float = 0.01,
    seed: int = 0,
) -> Extremes:
    """The `top` highest and lowest of n scores; `exact(rows)` gives the scores of ascending rows.

    `widths` are the errors' standard deviations up to a common factor. No more than a share of `misses` of either side is
    expected to be missing; where the approximations are too poor for that, all scores are computed.
    """
    n, top = len(approximate), min(top, len(approximate))
    known = np.full(n, np.nan)

    def compute(rows: np.ndarray) -> None:
        rows = np.unique(rows)
        rows = rows[np.isnan(known[rows])]
        if len(rows):
            known[rows] = exact(rows)

    sample = np.random.default_rng(seed).choice(n, min(SAMPLE, n), replace=False)
    compute(sample)
    relative = (known[sample] - approximate[sample]) / np.maximum(widths[sample], np.finfo(np.float64).tiny)
    widths = np.maximum(widths * np.sqrt(np.mean(relative**2)), np.finfo(np.float64).tiny)
    first = min(FIRST * top, n)
    compute(np.concatenate([np.argpartition(sign * approximate, n - first)[n - first :] for sign in (1.0, -1.0)]))
    while True:
        left = [_likely(sign * approximate, widths, sign * known, top) for sign in (1.0, -1.0)]
        needed = [_likeliest(rows, probabilities, misses * top) for rows, probabilities in left]
        num_computed = n - int(np.isnan(known).sum())
        if not any(map(len, needed)):
            break
        compute(np.arange(n) if num_computed + sum(map(len, needed)) > MOST * n else np.concatenate(needed))
    highest, lowest = (_best(sign * known, top) for sign in (1.0, -1.0))
    missed = max(float(probabilities.sum()) for _rows, probabilities in left)
    return Extremes(highest, known[highest], lowest, known[lowest], num_computed, missed)


def _likely(approximate: np.ndarray, widths: np.ndarray, known: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are not known and may have a score above the `top`-th of the known ones, and how probable that is."""
    unknown = np.isnan(known)
    threshold = np.partition(known[~unknown], -top)[-top]
    with np.errstate(over="ignore"):  # of a row that is certain
        above = (approximate - threshold) / widths
    rows = np.flatnonzero(unknown & (above > -FARTHEST))
    return rows, ndtr(above[rows])


def _likeliest(rows: np.ndarray, probabilities: np.ndarray, misses: float) -> np.ndarray:
    """The fewest rows without which the probabilities sum to half of `misses` or less; none if they do not sum to `misses`."""
    if probabilities.sum() <= misses:
        return np.empty(0, np.int64)
    order = np.argsort(probabilities)
    return rows[order[np.cumsum(probabilities[order]) > misses / 2]]


def _best(known: np.ndarray, top: int) -> np.ndarray:
    rows = np.flatnonzero(~np.isnan(known))
    return rows[np.argsort(-known[rows], kind="stable")[:top]]
