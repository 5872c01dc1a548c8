"""Attribution methods, each a function of a fitted run that gives (query, row) scores: positive helps the query.

Scores of SOURCE, influence functions and replay are the predicted rise of the query's mean cost per term when the row is left out
of training; those of the others have no unit.
"""

from collections.abc import Callable

import numpy as np
import torch

from tda.baselines import random_scores, token_bm25_scores
from tda.data import Documents
from tda.fitted import Fitted
from tda.influence import precondition
from tda.scores import cosines, source_values

Method = Callable[[Fitted], np.ndarray]


def gradient_dot(run: Fitted) -> np.ndarray:
    """Dot products of gradients at the last checkpoint (Charpiat et al. 2019)."""
    return run.dot(run.segments[-1], len(run.run.checkpoints) - 1, run.query_gradients).T


def gradient_cosine(run: Fitted) -> np.ndarray:
    """Cosines of gradients at the last checkpoint (Hanawa et al. 2021): blind to how long a gradient is."""
    query = torch.cat([run.query_gradients[layer.name].flatten(1) for layer in run.layers], dim=1)
    return cosines(gradient_dot(run).T, run.norms(len(run.run.checkpoints) - 1), query).T


def tracin(run: Fitted) -> np.ndarray:
    """TracInCP (Pruthi et al. 2020, equation 3): dot products at every checkpoint, weighted by the learning rate that followed.

    A row counts by the share of each segment's learning rate that went through it.
    """
    total: np.ndarray | float = 0.0
    for segment in run.segments:
        received = segment.time * run.exposure[:, segment.index] / (len(segment.checkpoints) * segment.tokens_per_document)
        for checkpoint in segment.checkpoints:
            total = total + received[:, None] * run.dot(segment, checkpoint, run.query_gradients_at(checkpoint))
    return np.asarray(total).T


def ekfac_influence(run: Fitted) -> np.ndarray:
    """EK-FAC influence functions at the last checkpoint (Grosse et al. 2023, arXiv 2308.03296)."""
    last, final = run.segments[-1], len(run.run.checkpoints) - 1
    factors = run.segment_factors(last, [final])
    conditioned = precondition(run.query_gradients, factors.plain, damping=run.settings.damping)
    return run.dot(last, final, conditioned).T / (len(run.train) * last.tokens_per_document)


def source(run: Fitted) -> np.ndarray:
    """SOURCE (Bae et al. 2024, arXiv 2405.12186), with the optimizer as a preconditioner (`preconditioner.py`)."""
    return source_values(run.query_gradients, run.dynamics, run.segments, exposure=run.exposure, dot=run.dot)


def random(run: Fitted) -> np.ndarray:
    """A uniform draw per row and query."""
    return np.stack([random_scores(run.train.ids, seed=run.settings.seed + query) for query in range(len(run.queries))])


def bm25(run: Fitted) -> np.ndarray:
    """BM25 of documents for each query, a token being a word.

    Raises:
        ValueError: the data are not documents.
    """
    if not isinstance(run.train, Documents) or not isinstance(run.queries, Documents):
        raise ValueError("bm25: the data have no tokens; expected Documents; leave the method out")
    return token_bm25_scores(run.train.tokens, run.queries.tokens)


METHODS: dict[str, Method] = {
    "gradient_dot": gradient_dot,
    "gradient_cosine": gradient_cosine,
    "tracin": tracin,
    "ekfac_influence": ekfac_influence,
    "source": source,
    "bm25": bm25,
    "random": random,
}
