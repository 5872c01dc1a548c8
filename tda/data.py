"""Training data: documents as token rows, or plain tensors of any model, and batches of either.

Every kind of batch has

- `rows`: the numbers of its examples;
- `counts` (example, position): true where an activation can affect a loss;
- `sizes` (example): the terms of each example in the training loss, which is a mean over terms: predicted tokens, or 1;
- `by_document(x)`: positions grouped by example, (example, position, k).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
import xxhash
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tda.artifacts import read_table


@dataclass(frozen=True)
class Documents:
    """Tokenised documents in a fixed order; a document's row number is its index here."""

    ids: list[str]
    sources: list[str]
    parts: list[str]
    content_hashes: list[str]
    tokens: list[np.ndarray]  # int32 token ids, beginning-of-text included
    loss_starts: np.ndarray  # index of the first token whose prediction counts

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self, *more: str) -> str:
        """A digest of everything that a run on these documents depends on, and of `more`."""
        identity = [self.ids, self.content_hashes, self.parts, self.loss_starts.tolist(), self.lengths.tolist(), *more]
        digest = xxhash.xxh3_128(json.dumps(identity).encode())
        digest.update(np.concatenate(self.tokens).astype(np.int32).tobytes())
        return digest.hexdigest()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every document."""
        return np.array([len(row) for row in self.tokens], dtype=np.int64)

    @cached_property
    def num_loss_tokens(self) -> np.ndarray:
        """Predictions of every document that count in the loss."""
        return self.lengths - self.loss_starts

    def batch(self, rows: Sequence[int]) -> "Batch":
        """The documents in `rows`, padded on the right to the longest."""
        lengths = np.array([len(self.tokens[row]) for row in rows])
        tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
        for place, row in enumerate(rows):
            tokens[place, : lengths[place]] = self.tokens[row]
        at = np.arange(tokens.shape[1])
        mask = at < lengths[:, None]
        predicted = at[1:]
        loss_mask = (predicted >= self.loss_starts[np.asarray(rows)][:, None]) & (predicted < lengths[:, None])
        return Batch(list(rows), torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(loss_mask))

    def select(self, rows: Sequence[int] | np.ndarray) -> "Documents":
        """The documents in `rows`, in that order."""
        return Documents(
            ids=[self.ids[row] for row in rows],
            sources=[self.sources[row] for row in rows],
            parts=[self.parts[row] for row in rows],
            content_hashes=[self.content_hashes[row] for row in rows],
            tokens=[self.tokens[row] for row in rows],
            loss_starts=self.loss_starts[np.asarray(rows, dtype=np.int64)],
        )


@dataclass(frozen=True)
class Batch:
    """Padded token rows; `mask` marks real tokens, `loss_mask` the predictions that count."""

    rows: list[int]  # row numbers of the documents
    tokens: Int[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]
    loss_mask: Bool[Tensor, "batch prediction"]  # at place t: whether the prediction of token t + 1 counts

    @property
    def counts(self) -> Bool[Tensor, "batch token"]:
        """True for every token except a document's last one, which predicts nothing."""
        return F.pad(self.mask[:, 1:], (0, 1))

    @property
    def sizes(self) -> Int[Tensor, " batch"]:
        """Predictions that count."""
        return self.loss_mask.sum(dim=1)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a causal language model is called with."""
        return {"input_ids": self.tokens}

    @property
    def predictions(self) -> tuple[Int[Tensor, " prediction"], Int[Tensor, " prediction"]]:
        """The places among the flattened tokens of the predictions that count, and the tokens that they are to predict."""
        places = F.pad(self.loss_mask, (0, 1)).flatten().nonzero()[:, 0]
        return places, self.tokens.flatten()[places + 1]

    def documents_of(self, places: Int[Tensor, " place"]) -> Int[Tensor, " place"]:
        """For places among the flattened tokens, the index in `rows` of their documents."""
        return places // self.tokens.shape[1]

    def sums(self, values: Float[Tensor, " prediction"]) -> Float[Tensor, " batch"]:
        """`values`, one per prediction that counts, summed over each document."""
        return values.new_zeros(self.loss_mask.shape).masked_scatter_(self.loss_mask, values).sum(dim=1)

    def by_document(self, x: Float[Tensor, "batch token k"]) -> Float[Tensor, "batch token k"]:
        """Positions grouped by document: they already are."""
        return x

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`."""
        return Batch(self.rows, self.tokens.to(device), self.mask.to(device), self.loss_mask.to(device))


@dataclass(frozen=True)
class Examples:
    """Training data of any model with one input and one target tensor; their first axis is the example."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if not (isinstance(self.x, Tensor) and isinstance(self.y, Tensor)):
            raise ValueError(
                f"examples: the inputs are {type(self.x).__name__}, the targets {type(self.y).__name__}; expected tensors; give "
                "torch.as_tensor of them, and several inputs as one tensor, which the task or the model divides"
            )
        if len(self.x) != len(self.y) or not len(self.x):
            raise ValueError(f"examples: {len(self.x)} inputs and {len(self.y)} targets; expected equally many, at least one")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def ids(self) -> list[str]:
        """Row numbers."""
        return [str(row) for row in range(len(self))]

    @property
    def lengths(self) -> np.ndarray:
        """What `batch_plan` counts of an example: 1."""
        return np.ones(len(self), dtype=np.int64)

    @property
    def num_loss_tokens(self) -> np.ndarray:
        """Terms of every example in the training loss: 1."""
        return np.ones(len(self), dtype=np.int64)

    def batch(self, rows: Sequence[int]) -> "TensorBatch":
        """The examples in `rows`."""
        return TensorBatch(list(rows), self.x[list(rows)], self.y[list(rows)])

    def check_finite(self, origin: str) -> None:
        """Refuse inputs or targets that are not finite with a ValueError, whose message begins with `origin`."""
        for name, values in (("input", self.x), ("target", self.y)):
            bad = (~values.isfinite()).nonzero()[:, 0].unique().tolist() if values.is_floating_point() else []
            if bad:
                raise ValueError(
                    f"{origin}: the {name}s of {len(bad)} of {len(values)} rows are not finite, such as that of row {bad[0]}; "
                    "expected numbers; leave such rows out"
                )

    def at_least_float32(self) -> "Examples":
        """The examples with inputs in float32 or wider; integer inputs, such as tokens, stay as they are."""
        narrow = self.x.dtype in (torch.bfloat16, torch.float16)
        return Examples(self.x.float(), self.y) if narrow else self

    def to(self, device: torch.device) -> "Examples":
        """The examples on `device`."""
        return Examples(self.x.to(device), self.y.to(device))

    def select(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """The examples in `rows`, in that order."""
        return Examples(self.x[list(rows)], self.y[list(rows)])


@dataclass(frozen=True)
class TensorBatch:
    """A few `Examples`."""

    rows: list[int]
    x: Tensor
    y: Tensor

    def to(self, device: torch.device | str) -> "TensorBatch":
        """The batch on `device`."""
        return TensorBatch(self.rows, self.x.to(device), self.y.to(device))

    def by_document(self, x: Float[Tensor, "batch position k"]) -> Float[Tensor, "batch position k"]:
        """Positions grouped by example: they already are."""
        return x

    @property
    def counts(self) -> Bool[Tensor, "batch 1"]:
        """Every activation of an example can matter."""
        return torch.ones(len(self.rows), 1, dtype=torch.bool, device=self.x.device)

    @property
    def sizes(self) -> Int[Tensor, " batch"]:
        """One term each."""
        return torch.ones(len(self.rows), dtype=torch.int64, device=self.x.device)


Data = Documents | Examples


def load_documents(path: Path, *, half: str | None = None) -> Documents:
    """The documents that `prepare` wrote to `path`; of targets only one `half`. A missing file is a FileNotFoundError.

    Raises:
        ValueError: the table is empty.
    """
    table = read_table(path, stage="prepare")
    if half is not None:
        table = table.filter(pl.col("half") == half)
    if table.is_empty():
        raise ValueError(
            f"{path}: no documents{f' in half {half}' if half else ''}; expected at least one; see prepare in params.yaml"
        )
    return as_documents(table)


def as_documents(table: pl.DataFrame) -> Documents:
    """The documents in a table with the columns that `prepare` writes."""
    return Documents(
        ids=table["id"].to_list(),
        sources=table["source"].to_list(),
        parts=table["part"].to_list(),
        content_hashes=table["content_hash"].to_list(),
        tokens=[row.to_numpy() for row in table["tokens"]],
        loss_starts=table["loss_start"].to_numpy().astype(np.int64),
    )


def batch_plan(lengths: Sequence[int] | np.ndarray, *, batch_tokens: int) -> list[list[int]]:
    """Row numbers of batches of at most `batch_tokens` padded tokens, longest documents first.

    Documents are sorted by length, so that there is little padding. The plan depends on the lengths alone, so a run that was
    killed makes the same batches again. A document longer than `batch_tokens` gets a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    plan: list[list[int]] = []
    for row in order.tolist():
        longest = int(lengths[plan[-1][0]]) if plan else 0
        if plan and longest * (len(plan[-1]) + 1) <= batch_tokens:
            plan[-1].append(row)
        else:
            plan.append([row])
    return plan


def batches(data: Data, *, batch_tokens: int) -> Iterator[Batch | TensorBatch]:
    """All of `data` in batches of similar length, longest first."""
    for rows in batch_plan(data.lengths, batch_tokens=batch_tokens):
        yield data.batch(rows)
