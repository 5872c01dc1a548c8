"""Curvature as the optimizer sees it: SOURCE's `respond` and `decay` for SGD and for AdamW.

An optimizer with a diagonal preconditioner P takes steps theta <- theta - eta P g. SOURCE's appendix C then needs functions of
P H, which is not symmetric. Here they are written with the symmetric matrix M = P^(1/2) H P^(1/2), to which P H is similar; the
result is the same. Decoupled weight decay adds to the eigenvalues of M.

    respond(q) = P^(1/2) F_r(M) P^(1/2) q          decay(q) = P^(-1/2) F_S(M) P^(1/2) q      (the transpose of exp(-eta K P H))

There are four ways to approximate M:

    none        P = 1, as for SGD                                                         `plain`
    scalar      one P per layer, which multiplies the eigenvalues of the plain EK-FAC     `scalar`
    symmetric   an EK-FAC of its own, of gradients scaled by P^(1/2)                      `LayerCurvature`, `scaled_factors`
    diagonal    the paper's: exp(-eta K P H) on the diagonal, the inverse by EK-FAC       `DiagonalCurvature`
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda.capture import captured
from tda.data import TensorBatch
from tda.ekfac import EKFAC, ONE_BY_ONE, Covariances, Diagonal, basis_like, eigenbasis
from tda.losses import at_least_float32
from tda.model import Layer
from tda.packing import DocumentBatch
from tda.projection import append_one
from tda.spectral import damped_inverse, segment_decay, segment_response
from tda.task import Task


@dataclass(frozen=True)
class LayerCurvature:
    """M = P^(1/2) H P^(1/2) of one layer, by EK-FAC or as diagonal, and P^(1/2): a scalar, or of the gradient's shape."""

    M: EKFAC | Diagonal
    root_P: Tensor

    def respond(self, q: Float[Tensor, "*n d_out d_in"], *, time: float, weight_decay: float) -> Float[Tensor, "*n d_out d_in"]:
        """A query's sensitivity to a gradient that acts throughout the segment."""
        return self.root_P * self.M.apply(segment_response(time, weight_decay=weight_decay), self.root_P * q)

    def decay(self, q: Float[Tensor, "*n d_out d_in"], *, time: float, weight_decay: float) -> Float[Tensor, "*n d_out d_in"]:
        """The query's gradient carried back to the start of the segment."""
        return self.M.apply(segment_decay(time, weight_decay=weight_decay), self.root_P * q) / self.root_P

    def to(self, device: torch.device) -> "LayerCurvature":
        """The curvature on `device`."""
        return LayerCurvature(self.M.to(device), self.root_P.to(device))


NEARLY_UNDAMPED = 1e-8  # damping in mean eigenvalues, only against division by zero: the paper's form does not damp H


@dataclass(frozen=True)
class DiagonalCurvature:
    """The hybrid of SOURCE's appendix D (equation 43): exp(-eta K P H) on the diagonal, H^-1 by EK-FAC.

    `respond` is H^-1 (1 - exp(-eta K (P diag(H) + w))). Where H is small the two approximations should cancel but do not, and the
    nearly undamped H^-1 magnifies the difference. The symmetric form above does not have this problem.
    """

    H: EKFAC
    P: Float[Tensor, "d_out d_in"]

    def respond(self, q: Float[Tensor, "*n d_out d_in"], *, time: float, weight_decay: float) -> Float[Tensor, "*n d_out d_in"]:
        """A query's sensitivity to a gradient that acts throughout the segment."""
        damping = NEARLY_UNDAMPED * self.H.Lambda.mean().item()
        return self.H.apply(damped_inverse(damping), -torch.expm1(-time * self._rate(weight_decay)) * q)

    def decay(self, q: Float[Tensor, "*n d_out d_in"], *, time: float, weight_decay: float) -> Float[Tensor, "*n d_out d_in"]:
        """The query's gradient carried back to the start of the segment."""
        return torch.exp(-time * self._rate(weight_decay)) * q

    def to(self, device: torch.device) -> "DiagonalCurvature":
        """The curvature on `device`."""
        return DiagonalCurvature(self.H.to(device), self.P.to(device))

    def _rate(self, weight_decay: float) -> Float[Tensor, "d_out d_in"]:
        return self.P * (self.H.Q_S.square() @ self.H.Lambda @ self.H.Q_A.square().T) + weight_decay


Curvature = LayerCurvature | DiagonalCurvature


def plain(factors: EKFAC | Diagonal) -> LayerCurvature:
    """The curvature under SGD, P = 1."""
    return LayerCurvature(factors, factors.Lambda.new_ones(()))


def scalar(factors: EKFAC, P: Float[Tensor, "d_out d_in"]) -> LayerCurvature:
    """The curvature with one P for the whole layer: the median, which dead units (v near 0, so P huge) do not move."""
    p = P.flatten().median()
    return LayerCurvature(replace(factors, Lambda=p * factors.Lambda), p.sqrt())


def scaled_diagonal(H: Diagonal, P: Float[Tensor, "d_out d_in"]) -> LayerCurvature:
    """The curvature with AdamW's P, where H is diagonal: exactly P H."""
    return LayerCurvature(Diagonal(P * H.Lambda), P.sqrt())


def adam_preconditioner(second_moment: Float[Tensor, "..."], *, step: int, beta2: float, epsilon: float) -> Float[Tensor, "..."]:
    """P after `step` steps, from the second moment v as the optimizer stores it, without bias correction."""
    return preconditioner_of(second_moment / (1 - beta2**step), epsilon=epsilon)


def preconditioner_of(corrected: Float[Tensor, "..."], *, epsilon: float) -> Float[Tensor, "..."]:
    """P = 1 / (sqrt(v_hat) + epsilon), elementwise, from the bias-corrected second moment v_hat = v / (1 - beta2^t)."""
    return 1 / (corrected.sqrt() + epsilon)


def scaled_factors(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[DocumentBatch | TensorBatch],
    *,
    task: Task,
    root_P: dict[str, Tensor],
    basis: dict[str, tuple[Tensor, Tensor]] | None,
    generator: torch.Generator,
    into: tuple[Covariances, dict[str, Tensor]] | None = None,
) -> tuple[Covariances, dict[str, Tensor]]:
    """Sums over documents for the EK-FAC of M, with sampled labels, where G is a document's gradient scaled by `root_P`.

    Without a `basis` the sums are those of `G G^T` and `G^T G`, whose eigenvectors are the basis; the count of the `Covariances`
    is then the number of documents. With a `basis` they are those of `(Q_S^T G Q_A)^2`. Scaled gradients of tokens are not
    outer products any more, so each document's gradient is formed in full. If `into` is given, the sums are added to it.
    """
    sums, Lambda = (Covariances({}, {}, 0), {}) if into is None else into
    A, S, num_documents = sums.A, sums.S, sums.count
    rotations = None if basis is None else basis_like(at_least_float32(next(model.parameters()).new_zeros(())), basis)
    batch: DocumentBatch | TensorBatch

    def keep_inputs(layer: Layer, a: Tensor) -> Tensor:
        return append_one(at_least_float32(a), bias=layer.bias)

    def add(layer: Layer, a: Tensor, Ds: Tensor) -> None:
        outputs, inputs = batch.by_document(at_least_float32(Ds)), batch.by_document(a)
        at_once = max(1, ONE_BY_ONE // root_P[layer.name].numel())
        for some_outputs, some_inputs in zip(outputs.split(at_once), inputs.split(at_once), strict=True):
            add_gradients(layer.name, root_P[layer.name] * (some_outputs.mT @ some_inputs))

    def add_gradients(name: str, G: Tensor) -> None:
        if rotations is None:
            A[name] = A.get(name, 0) + torch.einsum("noi,noj->ij", G, G)
            S[name] = S.get(name, 0) + torch.einsum("noi,npi->op", G, G)
        else:
            Q_A, Q_S = rotations[name]
            Lambda[name] = Lambda.get(name, 0) + (Q_S.T @ G @ Q_A).square_().sum(dim=0)

    with captured(model, layers, encode=keep_inputs, consume=add):
        for batch in batches:
            num_documents += len(batch.rows)
            total, _losses = task.losses(model, batch, labels="sampled", generator=generator)
            total.backward()
    return Covariances(A, S, num_documents), Lambda


def scaled_eigenbasis(sums: Covariances, layers: Sequence[Layer]) -> dict[str, tuple[Tensor, Tensor]]:
    """`(Q_A, Q_S)` of scaled gradients. Scaling gives every layer an input side of its own, so none is shared."""
    return eigenbasis(sums, [replace(layer, group=layer.name) for layer in layers])
