"""Adopting the output of a Hugging Face Trainer as the training run: its checkpoints, optimizer state and learning rates.

What is read: every `checkpoint-*` folder that has a `trainer_state.json` (whose `global_step` counts, not the folder's name);
the optimizer state in `optimizer.pt`, without unpickling code; and the learning rates logged in the last state, interpolated
between log entries.

Two things are not recorded there. Which documents were in which batch: all are taken to have been seen equally often, as SOURCE
itself assumes. Whether gradients were clipped: they are taken not to have been, which matters only for SGD, since AdamW's steps
do not depend on the gradient's length.
"""

import contextlib
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tda.adapters import normalise_config
from tda.artifacts import Workspace, whole, write_json, write_table
from tda.checkpoints import architecture_digest, check_fits, run_facts, start_facts
from tda.config import Train
from tda.data import Documents
from tda.model import freeze, load_model, trained_parameters
from tda.train import TRAJECTORY

# Patterns of names that the Trainer exempts from weight decay; these parameters come last in its optimizer state.
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
MOMENTS = {"exp_avg", "exp_avg_sq"}  # Adam's state of a parameter


def adopt_run(recipe: Train, documents: Documents, workspace: Workspace) -> None:
    """Copy as many checkpoints of the run in `train.run` as `train.checkpoints` asks for, and write trajectory and `train.json`.

    A run that does not exist, has too few checkpoints or a truncated one is a FileNotFoundError. An optimizer state of another
    model, or of an optimizer that SOURCE cannot follow, is a ValueError.
    """
    run = Path(recipe.run)
    found = find_checkpoints(run)
    if said := too_few_checkpoints(recipe, len(found)):
        raise FileNotFoundError(f"{said}, or save more of them (save_steps and save_total_limit of the Trainer)")
    chosen = [found[round((index + 1) * len(found) / len(recipe.checkpoints)) - 1] for index in recipe.checkpoints]
    frozen = unmoved(found[0][1], found[-1][1], base=recipe.model) if len(found) > 1 else []
    final_state = _trainer_state(chosen[-1][1])
    num_steps = chosen[-1][0]
    rates = interpolate_rates(known_rates(found, final_state["log_history"]), num_steps)
    optimizer: dict[str, Any] = {}
    model: nn.Module | None = None
    with whole(workspace.checkpoints) as part:
        part.mkdir()
        for index, (step, folder) in enumerate(chosen):
            before, model = model, load_model(folder, base=recipe.model)
            _check_architecture(folder, model, before)
            check_fits(model, documents, origin=str(folder))
            target = part / str(index)
            _copy_model(folder, target / "model", model)
            normalise_config(target / "model", base=recipe.model)
            optimizer = _copy_optimizer(folder, target, model, frozen=frozen)
            write_json(target / "state.json", {"step": step, "from": folder.name})
    for said in filter(None, (without_optimizer(recipe, chosen), other_recipe(recipe, optimizer))):
        print(f"tda train: {said}", file=sys.stderr)
    losses = {entry["step"]: entry["loss"] for entry in final_state["log_history"] if "loss" in entry}
    write_table(workspace.trajectory, _trajectory(num_steps, rates, losses))
    assert model is not None
    write_json(
        workspace.training,
        {
            "batches_known": False,
            "frozen": frozen,
            "first_loss": losses[min(losses)] if losses else None,
            "final_loss": losses[max(losses)] if losses else None,
            **run_facts(
                recipe,
                freeze(model, frozen),
                documents,
                checkpoint_steps=[step for step, _ in chosen],
                stage_ends=[num_steps],
                stage_parts=["all"],
                optimizer=optimizer,
            ),
            **start_facts(recipe.model),
        },
    )


def other_recipe(recipe: Train, optimizer: dict[str, Any]) -> str:
    """A sentence on how retraining will differ from the run; empty if it will not."""
    run = dict(optimizer)
    if run.get("optimizer") == "adamw":
        run.pop("momentum", None)
    unlike = [
        f"{key} {_shown(value)} (train.{key} is {getattr(recipe, key)})"
        for key, value in run.items()
        if value != getattr(recipe, key)
    ]
    if not unlike:
        return ""
    return (
        f"the run had {', '.join(unlike)}: retraining, and so the verdict, goes by params.yaml; set these keys, and train.stages"
        ", to what the run did"
    )


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def too_few_checkpoints(recipe: Train, there: int) -> str:
    """A sentence if the run has fewer checkpoints than `train.checkpoints` asks for; else empty."""
    if there >= len(recipe.checkpoints):
        return ""
    return (
        f"train.run: {recipe.run} has {there} of the {len(recipe.checkpoints)} checkpoints that are asked for; set "
        f"train.checkpoints to {list(range(there))}"
    )


def without_optimizer(recipe: Train, found: list[tuple[int, Path]]) -> str:
    """A sentence if a checkpoint lacks the optimizer state that stage curvature will want; else empty."""
    lacking = [folder.name for _, folder in found if not (folder / "optimizer.pt").exists()]
    if recipe.optimizer != "adamw" or not lacking:
        return ""
    return (
        f"train.run: {lacking[0]} has no optimizer.pt: stage curvature refuses it unless curvature.adam is none, which ranks "
        "documents far worse; train with save_only_model=False"
    )


def find_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """`(step, folder)` of every checkpoint of a Trainer's output folder, by step.

    Raises:
        FileNotFoundError: there is no such folder, or no checkpoint in it.
    """
    if not run.is_dir():
        raise FileNotFoundError(
            f"train.run: no folder {run}; expected the output folder of a Hugging Face Trainer, or an empty string"
        )
    folders = [folder for folder in run.glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]
    if not folders:
        raise FileNotFoundError(
            f"train.run: {run} has no checkpoint-* folder with a trainer_state.json; was the run saved by a Trainer?"
        )
    return sorted((_trainer_state(folder)["global_step"], folder) for folder in folders)


def _trainer_state(folder: Path) -> dict[str, Any]:
    path = folder / "trainer_state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {"global_step": int(state["global_step"]), "log_history": list(state.get("log_history", []))}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"train.run: {path} cannot be read: {type(error).__name__}: {error}; expected the file as the Trainer wrote it; copy "
            "it again, or remove that checkpoint"
        ) from error


def known_rates(found: list[tuple[int, Path]], log_history: list[dict]) -> dict[int, float]:
    """The learning rates that the run recorded, by step: the logged ones, and in every checkpoint's scheduler the next one."""
    known = {}
    for step, folder in found:
        with contextlib.suppress(OSError, RuntimeError, EOFError, KeyError, IndexError, pickle.UnpicklingError):
            known[step + 1] = float(torch.load(folder / "scheduler.pt", map_location="cpu", weights_only=True)["_last_lr"][0])
    return known | {entry["step"]: float(entry["learning_rate"]) for entry in log_history if "learning_rate" in entry}


def interpolate_rates(known: dict[int, float], num_steps: int) -> np.ndarray:
    """The learning rate of every step, linear between the known ones.

    Raises:
        ValueError: none is known in the first half of the run, so that its schedule is not.
    """
    steps = sorted(step for step in known if step <= num_steps)
    if not steps or steps[0] > (num_steps + 1) // 2:
        raise ValueError(
            "train.run: trainer_state.json has no learning rate in its log_history before step "
            f"{steps[0] if steps else num_steps} of {num_steps}, and no checkpoint of the first half has a scheduler.pt; "
            "expected to know the rates of the run: train with smaller logging_steps"
        )
    return np.interp(np.arange(1, num_steps + 1), steps, [known[step] for step in steps])


def _check_architecture(folder: Path, model: nn.Module, before: nn.Module | None) -> None:
    if before is not None and architecture_digest(model) != architecture_digest(before):
        raise ValueError(
            f"train.run: {folder} is a checkpoint of another architecture than the ones before it; expected checkpoints of one "
            "run; move those of other runs elsewhere"
        )


def _copy_model(folder: Path, target: Path, model: nn.Module) -> None:
    """The model's files; weights in a format other than safetensors are written as that."""
    if any(folder.glob("*.safetensors")):
        shutil.copytree(folder, target, ignore=lambda _folder, names: [name for name in names if not _is_model(name)])
    else:
        model.save_pretrained(target)


def _is_model(name: str) -> bool:
    return name.endswith((".safetensors", ".json")) and not name.startswith(("trainer_state", "training_args"))


def unmoved(first: Path, last: Path, *, base: str) -> list[str]:
    """The parameters that are equal in two checkpoints, which the run kept frozen; an adapter's `base` is not among them."""
    before, after = (trained_parameters(load_model(folder, base=base)) for folder in (first, last))
    return sorted(name for name, value in after.items() if name in before and torch.equal(before[name], value))


def _copy_optimizer(folder: Path, target: Path, model: nn.Module, *, frozen: list[str]) -> dict[str, Any]:
    """Write the optimizer's tensors by parameter name, and return its kind and settings; empty if the run saved none.

    It may or may not include frozen parameters: a Trainer leaves out those that were frozen when it began.
    """
    path = folder / "optimizer.pt"
    if not path.exists():
        return {}
    saved = _load_optimizer(path)
    settings = _kind_of(saved, path)
    names = parameter_order(model)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(numbers) == len(names) - len(frozen):
        names = [name for name in names if name not in frozen]
    if numbers != list(range(len(names))):
        raise ValueError(
            f"train.run: {path} is for {len(numbers)} parameters, the model has {len(names)}, of which {len(frozen)} do not "
            "change between the first checkpoint and the last; expected the optimizer of this model, saved by the Trainer; or "
            "remove the file and set curvature.adam to none"
        )
    tensors = {
        f"{kind}.{names[number]}": value.contiguous()
        for number, values in saved["state"].items()
        for kind, value in values.items()
        if isinstance(value, Tensor)
    }
    parameters = trained_parameters(model)
    for key, value in tensors.items():
        name = key.partition(".")[2]
        if value.ndim and value.shape != parameters[name].shape:
            raise ValueError(
                f"train.run: {path}: the state of {name} is {tuple(value.shape)}, the parameter {tuple(parameters[name].shape)}; "
                "expected the optimizer of this model, its parameters in the Trainer's order (decayed ones first)"
            )
    save_file(tensors, target / "optimizer.safetensors")
    return settings


def _kind_of(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """The kind and settings of the optimizer in `saved`, recognised by its state and settings."""
    group = max(saved["param_groups"], key=lambda held: held.get("weight_decay", 0.0))
    kept = {kind for values in saved["state"].values() for kind in values}
    decay = float(group.get("weight_decay", 0.0))
    strange = [key for key in ("nesterov", "amsgrad", "maximize", "dampening", "centered") if group.get(key)]
    found: dict[str, Any] = {}
    if MOMENTS <= kept <= MOMENTS | {"step", "max_exp_avg_sq"} and {"betas", "eps"} <= set(group):
        beta1, beta2 = group["betas"]
        found = {"optimizer": "adamw", "momentum": 0.0, "beta1": beta1, "beta2": beta2, "epsilon": group["eps"]}
        strange += ["weight_decay as a part of the gradient"] * (decay > 0 and group.get("decoupled_weight_decay") is False)
    elif kept <= {"momentum_buffer"} and {"momentum", "dampening"} <= set(group):
        found = {"optimizer": "sgd", "momentum": float(group["momentum"])}
    else:
        known = ", ".join(sorted(set(group) - {"params"}))
        strange.append(f"a state of {', '.join(sorted(kept)) or 'nothing'} and the settings {known}")
    if strange:
        raise ValueError(
            f"train.run: {path}: an optimizer with {', '.join(strange)}; expected AdamW as torch has it, or SGD, whose dynamics "
            "SOURCE follows; to follow the run as one of SGD, which ranks documents worse, remove its optimizer.pt files and set "
            "curvature.adam to none"
        )
    return found | {"learning_rate": group.get("initial_lr", group["lr"]), "weight_decay": decay}


def _load_optimizer(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise FileNotFoundError(
            f"train.run: {path} cannot be read: {str(error).splitlines()[0]}; expected a whole file of tensors as a Trainer "
            "saves it; copy it again, or remove it and set curvature.adam to none"
        ) from error


def parameter_order(model: nn.Module) -> list[str]:
    """Parameter names in the order of a Trainer's optimizer state: those with weight decay, then those without."""
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    names = list(trained_parameters(model))
    return [name for name in names if name in decayed] + [name for name in names if name not in decayed]


def _trajectory(num_steps: int, rates: np.ndarray, losses: dict[int, float]) -> pl.DataFrame:
    steps = range(1, num_steps + 1)
    return pl.DataFrame(
        {
            "step": steps,
            "stage": [0] * num_steps,
            "learning_rate": rates,
            "gradient_scale": [1.0] * num_steps,
            "loss": [losses.get(step) for step in steps],
            "documents": [[]] * num_steps,
        },
        schema=TRAJECTORY,
    )
