"""A recorded `Run` in a folder, written and read: tensors as safetensors, steps and learning rates beside them."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tda.artifacts import read_json, whole, write_json
from tda.trajectory import Checkpoint, Optimizer, Run


def save_run(folder: Path, run: Run, **facts: object) -> None:
    """Write `run` to `folder`, whole or not at all, with any `facts` beside it. The model's class is not written."""
    with whole(folder) as part:
        part.mkdir()
        _save(part / "initial.safetensors", weights=run.initial)
        for index, checkpoint in enumerate(run.checkpoints):
            _save(
                part / f"{index}.safetensors",
                weights=checkpoint.weights,
                second_moments=checkpoint.second_moments,
                mean_weights=checkpoint.mean_weights,
            )
        np.savez(
            part / "steps.npz",
            learning_rates=run.learning_rates,
            rows=np.concatenate(run.batches),
            batch_sizes=np.array([len(rows) for rows in run.batches]),
        )
        steps = [checkpoint.step for checkpoint in run.checkpoints]
        write_json(part / "run.json", {"checkpoints": steps, "optimizer": asdict(run.optimizer), "facts": facts})


def load_run(folder: Path, model: nn.Module) -> Run:
    """The run in `folder`; `model` has its architecture."""
    about = read_run_facts(folder)
    with np.load(folder / "steps.npz") as steps:
        ends = np.cumsum(steps["batch_sizes"])[:-1]
        rates, batches = steps["learning_rates"], np.split(steps["rows"], ends)
    checkpoints = []
    for index, step in enumerate(about["checkpoints"]):
        held = _load(folder / f"{index}.safetensors")
        checkpoints.append(Checkpoint(step, held["weights"], held["second_moments"], held["mean_weights"]))
    initial = _load(folder / "initial.safetensors")["weights"]
    settings = about["optimizer"]
    optimizer = Optimizer(**settings | {"undecayed": tuple(settings.get("undecayed", ()))})
    return Run(model, checkpoints, rates, batches, optimizer, initial)


def read_run_facts(folder: Path) -> dict:
    """Steps of the checkpoints, the optimizer, and the facts that were given."""
    return read_json(folder / "run.json", stage="evaluate")


def _save(path: Path, **kinds: dict[str, Tensor]) -> None:
    save_file({f"{kind}/{name}": value.contiguous() for kind, held in kinds.items() for name, value in held.items()}, path)


def _load(path: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {"weights": {}, "second_moments": {}, "mean_weights": {}}
    for key, value in load_file(path).items():
        kind, _, name = key.partition("/")
        found[kind][name] = value
    return found
