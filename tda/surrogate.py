"""Scores from a surrogate that is cheap to retrain: kernel machines in the model's tangent kernel, on random halves of the rows.

Influence functions and SOURCE linearise around a model that was trained on every row. A memorised row has no gradient left there,
so its effect cannot be seen; and their curvature ignores what couples layers. Here a row's effect is computed for machines that
were not trained on it, and without approximating the curvature:

1. The tangent kernel K of rows and queries, exact over all tracked layers, averaged over the run (the path kernel of Domingos
   2020, arXiv 2012.00152) up to where training on half the rows would end (`counterfactual_end`).
2. Kernel machines, fitted to the training loss on random halves of the rows, each weighted by how often the run drew it.
   Their ridge is `ridge_scale` times (2/(eta_bar K) + weight decay), SOURCE's damping for a run on half the data, which
   takes half the steps.
3. For every row outside a half, the effect of adding it on the outputs at every query, in closed form (`kernel_machine.py`).
4. The score is minus that effect times the derivative of the query's cost by its outputs. The derivative is averaged over the
   machines, because a cost with a kink, such as |error|, has a slope in the mean over runs that no single run shows.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda.data import Examples, TensorBatch
from tda.fitted import Fitted
from tda.kernel import Roots, rank_one_roots, tangent_kernel
from tda.kernel_machine import SoftmaxMachine, SquaresMachine
from tda.task import Classification, Regression
from tda.usage import free_memory

HALVES = 2  # of every split
QUERIES_AT_ONCE = 512


def surrogate_scores(fitted: Fitted) -> np.ndarray:
    """(query, row) scores: the predicted rise of the query's cost when the row is left out of training on half the data.

    Raises:
        ValueError: the task is neither `Classification` nor `Regression` (a subclass may have another loss), the run drew fewer
            than four rows, or memory is too small.
    """
    train, queries, task = fitted.train, fitted.queries, fitted.task
    num_seen = int((fitted.shares > 0).sum())
    if type(task) not in (Classification, Regression) or not isinstance(train, Examples) or num_seen < 2 * HALVES:
        raise ValueError(
            f"surrogate: needs Classification or Regression on four examples or more; got {type(task).__name__} on {num_seen} "
            "rows that the run drew; use source, which takes every task"
        )
    num_outputs = task.outputs(fitted.model(-1), train.batch([0])).shape[1]
    needed, free = memory_needed(fitted, num_outputs), free_memory(fitted.device)
    if needed > free:
        raise ValueError(
            f"surrogate: {len(train)} rows, {len(queries)} queries and {num_outputs} outputs need about {needed / 2**30:.1f} GiB "
            f"of memory, {free / 2**30:.1f} are free; use averaged_influence, whose memory does not grow with the rows, or fewer "
            "rows"
        )
    machine = SoftmaxMachine(num_outputs) if isinstance(task, Classification) else SquaresMachine()
    implied = 2 / float(fitted.rates.sum()) + fitted.run.optimizer.weight_decay
    return retrained_effects(
        path_kernel(fitted),
        train,
        queries,
        task=task,
        machine=machine,
        shares=torch.from_numpy(fitted.shares),
        ridge=(fitted.settings.ridge_scale or machine.ridge_scale) * implied,
        splits=fitted.settings.splits or machine.splits,
        seed=fitted.settings.seed,
    )


def memory_needed(fitted: Fitted, num_outputs: int) -> int:
    """About how many bytes it takes: kernels of all points, inputs and pseudo-gradients of layers, a half's matrices."""
    points, half = len(fitted.train) + len(fitted.queries), len(fitted.train) // HALVES
    kept = points * sum(layer.d_in + num_outputs * layer.d_out for layer in fitted.layers)
    matrices = num_outputs + 3 if isinstance(fitted.task, Classification) else 3
    return next(fitted.run.model.parameters()).element_size() * (3 * points**2 + kept + matrices * half**2)


def path_kernel(fitted: Fitted) -> Float[Tensor, "point point"]:
    """The tangent kernel of all points, rows first and then queries, averaged over the run up to the counterfactual's end.

    A stretch of training is represented by the checkpoint at its end, with the optimizer's preconditioner there, and weighted by
    its summed learning rate; all weigh the same if nothing was learned by then.
    """
    points = Examples(torch.cat([fitted.train.x, fitted.queries.x]), torch.cat([fitted.train.y, fitted.queries.y]))
    steps = [0, *(checkpoint.step for checkpoint in fitted.run.checkpoints)]
    last = max(1, sum(step <= fitted.settings.counterfactual_end * steps[-1] for step in steps[1:]))
    times = [float(fitted.rates[start:end].sum()) for start, end in itertools.pairwise(steps[: last + 1])]
    times = times if any(times) else [1.0] * last
    K: Tensor | float = 0.0
    for index, time in enumerate(times):
        here, _outputs = tangent_kernel(
            fitted.model(index),
            fitted.layers,
            points,
            task=fitted.task,
            batch_size=fitted.batch_size,
            roots=_roots(fitted, index),
        )
        K = K + time / sum(times) * here
    if not torch.as_tensor(K).isfinite().all():
        raise ValueError(
            "surrogate: gradients of the network's outputs are not finite at a checkpoint; expected finite weights; look for a "
            "diverged run"
        )
    return K


def _roots(fitted: Fitted, index: int) -> dict[str, Roots] | None:
    if fitted.adam == "none":
        return None
    return {name: rank_one_roots(v.to(fitted.device)) for name, v in fitted.second_moments(index).items()}


def retrained_effects(
    K: Float[Tensor, "point point"],
    train: Examples,
    queries: Examples,
    *,
    task: Classification | Regression,
    machine: SquaresMachine | SoftmaxMachine,
    shares: Float[Tensor, " row"],
    ridge: float,
    splits: int,
    seed: int,
) -> np.ndarray:
    """Scores (query, row) from the kernel K of all points; each of `splits` random splits gives every row one effect.

    A row has the weight of its share in the loss. Rows without one were not trained on, and leaving them out has no effect.
    """
    num_rows, seen = len(train), shares.nonzero()[:, 0]
    K_rows, K_queries = K[:num_rows, :num_rows], K[:num_rows, num_rows:]
    machines = []
    for some, others in _splits(len(seen), splits, seed=seed):
        inside, outside = seen[some], seen[others]
        c = (shares * len(inside) / shares[inside].sum()).to(K)  # 1 where all shares are equal
        alpha = machine.fit(K_rows[inside[:, None], inside], train.y[inside], c[inside], ridge=ridge)
        machines.append((inside, outside, c, alpha))
    of_cost = [_cost_slopes(K_queries[inside].T @ alpha, queries, task) for inside, _outside, _c, alpha in machines]
    slopes = torch.stack(of_cost).mean(dim=0).T[:, None]  # (output, 1, query)
    scores = torch.zeros(len(queries), num_rows, dtype=torch.float64)
    for inside, outside, c, alpha in machines:
        n_ridge, K_S, K_zS = len(inside) * ridge, K_rows[inside[:, None], inside], K_rows[outside[:, None], inside]
        curvature = machine.curvature(K_S, K_S @ alpha, c[inside], ridge=ridge)
        r, w = machine.response(K_zS @ alpha, train.y[outside], c[outside])
        leverage = w * (K_rows.diagonal()[outside] - curvature.explained(K_zS.T)) / n_ridge
        for some in torch.arange(len(queries)).split(QUERIES_AT_ONCE):
            K_q, s = K_queries[:, some], slopes[:, :, some]
            k = K_q[outside] * s - K_zS @ curvature.solve(K_q[inside] * s)  # (output, z, query)
            effects = torch.einsum("zo,ozq->qz", r, k) / n_ridge / (1 + leverage)
            scores[some[:, None], outside] -= effects.double().cpu() / splits
    return scores.numpy()


def _splits(num_rows: int, splits: int, *, seed: int) -> Iterator[tuple[Int[Tensor, " inside"], Int[Tensor, " outside"]]]:
    random = np.random.default_rng(seed)
    for _ in range(splits):
        first, second = torch.from_numpy(random.permutation(num_rows)).chunk(HALVES)
        yield first, second
        yield second, first


def _cost_slopes(
    f: Float[Tensor, "query output"], queries: Examples, task: Classification | Regression
) -> Float[Tensor, "query output"]:
    """The derivative of every query's cost by its outputs."""
    f = f.detach().requires_grad_()
    costs = task.output_costs(f, TensorBatch(list(range(len(f))), f, queries.y))
    return torch.autograd.grad(costs.sum(), f)[0]
