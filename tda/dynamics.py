"""Reading the segments of the pipeline's run from their artifacts: the segments, exposure, and SOURCE's dynamics."""

from dataclasses import fields

import numpy as np
import polars as pl

from tda.artifacts import Workspace, read_json, read_table
from tda.config import Curvature
from tda.data import Documents
from tda.factors import SegmentFactors
from tda.segments import Segment, draw_shares, effective_weight_decay, rows_seen
from tda.source import SegmentDynamics


def load_segments(workspace: Workspace) -> list[Segment]:
    """The segments of the run, first to last."""
    names = [field.name for field in fields(Segment)]
    held = read_json(workspace.segments, stage="segments")["segments"]
    return [Segment(**{name: values[name] for name in names}) for values in held]


def segment_at(workspace: Workspace, index: int) -> Segment:
    """The segment with this index.

    Raises:
        ValueError: the run was divided into fewer.
    """
    segments = load_segments(workspace)
    if index >= len(segments):
        raise ValueError(
            f"{workspace.segments} has no segment {index}, it has {len(segments)}: segments.indices was changed after stage "
            "segments had run; run `dvc repro segments`"
        )
    return segments[index]


def segment_with(workspace: Workspace, checkpoint: int) -> Segment:
    """The segment that a checkpoint belongs to.

    Raises:
        ValueError: it belongs to none.
    """
    segments = load_segments(workspace)
    for segment in segments:
        if checkpoint in segment.checkpoints:
            return segment
    raise ValueError(
        f"{workspace.segments} has no checkpoint {checkpoint}, it has {sum(len(one.checkpoints) for one in segments)}: "
        "train.checkpoints was changed after the stages train and segments had run; run `dvc repro segments`, which trains again"
    )


def load_exposure(workspace: Workspace, documents: Documents) -> np.ndarray:
    """(document, segment) shares of each segment's learning rate, in the order of `documents`.

    Raises:
        ValueError: the exposures are those of other documents.
    """
    table = read_table(workspace.exposure, stage="segments")
    if table["doc_id"].to_list() != documents.ids:
        raise ValueError(f"{workspace.exposure} is of other documents than {workspace.documents}; run `dvc repro segments`")
    return table.drop("doc_id").to_numpy()


def load_draw_shares(workspace: Workspace, documents: Documents) -> np.ndarray:
    """(document,) the share of the run's draws that each document got."""
    known = read_json(workspace.training, stage="train")["batches_known"]
    steps = read_table(workspace.trajectory, stage="train", columns=["documents"])["documents"]
    return draw_shares([rows.to_numpy() for rows in steps] if known else [], len(documents))


def curvature_rows(config: Curvature, exposure: np.ndarray, index: int) -> np.ndarray:
    """Row numbers of the documents that the curvature of segment `index` is fitted on: some of those that it saw."""
    return rows_seen(exposure, index, config.num_documents, seed=[config.seed, index])


def load_dynamics(
    workspace: Workspace, segments: list[Segment], factors: list[SegmentFactors], *, adam: str
) -> list[SegmentDynamics]:
    """Every segment's respond and decay, made of its factors."""
    training = read_json(workspace.training, stage="train")
    trajectory = read_table(workspace.trajectory, stage="train", columns=["step", "learning_rate", "gradient_scale"])
    return [
        SegmentDynamics(
            index=segment.index,
            curvature=held.curvature(adam if training["optimizer"] == "adamw" else "none"),
            time=segment.time,
            weight_decay=effective_weight_decay(
                trajectory.filter(pl.col("step").is_between(segment.first_step, segment.last_step)),
                optimizer=training["optimizer"],
                weight_decay=training["weight_decay"],
            ),
        )
        for segment, held in zip(segments, factors, strict=True)
    ]
