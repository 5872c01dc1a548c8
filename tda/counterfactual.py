"""Counterfactuals: training a recorded run again on some of its rows, which is what attribution predicts.

The result is the mean of the weights over the last steps. That removes the noise of the last batches, which is most of the
difference between two trainings on the same rows (EXPERIMENTS.md, 2026-11-25).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda.data import Data, batches
from tda.means import RunningMean
from tda.model import copy_of
from tda.task import Task
from tda.trajectory import Optimizer, Run

AVERAGED = 0.25  # the part of the steps, at the end, over which weights are averaged
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
QUERY_TOKENS = 8192  # in a batch of queries

Retraining = tuple[np.ndarray, int]
"""The numbers of the rows to train on, and a seed: of the initial weights where they are random, and of the order."""

Retrain = Callable[[Sequence[Retraining]], Iterable[nn.Module]]
"""A model for each training, in their order: trained as the run was, but on those rows."""


def random_halves(num_rows: int, number: int, random: np.random.Generator) -> np.ndarray:
    """(half, row) uniform random halves of the rows, True: in it. Of an odd number of rows a half is the smaller part."""
    halves = np.zeros((number, num_rows), dtype=bool)
    for half in halves:
        half[random.permutation(num_rows)[: num_rows // 2]] = True
    return halves


def retrained(run: Run, task: Task, train: Data, trainings: Sequence[Retraining]) -> Iterator[nn.Module]:
    """Models trained as a recorded run was: from its initial weights, as many epochs in another order, with its learning rates.

    They are trained in eval mode, so without dropout. Warns if the model has any.

    Raises:
        ValueError: the run has no initial weights or no batches, or its model does not train in eval mode.
    """
    if not run.initial or not run.batches:
        raise ValueError(
            "retraining: the run has no initial weights, or does not say which rows a step took; expected both, which a Recorder "
            "made before the first step takes down; or hand over `retrain`, a function that trains"
        )
    if any(isinstance(module, BATCH_NORMS) for module in run.model.modules()):
        raise ValueError(
            "retraining: the model normalises by batches, whose statistics it would not learn in eval mode, as retraining is; "
            "hand over `retrain`, a function that trains"
        )
    if has_dropout(run.model):
        warnings.warn(
            "retraining: the model has dropout, and retrainings are without; if the run was trained with it, hand over "
            "`retrain`, a function that trains",
            stacklevel=2,
        )
    for rows, seed in trainings:
        model = copy_of(run.model).eval()
        model.load_state_dict(run.initial, strict=False)  # names of tied weights may be left out
        steps, rates = schedule_without(run, rows, seed=seed)
        optimizer = make_optimizer(model, run.optimizer)
        tail = TailMean(model, len(steps))
        for number, (step, rate) in enumerate(zip(steps, rates, strict=True), start=1):
            for group in optimizer.param_groups:
                group["lr"] = rate
            take_step(model, train, step, task=task, optimizer=optimizer, origin=f"retraining: step {number}")
            tail.step()
        yield tail.finish()


def has_dropout(model: nn.Module) -> bool:
    """Whether the model drops anything at random in training mode."""
    inside = (nn.RNNBase, nn.MultiheadAttention)
    return any(
        (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        or (isinstance(module, inside) and module.dropout > 0)
        for module in model.modules()
    )


def schedule_without(run: Run, rows: np.ndarray, *, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Every step's rows and learning rate, for training as `run` was but only on those of `rows` that it saw.

    There are as many epochs, each in a fresh order, in batches as large as the run's largest. Rates follow the run's schedule,
    stretched to the number of steps.
    """
    random, recorded = np.random.default_rng(seed), np.concatenate(run.batches)
    seen = np.unique(recorded)
    rows = rows[np.isin(rows, seen)]
    size, left = max(map(len, run.batches)), round(len(recorded) / len(seen) * len(rows))
    steps: list[np.ndarray] = []
    while left > 0:
        order = random.permutation(rows)[:left]
        steps += [order[start : start + size] for start in range(0, len(order), size)]
        left -= len(order)
    num_recorded = len(run.learning_rates)
    return steps, run.learning_rates[np.arange(len(steps)) * num_recorded // max(1, len(steps))]


def make_optimizer(model: nn.Module, settings: Optimizer, *, rate: float = 0.0) -> torch.optim.Optimizer:
    """Torch's optimizer of those settings."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(settings.decay(name), []).append(parameter)
    decayed = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
    if settings.kind == "sgd":
        return torch.optim.SGD(decayed, lr=rate, momentum=settings.momentum)
    return torch.optim.AdamW(decayed, lr=rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)


def take_step(
    model: nn.Module, data: Data, rows: np.ndarray, *, task: Task, optimizer: torch.optim.Optimizer, origin: str
) -> None:
    """One step of training on the mean loss over the terms of `rows`; `origin` names the step in an error."""
    batch = data.batch(rows.tolist()).to(next(model.parameters()).device)
    one_over_terms = (1 / batch.sizes.sum()).expand(len(batch.sizes)).float()  # so that the weighted sum is the mean over terms
    total, _losses = task.losses(model, batch, weights=one_over_terms)
    check_loss(total, optimizer.param_groups[0]["lr"], origin=origin)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()


def check_loss(total: Tensor, rate: float, *, origin: str) -> None:
    """Refuse a loss that is not finite with a ValueError, whose message begins with `origin`."""
    if not torch.isfinite(total):
        raise ValueError(f"{origin}: the loss is not finite at learning rate {rate:g}; expected a finite number; lower the rate")


class TailMean:
    """Averages a model's weights over the last `AVERAGED` of its steps: call `step` after every one, and `finish` at the end."""

    def __init__(self, model: nn.Module, num_steps: int):
        self._model = model
        self._mean = RunningMean(model)
        self._left = num_steps
        self._counted = math.ceil(AVERAGED * num_steps)

    def step(self) -> None:
        """Include the weights in the mean if the step is one of the last."""
        self._left -= 1
        if 0 <= self._left < self._counted:
            self._mean.add()

    def finish(self) -> nn.Module:
        """The model, with the mean weights."""
        self._model.load_state_dict(self._mean.take(), strict=False)
        return self._model


@torch.no_grad()
def query_costs(model: nn.Module, task: Task, queries: Data) -> Float[np.ndarray, " query"]:
    """The cost of every query, a mean over its terms."""
    values, device = np.empty(len(queries)), next(model.parameters()).device
    for held in batches(queries, batch_tokens=QUERY_TOKENS):
        batch = held.to(device)
        _total, costs = task.costs(model, batch, weights=torch.ones(len(batch.rows), device=device))
        values[batch.rows] = (costs.double() / batch.sizes).cpu().numpy()
    return values
