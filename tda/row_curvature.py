"""EK-FAC of a segment from its stored rows, so that the passes which logged these are the only ones over the documents.

The basis is given by the eigenvectors of the sums of `R R^T` and `R^T R` over documents (Shampoo's factors: Gupta et al. 2018,
algorithm 1), where R is a projected gradient (LoGra, arXiv 2405.13954, section 3.2). The eigenvalues are corrected as in EK-FAC
(George et al. 2018, equation 7).

Rows are gradients of the true labels, so this is the empirical Fisher matrix of whole documents. Unlike the Gauss-Newton
matrix, which `ekfac.py` fits with sampled labels, it includes what the tokens of a document have in common.
"""

from collections.abc import Callable, Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from tda.ekfac import EKFAC, Covariances, add_lower_products, complete_from_lower
from tda.model import Layer
from tda.preconditioner import scaled_eigenbasis

Blocks = Callable[[], Iterable[Float[Tensor, "row values"]]]
"""Gives blocks of rows, with equally many documents from every checkpoint; it is called twice."""


def row_curvature(
    blocks: Blocks, layers: Sequence[Layer], shapes: dict[str, tuple[int, int]], *, weight: float
) -> dict[str, EKFAC]:
    """EK-FAC of every layer. In a row, layers stand side by side, each flattened from its shape (k_out, k_in) in `shapes`.

    `weight` is the training loss's factor w on a document's summed loss: eigenvalues are the mean over rows of
    `w (Q_S^T R Q_A)^2`. No rows, or rows that are not finite, are a ValueError.
    """
    basis = _basis(blocks, layers, shapes)
    Lambda = {name: Q_A.new_zeros(shapes[name]) for name, (Q_A, _Q_S) in basis.items()}
    num_rows = 0
    for R in _split(blocks, layers, shapes):
        for name, held in R.items():
            Q_A, Q_S = basis[name]
            Lambda[name] += (Q_S.T @ held @ Q_A).square_().sum(dim=0)
        num_rows += len(held)
    return {name: EKFAC(Q_A, Q_S, Lambda[name] * (weight / num_rows)) for name, (Q_A, Q_S) in basis.items()}


def _basis(blocks: Blocks, layers: Sequence[Layer], shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
    A: dict[str, Tensor] = {}
    S: dict[str, Tensor] = {}
    num_rows = 0
    for R in _split(blocks, layers, shapes):
        for name, held in R.items():
            for sums, sides in ((A, held), (S, held.mT)):
                if name not in sums:
                    sums[name] = sides.new_zeros(sides.shape[2], sides.shape[2])
                add_lower_products(sums[name], sides.flatten(0, 1))
        num_rows += len(held)
    if not num_rows:
        raise ValueError("curvature.space: rows needs gradient rows of documents that the segment saw; there are none")
    for matrix in (*A.values(), *S.values()):
        complete_from_lower(matrix)
    return scaled_eigenbasis(Covariances(A, S, num_rows), layers)


def _split(blocks: Blocks, layers: Sequence[Layer], shapes: dict[str, tuple[int, int]]) -> Iterable[dict[str, Tensor]]:
    for rows in blocks():
        yield by_layer(rows, layers, shapes)


def by_layer(
    rows: Float[Tensor, "row values"], layers: Sequence[Layer], shapes: dict[str, tuple[int, int]]
) -> dict[str, Float[Tensor, "row k_out k_in"]]:
    """Every layer's part of the rows, in the layer's shape."""
    sizes = [shapes[layer.name][0] * shapes[layer.name][1] for layer in layers]
    parts = zip(layers, rows.split(sizes, dim=1), strict=True)
    return {layer.name: part.unflatten(1, shapes[layer.name]) for layer, part in parts}
