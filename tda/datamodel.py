"""Datamodels that know what to expect: real retrainings correct the scores of another method.

A datamodel (Ilyas et al. 2022, arXiv 2202.00622) is the linear model  cost(q | S) = c_q - sum over rows z in S of w_qz  fitted to
retrainings on random halves S. It has as many unknowns as rows, and takes tens of thousands of trainings if nothing else is known
of them. Another method's scores m say most of it, and where an error can be large:

    w_q ~ Normal(slope m_q, deviation m_q m_q^T + spread diag |m_q|)

With that prior some tens of trainings already improve on m. They come in pairs, of a half and of all other rows, from the same
initial weights; in half the difference of their costs neither c_q nor what the initial weights do is left:

    d_q = -1/2 sum over rows z of (1 if z is in S else -1) w_qz + noise

Slope, deviation, spread and noise are those of the largest marginal likelihood (empirical Bayes; Rasmussen and Williams 2006,
section 5.4.1), each one number for all queries, whose differences and predictions are brought to one scale first. The answer is
the mean of the posterior, in the unit of the retrainings' costs. Halves do not show what all rows' effects have in common, which
stays as the prior has it.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tda.counterfactual import query_costs, random_halves
from tda.fitted import Fitted

SPREADS = np.geomspace(1e-3, 1e2, 31)  # of the prior in a pair's difference, in parts of the noise's variance
DEVIATIONS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # of a query's slope from that of all, in the same unit


def retrain_on_halves(fitted: Fitted) -> tuple[Float[np.ndarray, "pair row"], Float[np.ndarray, "pair query"]]:
    """The signs of `half_signs`, and half of what the queries' costs differ by when trained on the half and on the other rows.

    Raises:
        ValueError: there are fewer than two rows or retrainings, or a retraining's costs are not finite.
    """
    num_pairs = fitted.settings.retrainings // 2
    if num_pairs < 1 or len(fitted.train) < 2:
        raise ValueError(
            f"datamodel: {fitted.settings.retrainings} retrainings on halves of {len(fitted.train)} rows; expected at least 2 of "
            "each"
        )
    signs = half_signs(len(fitted.train), num_pairs, seed=fitted.settings.seed)
    seeds = np.random.SeedSequence(fitted.settings.seed).generate_state(num_pairs)
    trainings = [
        (np.flatnonzero(half), int(seed)) for pair, seed in zip(signs, seeds, strict=True) for half in (pair > 0, pair < 0)
    ]
    costs = np.stack([query_costs(model, fitted.task, fitted.queries) for model in fitted.retrained(trainings)])
    if not np.isfinite(costs).all():
        raise ValueError(
            f"datamodel: {int((~np.isfinite(costs)).any(axis=1).sum())} of {len(costs)} retrainings give costs that are not "
            "finite; expected numbers; look at the queries, or train with a smaller learning rate"
        )
    return signs, (costs[0::2] - costs[1::2]) / 2


def half_signs(num_rows: int, num_pairs: int, *, seed: int) -> Float[np.ndarray, "pair row"]:
    """1 for the rows of a uniform random half, -1 for the others.

    Not the halves that a bank of the same seed is made of (`half_subsets`), on which a datamodel may be measured.
    """
    return np.where(random_halves(num_rows, num_pairs, np.random.default_rng(seed)), 1.0, -1.0)


def posterior(
    prior: Float[np.ndarray, "query row"], signs: Float[np.ndarray, "pair row"], differences: Float[np.ndarray, "pair query"]
) -> Float[np.ndarray, "query row"]:
    """The mean of every effect given the differences, half of what the costs of a half and of the other rows differ by."""
    X = torch.from_numpy(signs) / -2  # differences = X w + noise
    told = np.flatnonzero((prior != 0).any(axis=1) & (differences != 0).any(axis=0))  # else nothing is expected, or learned
    if not len(told):
        return prior
    m, d = torch.from_numpy(prior[told]).double(), torch.from_numpy(differences[:, told]).T
    f = m @ X.T
    unit, length = (values.square().mean(dim=1, keepdim=True).sqrt() for values in (d, f))
    variances = 4 * m.abs() / m.abs().sum(dim=1, keepdim=True)  # they make a variance of 1 of a pair's difference
    eigenvalues, U = torch.linalg.eigh(torch.stack([X * of_query @ X.T for of_query in variances]))
    f, d = ((values[:, None] @ U)[:, 0] for values in (f / length, d / unit))  # in the eigenvectors: pairs no more
    fitted = _Prior.most_likely(eigenvalues, f, d)
    slopes, unexplained = fitted.explain(eigenvalues, f, d)
    corrections = fitted.spread * variances * ((U @ unexplained[..., None])[..., 0] @ X)
    scores = np.array(prior, dtype=np.float64)
    scores[told] = unit * (slopes / length * m + corrections)
    return scores


@dataclass(frozen=True)
class _Prior:
    """What holds for all queries; variances are in units of the noise's."""

    slope: float  # at least 0
    deviation: float
    spread: float

    @classmethod
    def most_likely(
        cls,
        eigenvalues: Float[Tensor, "query eigenvector"],
        f: Float[Tensor, "query eigenvector"],
        d: Float[Tensor, "query eigenvector"],
    ) -> "_Prior":
        """Of the largest marginal likelihood of the differences `d`, predicted as `f`.

        The eigenvectors are those of what rows' variances make of the differences' covariance. For given deviation and spread the
        slope is that of generalised least squares, and the noise's variance is profiled out.
        """
        found = []
        for spread, deviation in itertools.product(SPREADS, DEVIATIONS):
            V = 1 + spread * eigenvalues
            ff, fd, dd = ((one * other / V).sum(dim=1) for one, other in ((f, f), (f, d), (d, d)))
            more = 1 + deviation * ff  # by which f f^T raises the determinant; what follows is Sherman-Morrison
            ff, fd, dd = ff / more, fd / more, dd - deviation * fd.square() / more
            slope = max(0.0, float(fd.sum() / ff.sum()))
            noise = float((dd - 2 * slope * fd + slope**2 * ff).sum()) / d.numel()
            evidence = -d.numel() * np.log(max(noise, np.finfo(float).tiny)) - float(V.log().sum() + more.log().sum())
            found.append((evidence, cls(slope, deviation, float(spread))))
        return max(found, key=lambda one: one[0])[1]

    def explain(
        self,
        eigenvalues: Float[Tensor, "query eigenvector"],
        f: Float[Tensor, "query eigenvector"],
        d: Float[Tensor, "query eigenvector"],
    ) -> tuple[Float[Tensor, "query 1"], Float[Tensor, "query eigenvector"]]:
        """The slope of every query; and what it leaves of the differences, times the inverse covariance of spread and noise."""
        V, left = 1 + self.spread * eigenvalues, d - self.slope * f
        more = 1 + self.deviation * (f.square() / V).sum(dim=1, keepdim=True)
        own = self.deviation * (f * left / V).sum(dim=1, keepdim=True) / more
        return self.slope + own, (left - own * f) / V
