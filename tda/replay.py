"""Exact unrolled differentiation of one training run: the derivative of a query's cost by every row's weight in training.

With `s_t` the state after step t (weights and optimizer moments) and `w` the rows' weights in the training loss,

    s_t = step_t(s_{t-1}, w)        q_T = gradient of the query's cost at s_T
    for step t = T, ..., 1:   dcost/dw += (d step_t / dw)^T q_t     q_{t-1} = (d step_t / ds)^T q_t
    score(n) = - dcost/dw_n

which predicts the rise of the cost when row n's weight goes from 1 to 0 and the rest of the run is kept: initial weights,
order, number of steps, and what a step's loss is divided by. This is MAGIC (arXiv 2504.16430), with REPLAY of arXiv 2503.13751.
It tells what this one run would have done. For large removals, or over many seeds, that is not what training does on average.

Cost of T steps: the run is repeated three times, once to check that the replay ends where the run did, once to save states, and
once between saved states, so that about 2 sqrt(T) states are held instead of T. In addition, every step and query takes one
product with a Hessian, which costs about three times the step's gradient.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tda.counterfactual import BATCH_NORMS, has_dropout
from tda.data import Batch, Data, TensorBatch
from tda.optimizer_steps import PULL_BACKS, STEPS, State, Weights
from tda.parallel import DEVICE_ERRORS
from tda.task import Task
from tda.trajectory import Run

QUERY_BYTES = 2**31  # of the derivatives that are carried back at once
BLOCK_ELEMENTS = 2**20  # of the weights of the queries that a step handles together: more would not fit into the cache


def replay_scores(
    run: Run,
    task: Task,
    train: Data,
    queries: Data,
    *,
    dtype: torch.dtype | None = None,
    queries_at_once: int | None = None,
    spacing: int | None = None,
    aggregate: bool = False,
    tolerance: float = 1e-2,
) -> np.ndarray:
    """(query, row) float64: the predicted rise of the query's cost when the row's weight in training goes from 1 to 0.

    Positive means that the row helps. The unit is that of the task's cost, which for a document is summed over its predictions.

    Args:
        run: the run, with its initial weights, and its model in eval mode.
        task: what the run minimised, and what is measured.
        train: the rows that the run's batches name.
        queries: what the cost is measured on.
        dtype: precision of the derivatives and of the repeated training; by default the run's own, in which the check that the
            replay ends where the run did is always made.
        queries_at_once: queries that are carried back together, each as large as an optimizer state; by default as many as fit
            into 2 GiB. Every group of queries repeats the run once.
        spacing: steps between saved states, by default the square root of the number of steps. It changes memory, not results.
        aggregate: whether to score only the mean of the queries' costs, as a single row, at the cost of one query.
        tolerance: how far the replayed weights may be from the recorded ones at any checkpoint, relative to the distance moved.

    Raises:
        ValueError: the run cannot be replayed, does not end where it did, or the scores are not finite.
    """
    check_replay(run, task, train, tolerance=tolerance)
    training = _Training.of(run, task, train, dtype)
    spacing = spacing or math.ceil(math.sqrt(training.num_steps))
    weights = torch.ones(len(train), dtype=torch.float64)
    with _differentiable_twice(run.model):
        saved = {}
        for number, end in training.walk(training.start(), weights):
            if number % spacing == 0:
                saved[number] = end
        num_values = sum(value.numel() for value in end.weights.values())
        num_bytes = num_values * training.dtype.itemsize * (3 if end.second else 2)
        size = queries_at_once or max(1, QUERY_BYTES // num_bytes)
        block = max(1, BLOCK_ELEMENTS // num_values)
        rows = list(range(len(queries)))
        groups = [rows] if aggregate else [rows[at : at + size] for at in range(0, len(rows), size)]
        scores = torch.cat([
            -_walk_back(training, saved, weights, training.query(queries, end, group, aggregate), block) for group in groups
        ])
    if not torch.isfinite(scores).all():
        bad = (~torch.isfinite(scores)).any(dim=1).nonzero()[:, 0].tolist()
        raise ValueError(
            f"replay: the scores of {len(bad)} of {len(scores)} queries are not finite, the first is {bad[0]}; expected numbers. "
            "A derivative through training this unstable has overflowed: replay with dtype=torch.float64, or train with a "
            "smaller learning rate or larger batches"
        )
    return scores.numpy()


def replay(
    run: Run, task: Task, train: Data, weights: np.ndarray | None = None, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The trained weights at the end of `run`, repeated with the rows' losses multiplied by `weights` (default 1).

    Initial weights, order and number of steps are the run's. A step's loss is divided by the terms of all its rows, even those
    of weight 0. Names are those of `named_parameters`; parameters that training does not move are left out.

    Raises:
        ValueError: the run cannot be replayed, or `weights` are not one for each row.
    """
    if weights is not None and weights.shape != (len(train),):
        raise ValueError(f"replay: weights of shape {weights.shape} for {len(train)} training rows; expected one for each row")
    training = _Training.of(run, task, train, dtype)
    factors = torch.ones(len(train), dtype=torch.float64) if weights is None else torch.from_numpy(weights).double()
    with _differentiable_twice(run.model):
        ((_number, end),) = deque(training.walk(training.start(), factors), maxlen=1)
    return end.weights


def check_replay(run: Run, task: Task, train: Data, *, tolerance: float = 1e-2) -> float:
    """How far the replayed weights are from the recorded ones at the worst checkpoint, relative to the distance moved.

    It is above 0 if the run used another arithmetic (a fused optimizer, another device), since training amplifies rounding
    errors as it does any change. More than `tolerance` is a ValueError.
    """
    training = _Training.of(run, task, train, None)
    _refuse_partly_trained(training.moved_without())
    start, worst = training.start(), 0.0
    recorded = {checkpoint.step: checkpoint.weights for checkpoint in run.checkpoints}
    with _differentiable_twice(run.model):
        for number, state in training.walk(start, torch.ones(len(train), dtype=torch.float64)):
            if number in recorded:
                worst = max(worst, _deviation(start.weights, state.weights, recorded[number], number, tolerance, run.model))
    return worst


@dataclass(frozen=True)
class _Training:
    """A run as a function of its rows' weights."""

    run: Run
    data: Data
    losses: nn.Module  # the task's, called with the weights of the model in its state
    costs: nn.Module
    initial: Weights  # of what is trained
    constants: Weights  # frozen parameters and buffers
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, run: Run, task: Task, train: Data, dtype: torch.dtype | None) -> "_Training":
        """The run in `dtype` (default: its own); refused if it lacks something that a replay needs."""
        _check(run, train)
        device = next(run.model.parameters()).device
        trained = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
        dtype = dtype or run.initial[trained[0]].dtype
        state = {**dict(run.model.named_buffers()), **dict(run.model.named_parameters()), **run.initial}
        state = {name: _cast(value.detach().to(device), dtype) for name, value in state.items()}
        names = [name for name, _ in [*run.model.named_parameters(), *run.model.named_buffers()]]
        training = cls(
            run=run,
            data=train,
            losses=_Total(run.model, task.losses),
            costs=_Total(run.model, task.costs),
            initial={name: state[name] for name in trained},
            constants={name: state[name] for name in names if name not in trained},
            dtype=dtype,
            device=device,
        )
        return training.without_unused()

    @property
    def num_steps(self) -> int:
        return len(self.run.batches)

    def without_unused(self) -> "_Training":
        """The same, with parameters that get no gradient as constants: optimizers skip them, even their weight decay."""
        batch = self.batch(self.data, self.run.batches[0].tolist())
        leaves = _leaves(self.initial)
        with _differentiable_twice(self.run.model):
            total = self.total(self.losses, leaves, batch, torch.ones(len(batch.rows), dtype=self.dtype, device=self.device))
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        used = {name for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
        return dataclasses.replace(
            self,
            initial={name: value for name, value in self.initial.items() if name in used},
            constants=self.constants | {name: value for name, value in self.initial.items() if name not in used},
        )

    def moved_without(self) -> list[str]:
        """Parameters that count as unused, as the first step gives them no gradient, and yet were moved by later ones."""
        last = self.run.checkpoints[-1].weights
        trained = [name for name, parameter in self.run.model.named_parameters() if parameter.requires_grad]
        unused = [name for name in trained if name in self.constants and name in last]
        return [name for name in unused if not torch.equal(last[name].to(self.constants[name]), self.constants[name])]

    def start(self) -> State:
        """The state before the first step."""
        zeros = {name: torch.zeros_like(value) for name, value in self.initial.items()}
        return State(self.initial, zeros, zeros if self.run.optimizer.kind == "adamw" else {})

    def batch(self, data: Data, rows: Sequence[int]) -> Batch | TensorBatch:
        """The rows of `data` on the device, numbers in the precision of the weights."""
        batch = data.batch(rows).to(self.device)
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return dataclasses.replace(
            batch, **{name: _cast(value, self.dtype) for name, value in fields.items() if isinstance(value, Tensor)}
        )

    def total(self, function: nn.Module, weights: Weights, batch: Batch | TensorBatch, w: Tensor) -> Tensor:
        """The task's `function` of `batch`, weighted by `w`, under `weights`; weights that are tied need one name."""
        named = {f"model.{name}": value for name, value in (self.constants | weights).items()}
        return functional_call(function, named, (batch, w))

    def gradient(self, weights: Weights, number: int, row_weights: Tensor, *, twice: bool = False) -> "_Gradient":
        """The gradient of the loss of step `number` (from 1)."""
        batch = self.batch(self.data, self.run.batches[number - 1].tolist())
        leaves = _leaves(weights)
        w = row_weights[batch.rows].to(self.device, self.dtype).requires_grad_(twice)
        total = self.total(self.losses, leaves, batch, w / batch.sizes.sum())
        gradients = torch.autograd.grad(total, list(leaves.values()), create_graph=twice, allow_unused=True)
        _refuse_partly_trained([name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None])
        return _Gradient(batch.rows, leaves, w, dict(zip(leaves, gradients, strict=True)))

    def walk(self, state: State, row_weights: Tensor, *, first: int = 0, last: int | None = None) -> Iterator[tuple[int, State]]:
        """The state after each of the steps `first` + 1 to `last`, with its number; and `state`, the one after `first`."""
        step = STEPS[self.run.optimizer.kind]
        yield first, state
        for number in range(first + 1, (self.num_steps if last is None else last) + 1):
            G = self.gradient(state.weights, number, row_weights).values
            state = step(state, G, float(self.run.learning_rates[number - 1]), number, self.run.optimizer)
            yield number, state

    def query(self, queries: Data, end: State, rows: list[int], aggregate: bool) -> State:
        """The derivatives of the queries' costs in the final state, (query, ...), or of their mean, (1, ...)."""
        count = 1 if aggregate else len(rows)
        q = State(*({name: value.new_zeros(count, *value.shape) for name, value in part.items()} for part in end._parts))
        for place, row in enumerate(rows):
            leaves = _leaves(end.weights)
            batch = self.batch(queries, [row])
            weight = torch.full((1,), 1 / len(rows) if aggregate else 1.0, dtype=self.dtype, device=self.device)
            total = self.total(self.costs, leaves, batch, weight)
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    q.weights[name][0 if aggregate else place] += gradient
        return q


@dataclass(frozen=True)
class _Gradient:
    """Gradient of a step's loss, with the graph that leads to it."""

    rows: list[int]
    leaves: Weights
    w: Tensor  # (row of the batch)
    values: Weights

    def pull_back(self, g: Weights) -> tuple[dict[str, Tensor | None], Tensor]:
        """`g` (query, ...), derivatives in the gradient, as derivatives in the weights (None: zero) and in the rows' weights.

        The loss and its gradient were run once for all queries; only the products with their derivatives have a query axis.
        """
        leaves, tangents = [*self.leaves.values(), self.w], [g[name] for name in self.values]
        try:
            *of_weights, of_w = self._products(leaves, tangents, is_grads_batched=True)
        except DEVICE_ERRORS:
            raise
        except RuntimeError:  # an operation that cannot be batched over queries, as group norm
            try:
                each = list(zip(*(self._products(leaves, list(one)) for one in zip(*tangents, strict=True)), strict=True))
            except DEVICE_ERRORS:
                raise
            except RuntimeError as error:
                raise ValueError(
                    f"replay: an operation of the model cannot be differentiated twice: {error}; expected operations that can, "
                    "as those of most layers; write it in others, or use another method, such as source"
                ) from error
            *of_weights, of_w = (None if parts[0] is None else torch.stack(parts) for parts in each)
        return dict(zip(self.leaves, of_weights, strict=True)), of_w

    def _products(self, leaves: list[Tensor], tangents: list[Tensor], **batched: bool) -> Sequence[Tensor | None]:
        values = list(self.values.values())
        return torch.autograd.grad(values, leaves, tangents, retain_graph=True, allow_unused=True, **batched)


def _walk_back(training: _Training, saved: dict[int, State], row_weights: Tensor, q: State, block: int) -> Tensor:
    """(query, row): the derivative of every query's cost in the row's weight; `q`, those in the final state, is used up."""
    count = len(next(iter(q.weights.values())))
    derivatives = torch.zeros(count, len(training.data), dtype=torch.float64)
    optimizer, last = training.run.optimizer, training.num_steps
    for first in sorted(saved, reverse=True):
        states = dict(training.walk(saved[first], row_weights, first=first, last=last))
        for number in range(last, first, -1):
            gradient = training.gradient(states[number - 1].weights, number, row_weights, twice=True)
            G = {name: value.detach() for name, value in gradient.values.items()}
            rate = float(training.run.learning_rates[number - 1])
            pull_back = PULL_BACKS[optimizer.kind](states.pop(number), G, rate, number, optimizer)
            for at in range(0, count, block):
                part = q[at : at + block]
                of_weights, of_w = gradient.pull_back(pull_back(part))
                for name, value in of_weights.items():
                    if value is not None:
                        part.weights[name].add_(value)
                derivatives[at : at + block].index_add_(1, torch.tensor(gradient.rows), of_w.detach().double().cpu())
        last = first
    return derivatives


class _Total(nn.Module):
    """A task's sum over a batch, as a module around the model, whose weights `functional_call` can set."""

    def __init__(self, model: nn.Module, function: Callable[..., tuple[Tensor, Tensor]]):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Batch | TensorBatch, w: Tensor) -> Tensor:
        return self.function(self.model, batch, weights=w)[0]


@contextmanager
def _differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Inside the block, attention and a language model's head use plain operations: the faster ones have no second derivative.

    Neither have sparse gradients of embeddings, which become dense.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if getattr(module, "sparse", False):
                module.sparse = False
                stack.callback(setattr, module, "sparse", True)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None:  # `document_losses` calls a head that is listened to
            stack.callback(head.register_forward_hook(lambda *_: None).remove)
        yield


def _leaves(weights: Weights) -> Weights:
    return {name: value.detach().requires_grad_() for name, value in weights.items()}


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _check(run: Run, train: Data) -> None:
    """Refuse a run that does not hold what a replay needs."""
    if not run.initial:
        raise ValueError(
            "replay: the run has no initial weights; expected those before the first step; record the run with a Recorder made "
            "before training, or save the model's state dict and give it as Run.initial"
        )
    training = [name or "the model" for name, module in run.model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"replay: {training[0]} is in training mode; expected a model in eval mode, whose dropout and batch statistics do "
            "nothing, and a run trained that way; call model.eval()"
        )
    before, after = run.initial, run.checkpoints[-1].weights
    counted = [f"{name}.num_batches_tracked" for name, module in run.model.named_modules() if isinstance(module, BATCH_NORMS)]
    learned = [name for name in counted if name in before and name in after and not torch.equal(before[name], after[name])]
    if learned:
        raise ValueError(
            f"replay: {learned[0].rpartition('.')[0]} normalised by batches while it was trained, as it does not in eval mode; "
            "expected a run trained in eval mode, which replay follows, or a model without such layers"
        )
    missing = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad and name not in run.initial]
    if missing:
        raise ValueError(
            f"replay: the initial weights lack {', '.join(missing[:3])}; expected every trained parameter of the model; they "
            f"hold {', '.join(list(run.initial)[:3])}, ..."
        )
    for number, rows in enumerate(run.batches or [[]], start=1):
        if not len(rows):
            raise ValueError(
                f"replay: step {number} has no batch; expected the row numbers it was taken on; give Recorder.step them"
            )
        if min(rows) < 0 or max(rows) >= len(train):
            raise ValueError(
                f"replay: step {number} was taken on rows {min(rows)} to {max(rows)}, the training data has {len(train)}; "
                "expected the data that the run was trained on"
            )


def _refuse_partly_trained(names: Sequence[str]) -> None:
    """Refuse parameters that an optimizer skips in some steps: those without a gradient there."""
    if names:
        raise ValueError(
            f"replay: {', '.join(names[:3])} had a gradient in some steps only; expected parameters that have one in every step, "
            "or in none; use another method, such as source"
        )


def _deviation(start: Weights, weights: Weights, recorded: Weights, number: int, tolerance: float, model: nn.Module) -> float:
    """The distance of replayed and recorded weights, in parts of the distance moved; refused above `tolerance`."""
    lacking = [name for name in weights if name not in recorded or recorded[name].shape != weights[name].shape]
    if lacking:
        raise ValueError(
            f"replay: the checkpoint at step {number} has no {lacking[0]} of the replay's shape; expected one of the run"
        )
    narrow = [name for name, value in weights.items() if recorded[name].dtype != value.dtype]
    moved = torch.cat([(value - start[name]).double().flatten() for name, value in weights.items()])
    expected = torch.cat([(recorded[name].to(value) - start[name]).double().flatten() for name, value in weights.items()])
    error = float((moved - expected).norm() / expected.norm().clamp_min(torch.finfo(moved.dtype).tiny))
    if error <= tolerance:
        return error
    cosine = float(moved @ expected / (moved.norm() * expected.norm()))
    causes = (
        "they went the same way by another length: learning rates (recorded after a scheduler changed them?), clipped gradients, "
        "the task's loss, or what it is divided by"
        if cosine > 0.99
        else "they went another way: batches (other rows, or another order), the optimizer's settings, clipped "
        "gradients, the task's loss, or the data"
    )
    if narrow:
        causes += f"; the checkpoint is {recorded[narrow[0]].dtype}, the initial weights are {weights[narrow[0]].dtype}"
    elif all(torch.equal(recorded[name].bfloat16().to(recorded[name]), recorded[name]) for name in weights):
        causes += "; the recorded weights are in bfloat16, whose rounding in every step is not repeated"
    if has_dropout(model):
        causes += "; the model has dropout, which must have been off (eval mode) in training"
    raise ValueError(
        f"replay: at step {number} the replayed weights are off by {error:.2g} of the distance that the recorded ones moved; "
        f"expected at most {tolerance:.2g}. They moved {float(moved.norm()):.3g} instead of {float(expected.norm()):.3g}, "
        f"at a cosine of {cosine:.3f}: {causes}"
    )
