"""EK-FAC influence functions at one checkpoint (arXiv 2308.03296): the inverse curvature applied to a query."""

from torch import Tensor

from tda.ekfac import EKFAC
from tda.spectral import damped_inverse


def precondition(query: dict[str, Tensor], factors: dict[str, EKFAC], *, damping: float) -> dict[str, Tensor]:
    """(H + lambda)^-1 q, layer by layer; lambda is `damping` times the layer's mean eigenvalue (section 2.1 of the paper)."""
    return {
        name: held.to(query[name].device).apply(damped_inverse(damping * held.Lambda.mean().item()), query[name])
        for name, held in factors.items()
    }
