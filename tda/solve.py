"""Responses of queries under the damped Gauss-Newton matrix of all tracked layers, by iteration from EK-FAC's answer.

    (P^(1/2) G P^(1/2) + damping) x = P^(1/2) q       response = P^(1/2) x

`G` is the Gauss-Newton matrix of `ggn.py`, P the optimizer's preconditioner (1 for plain influence functions), and `damping` one
number per layer. EK-FAC ignores the curvature between layers, which is most of the accuracy it loses (arXiv 2509.23437); solving
for all layers together recovers it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tda.ekfac import EKFAC, Diagonal, basis_like
from tda.ggn import Product, pack, unpack
from tda.model import Layer
from tda.preconditioner import LayerCurvature
from tda.source import Gradients, SegmentDynamics
from tda.spectral import damped_inverse


@dataclass(frozen=True)
class DampedCurvature:
    """P^(1/2) G P^(1/2) + damping, and its approximation by EK-FAC, which preconditions the solvers."""

    layers: Sequence[Layer]
    approximation: dict[str, EKFAC | Diagonal]  # of P^(1/2) G P^(1/2)
    root_P: Float[Tensor, " value"]
    damping: dict[str, float]

    @classmethod
    def of(
        cls, layers: Sequence[Layer], curvature: dict[str, LayerCurvature], damping: dict[str, float], *, device: torch.device
    ) -> "DampedCurvature":
        """The curvature as the optimizer sees it, on `device`."""
        held = {layer.name: curvature[layer.name] for layer in layers}
        like = next(iter(held.values())).M.Lambda.new_empty(0, device=device)
        bases = basis_like(like, {name: (one.M.Q_A, one.M.Q_S) for name, one in held.items() if isinstance(one.M, EKFAC)})
        root_P = pack({name: one.root_P.to(device).expand_as(one.M.Lambda) for name, one in held.items()}, layers)
        approximation: dict[str, EKFAC | Diagonal] = {}
        for name, one in held.items():
            Lambda = one.M.Lambda.to(device)
            approximation[name] = EKFAC(*bases[name], Lambda) if name in bases else Diagonal(Lambda)
        return cls(layers, approximation, root_P, damping)

    def times(self, product: Product) -> Product:
        """Products with this matrix, made of products with G."""
        added = pack(
            {name: torch.full_like(held.Lambda, self.damping[name]) for name, held in self.approximation.items()}, self.layers
        )
        return lambda v: self.root_P * product(self.root_P * v) + added * v

    def approximate_inverse(self, v: Float[Tensor, "query value"]) -> Float[Tensor, "query value"]:
        """EK-FAC's answer: (Lambda + damping)^-1 in its eigenbasis."""
        matrices = unpack(v, self.layers)
        solved = {
            name: held.apply(damped_inverse(self.damping[name]), matrices[name]) for name, held in self.approximation.items()
        }
        return pack(solved, self.layers)


Solver = Callable[[DampedCurvature, Float[Tensor, "query value"]], Float[Tensor, "query value"]]


def respond(query: Gradients, curvature: DampedCurvature, solver: Solver, *, queries_at_once: int) -> Gradients:
    """The responses of all queries, solved `queries_at_once` together.

    Queries are solved at a size of about 1: the squares of a tiny gradient, as of a query that is classified surely, would be 0.
    """
    rows = pack(query, curvature.layers)
    units = torch.ldexp(torch.ones_like(rows[:, :1]), rows.abs().amax(dim=1, keepdim=True).frexp().exponent)
    blocks = [curvature.root_P * solver(curvature, curvature.root_P * block) for block in (rows / units).split(queries_at_once)]
    return unpack(units * torch.cat(blocks), curvature.layers)


@dataclass(frozen=True)
class SolvedDynamics:
    """A segment that answers with 1 / (s + w + 1 / (eta_bar K)), solved for all layers together, instead of F_r(s).

    From ASTRA-SOURCE (arXiv 2507.14740): like F_r it is `eta_bar K` at s + w = 0 and tends to 1 / (s + w). `decay` remains that
    of EK-FAC.
    """

    ekfac: SegmentDynamics
    respond: Callable[[Gradients], Gradients]

    @property
    def index(self) -> int:
        """The segment's number."""
        return self.ekfac.index

    def decay(self, query: Gradients) -> Gradients:
        """The query's gradient carried back to the start of the segment."""
        return self.ekfac.decay(query)
