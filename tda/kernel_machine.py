"""Kernel machines: what training to a loss gives in a model's tangent space, and what one more row would change there.

    minimise over f = K alpha     1/n sum over rows of loss(f_i, y_i) + ridge/2 |f|_K^2

A `Machine` holds, for the rows left out and the queries, its predictions, and the posterior kernel in which a new row acts:
adding row z, with residual r_z (minus the derivative of its loss) and curvature w_z (of its loss along r_z), moves outputs by

    f(q) -> f(q) + k(q, z) r_z / (1 + w_z k(z, z)),      k = (K - K_.S (K_S + n ridge / w_S)^-1 K_S.) / (n ridge)

which is exact for a squared loss, and one Newton step for cross-entropy, whose Hessian in a row's outputs is replaced by one
number per row: its trace.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

MAX_ITERATIONS, TOLERANCE = 200, 1e-3


@dataclass(frozen=True)
class Machine:
    """A machine fitted on rows S, seen at other points."""

    predictions: Float[Tensor, "point output"]
    K_S_point: Float[Tensor, "row point"]
    whitener: Float[Tensor, "row row"]  # lower Cholesky factor of I + sqrt(w) K_S sqrt(w) / (n ridge)
    root_w: Float[Tensor, " row"]
    n_ridge: float

    def posterior(self, K_pq: Float[Tensor, "p q"], p: slice, q: slice) -> Float[Tensor, "p q"]:
        """The posterior kernel between points `p` and points `q`, whose prior kernel is `K_pq`."""
        return (K_pq - self._whitened(p).T @ self._whitened(q)) / self.n_ridge

    def posterior_diagonal(self, K_pp: Float[Tensor, " p"], p: slice) -> Float[Tensor, " p"]:
        """The posterior kernel of each of the points `p` with itself."""
        return (K_pp - self._whitened(p).square().sum(dim=0)) / self.n_ridge

    def _whitened(self, p: slice) -> Float[Tensor, "row p"]:
        scaled = self.root_w[:, None] * self.K_S_point[:, p] / self.n_ridge**0.5
        return torch.linalg.solve_triangular(self.whitener, scaled, upper=False)


def _machine(K_S: Tensor, K_S_point: Tensor, alpha: Tensor, w: Tensor, n_ridge: float) -> Machine:
    root_w = w.sqrt()
    inner = root_w[:, None] * K_S * root_w / n_ridge
    inner.diagonal().add_(1)
    return Machine(K_S_point.T @ alpha, K_S_point, torch.linalg.cholesky(inner), root_w, n_ridge)


def fit_squares(
    K_S: Float[Tensor, "row row"], y: Float[Tensor, "row output"], K_S_point: Float[Tensor, "row point"], *, ridge: float
) -> Machine:
    """The machine of the squared error, whose second derivative is 2: kernel ridge regression."""
    n_ridge = len(K_S) * ridge
    shifted = K_S.clone()
    shifted.diagonal().add_(n_ridge / 2)
    alpha = torch.cholesky_solve(y, torch.linalg.cholesky(shifted))
    return _machine(K_S, K_S_point, alpha, torch.full_like(y[:, 0], 2.0), n_ridge)


def fit_softmax(
    K_S: Float[Tensor, "row row"],
    y: Int[Tensor, " row"],
    K_S_point: Float[Tensor, "row point"],
    *,
    ridge: float,
    num_classes: int,
) -> Machine:
    """The machine of the cross-entropy, by accelerated steps on its quadratic bound of curvature 1/2 (Boehning 1992)."""
    n_ridge = len(K_S) * ridge
    onehot = F.one_hot(y, num_classes).to(K_S.dtype)
    bound = K_S.clone()
    bound.diagonal().add_(2 * n_ridge)
    factor = torch.linalg.cholesky(bound)
    alpha = torch.zeros_like(onehot)
    before, weight = alpha, 1.0
    for _ in range(MAX_ITERATIONS):
        following = (1 + (1 + 4 * weight**2) ** 0.5) / 2
        ahead = alpha + (weight - 1) / following * (alpha - before)
        gradient = (K_S @ ahead).softmax(dim=1) - onehot + n_ridge * ahead
        before, alpha, weight = alpha, ahead - 2 * torch.cholesky_solve(gradient, factor), following
        if n_ridge * (alpha - before).abs().max() < TOLERANCE:
            break
    p = (K_S @ alpha).softmax(dim=1)
    return _machine(K_S, K_S_point, alpha, 1 - p.square().sum(dim=1), n_ridge)


def square_response(
    f: Float[Tensor, "row output"], y: Float[Tensor, "row output"]
) -> tuple[Float[Tensor, "row output"], Float[Tensor, " row"]]:
    """Residuals and curvatures of rows under the squared error."""
    return 2 * (y - f), torch.full_like(f[:, 0], 2.0)


def softmax_response(
    f: Float[Tensor, "row output"], y: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "row output"], Float[Tensor, " row"]]:
    """Residuals of rows under the cross-entropy, and the curvature of each along its residual."""
    p = f.softmax(dim=1)
    r = F.one_hot(y, f.shape[1]).to(f.dtype) - p
    along = (p * r.square()).sum(dim=1) - (p * r).sum(dim=1).square()
    return r, along / r.square().sum(dim=1).clamp_min(torch.finfo(f.dtype).tiny)
