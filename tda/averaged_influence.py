"""Influence functions at mean weights, around the point of the run where a retraining would end.

    score(n) = 1/N < (G + (w + c/(eta_bar K)) P^-1)^-1 q , g_n >         q, G, g_n at the mean of the weights around that point

It differs from EK-FAC influence at the last checkpoint in four ways (EXPERIMENTS.md says what each is worth):

- Where. A retraining on half the rows for the same epochs takes half the steps, so it ends near where the run was at half its
  length, and scores linearised there predict it better. At the end of the run, memorised rows have no gradient left.
  `counterfactual_end` sets the point: 0.5 for half the steps, 1 for a retraining with as many steps as the run.
- Weights. A single iterate carries the noise of its last batches, which its gradients show in full. The mean over a third of the
  run carries little of it.
- Curvature. Instead of EK-FAC's blocks, the Gauss-Newton matrix G of all tracked layers, preconditioned by the optimizer's P and
  damped as SOURCE implies, times c (`damping_scale`). All queries are solved together by block Krylov, from EK-FAC's answer,
  with G on a few rows. Each can use the directions of the others, so its scores depend a little on which they are.
- Weights that count. Embeddings too, and a head that shares its weight with one. The solver starts from a diagonal there: EK-FAC
  of a vocabulary would be too large.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from tda.factors import SegmentFactors
from tda.fitted import Fitted
from tda.iterative import block_krylov
from tda.scores import received_per_checkpoint
from tda.solve import DampedCurvature, respond
from tda.source import Gradients
from tda.trajectory import at_mean

WINDOW = 1 / 3  # the part of the run, around the counterfactual's end, whose weights are averaged
BLOCK_VALUES = 2**26  # values of the queries that are solved together; the solver holds about a dozen times as many


def averaged_influence_scores(fitted: Fitted) -> np.ndarray:
    """(query, row) scores: the predicted rise of the query's mean cost when the row is left out of training."""
    steps = [checkpoint.step for checkpoint in fitted.run.checkpoints]
    place = at_mean_of(fitted, around(steps, fitted.settings.counterfactual_end))
    return row_scores(place, averaged_response(place, place.query_gradients))


def at_mean_of(fitted: Fitted, checkpoints: Sequence[int], *, factors: Sequence[SegmentFactors] = ()) -> Fitted:
    """The run as one segment, at its mean weights over the stretches of training that end at these checkpoints (indices).

    The solver starts from `factors`, if they are given, and otherwise from EK-FAC there.
    """
    num_rows = math.ceil(fitted.settings.solver_terms / fitted.train.num_loss_tokens.mean())
    settings = replace(fitted.settings, num_segments=1, solver_examples=num_rows)
    run = at_mean(fitted.run, checkpoints)
    return Fitted(run, fitted.task, fitted.train, fitted.queries, settings, embeddings=True, factors=factors)


def averaged_response(place: Fitted, query: Gradients) -> Gradients:
    """(G + (w + damping) P^-1)^-1 q for query gradients q, with the curvature of `place`, as `at_mean_of` gives it."""
    (segment,) = place.segments
    (dynamics,) = place.dynamics
    rate = dynamics.weight_decay + place.settings.damping_scale / segment.time
    if not rate:
        raise ValueError(
            "averaged_influence: damping_scale is 0 and the run has no weight decay, so that there may be no answer; expected "
            "one of them above 0"
        )
    damping = dict.fromkeys(dynamics.curvature, rate)
    curvature = DampedCurvature.of(place.layers, dynamics.curvature, damping, device=place.device)
    product = place.product(segment, segment.checkpoints)

    def solve(curvature: DampedCurvature, q: Tensor) -> Tensor:
        return block_krylov(curvature.times(product), q, precondition=curvature.approximate_inverse, rounds=place.settings.rounds)

    values = sum(layer.d_out * layer.d_in for layer in place.layers)
    return respond(query, curvature, solve, queries_at_once=max(1, BLOCK_VALUES // values))


def row_scores(place: Fitted, response: Gradients) -> np.ndarray:
    """(query, row) scores from responses to the queries."""
    (segment,) = place.segments
    return received_per_checkpoint(segment, place.exposure) * place.dot(0, response).T


def around(steps: Sequence[int], end: float) -> list[int]:
    """The indices of the checkpoints at `steps` whose stretches of training lie in the `WINDOW` around `end` (0 to 1)."""
    ends = np.array([0, *steps])
    centres = (ends[:-1] + ends[1:]) / 2 / ends[-1]
    start = min(max(end - WINDOW / 2, 0), 1 - WINDOW)
    inside = np.flatnonzero((centres > start) & (centres < start + WINDOW))
    return inside.tolist() or [int(np.abs(centres - (start + WINDOW / 2)).argmin())]
