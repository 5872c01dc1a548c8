"""Averaged influence from the pipeline's artifacts: for the target set, for a text, and of documents that training has not seen.

Only the mean over all targets is needed, so one system is solved, for their mean gradient. The solver starts from the factors of
the last segment. Documents' gradients are taken in full, in a pass of their own, because the projection of the stored rows keeps
little of this response.
"""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch

from tda.artifacts import Workspace, read_json
from tda.averaged_influence import around, at_mean_of, averaged_response, row_scores
from tda.config import Config
from tda.data import Documents
from tda.dynamics import load_segments
from tda.factors import load_factors
from tda.fitted import Fitted, Settings
from tda.gradients import QUERY_VALUES, weighted_sum
from tda.parallel import device_of
from tda.recorded import load_run
from tda.source import Gradients
from tda.task import CausalLM

BATCH_TOKENS = 1024  # products with the Gauss-Newton matrix need smaller batches than gradients


@dataclass(frozen=True)
class Effort:
    """How exactly a response is solved for."""

    rounds: int  # of conjugate gradients
    tokens: int  # predicted tokens in the Gauss-Newton matrix


DECISION = Effort(rounds=12, tokens=8192)
ANSWER = Effort(rounds=6, tokens=4096)  # while somebody waits: a quarter of the cost, and nearly the same scores (EXPERIMENTS.md)


def target_influence(config: Config, workspace: Workspace, documents: Documents, queries: Documents) -> np.ndarray:
    """One score per training document, for the measurement's mean over all predicted tokens of `queries`.

    A missing artifact is a FileNotFoundError.
    """
    place = mean_place(config, workspace, documents, queries, DECISION)
    return row_scores(place, mean_response(place))[0]


def influence_of_new(
    config: Config, workspace: Workspace, documents: Documents, queries: Documents, *, new: Documents
) -> np.ndarray:
    """The scores of `new` documents, as if training had seen each as often as the average of its `documents`."""
    place = mean_place(config, workspace, documents, queries, DECISION)
    (segment,) = place.segments
    return place.dot(0, mean_response(place), new)[:, 0] / (len(documents) * segment.tokens_per_document)


def mean_place(config: Config, workspace: Workspace, documents: Documents, queries: Documents, effort: Effort) -> Fitted:
    """The run at its mean weights around the end of a retraining with as many steps, as the stage `retraining` has."""
    settings = Settings.of(
        layers=config.curvature.layers,
        adam=config.curvature.adam,
        curvature_examples=config.curvature.num_documents,
        counterfactual_end=1.0,
        rounds=effort.rounds,
        solver_terms=effort.tokens,
        batch_size=min(config.gradients.batch_tokens, BATCH_TOKENS),
        seed=config.curvature.seed,
    )
    steps = read_json(workspace.training, stage="train")["checkpoint_steps"]
    run = load_run(workspace, needs_moments=config.curvature.adam != "none", only=around(steps, settings.counterfactual_end))
    run = replace(run, model=run.model.to(device_of(config.compute)))  # the methods compute where the model is
    fitted = Fitted(run, CausalLM(config.scores.measurement), documents, queries, settings)
    held = load_factors(workspace.curvature(load_segments(workspace)[-1].index))
    return at_mean_of(fitted, range(len(run.checkpoints)), factors=[] if held.projections else [held])


def mean_response(place: Fitted) -> Gradients:
    """The response (1, d_out, d_in) to the mean over all predicted tokens of the queries. Scores are linear in a query."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "attribute: scores follow")  # stage `curvature` has said so already
        size = max(1, QUERY_VALUES // sum(layer.d_in * layer.d_out for layer in place.layers))
    queries, num = place.queries, len(place.queries)
    parts = (range(start, min(start + size, num)) for start in range(0, num, size))
    gradients = ((place.query_gradients_at(-1, queries.select(rows)), rows) for rows in parts)
    weights = torch.from_numpy(queries.num_loss_tokens / queries.num_loss_tokens.sum())
    return averaged_response(place, weighted_sum(gradients, weights))
