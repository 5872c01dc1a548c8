"""The documents with the highest and the lowest scores for a text, found in the store.

By averaged influence, the stored rows of the last checkpoint name candidates, and the scores of these are taken from their full
gradients. By SOURCE, scores are those of the rows. In a large store, sketches of the rows find what is scored.
"""

from dataclasses import replace

import numpy as np
from torch import Tensor

from tda.artifacts import Workspace
from tda.config import Config
from tda.data import Documents
from tda.gradients import project_queries
from tda.nearest import Extremes, extremes, extremes_of
from tda.row_products import dot_scores_at
from tda.scores import received_per_checkpoint
from tda.scoring import Attribution, mean_gradient, store_dot
from tda.sketch import open_sketch
from tda.store import open_sealed
from tda.stored_rows import stored_bytes
from tda.target_influence import ANSWER, mean_place, mean_response

CANDIDATES = 512  # documents of the highest and of the lowest scores by rows, whose gradients are taken in full
SKETCHED_BYTES = 2**30  # of stored rows from which on sketches are used; scoring fewer rows completely takes no longer

Part = tuple[int, np.ndarray, Tensor]
"""A checkpoint, documents' factors, and a vector (1, values): what the rows of the checkpoint add to scores."""


def top_documents(config: Config, workspace: Workspace, attribution: Attribution, text: Documents, *, top: int) -> Extremes:
    """The `top` most helpful and most harmful training documents for the measurement's mean over all predicted tokens of `text`.

    By averaged influence if `scores.averaged_influence` is on, and otherwise by SOURCE.
    """
    if config.scores.averaged_influence:
        return _by_averaged_influence(config, workspace, attribution, text, top=top)
    parts = attribution.by_checkpoint(mean_gradient(config, workspace, attribution, text))
    return _by_rows(config, workspace, attribution, list(parts), top=top)


def _by_averaged_influence(
    config: Config, workspace: Workspace, attribution: Attribution, text: Documents, *, top: int
) -> Extremes:
    documents = attribution.documents
    place = mean_place(config, workspace, documents, text, ANSWER)
    (segment,) = place.segments
    response, received = mean_response(place), received_per_checkpoint(segment, place.exposure)
    u = project_queries(response, attribution.factors[-1].layers, attribution.projections[-1])
    parts = [(attribution.final_checkpoint, received, u)]
    found = _by_rows(config, workspace, attribution, parts, top=max(top, CANDIDATES))
    candidates = np.union1d(found.highest, found.lowest)
    scores = received[candidates] * place.dot(0, response, documents.select(candidates))[:, 0]
    best = extremes_of(scores, top=top)
    return replace(best, highest=candidates[best.highest], lowest=candidates[best.lowest])


def _by_rows(config: Config, workspace: Workspace, attribution: Attribution, parts: list[Part], *, top: int) -> Extremes:
    """The extremes of the sums, over `parts`, of factor times row times vector."""
    manifests = [attribution.manifests[checkpoint] for checkpoint, _received, _u in parts]
    if sum(held["rows"] * stored_bytes(held["dim"], held["dtype"]) for held in manifests) >= SKETCHED_BYTES:
        return _by_sketches(workspace, attribution, parts, top=top)
    dot = store_dot(config, workspace, attribution, attribution.documents.ids)
    return extremes_of(sum(received * dot(checkpoint, u)[:, 0] for checkpoint, received, u in parts), top=top)


def _by_sketches(workspace: Workspace, attribution: Attribution, parts: list[Part], *, top: int) -> Extremes:
    """The same, found by sketches of the rows and then scored exactly.

    A missing sketch is made, which takes one pass over the rows of its checkpoint.
    """
    documents = attribution.documents.ids
    opened = []
    approximate, squares = np.zeros(len(documents)), np.zeros(len(documents))
    for checkpoint, received, response in parts:
        u = response.float().cpu().numpy()
        table = open_sealed(workspace.store, attribution.manifests[checkpoint])
        sketch = open_sketch(table, attribution.manifests[checkpoint], documents)
        approximate += received * sketch.scores(u[0])
        squares += (received * np.linalg.norm(u) * sketch.norms.numpy()) ** 2
        opened.append((received, table, sketch.places.numpy(), u))

    def exact(rows: np.ndarray) -> np.ndarray:
        asked = [documents[row] for row in rows.tolist()]
        dots = (received[rows] * dot_scores_at(table, places[rows], asked, u)[:, 0] for received, table, places, u in opened)
        return sum(dots, start=np.zeros(len(rows)))

    return extremes(approximate, np.sqrt(squares), exact, top=top)
