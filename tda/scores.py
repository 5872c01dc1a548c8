"""Scores of documents for queries: their orientation, sign and unit, and SOURCE's sum over checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tda.segments import Segment
from tda.source import Dynamics, Gradients, walk_back

ENSEMBLE = "+"  # joins the names of methods whose scores are averaged
Dot = Callable[[int, Gradients], np.ndarray]
"""`dot(checkpoint, response)`: (document, query) dot products of the queries' responses with the gradients of the documents'
summed losses at a checkpoint."""


@dataclass(frozen=True)
class Scores:
    """Predicted effects of documents on queries.

    A positive score means that training on the document is predicted to help the query, that is, to lower its cost. The unit of
    SOURCE and of influence functions is the rise of the query's mean cost per token (nats) when the document is left out.
    """

    values: np.ndarray  # (query, document), float64
    query_ids: list[str]
    doc_ids: list[str]

    def aggregate(self, weights: np.ndarray) -> np.ndarray:
        """One score per document: the mean over queries by `weights` (query), which sum to 1."""
        return weights @ self.values


def source_values(
    query: Gradients, dynamics: Sequence[Dynamics], segments: Sequence[Segment], *, exposure: np.ndarray, dot: Dot
) -> np.ndarray:
    """SOURCE scores (query, document); `exposure` is (document, segment).

    `dot` is with gradients of a document's summed loss. Dividing by `tokens_per_document` makes them gradients of the training
    loss, which is a mean over tokens.
    """
    values: np.ndarray | float = 0.0
    for segment_dynamics, response in walk_back(query, dynamics):
        segment = segments[segment_dynamics.index]
        received = received_per_checkpoint(segment, exposure)[:, None]
        for checkpoint in segment.checkpoints:
            values = values + received * dot(checkpoint, response)
    return np.asarray(values).T


def received_per_checkpoint(segment: Segment, exposure: np.ndarray) -> np.ndarray:
    """(document,) factors of the dot products at each of the segment's checkpoints; `exposure` is (document, segment)."""
    return exposure[:, segment.index] / (len(segment.checkpoints) * segment.tokens_per_document)


def cosines(dots: np.ndarray, row_norms: np.ndarray, query: Float[Tensor, "query values"]) -> np.ndarray:
    """(document, query) dot products divided by both norms; 0 where a norm is 0."""
    norms = row_norms[:, None] * torch.linalg.vector_norm(query, dim=1).double().cpu().numpy()
    return np.divide(dots, norms, out=np.zeros_like(norms), where=norms > 0)


def ensemble(members: Sequence[np.ndarray]) -> np.ndarray:
    """(query, document): the mean of several methods' scores.

    For every query each method is scaled to the same standard deviation over documents, the mean of theirs, so that all have an
    equal say in the order of the documents, whatever their units.
    """
    spreads = np.stack([values.std(axis=1, keepdims=True) for values in members])
    scales = np.divide(spreads.mean(axis=0), spreads, out=np.ones_like(spreads), where=spreads > 0)
    return np.mean([scale * values for scale, values in zip(scales, members, strict=True)], axis=0)
