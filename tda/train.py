"""The training loop: AdamW or SGD over a fixed schedule of batches, with checkpoints and a trajectory.

The training loss of a step is the mean over all predicted tokens of its batch, in nats. The schedule is a function of the seed
alone, so a run that was killed goes on from its last checkpoint and ends with the same bytes.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tda.adapters import normalise_config
from tda.artifacts import MEAN_FILE, read_json, whole, write_json
from tda.config import Train
from tda.data import Documents, batches
from tda.losses import document_losses
from tda.model import load_model, trained_parameters
from tda.parallel import tf32

TRAJECTORY = {  # a column for each; a row per step
    "step": pl.Int32,
    "stage": pl.Int32,
    "learning_rate": pl.Float64,
    "gradient_scale": pl.Float64,
    "loss": pl.Float64,
    "documents": pl.List(pl.Int32),
}


@dataclass(frozen=True)
class Step:
    """One optimizer step of the schedule."""

    number: int  # from 1
    stage: int  # index into train.stages
    rows: list[int]  # row numbers of the documents in the batch
    learning_rate: float


@dataclass(frozen=True)
class StepResult:
    """A step that was taken."""

    step: Step
    loss: float  # nats per token
    scale: float  # the factor by which clipping shortened the gradient; 1 if it did not


def stage_lengths(documents: Documents, recipe: Train) -> list[int]:
    """Steps of every training stage: its epochs over its part, in whole batches; 0 for a part without documents."""
    parts = np.array(documents.parts)
    sizes = [len(parts) if stage.part == "all" else int((parts == stage.part).sum()) for stage in recipe.stages]
    return [
        math.ceil(stage.epochs * math.ceil(size / recipe.batch_size)) if size else 0
        for stage, size in zip(recipe.stages, sizes, strict=True)
    ]


def stage_ends(lengths: Sequence[int]) -> list[int]:
    """The last step of every training stage that takes any."""
    return [sum(lengths[: index + 1]) for index in range(len(lengths)) if lengths[index]]


def schedule(
    documents: Documents, recipe: Train, *, seed: int, lengths: Sequence[int], keep: np.ndarray | None = None
) -> list[Step]:
    """All steps of a run: `lengths` steps per stage, over the documents that `keep` marks (default: all).

    Every epoch permutes the whole part afresh and then takes out the documents that are not kept, so runs with the same seed but
    different selections see the documents they share in the same order.

    Raises:
        ValueError: a stage that takes steps has no documents to take them on, or no stage takes any.
    """
    parts = np.array(documents.parts)
    kept = np.ones(len(documents), dtype=bool) if keep is None else keep
    rates = learning_rates(recipe, sum(lengths))
    if not rates:
        raise ValueError(
            f"train.stages: none of the parts {[stage.part for stage in recipe.stages]} has documents; see "
            "prepare.general_sources"
        )
    steps: list[Step] = []
    for index, (stage, length) in enumerate(zip(recipe.stages, lengths, strict=True)):
        pool = np.arange(len(documents)) if stage.part == "all" else np.flatnonzero(parts == stage.part)
        if length and not kept[pool].any():
            raise ValueError(
                f"train.stages: no documents are left for part {stage.part}; curation dropped them all, lower curation.drop"
            )
        stream = _shuffled(pool, kept, np.random.default_rng([seed, index]), recipe.batch_size)
        for _ in range(length):
            number = len(steps) + 1
            steps.append(Step(number, index, next(stream), rates[number - 1]))
    return steps


def _shuffled(pool: np.ndarray, kept: np.ndarray, random: np.random.Generator, size: int) -> Iterator[list[int]]:
    while True:
        order = random.permutation(pool)
        order = order[kept[order]]
        for start in range(0, len(order), size):
            yield order[start : start + size].tolist()


def learning_rates(recipe: Train, num_steps: int) -> list[float]:
    """The learning rate of every step: linear warm-up, then constant, or linear or cosine decay to zero."""
    warmup = round(recipe.warmup * num_steps)

    def factor(step: int) -> float:
        if step <= warmup:
            return step / warmup
        progress = (step - 1 - warmup) / max(1, num_steps - warmup)
        if recipe.schedule == "linear":
            return 1 - progress
        return 1.0 if recipe.schedule == "constant" else (1 + math.cos(math.pi * progress)) / 2

    return [recipe.learning_rate * factor(step) for step in range(1, num_steps + 1)]


def make_optimizer(model: nn.Module, recipe: Train) -> torch.optim.Optimizer:
    """AdamW (decoupled weight decay) or SGD with heavy-ball momentum (coupled); matrices decay, vectors do not."""
    trainable = trained_parameters(model).values()
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon, fused=True
        )
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)


def train(
    model: nn.Module,
    documents: Documents,
    steps: Sequence[Step],
    recipe: Train,
    *,
    optimizer: torch.optim.Optimizer,
    weights: np.ndarray | None = None,
    seed: int = 0,
    after: Callable[[StepResult], None] = lambda result: None,
) -> None:
    """Train `model` in place by `steps`; `weights` (default 1) multiply each document's loss; `after` is called after each step.

    A GPU multiplies in TF32, whose rounding is far below the noise of a batch, at several times the speed of float32.

    Raises:
        ValueError: the loss is not finite.
    """
    device = next(model.parameters()).device
    factors = torch.ones(len(documents)) if weights is None else torch.from_numpy(weights).float()
    model.train()
    with tf32(allowed=device.type != "cpu"):
        for step in steps:
            torch.manual_seed(seed * 1_000_003 + step.number)  # so that dropout does not depend on a restart
            for group in optimizer.param_groups:
                group["lr"] = step.learning_rate
            batch = documents.batch(step.rows).to(device)
            loss, _losses = document_losses(model, batch, weights=factors[step.rows].to(device) / batch.loss_mask.sum())
            if not torch.isfinite(loss):
                raise ValueError(
                    f"train: the loss of step {step.number} is {loss.item()} at learning rate {step.learning_rate:.3g}; expected "
                    "a finite number. Lower train.learning_rate, lengthen train.warmup, or set train.max_gradient_norm"
                )
            loss.backward()
            scale = 1.0
            if recipe.max_gradient_norm:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
                scale = min(1.0, recipe.max_gradient_norm / (norm.item() + 1e-6))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after(StepResult(step, loss.item(), scale))
    model.eval()


@torch.no_grad()
def mean_loss(model: nn.Module, documents: Documents, *, batch_tokens: int = 4096) -> float:
    """Mean loss over all predicted tokens of `documents`, in nats per token."""
    device = next(model.parameters()).device
    total = sum(
        document_losses(model, batch.to(device))[1].double().sum().item()
        for batch in batches(documents, batch_tokens=batch_tokens)
    )
    return total / int(documents.num_loss_tokens.sum())


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by `KIND.PARAMETER`, such as `exp_avg_sq.model.layers.0.mlp.up_proj.weight`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{kind}.{names[parameter]}": value.detach().contiguous()
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Load `state`, as `optimizer_state` gives it, into `optimizer`."""
    by_parameter: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        kind, _, name = key.partition(".")
        by_parameter[name][kind] = value.clone()
    names = {parameter: name for name, parameter in model.named_parameters()}
    known = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    held = {number: by_parameter[name] for number, name in enumerate(known) if name in by_parameter}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": held})


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, *, step: int, mean: dict[str, Tensor] | None = None
) -> None:
    """Write weights, their `mean` if there is one, optimizer state and step number to `folder`, whole or not at all."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with whole(folder) as part:
        part.mkdir()
        model.save_pretrained(part / "model")
        normalise_config(part / "model")
        if optimizer is not None:
            save_file(optimizer_state(model, optimizer), part / "optimizer.safetensors")
        if mean is not None:
            save_file({name: mean[name] for name in trained_parameters(model)}, part / MEAN_FILE)
        write_json(part / "state.json", {"step": step})


def checkpoint_steps(num_steps: int, num_checkpoints: int, stage_ends: Sequence[int]) -> list[int]:
    """The steps after which checkpoints are taken: evenly spaced, but the one nearest to a stage's end is moved there.

    Raises:
        ValueError: there are more checkpoints than steps.
    """
    if num_checkpoints > num_steps:
        raise ValueError(f"train.checkpoints: {num_checkpoints} checkpoints of {num_steps} steps; ask for fewer, or train longer")
    steps = [round((index + 1) * num_steps / num_checkpoints) for index in range(num_checkpoints)]
    for end in stage_ends:
        nearest = min(range(num_checkpoints - 1), key=lambda index: abs(steps[index] - end), default=None)
        if nearest is not None and 0 < end < num_steps and end not in steps:
            steps[nearest] = end
    return sorted(steps)


def trajectory_table(results: Sequence[StepResult]) -> pl.DataFrame:
    """The trajectory as a table: a row per step."""
    return pl.DataFrame(
        {
            "step": [result.step.number for result in results],
            "stage": [result.step.stage for result in results],
            "learning_rate": [result.step.learning_rate for result in results],
            "gradient_scale": [result.scale for result in results],
            "loss": [result.loss for result in results],
            "documents": [result.step.rows for result in results],
        },
        schema=TRAJECTORY,
    )


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint in `folder` into `model` and `optimizer`; return its step."""
    model.load_state_dict(load_model(folder / "model", dtype=next(model.parameters()).dtype).state_dict())
    restore_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"))
    return read_json(folder / "state.json", stage="train")["step"]
