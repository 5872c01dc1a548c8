"""Solvers of `A x = b` that ask only for products with the matrix; every row of a tensor is a system of its own."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "query value"]
Map = Callable[[Tensor], Tensor]  # (query, value) to (query, value), row by row


def conjugate_gradients(product: Map, b: Rows, *, precondition: Map, iterations: int) -> Rows:
    """Preconditioned conjugate gradients (Hestenes and Stiefel 1952), from `precondition(b)`; both maps symmetric and positive.

    A row that is solved to rounding stays where it is.
    """
    x = precondition(b)
    r = b - product(x)
    z = precondition(r)
    p, rz = z, _dots(r, z)
    floor = torch.finfo(b.dtype).eps ** 2 * _dots(b, x)  # squared, since `rz` is a squared norm
    for _ in range(iterations):
        Ap = product(p)
        pAp = _dots(p, Ap)
        step = torch.where((rz > floor) & (pAp > 0), rz / pAp, torch.zeros_like(rz))
        x = x + step * p
        r = r - step * Ap
        z = precondition(r)
        before, rz = rz, _dots(r, z)
        p = z + torch.where(before > floor, rz / before, torch.zeros_like(rz)) * p
    return x


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

    With a constant preconditioner and no momentum: the Neumann series, LiSSA (Agarwal et al. 2017). With EK-FAC's: ASTRA
    (arXiv 2507.14740, section 4), which halves its step every so many iterations, 0 for never.

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
    v = torch.randn(1, like.shape[1], generator=generator, dtype=like.dtype)
    for _ in range(iterations):
        v = product(v / v.norm())
    return v.norm().item()


def _dots(a: Rows, b: Rows) -> Float[Tensor, "query 1"]:
    return (a * b).sum(dim=1, keepdim=True)
