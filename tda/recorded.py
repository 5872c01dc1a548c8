"""The pipeline's run as a `Run`, read from its artifacts, so that the methods for any model can use it."""

from collections.abc import Sequence

from tda.artifacts import Workspace, read_json, read_table
from tda.checkpoints import load_checkpoint, second_moments
from tda.model import moving_state
from tda.segments import effective_weight_decay
from tda.trajectory import Checkpoint, Optimizer, Run


def load_run(workspace: Workspace, *, needs_moments: bool, only: Sequence[int] | None = None) -> Run:
    """The run, each checkpoint with the weights at which it is attributed.

    `only` selects checkpoints by index, and has to include the last one. With `needs_moments`, an AdamW run whose checkpoints
    have no optimizer state is a FileNotFoundError; without, the run is treated as one of SGD.
    """
    training = read_json(workspace.training, stage="train")
    trajectory = read_table(workspace.trajectory, stage="train")
    sgd = training["optimizer"] == "sgd"
    optimizer = Optimizer(
        "adamw" if needs_moments and not sgd else "sgd",
        momentum=training["momentum"] if sgd else 0.0,
        beta2=training["beta2"],
        epsilon=training["epsilon"],
        weight_decay=effective_weight_decay(trajectory, optimizer=training["optimizer"], weight_decay=training["weight_decay"]),
    )
    checkpoints = []
    steps = training["checkpoint_steps"]
    for index in range(len(steps)) if only is None else only:
        model = load_checkpoint(workspace, index)
        weights = {name: value.clone() for name, value in moving_state(model).items()}
        checkpoints.append(
            Checkpoint(steps[index], weights, second_moments(workspace, index) if optimizer.kind == "adamw" else {})
        )
    rates = trajectory["learning_rate"].to_numpy()
    if sgd:
        rates = rates * trajectory["gradient_scale"].to_numpy()  # what clipping left of each step
    batches = [rows.to_numpy() for rows in trajectory["documents"]] if training["batches_known"] else []
    return Run(model, checkpoints, rates, batches, optimizer, {})
