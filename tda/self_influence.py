"""Self-influence: scores of training rows for themselves, which predict how much a row's own cost would rise without it."""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tda.factors import SegmentFactors
from tda.fitted import Fitted
from tda.methods import METHODS
from tda.segments import Segment

ROWS_AT_ONCE = 64  # rows whose full gradients are held at once
METHODS_BY_BLOCK = ("gradient_dot", "tracin", "ekfac_influence", "source")  # whose score of a row needs no other row's gradient


def self_scores(method: str, fitted: Fitted) -> np.ndarray:
    """(row,) the score by `method` of every training row for itself.

    Rows are taken in blocks as the queries, and scored against the gradients of the same block only.

    Raises:
        ValueError: the method compares rows with each other, or gives all rows the same score for themselves.
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
    """A fitted run with a few of its training rows as queries, which computes no other row's gradients."""

    def __init__(self, whole: Fitted, rows: Sequence[int], factors: Callable[[int, tuple[int, ...]], SegmentFactors]):
        super().__init__(whole.run, whole.task, whole.train, whole.train.select(rows), whole.settings)
        self._rows, self._factors = rows, factors
        self.segments, self.exposure, self.layers = whole.segments, whole.exposure, whole.layers

    def segment_factors(self, segment: Segment, checkpoints: list[int]) -> SegmentFactors:
        """The factors of the whole run, fitted once."""
        return self._factors(segment.index, tuple(checkpoints))

    def batches(self) -> Iterator:
        """The block's rows only."""
        yield self._batch(list(self._rows))
