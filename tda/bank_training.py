"""Training models by a bank's recipe: a single one with its trajectory recorded, or many, to measure the queries after each."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda.counterfactual import Retraining, TailMean, check_loss, make_optimizer, query_costs, take_step
from tda.data import Data, Examples, TensorBatch
from tda.model import load_model
from tda.model_stack import ModelStack, StackOptimizer, make_mlp
from tda.recipe import CausalLMModel, MLPModel, Recipe, Training
from tda.trajectory import Optimizer, Recorder, Run

STACK_PARAMETERS, LARGEST_STACK = 400_000, 64
ATTRIBUTED, SUBSET, FULL, REMOVAL, RETRAINED = 1, 2, 3, 4, 5  # kinds of runs: the first seed, so that no two kinds share seeds


@dataclass(frozen=True)
class Job:
    """A model to train: its rows and its seeds."""

    rows: np.ndarray  # row numbers
    seed: tuple[int, int, int]  # the kind of run, and two numbers within that kind


def initial_model(recipe: Recipe, seed: Sequence[int]) -> nn.Module:
    """The model before its first step: freshly initialised by `seed`, or pretrained; in eval mode."""
    if isinstance(recipe.model, CausalLMModel):
        return load_model(recipe.model.path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_words(seed)[0])
        return make_mlp(recipe.model)


def schedule(rows: np.ndarray, training: Training, seed: Sequence[int]) -> list[np.ndarray]:
    """The rows of every step: each epoch is a fresh permutation by `seed`, and its last batch may be short."""
    random = np.random.default_rng(_words(seed)[1])
    orders = [random.permutation(rows) for _ in range(training.epochs)]
    return [order[start : start + training.batch] for order in orders for start in range(0, len(order), training.batch)]


def _words(seed: Sequence[int]) -> tuple[int, int]:
    """Independent seeds for the initial weights and for the order of rows."""
    weights, order = np.random.SeedSequence(list(seed)).generate_state(2)
    return int(weights), int(order)


def recipe_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The recipe's optimizer: all parameters in one group."""
    beta1, beta2 = training.betas
    settings = Optimizer(
        training.optimizer,
        momentum=training.momentum,
        beta1=beta1,
        beta2=beta2,
        epsilon=training.eps,
        weight_decay=training.weight_decay,
    )
    return make_optimizer(model, settings, rate=training.lr)


def train_one(
    model: nn.Module,
    data: Data,
    steps: Sequence[np.ndarray],
    recipe: Recipe,
    *,
    optimizer: torch.optim.Optimizer,
    after: Callable[[np.ndarray], None] = lambda rows: None,
) -> None:
    """Train `model` in place on the rows of `steps`, without dropout; `after` is called with the rows of each step."""
    for number, rows in enumerate(steps, start=1):
        take_step(model, data, rows, task=recipe.task, optimizer=optimizer, origin=f"recipe.training: step {number}")
        after(rows)
    optimizer.zero_grad(set_to_none=True)


def train_run(data: Data, recipe: Recipe, *, rows: np.ndarray, seed: Sequence[int], num_checkpoints: int) -> Run:
    """A recorded run on `rows`, with evenly spaced checkpoints, one per step at most."""
    model = initial_model(recipe, seed)
    steps = schedule(rows, recipe.training, seed)
    optimizer = recipe_optimizer(model, recipe.training)
    recorder = Recorder(model, optimizer, num_steps=len(steps), num_checkpoints=min(num_checkpoints, len(steps)))
    train_one(model, data, steps, recipe, optimizer=optimizer, after=recorder.step)
    return recorder.run


def outcomes(
    jobs: Sequence[Job], recipe: Recipe, *, train: Data, queries: Data
) -> tuple[Float[np.ndarray, "job query"], Float[np.ndarray, "job query"]]:
    """The measurement of every query after each job, and whether it was classified correctly (1 or 0; NaN without classes)."""
    if models_at_once(recipe) > 1:
        return measure_stack(train_stack(jobs, recipe, train), recipe, queries)
    values, correct = np.empty((2, len(jobs), len(queries)))
    for place, job in enumerate(jobs):
        model = train_job(job, recipe, train)
        if isinstance(recipe.model, MLPModel):
            values[[place]], correct[[place]] = measure_stack(ModelStack([model]), recipe, queries)
        else:
            values[place], correct[place] = measure(model, recipe, queries), math.nan
    return values, correct


def models_at_once(recipe: Recipe) -> int:
    """How many models are best trained as one stack: as many small MLPs as fit into the processor's cache, else 1.

    On one CPU thread, a network with 34,000 parameters takes 0.33 times as long in stacks of 8 to 16 as alone; one with 570,000
    takes 1.5 to 2 times as long in a stack of any size.
    """
    if not isinstance(recipe.model, MLPModel):
        return 1
    num_parameters = sum((d_in + 1) * d_out for d_in, d_out in itertools.pairwise(recipe.model.dims))
    return max(1, min(LARGEST_STACK, STACK_PARAMETERS // num_parameters))


def measure(model: nn.Module, recipe: Recipe, queries: Data) -> Float[np.ndarray, " query"]:
    """The measurement of every query, a mean over its terms."""
    return recipe.cost_sign * query_costs(model, recipe.task, queries)


def retrained_by_recipe(trainings: Sequence[Retraining], recipe: Recipe, data: Data) -> Iterator[nn.Module]:
    """A `counterfactual.Retrain` by the recipe: every model starts from its own seed, and has the mean of its last weights."""
    size = models_at_once(recipe)
    jobs = [Job(rows, (RETRAINED, seed, 0)) for rows, seed in trainings]
    for start in range(0, len(jobs), size):
        if size > 1:
            yield from train_stack(jobs[start : start + size], recipe, data, averaged=True).unstacked()
        else:
            yield train_job(jobs[start], recipe, data, averaged=True)


def train_job(job: Job, recipe: Recipe, data: Data, *, averaged: bool = False) -> nn.Module:
    """The model of one job, by `train_one`; with the mean of its last weights if `averaged`."""
    model = initial_model(recipe, job.seed)
    steps = schedule(job.rows, recipe.training, job.seed)
    tail = TailMean(model, len(steps) if averaged else 0)
    optimizer = recipe_optimizer(model, recipe.training)
    train_one(model, data, steps, recipe, optimizer=optimizer, after=lambda _rows: tail.step())
    return tail.finish()


def train_stack(jobs: Sequence[Job], recipe: Recipe, data: Examples, *, averaged: bool = False) -> ModelStack:
    """The models of all `jobs`, each as `train_one` makes it, up to rounding; with means of their last weights if `averaged`."""
    stack = ModelStack([initial_model(recipe, job.seed) for job in jobs])
    parameters = list(stack.parameters())
    optimizer = StackOptimizer(parameters, recipe.training)
    schedules = [schedule(job.rows, recipe.training, job.seed) for job in jobs]
    width, num_steps = recipe.training.batch, max(map(len, schedules))
    tail = TailMean(stack, num_steps if averaged else 0)
    for number in range(num_steps):
        rows, counts = _padded([steps[number] if number < len(steps) else steps[0][:0] for steps in schedules], width)
        weights = torch.where(torch.arange(width) < counts[:, None], 1 / counts.clamp(min=1)[:, None], 0.0)
        batch = TensorBatch(rows.tolist(), data.x[rows], data.y[rows])
        total, _losses = recipe.task.losses(stack, batch, weights=weights.flatten())
        check_loss(total, recipe.training.lr, origin=f"recipe.training: step {number + 1}")
        optimizer.step(torch.autograd.grad(total, parameters), torch.where(counts > 0, recipe.training.lr, 0.0))
        tail.step()
    return tail.finish()


def _padded(batches_: Sequence[np.ndarray], width: int) -> tuple[Tensor, Tensor]:
    """Row numbers (model * width), with short batches filled up by row 0; and the number of real rows of each model."""
    rows = np.zeros((len(batches_), width), dtype=np.int64)
    for place, batch in enumerate(batches_):
        rows[place, : len(batch)] = batch
    return torch.from_numpy(rows.ravel()), torch.tensor([len(batch) for batch in batches_])


@torch.no_grad()
def measure_stack(
    stack: ModelStack, recipe: Recipe, queries: Examples
) -> tuple[Float[np.ndarray, "job query"], Float[np.ndarray, "job query"]]:
    """The measurement of every query under every model, and whether it was classified correctly (1 or 0; NaN without classes)."""
    shape = (stack.num_models, len(queries))
    x = queries.x.repeat(stack.num_models, 1)
    y = queries.y.repeat(stack.num_models, *[1] * (queries.y.ndim - 1))
    outputs = stack(x).double()
    batch = TensorBatch(list(range(math.prod(shape))), outputs, y)
    _total, costs = recipe.task.costs(nn.Identity(), batch, weights=torch.ones(math.prod(shape)))
    correct = (outputs.argmax(dim=1) == y).double() if recipe.loss == "cross_entropy" else torch.full_like(costs, math.nan)
    return (recipe.cost_sign * costs).reshape(shape).numpy(), correct.reshape(shape).numpy()
