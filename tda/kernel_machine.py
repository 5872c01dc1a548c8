"""Kernel machines: the result of training in a model's tangent kernel, and how one more row would change it.

    minimise over f = K alpha     1/n sum over rows of c_i loss(f_i, y_i) + ridge/2 |f|_K^2

A machine is its coefficients `alpha` (row, output); all outputs share the kernel. The weights c of the rows S have a mean of 1.
Adding a row z, with residual r_z (minus the derivative of its weighted loss) and curvature w_z (of that along r_z), changes
outputs by

    f(q) -> f(q) + k(q, z) r_z / (1 + w_z k(z, z)),      k = (K - K_.S (K_S + n ridge H^-1)^-1 K_S.) / (n ridge)

where H is the Hessian of the rows' weighted losses by their outputs. This is exact for the squared error, and a Newton step for
cross-entropy. `RowCurvature` has one number per row as H; `SoftmaxCurvature` is for a classifier, where H couples the outputs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer, Num
from torch import Tensor
from torch.nn import functional as F

MAX_ITERATIONS, TOLERANCE = 200, 1e-3


@dataclass(frozen=True)
class SquaresMachine:
    """Machines of the squared error, whose second derivative is 2: kernel ridge regression."""

    ridge_scale: float = 1.0  # in units of the ridge that training implies (`surrogate.py`)
    splits: int = 16  # a half takes one factorisation

    def fit(
        self, K_S: Float[Tensor, "row row"], y: Num[Tensor, "row ..."], c: Float[Tensor, " row"], *, ridge: float
    ) -> Float[Tensor, "row output"]:
        """The coefficients of the minimum."""
        y = y.reshape(len(y), -1).to(K_S.dtype)
        return torch.cholesky_solve(y, torch.linalg.cholesky(_shifted(K_S, len(K_S) * ridge / 2 / c)))

    def response(
        self, f: Float[Tensor, "row output"], y: Num[Tensor, "row ..."], c: Float[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row output"], Float[Tensor, " row"]]:
        """Residuals and curvatures of rows."""
        return 2 * c[:, None] * (y.reshape(f.shape).to(f.dtype) - f), 2 * c

    def curvature(
        self, K_S: Float[Tensor, "row row"], f: Float[Tensor, "row output"], c: Float[Tensor, " row"], *, ridge: float
    ) -> "RowCurvature":
        """The curvature of the rows of a machine."""
        return RowCurvature(K_S, 2 * c, ridge=ridge)


@dataclass(frozen=True)
class SoftmaxMachine:
    """Machines of the cross-entropy; see `SquaresMachine`."""

    num_classes: int
    ridge_scale: float = 2.5  # the Newton step goes too far for memorised rows (EXPERIMENTS.md, 2026-11-25)
    splits: int = 4  # a half takes a factorisation for every class

    def fit(
        self, K_S: Float[Tensor, "row row"], y: Integer[Tensor, " row"], c: Float[Tensor, " row"], *, ridge: float
    ) -> Float[Tensor, "row output"]:
        """The coefficients, by accelerated steps on the loss's quadratic bound of curvature 1/2 (Boehning 1992)."""
        n_ridge = len(K_S) * ridge / c[:, None]
        onehot = F.one_hot(y.long(), self.num_classes).to(K_S.dtype)
        factor = torch.linalg.cholesky(_shifted(K_S, 2 * n_ridge[:, 0]))
        alpha = torch.zeros_like(onehot)
        before, weight = alpha, 1.0
        for _ in range(MAX_ITERATIONS):
            following = (1 + (1 + 4 * weight**2) ** 0.5) / 2
            ahead = alpha + (weight - 1) / following * (alpha - before)
            gradient = (K_S @ ahead).softmax(dim=1) - onehot + n_ridge * ahead
            before, alpha, weight = alpha, ahead - 2 * torch.cholesky_solve(gradient, factor), following
            if (n_ridge * (alpha - before)).abs().max() < TOLERANCE:
                break
        return alpha

    def response(
        self, f: Float[Tensor, "row output"], y: Integer[Tensor, " row"], c: Float[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row output"], Float[Tensor, " row"]]:
        """Residuals of rows, and the curvature of each along its residual."""
        p = f.softmax(dim=1)
        r = F.one_hot(y.long(), self.num_classes).to(f.dtype) - p
        along = (p * r.square()).sum(dim=1) - (p * r).sum(dim=1).square()
        return c[:, None] * r, c * along / r.square().sum(dim=1).clamp_min(torch.finfo(f.dtype).tiny)

    def curvature(
        self, K_S: Float[Tensor, "row row"], f: Float[Tensor, "row output"], c: Float[Tensor, " row"], *, ridge: float
    ) -> "SoftmaxCurvature":
        """The curvature of the rows of a machine."""
        return SoftmaxCurvature(K_S, f, c, ridge=ridge)


class RowCurvature:
    """A curvature of one number `w` per row, the same in all directions of its outputs: 2 c of a squared error."""

    def __init__(self, K_S: Float[Tensor, "row row"], w: Float[Tensor, " row"], *, ridge: float):
        self._root = w.sqrt()[:, None]
        self._factor = torch.linalg.cholesky(_shifted(self._root * K_S * self._root.T, len(K_S) * ridge))

    def solve(self, b: Float[Tensor, "output row query"]) -> Float[Tensor, "output row query"]:
        """(K_S + n ridge H^-1)^-1 b, for every output."""
        return self._root * torch.cholesky_solve(self._root * b, self._factor)

    def explained(self, K_S_point: Float[Tensor, "row point"]) -> Float[Tensor, " point"]:
        """The diagonal of K_.S (K_S + n ridge H^-1)^-1 K_S.: how much of K(point, point) the rows explain."""
        return torch.linalg.solve_triangular(self._factor, self._root * K_S_point, upper=False).square().sum(dim=0)


class SoftmaxCurvature:
    """The curvature of the cross-entropy at outputs `f`; it solves by the Hessian and by its trace, and takes the mean.

    The Hessian of a row is c (diag(p) - p p^T) with p its softmax and c its weight. It nearly vanishes for a memorised row,
    although a step away from there meets more of it; its trace, taken in all directions, is an upper bound. The Hessian is
    solved as in Gaussian process classification (Rasmussen and Williams 2006, section 3.5): `E_k` is the inverse for c
    diag(p) alone, and p p^T takes one more matrix. Memory: (row, row) values for every output.
    """

    def __init__(self, K_S: Float[Tensor, "row row"], f: Float[Tensor, "row output"], c: Float[Tensor, " row"], *, ridge: float):
        p = f.softmax(dim=1)
        self._trace = RowCurvature(K_S, c * (1 - p.square().sum(dim=1)), ridge=ridge)
        self._E = K_S.new_empty(p.shape[1], *K_S.shape)
        for E, root in zip(self._E, (c[:, None] * p).sqrt().T, strict=True):
            inner = _shifted(root[:, None] * K_S * root, len(K_S) * ridge)
            torch.mul(root[:, None] * root, torch.cholesky_inverse(torch.linalg.cholesky(inner)), out=E)
        self._factor = torch.linalg.cholesky(self._E.sum(dim=0))

    def solve(self, b: Float[Tensor, "output row query"]) -> Float[Tensor, "output row query"]:
        """See `RowCurvature.solve`."""
        return (self.by_hessian(b) + self._trace.solve(b)) / 2

    def by_hessian(self, b: Float[Tensor, "output row query"]) -> Float[Tensor, "output row query"]:
        """The same by the Hessian alone."""
        of_diagonal = self._E @ b
        shared = torch.cholesky_solve(of_diagonal.sum(dim=0), self._factor)
        return of_diagonal - self._E @ shared

    def explained(self, K_S_point: Float[Tensor, "row point"]) -> Float[Tensor, " point"]:
        """See `RowCurvature.explained`; by the trace."""
        return self._trace.explained(K_S_point)


def _shifted(K: Float[Tensor, "row row"], shift: float | Float[Tensor, " row"]) -> Float[Tensor, "row row"]:
    shifted = K.clone()
    shifted.diagonal().add_(shift)
    return shifted
