"""SOURCE (Bae et al. 2024, arXiv 2405.12186, section 3): a query's gradient walks backwards through the segments of training.

    q_L = gradient of the query's cost at the final checkpoint
    for segment l = L, ..., 1:   u_l = respond_l(q_l)     q_{l-1} = decay_l(q_l)
    score(n) = sum over l of  exposure_l(n) * mean over the segment's checkpoints of < u_l, G_n >

In the paper `exposure_l(n)` is 1/N for every document. The score is the predicted rise of the query's cost when document n is
left out of training, so positive means that the document helps. It is linear in `G_n` and in the query's gradient.

A segment is whatever has `respond` and `decay` (`Dynamics`). With EK-FAC they apply the functions F_r and F_S of `spectral.py` to
each layer; `preconditioner.py` says how AdamW changes that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from tda.preconditioner import Curvature

Gradients = dict[str, Tensor]  # by layer, (query, d_out, d_in)


@runtime_checkable
class Dynamics(Protocol):
    """What a segment does to a query's gradient."""

    @property
    def index(self) -> int:
        """The segment's number."""
        ...

    def respond(self, query: Gradients) -> Gradients:
        """The query's sensitivity to a gradient that acts throughout the segment."""
        ...

    def decay(self, query: Gradients) -> Gradients:
        """The query's gradient carried back to the start of the segment."""
        ...


@dataclass(frozen=True)
class SegmentDynamics:
    """`Dynamics` by EK-FAC. Curvature moves to the query's device one layer at a time: a GPU may not have room for all of it."""

    index: int
    curvature: dict[str, Curvature]
    time: float  # eta_bar K
    weight_decay: float

    def respond(self, query: Gradients) -> Gradients:
        """The query's sensitivity to a gradient that acts throughout the segment."""
        return {
            name: layer.to(query[name].device).respond(query[name], time=self.time, weight_decay=self.weight_decay)
            for name, layer in self.curvature.items()
        }

    def decay(self, query: Gradients) -> Gradients:
        """The query's gradient carried back to the start of the segment."""
        return {
            name: layer.to(query[name].device).decay(query[name], time=self.time, weight_decay=self.weight_decay)
            for name, layer in self.curvature.items()
        }


def walk_back(query: Gradients, segments: Sequence[Dynamics]) -> Iterator[tuple[Dynamics, Gradients]]:
    """Every segment, last to first, with the query's response there."""
    for segment in reversed(segments):
        yield segment, segment.respond(query)
        query = segment.decay(query)
