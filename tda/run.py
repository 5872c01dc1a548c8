"""A training run on disk: checkpoints and trajectory, resumed where a killed one stopped."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import nn
from tqdm import tqdm

from tda.adapters import attach, lora
from tda.artifacts import Workspace, damaged, existing, remove, whole, write_json, write_table
from tda.checkpoints import check_fits, run_facts, start_facts
from tda.config import Train
from tda.data import Documents
from tda.means import RunningMean
from tda.model import build_model, load_model
from tda.parallel import piece_done, progress_is_shown
from tda.train import (
    StepResult,
    checkpoint_steps,
    make_optimizer,
    resume,
    save_checkpoint,
    schedule,
    stage_ends,
    stage_lengths,
    train,
    trajectory_table,
)

if TYPE_CHECKING:
    from peft import PeftConfig


def initial_model(recipe: Train, *, vocabulary: int, context: int, seed: int, adapter: "PeftConfig | None" = None) -> nn.Module:
    """The model before its first step: built with random weights from `seed`, or loaded, with a new `adapter` if one is given."""
    if recipe.model == "llama":
        return build_model(recipe.architecture, vocabulary=vocabulary, context=context, seed=seed)
    model = load_model(recipe.model)
    return model if adapter is None else attach(model, adapter, seed=seed)


def tokenizer_size(workspace: Workspace) -> int:
    """Tokens of the tokenizer that `prepare` wrote; refused with FileNotFoundError or ValueError if it is missing or damaged."""
    from transformers import AutoTokenizer

    existing(workspace.tokenizer / "tokenizer.json", stage="prepare")
    try:
        return len(AutoTokenizer.from_pretrained(workspace.tokenizer))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(damaged(workspace.tokenizer, error, stage="prepare")) from error


def train_run(recipe: Train, documents: Documents, workspace: Workspace, *, context: int, device: torch.device) -> None:
    """Train, and write checkpoints, trajectory and `train.json`.

    Until the run ends, checkpoints are kept in a work folder that is named after everything the run depends on; a run that was
    killed resumes from the last one there.
    """
    torch.set_num_threads(1)  # threads would change the order of sums, and with it the last bits
    model = initial_model(
        recipe,
        vocabulary=tokenizer_size(workspace),
        context=context,
        seed=recipe.seed,
        adapter=lora(recipe.lora, base=recipe.model),
    ).to(device)
    check_fits(model, documents, origin=f"train.model: {recipe.model}")
    lengths = stage_lengths(documents, recipe)
    steps = schedule(documents, recipe, seed=recipe.seed, lengths=lengths)
    ends = stage_ends(lengths)
    at = checkpoint_steps(len(steps), len(recipe.checkpoints), ends)
    optimizer = make_optimizer(model, recipe)

    start = start_facts(recipe.model)
    work = workspace.work / "train" / documents.digest(recipe.model_dump_json(), *start.values())
    done, before = _resume(work, model, optimizer, num_checkpoints=len(at))
    results: list[StepResult] = []
    mean = RunningMean(model) if recipe.attribute_at == "mean" else None
    with tqdm(total=len(steps), initial=done, desc="training", unit="step", disable=not progress_is_shown()) as bar:

        def after(result: StepResult) -> None:
            results.append(result)
            if mean is not None:
                mean.add()
            bar.update()
            piece_done()
            bar.set_postfix(loss=f"{result.loss:.3f}", refresh=False)
            if (number := result.step.number) in at:
                model.eval()
                folder = _checkpoints(work) / str(at.index(number))
                write_table(work / f"trajectory-{folder.name}.parquet", pl.concat([before, trajectory_table(results)]))
                save_checkpoint(folder, model, optimizer, step=number, mean=mean and mean.take())
                model.train()

        train(model, documents, steps[done:], recipe, optimizer=optimizer, seed=recipe.seed, after=after)

    trajectory = pl.read_parquet(work / f"trajectory-{len(at) - 1}.parquet")
    with whole(workspace.checkpoints) as part:
        shutil.move(_checkpoints(work), part)  # all at once: what a kill leaves can be resumed
    write_table(workspace.trajectory, trajectory)
    write_json(
        workspace.training,
        {
            "batches_known": True,
            "first_loss": trajectory["loss"][0],
            "final_loss": trajectory["loss"].tail(20).mean(),
            **run_facts(
                recipe,
                model,
                documents,
                checkpoint_steps=at,
                stage_ends=ends,
                stage_parts=[stage.part for stage, length in zip(recipe.stages, lengths, strict=True) if length],
                optimizer={},
            ),
            **start,
        },
    )
    remove(work)


def _checkpoints(work: Path) -> Path:
    """The folder of the checkpoints of an unfinished run."""
    return work / "checkpoints"


def _resume(work: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, num_checkpoints: int) -> tuple[int, pl.DataFrame]:
    """Load the last checkpoint in `work`, if there is one. Returns the number of steps taken and their trajectory."""
    found = [index for index in range(num_checkpoints) if (_checkpoints(work) / str(index) / "state.json").exists()]
    if not found:
        return 0, trajectory_table([])
    last = found[-1]
    step = resume(_checkpoints(work) / str(last), model, optimizer)
    return step, pl.read_parquet(work / f"trajectory-{last}.parquet")
