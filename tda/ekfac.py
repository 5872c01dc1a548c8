"""EK-FAC of a segment: covariances, eigenbasis, corrected eigenvalues (George et al. 2018; arXiv 2308.03296, section 2).

`A` and `S` are sums per token; only their eigenvectors are used. `Lambda` is per document, in the unit of the training loss's
Hessian: the mean over documents of `w (sum over tokens of the rotated gradient of a sampled label's loss)^2`, where the training
loss is `w` times the document's summed token loss (`fit_factors.py` multiplies by `w`). Labels at different tokens are drawn
independently, so cross terms vanish in the mean, and one `w` makes this the diagonal of the Gauss-Newton matrix of the loss that
was minimised.

A model in bfloat16 has its activations rotated and multiplied in bfloat16; every sum over tokens or documents is in float32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda.capture import captured
from tda.data import TensorBatch
from tda.losses import at_least_float32
from tda.model import Layer
from tda.packing import DocumentBatch
from tda.projection import Projection, append_one, encode_inputs
from tda.spectral import SpectralFn
from tda.task import Task

SMALLEST_STRIP = 64  # columns, and what strips are multiples of; narrower products run slower than they are smaller
MOST_STRIPS = 12
ONE_BY_ONE = 1 << 16  # values of a gradient from which documents' gradients are formed one after another, each in the cache
GRADIENTS_ON_GPU = 1 << 27  # values of gradients that are formed at once there


@dataclass(frozen=True)
class EKFAC:
    """Curvature of one linear layer, diagonal in a Kronecker eigenbasis."""

    Q_A: Float[Tensor, "d_in d_in"]  # eigenvectors of the input covariance A
    Q_S: Float[Tensor, "d_out d_out"]  # eigenvectors of the pseudo-gradient covariance S
    Lambda: Float[Tensor, "d_out d_in"]  # mean squared rotated gradient, per document

    def apply(self, f: SpectralFn, G: Float[Tensor, "*n d_out d_in"]) -> Float[Tensor, "*n d_out d_in"]:
        """The matrix function f of the curvature, applied to gradients G."""
        return self.Q_S @ (f(self.Lambda) * (self.Q_S.T @ G @ self.Q_A)) @ self.Q_A.T

    def to(self, device: torch.device) -> "EKFAC":
        """The factors on `device`."""
        return EKFAC(self.Q_A.to(device), self.Q_S.to(device), self.Lambda.to(device))


@dataclass(frozen=True)
class Covariances:
    """Sums over tokens of `a a^T` by group of layers and of `Ds Ds^T` by layer, so that merging is adding."""

    A: dict[str, Tensor]
    S: dict[str, Tensor]
    num_tokens: int

    def add_(self, other: "Covariances") -> "Covariances":
        """Both together, in the memory of the first."""
        add_by_name(self.A, other.A)
        add_by_name(self.S, other.S)
        return Covariances(self.A, self.S, self.num_tokens + other.num_tokens)


def add_by_name(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add `more` to `sums` in their memory; a part of the data that was empty has no names."""
    for name, values in more.items():
        sums[name] = sums[name].add_(values) if name in sums else values


def covariances(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[DocumentBatch | TensorBatch],
    *,
    task: Task,
    generator: torch.Generator,
    projections: dict[str, Projection] | None = None,
    into: Covariances | None = None,
) -> Covariances:
    """Sums of the covariances over all positions that a loss can depend on, in float32, with sampled labels.

    With `projections`, those of the projected inputs and pseudo-gradients. They are added to the sums in `into`, if it is given.
    """
    A, S = ({}, {}) if into is None else (into.A, into.S)
    device = next(model.parameters()).device
    held = {name: projection.to(device) for name, projection in (projections or {}).items()}
    num_tokens: Tensor | int = 0 if into is None else into.num_tokens  # becomes a tensor, for which no batch waits
    counts: Tensor

    def factor(values: Tensor) -> Tensor:  # a GPU multiplies bfloat16 at twice the speed of TF32, and sums the same float32
        return at_least_float32(values) if held or device.type == "cpu" else values

    def add_inputs(layer: Layer, a: Tensor) -> None:
        a = append_one(factor(a), bias=layer.bias)
        if held:
            a = a @ held[layer.name].P_i
        _accumulate(A, layer.name, (a * counts).flatten(0, 1))

    def add_pseudo_gradients(layer: Layer, _kept: None, Ds: Tensor) -> None:
        Ds = factor(Ds)
        if held:
            Ds = Ds @ held[layer.name].P_o
        _accumulate(S, layer.name, Ds.flatten(0, 1))

    with captured(model, layers, encode=add_inputs, consume=add_pseudo_gradients):
        for batch in batches:
            counts = batch.counts[:, :, None]
            num_tokens = num_tokens + counts.sum()
            total, _losses = task.losses(model, batch, labels="sampled", generator=generator)
            total.backward()
    for sums in (A, S):
        for matrix in sums.values():
            complete_from_lower(matrix)
    return Covariances(A, S, int(num_tokens))


def _accumulate(sums: dict[str, Tensor], name: str, rows: Float[Tensor, "row d"]) -> None:
    if name not in sums:
        sums[name] = at_least_float32(rows.new_zeros(())).new_zeros(rows.shape[1], rows.shape[1])
    add_lower_products(sums[name], rows)


def add_lower_products(total: Float[Tensor, "d d"], rows: Float[Tensor, "row d"]) -> None:
    """Add `rows^T rows` to the lower triangle of `total`, one strip of columns after another; what is above it is not to be read.

    A strip starts at its diagonal block, so that with s strips (s + 1) / 2s of the whole product's operations are done. Rows on a
    GPU may be narrower than `total`.
    """
    d = len(total)
    strip = strip_width(d)
    for start in range(0, d, strip):
        part, left, right = total[start:, start : start + strip], rows[:, start:].T, rows[:, start : start + strip]
        if rows.dtype == total.dtype:
            part.addmm_(left, right)
        else:
            torch.addmm(part, left, right, out_dtype=total.dtype, out=part)


def strip_width(d: int) -> int:
    """Columns of a strip of a matrix of d columns: of at most `MOST_STRIPS`, aligned as a GPU's products have to be."""
    return d if d < SMALLEST_STRIP * 2 else -(-d // (MOST_STRIPS * SMALLEST_STRIP)) * SMALLEST_STRIP


def complete_from_lower(total: Float[Tensor, "d d"]) -> None:
    """Make `total` symmetric, by its lower triangle."""
    total.tril_().add_(total.tril(-1).T)


def eigenbasis(covariances: Covariances, layers: Sequence[Layer]) -> dict[str, tuple[Tensor, Tensor]]:
    """`(Q_A, Q_S)` of every layer on the CPU, columns by falling eigenvalue; layers of one group share `Q_A`.

    Covariances are used up: each is let go when its eigenvectors are there. One that is not finite is refused with ValueError.
    """
    inputs = {name: _eigenvectors(covariances.A.pop(name), f"inputs of {name}").cpu() for name in list(covariances.A)}
    return {
        layer.name: (inputs[layer.group], _eigenvectors(covariances.S.pop(layer.name), f"outputs of {layer.name}").cpu())
        for layer in layers
    }


def _eigenvectors(covariance: Tensor, what: str) -> Tensor:
    if not torch.isfinite(covariance).all():
        raise ValueError(
            f"curvature: the covariance of the {what} is not finite; likely the checkpoint has diverged (look at the training "
            "loss), or activations overflow the model's dtype"
        )
    on_cpu = covariance.device.type == "cpu"
    matrix = covariance.double() if on_cpu else covariance  # on a GPU the time is that of the bytes: eigenvalues are corrected
    try:
        _values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    except torch.linalg.LinAlgError:  # a GPU's solver does not always converge where many eigenvalues are nearly equal
        if on_cpu:
            raise
        return _eigenvectors(covariance.cpu(), what).to(covariance.device)
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    signed = vectors * largest.sign()  # a fixed sign, so that equal covariances give equal rows
    return signed.to(covariance.dtype).contiguous()  # row by row, as files and copies want it: a CPU is slow to transpose


def corrected_eigenvalues(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[DocumentBatch | TensorBatch],
    *,
    task: Task,
    basis: dict[str, tuple[Tensor, Tensor]],
    generator: torch.Generator,
    into: tuple[dict[str, Tensor], int] | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Sums over documents of `(Q_S^T G Q_A)^2` with sampled labels, and the number of documents.

    Activations and pseudo-gradients are rotated before their product. They are added to the sums in `into`, if it is given.
    """
    parameter = next(model.parameters())
    rotations = basis_like(parameter, basis)  # which costs nothing if they are there already
    if into is None:
        zero = at_least_float32(parameter.new_zeros(()))
        into = {name: zero.new_zeros(Q_S.shape[1], Q_A.shape[1]) for name, (Q_A, Q_S) in basis.items()}, 0
    Lambda, num_documents = into
    batch: DocumentBatch | TensorBatch

    def rotate_inputs(layer: Layer, a: Tensor) -> Tensor:
        return encode_inputs(a.to(parameter.dtype), rotations[layer.name][0], bias=layer.bias)

    def add_squares(layer: Layer, rotated: Tensor, Ds: Tensor) -> None:
        add_squared_gradients(
            Lambda[layer.name], batch.by_document(Ds.to(parameter.dtype) @ rotations[layer.name][1]), batch.by_document(rotated)
        )

    with captured(model, layers, encode=rotate_inputs, consume=add_squares):
        for batch in batches:
            num_documents += len(batch.rows)
            total, _losses = task.losses(model, batch, labels="sampled", generator=generator)
            total.backward()
    return Lambda, num_documents


def basis_like(like: Tensor, basis: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The basis where `like` is, in its dtype; what layers share is there once. One that is there already is the same tensors."""

    def moved(Q: Tensor) -> Tensor:
        return Q.to(like.device).to(like.dtype)  # in two steps: together a CPU would convert

    inputs: dict[int, Tensor] = {}
    for Q_A, _Q_S in basis.values():
        if id(Q_A) not in inputs:
            inputs[id(Q_A)] = moved(Q_A)
    return {name: (inputs[id(Q_A)], moved(Q_S)) for name, (Q_A, Q_S) in basis.items()}


def add_squared_gradients(
    total: Float[Tensor, "d_out d_in"],
    outputs: Float[Tensor, "document position d_out"],
    inputs: Float[Tensor, "document position d_in"],
) -> None:
    """Add the squares of every document's gradient, the sum over positions of `outputs inputs^T`."""
    if outputs.shape[1] == 1:  # the square of an outer product is that of the squares: no gradient is formed
        total.addmm_(at_least_float32(outputs[:, 0]).square().T, at_least_float32(inputs[:, 0]).square())
    elif total.numel() < ONE_BY_ONE:
        total += at_least_float32(outputs.mT @ inputs).square_().sum(dim=0)
    elif total.device.type != "cpu":  # which has no cache for a gradient: the more of them are summed at once, the less is moved
        at_once = max(1, GRADIENTS_ON_GPU // total.numel())
        for some_outputs, some_inputs in zip(outputs.split(at_once), inputs.split(at_once), strict=True):
            lengths = torch.linalg.vector_norm(some_outputs.mT @ some_inputs, dim=0, dtype=total.dtype)
            total.addcmul_(lengths, lengths)
    else:
        G = inputs.new_empty(total.shape)
        for one_outputs, one_inputs in zip(outputs, inputs, strict=True):
            torch.mm(one_outputs.T, one_inputs, out=G)
            total.addcmul_(G, G)
