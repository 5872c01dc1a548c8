"""Scores of documents for queries. Orientation and sign live here alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tda.gradients import project_queries
from tda.model import Layer
from tda.projection import Projection
from tda.segments import Segment
from tda.source import Gradients, SegmentDynamics, walk_back

Dot = Callable[[int, Float[Tensor, "query values"]], np.ndarray]
"""`dot(checkpoint, queries)`: (document, query) dot products with the stored rows of a checkpoint."""


@dataclass(frozen=True)
class Scores:
    """Predicted effect of documents on queries.

    Positive: training on the document is predicted to help the query, which is to lower its cost. A score of SOURCE or of
    influence is the predicted rise of the query's mean cost per token (nats) when the document is left out of training.
    """

    values: np.ndarray  # (query, document), float64
    query_ids: list[str]
    doc_ids: list[str]

    def aggregate(self, weights: np.ndarray) -> np.ndarray:
        """One score per document: the queries' scores weighted by `weights` (query), which sum to 1."""
        return weights @ self.values


def source_values(
    query: Gradients,
    dynamics: Sequence[SegmentDynamics],
    segments: Sequence[Segment],
    *,
    layers: Sequence[Layer],
    projections: Sequence[dict[str, Projection]],
    exposure: np.ndarray,
    dot: Dot,
) -> tuple[np.ndarray, list[float]]:
    """SOURCE scores (query, document), and the share of each segment's response that its projection keeps.

    Stored rows are gradients of a document's summed token loss; over `tokens_per_document` they are those of the training loss.
    """
    values: np.ndarray | float = 0.0
    kept = [0.0] * len(segments)
    for segment_dynamics, response in walk_back(query, dynamics):
        index = segment_dynamics.index
        segment = segments[index]
        u = project_queries(response, layers, projections[index])
        kept[index] = (u.square().sum() / sum(part.square().sum() for part in response.values())).item()
        received = exposure[:, index, None] / (len(segment.checkpoints) * segment.tokens_per_document)
        for checkpoint in segment.checkpoints:
            values = values + received * dot(checkpoint, u)
    return np.asarray(values).T, kept


def rotated_query(query: Gradients, layers: Sequence[Layer], projections: dict[str, Projection]) -> Gradients:
    """Full gradients in projected space, where factors were fitted there."""
    return {layer.name: projections[layer.name].apply(query[layer.name]) for layer in layers}


def cosines(dots: np.ndarray, row_norms: np.ndarray, query: Float[Tensor, "query values"]) -> np.ndarray:
    """(document, query) dot products divided by both norms; 0 where a norm is 0."""
    norms = row_norms[:, None] * torch.linalg.vector_norm(query, dim=1).double().numpy()
    return np.divide(dots, norms, out=np.zeros_like(norms), where=norms > 0)
