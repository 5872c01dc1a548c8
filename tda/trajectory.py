"""A finished training run: its checkpoints, and what every step did. A `Recorder` records one beside any training loop."""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from tda.losses import at_least_float32
from tda.means import RunningMean
from tda.model import copy_of, freeze, linear_modules, parameter_name


@dataclass(frozen=True)
class Optimizer:
    """`torch.optim.SGD` (heavy-ball momentum, coupled weight decay) or `torch.optim.AdamW` (decoupled)."""

    kind: Literal["sgd", "adamw"]
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    undecayed: tuple[str, ...] = ()  # names of parameters without weight decay, as biases and norms often are

    def decay(self, name: str) -> float:
        """The weight decay of a parameter."""
        return 0.0 if name in self.undecayed else self.weight_decay


@dataclass(frozen=True)
class Checkpoint:
    """The weights after a step."""

    step: int  # from 1
    weights: dict[str, Tensor]  # by name; frozen ones may be missing, as the run's model has them
    second_moments: dict[str, Tensor]  # AdamW's `exp_avg_sq` by parameter name; empty for SGD
    mean_weights: dict[str, Tensor] = field(default_factory=dict)  # means over the steps since the checkpoint before, or empty

    def bias_correction(self, optimizer: Optimizer) -> float:
        """The factor by which the second moments are too small, because they started at 0."""
        return 1 - optimizer.beta2**self.step


@dataclass(frozen=True)
class Run:
    """A training run, in which a step's loss is the mean over the terms of its rows (see `Task`)."""

    model: nn.Module  # the architecture; its weights do not matter, except for frozen ones
    checkpoints: list[Checkpoint]  # in order; the last one is at the last step, or the run is refused
    learning_rates: np.ndarray  # (step,)
    batches: list[np.ndarray]  # row numbers of every step; empty if unknown: all rows then count as drawn equally often
    optimizer: Optimizer
    initial: dict[str, Tensor]  # weights before the first step; empty if unknown: `replay` and `datamodel` need them

    def __post_init__(self) -> None:
        steps = [checkpoint.step for checkpoint in self.checkpoints]
        if not steps or steps != sorted(set(steps)) or steps[0] < 1 or steps[-1] != len(self.learning_rates):
            raise ValueError(
                f"run: checkpoints at steps {steps} of {len(self.learning_rates)}; expected at least one, in rising order, the "
                "last one at the last step"
            )
        if self.batches and len(self.batches) != len(self.learning_rates):
            raise ValueError(f"run: {len(self.batches)} batches for {len(self.learning_rates)} steps; expected one for each step")
        if self.optimizer.kind == "adamw" and not all(checkpoint.second_moments for checkpoint in self.checkpoints):
            raise ValueError(
                "run: a checkpoint has no second moments; expected those of AdamW, which say how far a gradient moves a weight; "
                "save the optimizer's exp_avg_sq with every checkpoint"
            )

    @property
    def trajectory(self) -> pl.DataFrame:
        """A row per step, in the columns that `segments` reads."""
        return pl.DataFrame({
            "step": np.arange(1, len(self.learning_rates) + 1),
            "learning_rate": self.learning_rates,
            "gradient_scale": np.ones(len(self.learning_rates)),
            "documents": [rows.tolist() for rows in self.batches] or [[]] * len(self.learning_rates),
        })

    def at_least_float32(self) -> "Run":
        """The run in float32 or wider: in less, what a single row adds to a sum would be lost in rounding."""

        def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: at_least_float32(value) if value.is_floating_point() else value for name, value in tensors.items()}

        narrow = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in self.model.parameters())
        return replace(
            self,
            model=copy_of(self.model).float() if narrow else self.model,
            checkpoints=[
                replace(
                    held,
                    weights=wide(held.weights),
                    second_moments=wide(held.second_moments),
                    mean_weights=wide(held.mean_weights),
                )
                for held in self.checkpoints
            ],
            initial=wide(self.initial),
        )

    def at(self, index: int, *, mean: bool = False) -> nn.Module:
        """A copy of the model with the weights of checkpoint `index`, or with its mean weights, in eval mode.

        Raises:
            ValueError: mean weights are asked for and were not recorded.
        """
        checkpoint = self.checkpoints[index]
        if mean and not checkpoint.mean_weights:
            raise ValueError("run: its checkpoints have no mean weights; record the run with a Recorder, or use weights=last")
        model = copy_of(self.model)
        weights = checkpoint.weights | (checkpoint.mean_weights if mean else {})
        model.load_state_dict(weights, strict=False)  # names of tied weights may be left out
        return model.eval()


def averaged(run: Run, groups: Sequence[Sequence[int]]) -> Run:
    """The run with one checkpoint for each group of indices: the mean of their weights, at the step of the last of them."""
    held = [[run.checkpoints[index] for index in indices] for indices in groups]
    return replace(run, checkpoints=[_mean(each, run.optimizer, step=each[-1].step) for each in held])


def at_mean(run: Run, indices: Sequence[int]) -> Run:
    """The run with a single checkpoint at its end: the mean of the `mean_weights` of these checkpoints.

    If none were recorded, it is the mean of their weights.
    """
    held = [run.checkpoints[index] for index in indices]
    means = [replace(each, weights=each.weights | each.mean_weights) for each in held]
    return replace(run, checkpoints=[_mean(means, run.optimizer, step=len(run.learning_rates))])


def _mean(held: Sequence[Checkpoint], optimizer: Optimizer, *, step: int) -> Checkpoint:
    """The mean of checkpoints, as one of step `step`; second moments are averaged bias-corrected, then given its bias."""
    last = held[-1]
    weights = {
        name: sum(each.weights[name] for each in held) / len(held) if value.is_floating_point() else value
        for name, value in last.weights.items()
    }
    moments = {
        name: (1 - optimizer.beta2**step)
        * sum(each.second_moments[name] / each.bias_correction(optimizer) for each in held)
        / len(held)
        for name in last.second_moments
        if all(name in each.second_moments for each in held)
    }
    return Checkpoint(step, weights, moments, mean_weights=weights)


class Recorder:
    """Records a run beside a training loop: make it before the first step, and call `step` after every one.

        recorder = Recorder(model, optimizer, num_steps=len(loader) * epochs)
        ...
        optimizer.step()
        recorder.step(rows)
        ...
        run = recorder.run

    `num_steps` says where checkpoints lie. If training ends at another step, its checkpoint is taken when `run` is asked for.

    Whether gradients were clipped is not taken down: for SGD, whose steps grow with the gradient, learning rates are taken as if
    they were not, and `replay` refuses a run that clipping changed.

    Raises:
        ValueError: the optimizer is neither `torch.optim.SGD` nor `torch.optim.AdamW`, has a setting that the methods do not
            support, has taken steps before, or is that of another model.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, num_steps: int, num_checkpoints: int = 6):
        if not 1 <= num_checkpoints <= num_steps:
            raise ValueError(f"recorder: {num_checkpoints} checkpoints of {num_steps} steps; expected from 1 to {num_steps}")
        self._model = model
        self._optimizer = optimizer
        self._settings = _settings(optimizer, model)
        self._groups = _held(optimizer)
        self._spacing = num_steps / num_checkpoints
        self._at = {round((index + 1) * num_steps / num_checkpoints) for index in range(num_checkpoints)}
        every, trained = model.named_parameters(remove_duplicate=False), self._trained()
        self._frozen = {name for name, one in every if not one.requires_grad and id(one) not in trained}
        self._initial = self._moving()
        self._checkpoints: list[Checkpoint] = []
        self._learning_rates: list[float] = []
        self._batches: list[np.ndarray] = []
        self._mean = RunningMean(model)
        self._changes = 0

    def step(self, rows: Sequence[int] | np.ndarray | Tensor) -> None:
        """Record an optimizer step on the training rows numbered `rows`. Call it before a scheduler changes the learning rate.

        Raises:
            ValueError: `rows` are no row numbers, or the optimizer's groups have other settings than at first, or other learning
                rates than each other.
        """
        numbers = torch.as_tensor(rows).cpu().numpy()
        if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu" or numbers.min() < 0:
            raise ValueError(
                f"recorder: step {len(self._batches) + 1} was taken on rows {numbers!r}; expected row numbers from 0, one or more"
            )
        groups, rate = _held(self._optimizer), _rate(self._optimizer)
        if groups != self._groups:
            raise ValueError(
                f"recorder: at step {len(self._batches) + 1} the optimizer's groups have {groups}; expected {self._groups} all "
                "along; set cycle_momentum=False of a scheduler that cycles momentum or betas"
            )
        self._learning_rates.append(rate)
        self._batches.append(numbers.astype(np.int64))
        self._mean.add()
        self._changes = self._count_changes()
        if len(self._batches) in self._at:
            self._take_checkpoint()

    def _take_checkpoint(self) -> None:
        moments, mean = second_moments(self._model, self._optimizer), self._mean.take()
        self._checkpoints.append(Checkpoint(len(self._batches), self._moving(), moments, mean))

    def _end_here(self) -> None:
        """Take a checkpoint at a last step that was not foreseen."""
        num_steps = len(self._batches)
        if self._count_changes() != self._changes:
            raise ValueError(
                f"recorder: the last step, {num_steps}, has no checkpoint, and weights were changed since; expected those that "
                "it left; ask for the run before loading others, or set num_steps to the number of steps taken"
            )
        if (late := num_steps - max(self._at)) > self._spacing:
            warnings.warn(
                f"recorder: the last checkpoint stands for {late} of {num_steps} steps; expected about {self._spacing:.0f}, as "
                "for the others; set num_steps to about the number of steps taken",
                stacklevel=3,
            )
        self._take_checkpoint()
        self._at.add(num_steps)

    def _count_changes(self) -> int:
        """How often weights were changed in place, as by a step or by loading others."""
        return sum(parameter._version for parameter in self._model.parameters())

    def _trained(self) -> set[int]:
        """Ids of the parameters that the optimizer has."""
        return {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}

    def _moving(self) -> dict[str, Tensor]:
        """A copy of the model's state on the CPU, without frozen weights, which the model itself keeps."""
        state = self._model.state_dict()
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items() if name not in self._frozen}

    @property
    def run(self) -> Run:
        """The recorded run.

        Warns if weights have moved that the optimizer does not have, or have moved in a part of the run only, or if the run went
        on long after the last step that was expected. Refused with ValueError: no step was recorded, or the last one has no
        checkpoint and its weights are gone.
        """
        if self._batches and len(self._batches) not in self._at:
            self._end_here()
        model = copy_of(self._model).eval()
        trained = self._trained()
        others = [name for name, parameter in self._model.named_parameters() if id(parameter) not in trained]
        run = Run(
            model=freeze(model, others),
            checkpoints=list(self._checkpoints),
            learning_rates=np.array(self._learning_rates),
            batches=list(self._batches),
            optimizer=self._settings,
            initial=self._initial,
        )
        _warn_of_weights_moved_otherwise(run, others)
        return run


def _warn_of_weights_moved_otherwise(run: Run, others: Sequence[str]) -> None:
    """Warn of weights that moved without the optimizer (`others`), and of its own that moved in a part of the run only."""
    steps = [0, *(checkpoint.step for checkpoint in run.checkpoints)]
    weights = [run.initial, *(checkpoint.weights for checkpoint in run.checkpoints)]
    stretches = [number for number, (start, end) in enumerate(itertools.pairwise(steps)) if run.learning_rates[start:end].any()]
    moved = {
        name: [not torch.equal(weights[number][name], weights[number + 1][name]) for number in stretches]
        for name, _parameter in run.model.named_parameters()
        if name in run.initial
    }
    by_others = [name for name in moved if name in others and any(moved[name])]
    at_times = [name for name in moved if name not in others and any(moved[name]) and not all(moved[name])]
    for names, words in (
        (by_others, "moved, though the optimizer does not have them; they count as frozen, and scores leave them out"),
        (at_times, "did not move between some checkpoints; they count as trained in every step"),
    ):
        if names:
            warnings.warn(f"recorder: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} {words}", stacklevel=3)


def second_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's `exp_avg_sq` by parameter name; empty for an optimizer that has none."""
    return {
        name: optimizer.state[parameter]["exp_avg_sq"].detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if "exp_avg_sq" in optimizer.state.get(parameter, {})
    }


def _settings(optimizer: torch.optim.Optimizer, model: nn.Module) -> Optimizer:
    groups = optimizer.param_groups
    if not (isinstance(optimizer, torch.optim.AdamW) or type(optimizer) is torch.optim.SGD):
        raise ValueError(f"recorder: the optimizer is {type(optimizer).__name__}; expected torch.optim.SGD or torch.optim.AdamW")
    if not {id(parameter) for parameter in model.parameters()} & {id(one) for group in groups for one in group["params"]}:
        raise ValueError(
            "recorder: the optimizer has none of the model's parameters; expected the model that it trains, not a copy of it"
        )
    if any(optimizer.state.values()):
        raise ValueError(
            "recorder: the optimizer has taken steps already, and its moments are those of more steps than will be recorded; "
            "expected a Recorder made before the first step; go on with a new optimizer"
        )
    _rate(optimizer)
    held = _held(optimizer)
    for key in ("momentum", "betas", "eps"):
        values = {group[key] for group in held if key in group}
        if len(values) > 1:
            raise ValueError(f"recorder: parameter groups differ in {key}: {sorted(values)}; expected one value for all of them")
    group = held[0]
    unknown = [key for key in ("nesterov", "dampening", "amsgrad", "maximize") if any(group.get(key) for group in groups)]
    if unknown:
        raise ValueError(f"recorder: the optimizer sets {', '.join(unknown)}, which no method here knows; leave it off")
    decay, undecayed = _decay(groups, model)
    if isinstance(optimizer, torch.optim.AdamW):
        beta1, beta2 = group["betas"]
        return Optimizer("adamw", beta1=beta1, beta2=beta2, epsilon=group["eps"], weight_decay=decay, undecayed=undecayed)
    return Optimizer("sgd", momentum=group["momentum"], weight_decay=decay, undecayed=undecayed)


def _rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate, which all groups have."""
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1:
        raise ValueError(f"recorder: parameter groups differ in lr: {sorted(rates)}; expected one value for all of them")
    return rates.pop()


def _held(optimizer: torch.optim.Optimizer) -> list[dict[str, float | tuple[float, float]]]:
    """What has to stay as it is in every group, in numbers, which may be given as tensors."""
    return [
        {key: float(group[key]) for key in ("momentum", "eps", "weight_decay") if key in group}
        | ({"betas": tuple(map(float, group["betas"]))} if "betas" in group else {})
        for group in optimizer.param_groups
    ]


def _decay(groups: Sequence[dict], model: nn.Module) -> tuple[float, tuple[str, ...]]:
    """The weight decay, and the names of the parameters without; the weights of all layers that methods follow have the same."""
    decays = {id(parameter): float(group.get("weight_decay", 0)) for group in groups for parameter in group["params"]}
    decay = max(decays.values())
    undecayed = {name for name, parameter in model.named_parameters() if decays.get(id(parameter)) == 0 < decay}
    followed = sorted(undecayed & {parameter_name(layer, "weight") for layer in linear_modules(model)})
    if followed or not set(decays.values()) <= {0, decay}:
        raise ValueError(
            f"recorder: parameter groups differ in weight_decay: {sorted(set(decays.values()))}, 0 for "
            f"{', '.join(followed[:3]) or 'no weight of a layer'}; expected one value, and 0 for none but biases, norms and "
            "embeddings"
        )
    return decay, tuple(sorted(undecayed))
