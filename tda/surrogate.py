"""Scores by retraining a surrogate: a kernel machine in the model's own tangent space, on random halves of the data.

Influence functions and SOURCE linearise around what the run has become with every row in it: a row that was learned by heart has
no gradient left, so that what it taught cannot be seen any more, and the curvature between layers is left out. Here each row's
effect is worked out where it was not trained on, and without a curvature approximation:

1. K, the tangent kernel of rows and queries, exact over all tracked layers, averaged over the segments of the run with their
   learning rates (the path kernel of Domingos 2020, arXiv 2012.00152).
2. Kernel machines fitted to the training loss on random halves of the rows. Their ridge is 1/(eta_bar K) plus the weight decay,
   what SOURCE's damping is for a run on half the data, times `ridge_scale`.
3. For every row outside the half, the closed-form effect of adding it on the outputs at every query.
4. The score is minus that, along the derivative of the query's cost, averaged over the machines' own predictions: where the cost
   is not smooth, as |error| is, its slope is that of its mean over such runs, not that of one run's accident.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda.data import Examples, TensorBatch
from tda.fitted import Fitted
from tda.kernel import Roots, rank_one_roots, tangent_kernel
from tda.kernel_machine import Machine, fit_softmax, fit_squares, softmax_response, square_response
from tda.task import Classification, Regression, Task

HALVES = 2  # of every split


def surrogate_scores(run: Fitted) -> np.ndarray:
    """(query, row) scores: the predicted rise of the query's cost when the row is left out of training on half the data.

    Raises:
        ValueError: the task is neither classification nor regression, or there are fewer than four rows.
    """
    train, queries, task = run.train, run.queries, run.task
    if not isinstance(task, (Classification, Regression)) or not isinstance(train, Examples) or len(train) < 2 * HALVES:
        raise ValueError(
            f"surrogate: needs Classification or Regression on four examples or more; got {type(task).__name__} on {len(train)} "
            "rows; use source, which takes every task"
        )
    K, num_outputs = path_kernel(run)
    return retrained_effects(
        K,
        train,
        queries,
        task=task,
        num_outputs=num_outputs,
        ridge=run.settings.ridge_scale * (2 / float(run.rates.sum()) + run.run.optimizer.weight_decay),
        splits=run.settings.splits,
        seed=run.settings.seed,
    )


def path_kernel(run: Fitted) -> tuple[Float[Tensor, "point point"], int]:
    """The tangent kernel of rows, then queries, averaged over the segments by their learning rate; and the number of outputs.

    Each segment is seen at the checkpoint nearest to its middle, through the optimizer's preconditioner there.
    """
    points = Examples(torch.cat([run.train.x, run.queries.x]), torch.cat([run.train.y, run.queries.y]))
    total = sum(segment.time for segment in run.segments)
    K: Tensor | float = 0.0
    for segment in run.segments:
        middle = (segment.first_step - 1 + segment.last_step) / 2
        index = min(segment.checkpoints, key=lambda index: abs(run.run.checkpoints[index].step - middle))
        here, outputs = tangent_kernel(
            run.model(index), run.layers, points, task=run.task, batch_size=run.batch_size, roots=_roots(run, index)
        )
        K = K + segment.time / total * here
    return K, outputs.shape[1]


def _roots(run: Fitted, index: int) -> dict[str, Roots] | None:
    if run.run.optimizer.kind != "adamw" or run.settings.adam == "none":
        return None
    return {name: rank_one_roots(v) for name, v in run.second_moments(index).items()}


def retrained_effects(
    K: Float[Tensor, "point point"],
    train: Examples,
    queries: Examples,
    *,
    task: Task,
    num_outputs: int,
    ridge: float,
    splits: int,
    seed: int,
) -> np.ndarray:
    """Scores (query, row) from the kernel of rows, then queries; each of `splits` random splits gives every row one effect."""
    num_rows, num_queries = len(train), len(queries)
    random = np.random.default_rng(seed)
    of_queries = slice(-num_queries, None)
    predictions: list[Tensor] = []
    effects: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, k(q, z) / (1 + w k(z, z)), r_z
    for _ in range(splits):
        order = torch.from_numpy(random.permutation(num_rows))
        halves = order.chunk(HALVES)
        for inside, outside in (halves, halves[::-1]):
            points = torch.cat([outside, torch.arange(num_rows, num_rows + num_queries)])
            machine = _fit(K[inside][:, inside], K[inside][:, points], train.y[inside], task, num_outputs, ridge)
            of_rows = slice(0, len(outside))
            r, w = _response(machine.predictions[of_rows], train.y[outside], task)
            k = machine.posterior(K[num_rows:][:, outside], of_queries, of_rows)
            along = machine.posterior_diagonal(K.diagonal()[outside], of_rows)
            effects.append((outside, k / (1 + w * along), r))
            predictions.append(machine.predictions[of_queries])
    slopes = torch.stack([_cost_slopes(f, queries, task) for f in predictions]).mean(dim=0)
    scores = torch.zeros(num_queries, num_rows, dtype=torch.float64)
    for rows, k, r in effects:
        scores[:, rows] -= (k * (slopes @ r.T)).double() / splits
    return scores.numpy()


def _fit(K_S: Tensor, K_S_point: Tensor, y: Tensor, task: Task, num_outputs: int, ridge: float) -> Machine:
    if isinstance(task, Classification):
        return fit_softmax(K_S, y, K_S_point, ridge=ridge, num_classes=num_outputs)
    return fit_squares(K_S, y.reshape(len(y), -1).to(K_S.dtype), K_S_point, ridge=ridge)


def _response(f: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    if isinstance(task, Classification):
        return softmax_response(f, y)
    return square_response(f, y.reshape(len(y), -1).to(f.dtype))


def _cost_slopes(f: Float[Tensor, "query output"], queries: Examples, task: Task) -> Float[Tensor, "query output"]:
    """The derivative of every query's cost by its outputs."""
    f = f.detach().requires_grad_()
    batch = TensorBatch(list(range(len(f))), f, queries.y)
    total, _costs = task.costs(nn.Identity(), batch, weights=f.new_ones(len(f)))
    return torch.autograd.grad(total, f)[0]
