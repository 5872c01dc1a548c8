"""Datamodels with a prior: the scores of another method, corrected by real retrainings.

A datamodel (Ilyas et al. 2022, arXiv 2202.00622) is the linear model  cost(q | S) = c_q - sum over rows z in S of w_qz  fitted
to retrainings on random halves S of the rows. It has one unknown per row and query, and without a prior it takes tens of
thousands of retrainings. Here the scores m of another method are the prior, both for the effects and for how wrong they may be:

    w_q ~ Normal(slope m_q, deviation m_q m_q^T + spread diag |m_q|)

With it a few dozen retrainings already improve on m. They come in pairs with the same initial weights, one on a half and one on
the other rows. In half the difference of their costs, c_q and the effect of the initial weights cancel:

    d_q = -1/2 sum over rows z of (1 if z is in S else -1) w_qz + noise

Slope, deviation, spread and noise maximise the marginal likelihood (empirical Bayes; Rasmussen and Williams 2006, section
5.4.1). Each is one number for all queries; differences and predictions are brought to one scale for that. The result is the
posterior mean, in the unit of the cost. Pairs of halves say nothing about what the effects of all rows have in common: there
the prior stays.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tda.counterfactual import query_costs, random_halves
from tda.fitted import Fitted

SPREADS = np.geomspace(1e-3, 1e2, 31)  # values tried; a variance of a pair's difference, in units of the noise's variance
DEVIATIONS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # values tried; the variance of a query's slope around the common one, likewise


def retrain_on_halves(fitted: Fitted) -> tuple[Float[np.ndarray, "pair row"], Float[np.ndarray, "pair query"]]:
    """Retrain in pairs. Returns the `half_signs`, and half the differences of the queries' costs between half and other rows.

    Raises:
        ValueError: there are fewer than two rows or retrainings, or a retraining's costs are not finite.
    """
    num_retrainings, num_rows = fitted.settings.retrainings, len(fitted.train)
    num_pairs = num_retrainings // 2
    if num_pairs < 1 or num_rows < 2:
        raise ValueError(f"datamodel: {num_retrainings} retrainings on halves of {num_rows} rows; expected at least 2 of each")
    signs = half_signs(num_rows, num_pairs, seed=fitted.settings.seed)
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

    They differ from the halves of a bank with the same seed (`half_subsets`), which may be used to evaluate the datamodel.
    """
    return np.where(random_halves(num_rows, num_pairs, np.random.default_rng(seed)), 1.0, -1.0)


def posterior(
    prior: Float[np.ndarray, "query row"], signs: Float[np.ndarray, "pair row"], differences: Float[np.ndarray, "pair query"]
) -> Float[np.ndarray, "query row"]:
    """The posterior mean of every effect `w`, given the `differences` of `retrain_on_halves`."""
    X = torch.from_numpy(signs) / -2  # differences = X w + noise
    informed = np.flatnonzero((prior != 0).any(axis=1) & (differences != 0).any(axis=0))  # the other queries keep their prior
    if not len(informed):
        return prior
    m, d = torch.from_numpy(prior[informed]).double(), torch.from_numpy(differences[:, informed]).T
    f = m @ X.T
    unit, length = (values.square().mean(dim=1, keepdim=True).sqrt() for values in (d, f))
    variances = 4 * m.abs() / m.abs().sum(dim=1, keepdim=True)  # scaled so that a pair's difference has variance 1
    eigenvalues, U = torch.linalg.eigh(torch.stack([X * of_query @ X.T for of_query in variances]))
    f, d = ((values[:, None] @ U)[:, 0] for values in (f / length, d / unit))  # now by eigenvector instead of by pair
    fitted = _Prior.most_likely(eigenvalues, f, d)
    slopes, unexplained = fitted.explain(eigenvalues, f, d)
    corrections = fitted.spread * variances * ((U @ unexplained[..., None])[..., 0] @ X)
    scores = np.array(prior, dtype=np.float64)
    scores[informed] = unit * (slopes / length * m + corrections)
    return scores


@dataclass(frozen=True)
class _Prior:
    """The numbers that all queries share; `deviation` and `spread` are in units of the noise's variance."""

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
        """The prior that maximises the marginal likelihood of the differences `d`, which m predicts as `f`.

        Eigenvalues and eigenvectors are those of the covariance that the rows' variances give the differences. For a given
        deviation and spread, the slope is that of generalised least squares, and the noise's variance is profiled out.
        """
        found = []
        for spread, deviation in itertools.product(SPREADS, DEVIATIONS):
            V = 1 + spread * eigenvalues
            ff, fd, dd = ((one * other / V).sum(dim=1) for one, other in ((f, f), (f, d), (d, d)))
            more = 1 + deviation * ff  # the factor by which deviation f f^T raises the determinant; next: Sherman-Morrison
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
        """Every query's own slope, and the differences it leaves, times the inverse covariance of spread and noise."""
        V, left = 1 + self.spread * eigenvalues, d - self.slope * f
        more = 1 + self.deviation * (f.square() / V).sum(dim=1, keepdim=True)
        own = self.deviation * (f * left / V).sum(dim=1, keepdim=True) / more
        return self.slope + own, (left - own * f) / V
