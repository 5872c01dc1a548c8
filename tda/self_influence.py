"""Scores of training rows for themselves: how much a row's own cost would rise without it."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from tda.factors import SegmentFactors
from tda.fitted import Fitted
from tda.methods import METHODS
from tda.segments import Segment

ROWS_AT_ONCE = 64  # full gradients of as many rows are held
METHODS_BY_BLOCK = ("gradient_dot", "tracin", "ekfac_influence", "source")  # what they say of a row needs no other row's gradient


def self_scores(method: str, fitted: Fitted) -> np.ndarray:
    """(row,) the score by `method` of every training row for itself.

    Rows are taken a block at a time as the queries, against the gradients of the same block alone.

    Raises:
        ValueError: the method compares rows with one another, or is no scale to rank rows on.
    """
    if method not in METHODS_BY_BLOCK:
        raise ValueError(f"self-influence: not known of {method}; known of {', '.join(METHODS_BY_BLOCK)}")
    factors = functools.cache(lambda index, checkpoints: fitted.segment_factors(fitted.segments[index], list(checkpoints)))
    values = np.empty(len(fitted.train))
    for start in range(0, len(fitted.train), ROWS_AT_ONCE):
        rows = range(start, min(start + ROWS_AT_ONCE, len(fitted.train)))
        values[rows] = np.diagonal(METHODS[method](_Block(fitted, rows, factors))[:, rows])
    return values


class _Block(Fitted):
    """A fitted run that is asked about a few of its training rows, and computes no other row's gradients."""

    def __init__(self, whole: Fitted, rows: Sequence[int], factors: functools._lru_cache_wrapper):
        super().__init__(whole.run, whole.task, whole.train, whole.train.select(rows), whole.settings)
        self._rows, self._factors = rows, factors
        self.segments, self.exposure, self.layers = whole.segments, whole.exposure, whole.layers

    def segment_factors(self, segment: Segment, checkpoints: list[int]) -> SegmentFactors:
        """As of the whole run, fitted once."""
        return self._factors(segment.index, tuple(checkpoints))

    def batches(self) -> Iterator:
        """The block's rows only."""
        yield self.train.batch(list(self._rows))
