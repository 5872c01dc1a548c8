"""Training segments: stretches of the run with their checkpoints, and each document's exposure in each of them.

Of a segment, SOURCE (arXiv 2405.12186, section 3) uses only the summed learning rate, `eta_bar K`, and the checkpoints. The
paper assumes that all documents are drawn equally often, each for 1/N of the segment's learning rate. Here the trajectory says
what each one received (its exposure): documents of another training stage received nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl


@dataclass(frozen=True)
class Segment:
    """A stretch of training whose curvature and gradients are taken as constant."""

    index: int
    checkpoints: list[int]
    first_step: int
    last_step: int
    num_steps: int  # K
    mean_learning_rate: float  # eta_bar, of the effective rates: clipping and momentum included
    tokens_per_document: float  # mean number of predicted tokens of the documents seen; the training loss is a mean over tokens

    @property
    def time(self) -> float:
        """eta_bar K, the summed learning rate."""
        return self.mean_learning_rate * self.num_steps


def effective_learning_rates(trajectory: pl.DataFrame, *, optimizer: str, momentum: float) -> np.ndarray:
    """(step,) the factor by which each step would move along a constant gradient.

    Heavy-ball momentum multiplies the learning rate by 1 / (1 - momentum) (SOURCE, appendix D.2), and clipping by its scale. An
    AdamW step does not depend on the gradient's length, so its rates are as they are.
    """
    rates = trajectory["learning_rate"].to_numpy()
    return rates if optimizer == "adamw" else rates * trajectory["gradient_scale"].to_numpy() / (1 - momentum)


def effective_weight_decay(trajectory: pl.DataFrame, *, optimizer: str, weight_decay: float) -> float:
    """The weight decay for each unit of the summed effective learning rate of these steps.

    Clipping shortens the gradients of SGD but not the decay, which `torch.optim.SGD` adds to them afterwards.
    """
    if optimizer == "adamw":
        return weight_decay
    rates = trajectory["learning_rate"].to_numpy()
    clipped = float(rates @ trajectory["gradient_scale"].to_numpy())
    return weight_decay * float(rates.sum()) / clipped if clipped else weight_decay


def segment_ends(
    checkpoint_steps: Sequence[int], num_segments: int, *, by: str, rates: np.ndarray, stage_ends: Sequence[int]
) -> list[int]:
    """For every segment, the number of checkpoints up to its end.

    `by` says how checkpoints are divided:

    - "steps": equally many checkpoints for each (one more for the first ones if they do not divide evenly);
    - "learning_rate": about the same summed learning rate for each;
    - "stages": a boundary at the end of each training stage, with the stages of most checkpoints divided further.

    Raises:
        ValueError: there are fewer checkpoints than segments, or than the training stages need.
    """
    num_checkpoints = len(checkpoint_steps)
    if num_checkpoints < num_segments:
        raise ValueError(
            f"segments: {num_checkpoints} checkpoints cannot be divided into {num_segments} segments, each needs one; "
            f"set segments.indices to {list(range(num_checkpoints))} or fewer, or train.checkpoints to more (for `attribute`: "
            f"num_segments to {num_checkpoints} or fewer)"
        )
    if by == "steps":
        sizes = [len(part) for part in np.array_split(np.arange(num_checkpoints), num_segments)]
        return np.cumsum(sizes).tolist()
    if by == "learning_rate":
        received = np.cumsum(rates)[np.asarray(checkpoint_steps) - 1]
        return _nearest_ends(received, num_segments)
    return _stage_ends(checkpoint_steps, num_segments, stage_ends)


def _nearest_ends(received: np.ndarray, num_segments: int) -> list[int]:
    """Ends such that each segment receives nearly the same amount, and has at least one checkpoint."""
    ends: list[int] = []
    for index in range(1, num_segments):
        wanted = received[-1] * index / num_segments
        nearest = int(np.abs(received - wanted).argmin()) + 1
        lowest = (ends[-1] if ends else 0) + 1
        ends.append(min(max(nearest, lowest), len(received) - (num_segments - index)))
    return [*ends, len(received)]


def _stage_ends(checkpoint_steps: Sequence[int], num_segments: int, stage_ends: Sequence[int]) -> list[int]:
    stages: list[list[int]] = []  # the checkpoints of every stage
    begin = 0
    for end in stage_ends:
        stages.append([number for number, step in enumerate(checkpoint_steps) if begin < step <= end])
        begin = end
    if num_segments < len(stages):
        raise ValueError(
            f"segments: {num_segments} segments for {len(stages)} training stages; expected at least one each; add to "
            "segments.indices, or set segments.by to steps"
        )
    empty = [number for number, held in enumerate(stages) if not held]
    if empty:
        raise ValueError(
            f"segments: training stage {empty[0]} has no checkpoint; add to train.checkpoints, or set segments.by to steps"
        )
    parts = [1] * len(stages)
    while sum(parts) < num_segments:  # divide the stage with the most checkpoints per segment
        longest = max(range(len(stages)), key=lambda number: len(stages[number]) / parts[number])
        parts[longest] += 1
    sizes = [len(piece) for held, number in zip(stages, parts, strict=True) for piece in np.array_split(held, number)]
    if min(sizes) == 0:
        raise ValueError(
            f"segments: the stages' checkpoints {stages} do not divide into {num_segments} segments; add to train.checkpoints"
        )
    return np.cumsum(sizes).tolist()


def make_segments(
    checkpoint_steps: Sequence[int],
    ends: Sequence[int],
    *,
    rates: np.ndarray,
    exposure: np.ndarray | None,
    tokens: np.ndarray,
) -> list[Segment]:
    """The segments. `exposure` (document, segment) weights the mean of `tokens` (document).

    If it is None, or nothing was learned in the segment, all documents weigh the same.
    """
    segments = []
    for index, end in enumerate(ends):
        begin = ends[index - 1] if index else 0
        first = checkpoint_steps[begin - 1] + 1 if begin else 1
        last = checkpoint_steps[end - 1]
        received = np.ones(len(tokens)) if exposure is None or not exposure[:, index].any() else exposure[:, index]
        segments.append(
            Segment(
                index=index,
                checkpoints=list(range(begin, end)),
                first_step=first,
                last_step=last,
                num_steps=last - first + 1,
                mean_learning_rate=float(rates[first - 1 : last].mean()),
                tokens_per_document=float(received @ tokens / received.sum()),
            )
        )
    return segments


def document_exposure(
    trajectory: pl.DataFrame, last_steps: Sequence[int], *, rates: np.ndarray, num_documents: int
) -> np.ndarray:
    """(document, segment): the share of the segment's learning rate that the document received.

    A step of batch size B gives each of its documents 1/B of its learning rate. Columns sum to 1: if all documents are drawn
    equally often, every share is 1/N. A segment whose learning rates are all 0 gives nothing to any document.
    """
    exposure = np.zeros((num_documents, len(last_steps)))
    segment = np.searchsorted(np.asarray(last_steps), trajectory["step"].to_numpy())
    for at, rate, rows in zip(segment, rates, trajectory["documents"].to_list(), strict=True):
        if at < len(last_steps):
            np.add.at(exposure[:, at], rows, rate / len(rows))
    received = exposure.sum(axis=0)
    return np.divide(exposure, received, out=np.zeros_like(exposure), where=received > 0)


def draw_shares(batches: Sequence[np.ndarray], num_documents: int) -> np.ndarray:
    """(document,) the share of the run's draws that each document got; `batches` has the documents of every step.

    If it is empty, how often each was drawn is unknown, and all count as drawn equally often.
    """
    if not batches:
        return np.full(num_documents, 1 / num_documents)
    drawn = np.concatenate(batches)
    return np.bincount(drawn, minlength=num_documents) / len(drawn)


def rows_seen(exposure: np.ndarray, index: int, num: int, *, seed: Sequence[int]) -> np.ndarray:
    """Ascending numbers of `num` of the rows that segment `index` trained on, drawn by `seed`; 0: all of them.

    `exposure` is (row, segment). Of a segment that learned nothing, whose curvature has no effect, they are drawn from all rows.
    """
    seen = np.flatnonzero(exposure[:, index] if exposure[:, index].any() else np.ones(len(exposure)))
    if not 0 < num < len(seen):
        return seen
    return np.sort(np.random.default_rng(seed).choice(seen, num, replace=False))
