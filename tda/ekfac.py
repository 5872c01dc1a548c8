"""EK-FAC: covariances, eigenbasis, corrected eigenvalues (George et al. 2018; Grosse et al. 2023, arXiv 2308.03296, section 2).

1. `covariances`: A, the sum over tokens of `a a^T`, and S, that of `Ds Ds^T`, with labels sampled from the model.
2. `eigenbasis`: their eigenvectors `Q_A` and `Q_S`; the eigenvalues are not used.
3. `corrected_eigenvalues`: `Lambda`, the sum over documents of `(Q_S^T G Q_A)^2`, where `G` is the gradient of the document's
   loss summed over its tokens, again with sampled labels.

`fit_factors.py` makes these passes, divides `Lambda` by the number of documents and multiplies it by `w`, the training loss's
factor on a document's summed loss. That makes it the diagonal of the Gauss-Newton matrix of the training loss: labels of
different tokens are drawn independently, so the cross terms of the square vanish in the mean, and one factor `w` remains.

With a model in bfloat16, activations are rotated and multiplied in bfloat16. Sums over tokens or documents are always in float32.
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

SMALLEST_STRIP = 64  # columns; widths of strips are multiples of it. Narrower products lose more speed than they save work
MOST_STRIPS = 12
ONE_BY_ONE = 1 << 16  # values of a gradient from which on documents' gradients are formed one at a time, to stay in the cache
GRADIENTS_ON_GPU = 1 << 27  # values of gradients that are formed at once on a GPU


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
class Diagonal:
    """Curvature of a matrix that counts as diagonal in the weights themselves, as that of a large vocabulary's embedding."""

    Lambda: Float[Tensor, "d_out d_in"]  # mean squared gradient, per document

    def apply(self, f: SpectralFn, G: Float[Tensor, "*n d_out d_in"]) -> Float[Tensor, "*n d_out d_in"]:
        """The matrix function f of the curvature, applied to gradients G."""
        return f(self.Lambda) * G

    def to(self, device: torch.device) -> "Diagonal":
        """The curvature on `device`."""
        return Diagonal(self.Lambda.to(device))


@dataclass(frozen=True)
class Covariances:
    """Sums over tokens: `A` of `a a^T`, by group of layers, and `S` of `Ds Ds^T`, by layer."""

    A: dict[str, Tensor]
    S: dict[str, Tensor]
    count: int  # of tokens; of documents where gradients are scaled (`preconditioner.py`)

    def add_(self, other: "Covariances") -> "Covariances":
        """The sum of both, in the memory of `self`."""
        add_by_name(self.A, other.A)
        add_by_name(self.S, other.S)
        return Covariances(self.A, self.S, self.count + other.count)


def add_by_name(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add `more` to `sums` in place. A name may be missing on either side: an empty part of the data has none."""
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

    With `projections` they are those of projected inputs and pseudo-gradients. If `into` is given, sums are added to it.
    """
    A, S = ({}, {}) if into is None else (into.A, into.S)
    device = next(model.parameters()).device
    held = {name: projection.to(device) for name, projection in (projections or {}).items()}
    num_tokens: Tensor | int = 0 if into is None else into.count  # becomes a tensor on the device, so that no batch waits for it
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
        sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    add_lower_products(sums[name], rows)


def add_lower_products(total: Float[Tensor, "d d"], rows: Float[Tensor, "row d"]) -> None:
    """Add `rows^T rows` to the lower triangle of `total`, strip by strip of columns; the upper triangle is left undefined.

    A strip starts at its diagonal block, so s strips take (s + 1) / 2s of the operations of the whole product. On a
    GPU, rows may be narrower than `total`.
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
    """Width of the strips of a matrix of d columns: at most `MOST_STRIPS` of them, aligned as fast GPU products require."""
    return d if d < SMALLEST_STRIP * 2 else -(-d // (MOST_STRIPS * SMALLEST_STRIP)) * SMALLEST_STRIP


def complete_from_lower(total: Float[Tensor, "d d"]) -> None:
    """Copy the lower triangle of `total` to the upper one."""
    total.tril_().add_(total.tril(-1).T)


def eigenbasis(covariances: Covariances, layers: Sequence[Layer]) -> dict[str, tuple[Tensor, Tensor]]:
    """`(Q_A, Q_S)` of every layer, on the CPU, columns by descending eigenvalue; layers of a group share `Q_A`.

    `covariances` is emptied: each matrix is freed once its eigenvectors are known. A matrix that is not finite is refused with
    ValueError.
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
    matrix = covariance.double() if on_cpu else covariance  # a GPU is slow in float64, and eigenvalues are corrected later anyway
    try:
        _values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    except torch.linalg.LinAlgError:  # a GPU's solver may fail to converge if many eigenvalues are nearly equal
        if on_cpu:
            raise
        return _eigenvectors(covariance.cpu(), what).to(covariance.device)
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    signed = vectors * largest.sign()  # eigenvectors have no sign of their own: fix it, so that equal covariances give equal rows
    return signed.to(covariance.dtype).contiguous()  # row-major, as files and copies need it: transposing on a CPU is slow


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
    """Sums over documents of `(Q_S^T G Q_A)^2` with sampled labels, by layer, and the number of documents.

    Rotated are inputs and pseudo-gradients, before they are multiplied, or else the gradients, where these have fewer rows. If
    `into` is given, sums are added to it.
    """
    parameter = next(model.parameters())
    rotations = basis_like(parameter, basis)  # costs nothing if it is there already
    if into is None:
        zero = at_least_float32(parameter.new_zeros(()))
        into = {name: zero.new_zeros(Q_S.shape[1], Q_A.shape[1]) for name, (Q_A, Q_S) in basis.items()}, 0
    Lambda, num_documents = into
    outputs_of_group: dict[str, int] = {}
    for layer in layers:
        outputs_of_group[layer.group] = outputs_of_group.get(layer.group, 0) + layer.d_out
    batch: DocumentBatch | TensorBatch

    def later(values: Tensor, Q: Tensor, other_side: int) -> bool:
        """Whether the gradients of all documents, with `other_side` rows each, are fewer rows to rotate than `values`."""
        return Q.shape[0] == Q.shape[1] and len(batch.rows) * other_side < values.shape[:2].numel()

    def rotate_inputs(layer: Layer, a: Tensor) -> Tensor:
        a, Q_A = a.to(parameter.dtype), rotations[layer.name][0]
        if later(a, Q_A, outputs_of_group[layer.group]):
            return append_one(a, bias=layer.bias)
        return encode_inputs(a, Q_A, bias=layer.bias)

    def add_squares(layer: Layer, inputs: Tensor, Ds: Tensor) -> None:
        Q_A, Q_S = rotations[layer.name]
        Ds = Ds.to(parameter.dtype)
        still_A, still_S = later(inputs, Q_A, outputs_of_group[layer.group]), later(Ds, Q_S, layer.d_in)
        add_squared_gradients(
            Lambda[layer.name],
            batch.by_document(Ds if still_S else Ds @ Q_S),
            batch.by_document(inputs),
            Q_S=Q_S if still_S else None,
            Q_A=Q_A if still_A else None,
        )

    with captured(model, layers, encode=rotate_inputs, consume=add_squares):
        for batch in batches:
            num_documents += len(batch.rows)
            total, _losses = task.losses(model, batch, labels="sampled", generator=generator)
            total.backward()
    return Lambda, num_documents


def squared_gradients(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[DocumentBatch | TensorBatch],
    *,
    task: Task,
    generator: torch.Generator,
) -> dict[str, Float[Tensor, "d_out d_in"]]:
    """Sums over documents of the squared gradient with sampled labels, by layer. Uses of one weight are squared apart."""
    zero = at_least_float32(next(model.parameters()).new_zeros(()))
    sums = {layer.name: zero.new_zeros(layer.d_out, layer.d_in) for layer in layers}
    batch: DocumentBatch | TensorBatch

    def add_squares(layer: Layer, a: Tensor, Ds: Tensor) -> None:
        add_squared_gradients(sums[layer.name], batch.by_document(Ds), batch.by_document(a))

    with captured(model, layers, encode=lambda layer, a: append_one(a, bias=layer.bias), consume=add_squares):
        for batch in batches:
            total, _losses = task.losses(model, batch, labels="sampled", generator=generator)
            total.backward()
    return sums


def basis_like(like: Tensor, basis: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The basis on the device and in the dtype of `like`. A shared `Q_A` is moved once, and nothing is copied needlessly."""

    def moved(Q: Tensor) -> Tensor:
        return Q.to(like.device).to(like.dtype)  # in this order, so that a GPU converts, not the CPU

    inputs: dict[int, Tensor] = {}
    for Q_A, _Q_S in basis.values():
        if id(Q_A) not in inputs:
            inputs[id(Q_A)] = moved(Q_A)
    return {name: (inputs[id(Q_A)], moved(Q_S)) for name, (Q_A, Q_S) in basis.items()}


def add_squared_gradients(
    total: Float[Tensor, "d_out d_in"],
    outputs: Float[Tensor, "document position d_out"],
    inputs: Float[Tensor, "document position d_in"],
    *,
    Q_S: Float[Tensor, "d_out d_out"] | None = None,
    Q_A: Float[Tensor, "d_in d_in"] | None = None,
) -> None:
    """Add the elementwise square of every document's gradient `G`, which is the sum over positions of `outputs inputs^T`.

    With `Q_S` or `Q_A`, of `Q_S^T G`, `G Q_A` or `Q_S^T G Q_A`.
    """
    if outputs.shape[1] == 1 and Q_S is None and Q_A is None:
        # the square of one outer product is the outer product of the squares: no gradient is formed
        total.addmm_(at_least_float32(outputs[:, 0]).square().T, at_least_float32(inputs[:, 0]).square())
    elif total.numel() < ONE_BY_ONE:
        total += at_least_float32(_gradients(outputs, inputs, Q_S, Q_A)).square_().sum(dim=0)
    elif total.device.type != "cpu":  # which has no cache for a gradient: the more of them are summed at once, the less is moved
        at_once = max(1, GRADIENTS_ON_GPU // total.numel())
        for some_outputs, some_inputs in zip(outputs.split(at_once), inputs.split(at_once), strict=True):
            lengths = torch.linalg.vector_norm(_gradients(some_outputs, some_inputs, Q_S, Q_A), dim=0, dtype=total.dtype)
            total.addcmul_(lengths, lengths)
    else:
        for one_outputs, one_inputs in zip(outputs, inputs, strict=True):
            G = _gradients(one_outputs, one_inputs, Q_S, Q_A)
            total.addcmul_(G, G)


def _gradients(outputs: Tensor, inputs: Tensor, Q_S: Tensor | None, Q_A: Tensor | None) -> Float[Tensor, "*document d_out d_in"]:
    G = outputs.mT @ inputs
    G = G if Q_A is None else G @ Q_A
    return G if Q_S is None else Q_S.T @ G
