"""Spearman's rank correlation, column by column."""

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata


def spearman(a: Float[np.ndarray, "sample column"], b: Float[np.ndarray, "sample column"]) -> Float[np.ndarray, " column"]:
    """The correlation of the ranks of `a` and `b` in every column, ties ranked by their mean; 0 where one of them is constant."""
    a, b = _standardised_ranks(a), _standardised_ranks(b)
    return (a * b).sum(axis=0)


def _standardised_ranks(values: Float[np.ndarray, "sample column"]) -> Float[np.ndarray, "sample column"]:
    ranks = rankdata(values, axis=0)
    ranks -= ranks.mean(axis=0)
    norms = np.sqrt((ranks**2).sum(axis=0))
    return np.divide(ranks, norms, out=np.zeros_like(ranks), where=norms > 0)
