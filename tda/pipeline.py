"""The stages in their order, and how one is run. `dvc.yaml` says what each reads and makes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tda.artifacts import Workspace
    from tda.config import Config


@dataclass(frozen=True)
class Stage:
    """One stage: a function of the same name in `stages.py`, and a section of the same name in `params.yaml`."""

    name: str
    makes: str
    indices: str = ""  # the key of `params.yaml` that numbers its parts; empty: the stage has no parts


STAGES = {
    stage.name: stage
    for stage in (
        Stage("prepare", "read, clean, split and tokenise the documents and the targets"),
        Stage("train", "train the model, or adopt an existing run, and keep its checkpoints and trajectory"),
        Stage("segments", "divide the training run into segments"),
        Stage("curvature", "fit the EK-FAC curvature of one segment", indices="segments.indices"),
        Stage("gradients", "log every document's projected gradient at one checkpoint", indices="train.checkpoints"),
        Stage("scores", "score every training document against the target set"),
        Stage("curation", "decide which documents stay, and with what weight"),
        Stage("retraining", "retrain on all, on curated and on randomly reduced data, over paired seeds"),
        Stage("evaluation", "compare the retrained models and give the verdict"),
        Stage("report", "write the page"),
    )
}


def run_stage(name: str, config: "Config", workspace: "Workspace", index: int | None = None) -> None:
    """Run the stage `name`, or its part `index`. Refused while another process runs the same.

    Raises:
        ValueError: `params.yaml` has no part `index`.
    """
    from tda import stages
    from tda.artifacts import only_run

    arguments = () if index is None else (index,)
    if index is not None and index not in (known := part_numbers(STAGES[name], config)):
        raise ValueError(f"no part {index}: {STAGES[name].indices} in params.yaml is {known}; give --index one of these")
    remove_stale(config, workspace)
    with only_run(workspace.work / f"{'-'.join((name, *map(str, arguments)))}.lock"):
        getattr(stages, name)(config, workspace, *arguments)


def part_numbers(stage: Stage, config: "Config") -> list[int]:
    """The numbers of a stage's parts."""
    section, key = stage.indices.split(".")
    return getattr(getattr(config, section), key)


def remove_stale(config: "Config", workspace: "Workspace") -> None:
    """Remove outputs of parts that `params.yaml` no longer has: later stages depend on the whole folder."""
    outputs = {"curvature": workspace.curvature, "gradients": workspace.gradients}
    for name, output in outputs.items():
        wanted = part_numbers(STAGES[name], config)
        example: Path = output(0)
        for path in example.parent.glob(f"*{example.suffix}"):
            if path.stem.isdigit() and int(path.stem) not in wanted:
                path.unlink(missing_ok=True)
