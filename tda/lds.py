"""The linear datamodeling score (Park et al. 2023, TRAK; section 5): how well scores predict what retraining on subsets does.

    LDS(query) = Spearman over subsets ( cost of the query after retraining, - sum of the scores of the rows in the subset )

A score is the predicted rise of the query's cost when the row is left out, so rows that stay in the subset lower it. Only the
order of subsets matters, not the scale of scores. Reported is the mean over queries, with a percentile bootstrap interval over
queries: it is about other queries, with the same subsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from tda.rank_correlation import spearman

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over queries with its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def lds_by_query(
    scores: Float[np.ndarray, "scored_query scored_row"],
    masks: Bool[np.ndarray, "subset row"],
    costs: Float[np.ndarray, "subset query"],
) -> Float[np.ndarray, " query"]:
    """The LDS of every query; 0 where all subsets are predicted, or turned out, the same.

    Raises:
        ValueError: the scores are of other queries or rows, or not finite.
    """
    expected = (costs.shape[1], masks.shape[1])
    if scores.shape != expected or not np.isfinite(scores).all():
        raise ValueError(
            f"lds: scores of shape {scores.shape}, {int((~np.isfinite(scores)).sum())} not finite; expected finite scores "
            f"{expected}, (query, row); if a method gives such scores, leave it out with --methods"
        )
    predicted = -(masks.astype(np.float64) @ scores.T.astype(np.float64))
    return spearman(predicted, costs)


def mean_over_queries(values: Float[np.ndarray, " query"]) -> Estimate:
    """The mean of `values` with its interval over queries; the same draws for the same number of queries."""
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = values[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def interval_words(num_queries: int) -> str:
    """How `mean_over_queries` makes intervals."""
    if num_queries == 1:
        return "none of a single query, whose value stands at both ends"
    return f"{CONFIDENCE:.0%} percentile bootstrap over queries, {RESAMPLES} resamples"


@dataclass(frozen=True)
class MethodLDS:
    """The LDS of one method: of its runs one by one, and of the mean of their scores."""

    by_run: Float[np.ndarray, "run query"]
    of_ensemble: Float[np.ndarray, " query"]

    @property
    def of_single(self) -> Float[np.ndarray, " query"]:
        """Every query's LDS, averaged over the runs."""
        return self.by_run.mean(axis=0)

    @property
    def spread(self) -> float | None:
        """Standard deviation over runs of the mean over queries; None of one run."""
        return float(self.by_run.mean(axis=1).std(ddof=1)) if len(self.by_run) > 1 else None


def method_lds(
    scores: Sequence[Float[np.ndarray, "query row"]],
    masks: Bool[np.ndarray, "subset row"],
    costs: Float[np.ndarray, "subset query"],
) -> MethodLDS:
    """The LDS of a method from its scores under each run."""
    by_run = np.stack([lds_by_query(run, masks, costs) for run in scores])
    return MethodLDS(by_run, by_run[0] if len(scores) == 1 else lds_by_query(np.mean(scores, axis=0), masks, costs))
