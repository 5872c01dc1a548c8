"""`averaged_influence` of every document on the whole target set, from the artifacts of the pipeline.

The stage needs only the mean over all targets, so a few groups of targets are solved for instead of every target, and their
responses are summed. (One group would do, but block Krylov lets each group use the directions of the others.) Documents'
gradients are taken in full, in a pass of their own, because the projection of the stored rows keeps little of this response.
"""

import warnings
from dataclasses import replace

import numpy as np
import torch

from tda.artifacts import Workspace, read_json
from tda.averaged_influence import BLOCK_VALUES, around, at_mean_of, averaged_response, row_scores
from tda.config import Config
from tda.data import Documents
from tda.fitted import Fitted, Settings
from tda.gradients import QUERY_VALUES
from tda.parallel import device_of
from tda.recorded import load_run
from tda.source import Gradients
from tda.task import CausalLM
from tda.trajectory import Run

MOST_GROUPS, ROUNDS = 12, 6  # groups of targets, and rounds of block Krylov: with so few groups, more rounds cost little
SOLVER_TOKENS, SOLVER_BATCH_TOKENS = 8192, 1024  # in the Gauss-Newton matrix; its products need smaller batches than gradients


def target_influence(config: Config, workspace: Workspace, documents: Documents, queries: Documents) -> np.ndarray:
    """One score per document, for the measurement's mean over all predicted tokens of `queries`.

    The counterfactual has as many steps as the run, as the stage `retraining` has. A missing artifact is a FileNotFoundError.
    """
    settings = Settings.of(
        layers=config.curvature.layers,
        adam=config.curvature.adam,
        curvature_examples=config.curvature.num_documents,
        counterfactual_end=1.0,
        rounds=ROUNDS,
        solver_terms=SOLVER_TOKENS,
        batch_size=min(config.gradients.batch_tokens, SOLVER_BATCH_TOKENS),
        seed=config.curvature.seed,
    )
    steps = read_json(workspace.training, stage="train")["checkpoint_steps"]
    run = load_run(workspace, needs_moments=config.curvature.adam != "none", only=around(steps, settings.counterfactual_end))
    run = replace(run, model=run.model.to(device_of(config.compute)))  # the methods compute where the model is
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "attribute: scores follow")  # stage `curvature` has said so already
        return _scored(run, config, documents, queries, settings)


def _scored(run: Run, config: Config, documents: Documents, queries: Documents, settings: Settings) -> np.ndarray:
    fitted = Fitted(run, CausalLM(config.scores.measurement), documents, queries, settings)
    place = at_mean_of(fitted, range(len(run.checkpoints)))
    groups = grouped_gradients(place, queries.num_loss_tokens / queries.num_loss_tokens.sum())
    response = {name: G.sum(dim=0, keepdim=True) for name, G in averaged_response(place, groups).items()}
    return row_scores(place, response)[0]


def grouped_gradients(place: Fitted, weights: np.ndarray) -> Gradients:
    """The sums of `grouped` over all queries, with at most `QUERY_VALUES` values of query gradients in memory at once."""
    gradient = sum(layer.d_in * layer.d_out for layer in place.layers)
    size, num_groups = max(1, QUERY_VALUES // gradient), groups_for(len(weights), gradient=gradient)
    groups: Gradients = {}
    for start in range(0, len(weights), size):
        rows = np.arange(start, min(start + size, len(weights)))
        block = Fitted(place.run, place.task, place.train, place.queries.select(rows), place.settings, embeddings=True)
        for name, part in grouped(block.query_gradients, weights, rows, num_groups=num_groups).items():
            groups[name] = groups[name] + part if name in groups else part
    return groups


def groups_for(num_queries: int, *, gradient: int) -> int:
    """How many groups the queries are divided into, for gradients of `gradient` values: as many as can be solved together.

    More would not help, as groups that are solved apart share no directions. On the default model one group gives nearly the
    scores of twelve (EXPERIMENTS.md).
    """
    return min(MOST_GROUPS, num_queries, max(1, BLOCK_VALUES // gradient))


def grouped(query: Gradients, weights: np.ndarray, rows: np.ndarray, *, num_groups: int) -> Gradients:
    """Sums over groups of weighted query gradients (group, d_out, d_in); query i is in group i modulo `num_groups`.

    `query` has the gradients of the queries numbered `rows`, `weights` (query) is for all queries.
    """
    places = torch.from_numpy(rows)
    shares = torch.zeros(num_groups, len(places))
    shares[places % num_groups, torch.arange(len(places))] = torch.from_numpy(weights)[places].float()
    return {name: torch.einsum("gq,qoi->goi", shares.to(G), G) for name, G in query.items()}
