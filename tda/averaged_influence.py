"""Influence functions where the counterfactual training ends, at weights averaged over the trajectory there.

    score(n) = 1/N < (G + (w + 4/(eta_bar K)) P^-1)^-1 q , g_n >         q, G, g_n at the mean of the weights around that place

It differs from EK-FAC influence at the last checkpoint in three things (EXPERIMENTS.md says what each is worth):

- Place. Training on a half of the rows for as many epochs takes half the steps, and ends near where the run was at half its
  length. A score linearised there predicts it; at the end of the run, rows that were learned by heart have no gradient left.
  `counterfactual_end` says where: 0.5 for a half of the steps, 1 for retraining with as many steps as the run took.
- Weights. One iterate is the expected one plus the noise of its last batches, which gradients and slopes of costs feel in full.
  The mean over a third of the run has little of it.
- Curvature. The whole Gauss-Newton matrix of all tracked layers, P its optimizer's preconditioner, with SOURCE's damping, in
  place of EK-FAC's blocks: queries are solved together by block Krylov, from EK-FAC's answer, on a few rows.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from tda.fitted import Fitted
from tda.iterative import block_krylov
from tda.solve import DampedCurvature, respond
from tda.source import Gradients
from tda.trajectory import at_mean

WINDOW = 1 / 3  # of the run, around the counterfactual's end
BLOCK_VALUES = 2**26  # numbers of the queries that are solved together: about a dozen times as many are held


def averaged_influence_scores(fitted: Fitted) -> np.ndarray:
    """(query, row) scores: the predicted rise of the query's mean cost when the row is left out of training."""
    steps = [checkpoint.step for checkpoint in fitted.run.checkpoints]
    place = at_mean_of(fitted, around(steps, fitted.settings.counterfactual_end))
    return rows_under(place, averaged_response(place, place.query_gradients))


def at_mean_of(fitted: Fitted, checkpoints: Sequence[int]) -> Fitted:
    """The run as one segment, seen at the mean weights of the stretches of training that end at these checkpoints, by index."""
    num_rows = math.ceil(fitted.settings.solver_terms / fitted.train.num_loss_tokens.mean())
    settings = replace(fitted.settings, num_segments=1, solver_examples=num_rows)
    return Fitted(at_mean(fitted.run, checkpoints), fitted.task, fitted.train, fitted.queries, settings)


def averaged_response(place: Fitted, query: Gradients) -> Gradients:
    """(G + (w + damping) P^-1)^-1 of query gradients at that place."""
    (segment,) = place.segments
    (dynamics,) = place.dynamics
    damping = dict.fromkeys(dynamics.curvature, dynamics.weight_decay + place.settings.damping_scale / segment.time)
    curvature = DampedCurvature.of(place.layers, dynamics.curvature, damping, device=place.device)
    product = place.product(segment, segment.checkpoints)

    def solve(curvature: DampedCurvature, q: Tensor) -> Tensor:
        return block_krylov(curvature.times(product), q, precondition=curvature.approximate_inverse, rounds=place.settings.rounds)

    values = sum(layer.d_out * layer.d_in for layer in place.layers)
    return respond(query, curvature, solve, queries_at_once=max(1, BLOCK_VALUES // values))


def rows_under(place: Fitted, response: Gradients) -> np.ndarray:
    """(query, row) scores from the responses."""
    (segment,) = place.segments
    received = place.exposure / segment.tokens_per_document
    return (received * place.dot(0, response)).T


def around(steps: Sequence[int], end: float) -> list[int]:
    """The checkpoints at `steps`, by index, whose stretches of training lie in the third around `end`, a part of the run."""
    ends = np.array([0, *steps])
    centres = (ends[:-1] + ends[1:]) / 2 / ends[-1]
    start = min(max(end - WINDOW / 2, 0), 1 - WINDOW)
    inside = np.flatnonzero((centres > start) & (centres < start + WINDOW))
    return inside.tolist() or [int(np.abs(centres - (start + WINDOW / 2)).argmin())]
