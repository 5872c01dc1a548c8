"""The highest and the lowest of many scores, found from cheap approximations and few exact computations.

Errors of the approximations are taken to be normal, with known relative widths, whose scale a random sample shows. So every row
that was not computed has a probability of belonging to the answer. Rows are computed, the likeliest first, until the
probabilities of the others, whose sum is the expected number of misses, are small.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtr

SAMPLE = 256  # rows that show how wide the errors are
FIRST = 4  # rows that are computed at first, as a multiple of the rows asked for
FARTHEST = 6.0  # widths below the answer, beyond which rows are ignored: one in a billion of them belongs to it
MISSES = 0.01  # expected share of the answer that is not found, at most
MOST = 0.1  # share of rows that are computed one by one; if more are needed, it is cheaper to compute all


@dataclass(frozen=True)
class Extremes:
    """The rows with the highest and the lowest scores, the most extreme first; of equal scores, the earlier row first."""

    highest: Int[np.ndarray, " top"]
    highest_values: Float[np.ndarray, " top"]
    lowest: Int[np.ndarray, " top"]
    lowest_values: Float[np.ndarray, " top"]
    num_computed: int  # rows whose score was computed exactly
    expected_misses: float  # on the worse side


def extremes(
    approximate: Float[np.ndarray, " n"], widths: Float[np.ndarray, " n"], exact: Callable[[np.ndarray], np.ndarray], *, top: int
) -> Extremes:
    """The `top` highest and lowest of n scores. `exact(rows)` computes the scores of rows, given in ascending order.

    `widths` are the standard deviations of the errors, up to a common factor. On either side, the expected share of missing
    rows is at most `MISSES`; if the approximations are too poor for that, all scores are computed.
    """
    n, top = len(approximate), min(top, len(approximate))
    known = np.full(n, np.nan)

    def compute(rows: np.ndarray) -> None:
        rows = np.unique(rows)
        rows = rows[np.isnan(known[rows])]
        if len(rows):
            known[rows] = exact(rows)

    sample = np.random.default_rng(0).choice(n, min(SAMPLE, n), replace=False)
    compute(sample)
    relative = (known[sample] - approximate[sample]) / np.maximum(widths[sample], np.finfo(np.float64).tiny)
    widths = np.maximum(widths * np.sqrt(np.mean(relative**2)), np.finfo(np.float64).tiny)
    first = min(FIRST * top, n)
    compute(np.concatenate([np.argpartition(sign * approximate, n - first)[n - first :] for sign in (1.0, -1.0)]))
    while True:
        left = [_likely(sign * approximate, widths, sign * known, top) for sign in (1.0, -1.0)]
        needed = [_likeliest(rows, probabilities, MISSES * top) for rows, probabilities in left]
        num_computed = n - int(np.isnan(known).sum())
        if not any(map(len, needed)):
            break
        compute(np.arange(n) if num_computed + sum(map(len, needed)) > MOST * n else np.concatenate(needed))
    missed = max(float(probabilities.sum()) for _rows, probabilities in left)
    return replace(extremes_of(known, top=top), num_computed=num_computed, expected_misses=missed)


def extremes_of(scores: Float[np.ndarray, " n"], *, top: int) -> Extremes:
    """The `top` highest and lowest of the scores that are not NaN."""
    highest, lowest = _best(scores, top), _best(-scores, top)
    return Extremes(highest, scores[highest], lowest, scores[lowest], len(scores), 0.0)


def _likely(approximate: np.ndarray, widths: np.ndarray, known: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Unknown rows that may have a score above the `top`-th of the known ones, and the probabilities of that."""
    unknown = np.isnan(known)
    threshold = np.partition(known[~unknown], -top)[-top]
    with np.errstate(over="ignore"):  # of a row that is certain
        above = (approximate - threshold) / widths
    rows = np.flatnonzero(unknown & (above > -FARTHEST))
    return rows, ndtr(above[rows])


def _likeliest(rows: np.ndarray, probabilities: np.ndarray, misses: float) -> np.ndarray:
    """The fewest rows without which the other probabilities sum to at most `misses` / 2; none if all sum to at most `misses`."""
    if probabilities.sum() <= misses:
        return np.empty(0, np.int64)
    order = np.argsort(probabilities)
    return rows[order[np.cumsum(probabilities[order]) > misses / 2]]


def _best(known: np.ndarray, top: int) -> np.ndarray:
    rows = np.flatnonzero(~np.isnan(known))
    return rows[np.argsort(-known[rows], kind="stable")[:top]]
