"""Iterative solvers of `A x = b` for symmetric positive A, by products with A. Every row of `b` is a system of its own."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "query value"]
ENERGY_FLOOR = 1e-6  # relative to the largest: directions of less energy are rounding errors of float32 products
Map = Callable[[Tensor], Tensor]  # (query, value) to (query, value), row by row


def conjugate_gradients(product: Map, b: Rows, *, precondition: Map, iterations: int, from_zero: bool = False) -> Rows:
    """Preconditioned conjugate gradients (Hestenes and Stiefel 1952); `product` and `precondition` are symmetric and positive.

    They start from `precondition(b)`, which costs one product. With `from_zero` they start from 0, and the first iteration
    finds the best multiple of `precondition(b)`. A row that is solved to rounding stays as it is.
    """
    first = precondition(b)
    floor = torch.finfo(b.dtype).eps ** 2 * _dots(b, first)  # squared, since `rz` is a squared norm
    if from_zero:
        x, r, z = torch.zeros_like(b), b, first
    else:
        x, r = first, b - product(first)
        z = precondition(r)
    p, rz = z, _dots(r, z)
    del first
    for _ in range(iterations):
        Ap = product(p)
        pAp = _dots(p, Ap)
        step = torch.where((rz > floor) & (pAp > 0), rz / pAp, torch.zeros_like(rz))
        x = torch.addcmul(x, step, p)
        r = torch.addcmul(r, step, Ap, value=-1)
        z = precondition(r)
        before, rz = rz, _dots(r, z)
        p = torch.addcmul(z, torch.where(before > floor, rz / before, torch.zeros_like(rz)), p)
    return x


def block_krylov(product: Map, b: Rows, *, precondition: Map, rounds: int) -> Rows:
    """Every row's best solution in the space of all rows' search directions (Galerkin's method).

    Each round adds every row's preconditioned residual to the space. This is block conjugate gradients (O'Leary 1980) without
    the short recurrence, which loses rank if rows are alike. A round costs as much as an iteration of conjugate gradients, but
    with many rows it is worth several, because each row also uses the directions of the others. Memory: 2 `rounds` tensors like
    `b` and a few more. A single row is solved by conjugate gradients, which need only the few.
    """
    if len(b) == 1:
        return conjugate_gradients(product, b, precondition=precondition, iterations=rounds, from_zero=True)
    x, r = torch.zeros_like(b), b
    S = b.new_empty(rounds * len(b), b.shape[1])  # the directions
    AS = torch.empty_like(S)
    for before in range(0, len(S), len(b)):
        seen = before + len(b)
        S[before:seen] = precondition(r)
        AS[before:seen] = product(S[before:seen])
        coordinates = _galerkin((S[:seen] @ AS[:seen].T).double(), (S[:seen] @ b.T).double()).to(b.dtype)
        x, r = coordinates.T @ S[:seen], b - coordinates.T @ AS[:seen]
    return x


def _galerkin(
    SAS: Float[Tensor, "direction direction"], Sb: Float[Tensor, "direction query"]
) -> Float[Tensor, "direction query"]:
    """`(S A S^T)^-1 S b`, with directions scaled to unit energy, and without those that are 0 or lost in rounding."""
    energies = SAS.diagonal()
    scale = torch.where(energies > 0, energies.rsqrt(), 0)
    values, vectors = torch.linalg.eigh((SAS + SAS.T) / 2 * scale * scale[:, None])
    kept = values > ENERGY_FLOOR * values[-1]
    inside = vectors[:, kept]
    return scale[:, None] * (inside @ ((inside.T @ (scale[:, None] * Sb)) / values[kept, None]))


def descend(
    products: Callable[[int], Map],
    b: Rows,
    *,
    precondition: Map,
    iterations: int,
    step_size: float = 1.0,
    momentum: float = 0.0,
    halve_every: int = 0,
) -> Rows:
    """`x <- x - step_size P^-1 (A_k x - b)` from `P^-1 b`, with heavy-ball momentum; `products(k)` is `A_k`, an estimate of A.

    With a constant preconditioner and no momentum this is the Neumann series of LiSSA (Agarwal et al. 2017). With EK-FAC as the
    preconditioner it is ASTRA (arXiv 2507.14740, section 4). The step is halved every `halve_every` iterations; 0 is never.

    Raises:
        ValueError: it has diverged.
    """
    x, velocity = precondition(b), torch.zeros_like(b)
    for k in range(iterations):
        velocity = momentum * velocity + precondition(products(k)(x) - b)
        x = x - step_size * 0.5 ** (k // halve_every if halve_every else 0) * velocity
    if not torch.isfinite(x).all():
        raise ValueError(
            f"attribute: {iterations} stochastic iterations have diverged; expected a curvature that varies less from batch to "
            "batch; set batch_size or solver_damping higher, or use cg"
        )
    return x


def largest_eigenvalue(product: Map, like: Rows, *, iterations: int, generator: torch.Generator) -> float:
    """The largest eigenvalue of a symmetric positive matrix, from below, by power iteration from a random row."""
    v = torch.randn(1, like.shape[1], generator=generator, dtype=like.dtype).to(like.device)
    for _ in range(iterations):
        v = product(v / v.norm())
    return v.norm().item()


def _dots(a: Rows, b: Rows) -> Float[Tensor, "query 1"]:
    return (a * b).sum(dim=1, keepdim=True)
