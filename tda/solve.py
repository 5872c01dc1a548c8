"""Responses of queries to the damped Gauss-Newton matrix of all tracked layers together, by iteration from EK-FAC's answer.

    (P^(1/2) G P^(1/2) + damping) x = P^(1/2) q       response = P^(1/2) x

`G` is that of `ggn.py`, P the optimizer's preconditioner (1: influence functions), `damping` a number per layer. EK-FAC sees one
layer at a time; that is most of what it loses (METHODS: arXiv 2509.23437), and what is won back here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tda.ekfac import EKFAC, basis_like
from tda.ggn import Product, pack, unpack
from tda.model import Layer
from tda.preconditioner import LayerCurvature
from tda.source import Gradients, SegmentDynamics
from tda.spectral import damped_inverse


@dataclass(frozen=True)
class DampedCurvature:
    """P^(1/2) G P^(1/2) + damping, given products with G; and its approximation by EK-FAC."""

    layers: Sequence[Layer]
    approximation: dict[str, EKFAC]  # of P^(1/2) G P^(1/2)
    root_P: Float[Tensor, " value"]
    damping: dict[str, float]

    @classmethod
    def of(
        cls, layers: Sequence[Layer], curvature: dict[str, LayerCurvature], damping: dict[str, float], *, device: torch.device
    ) -> "DampedCurvature":
        """The curvature that an optimizer sees, on `device`."""
        held = {layer.name: curvature[layer.name] for layer in layers}
        like = next(iter(held.values())).M.Lambda.new_empty(0, device=device)
        bases = basis_like(like, {name: (one.M.Q_A, one.M.Q_S) for name, one in held.items()})
        root_P = pack({name: one.root_P.to(device).expand_as(one.M.Lambda) for name, one in held.items()}, layers)
        return cls(layers, {name: EKFAC(*bases[name], one.M.Lambda.to(device)) for name, one in held.items()}, root_P, damping)

    def times(self, product: Product) -> Product:
        """The product with it, from the product with G."""
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
    """The responses of queries, a few at a time."""
    rows = pack(query, curvature.layers)
    blocks = [curvature.root_P * solver(curvature, curvature.root_P * block) for block in rows.split(queries_at_once)]
    return unpack(torch.cat(blocks), curvature.layers)


@dataclass(frozen=True)
class SolvedDynamics:
    """A segment whose F_r(s) is 1 / (s + w + 1 / (eta_bar K)), solved for all layers together; F_S stays EK-FAC's.

    ASTRA-SOURCE (arXiv 2507.14740): both functions are `eta_bar K` at s + w = 0 and 1/(s + w) far from it.
    """

    ekfac: SegmentDynamics
    respond: Callable[[Gradients], Gradients]

    @property
    def index(self) -> int:
        """The segment's number."""
        return self.ekfac.index

    def decay(self, query: Gradients) -> Gradients:
        """The query seen from the segment's beginning."""
        return self.ekfac.decay(query)
