"""SOURCE: a query walked backwards through the segments of training (arXiv 2405.12186, section 3).

    q_L = gradient of the query at the final checkpoint
    for segment l = L, ..., 1:   u_l = respond_l(q_l)     q_{l-1} = decay_l(q_l)
    score(n) = sum over l of  exposure_l(n) * mean over the segment's checkpoints of < u_l, G_n >

`exposure_l(n)` is 1/N in the paper. Removing document n moves the weights by `sum_l exposure_l decay... respond_l G_n`, so the
score is the predicted rise of the query's cost when the document is left out: positive helps. Linear in `G_n`, and in the query.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from tda.preconditioner import Curvature

Gradients = dict[str, Tensor]  # by layer, (query, d_out, d_in)


@runtime_checkable
class Dynamics(Protocol):
    """What a segment does to a query."""

    @property
    def index(self) -> int:
        """The segment's number."""
        ...

    def respond(self, query: Gradients) -> Gradients:
        """How the query feels a gradient that acts all through the segment."""
        ...

    def decay(self, query: Gradients) -> Gradients:
        """The query seen from the segment's beginning."""
        ...


@dataclass(frozen=True)
class SegmentDynamics:
    """`Dynamics`, layer by layer; curvature comes to where the query is one layer at a time, since a GPU may not hold all."""

    index: int
    curvature: dict[str, Curvature]
    time: float  # eta_bar K
    weight_decay: float

    def respond(self, query: Gradients) -> Gradients:
        """How the query feels a gradient that acts all through the segment."""
        return {
            name: layer.to(query[name].device).respond(query[name], time=self.time, weight_decay=self.weight_decay)
            for name, layer in self.curvature.items()
        }

    def decay(self, query: Gradients) -> Gradients:
        """The query seen from the segment's beginning."""
        return {
            name: layer.to(query[name].device).decay(query[name], time=self.time, weight_decay=self.weight_decay)
            for name, layer in self.curvature.items()
        }


def walk_back(query: Gradients, segments: Sequence[Dynamics]) -> Iterator[tuple[Dynamics, Gradients]]:
    """Every segment, the last one first, with the query's response there."""
    for segment in reversed(segments):
        yield segment, segment.respond(query)
        query = segment.decay(query)
