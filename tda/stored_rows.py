"""Gradient rows of documents: in memory, as the store keeps them, and their digests.

float16 vectors are stored divided by a power of two per row (`scale`), so that the largest element uses float16's range and the
division itself is exact; they come back multiplied by it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Float32, Int32
from torch import Tensor

TOP_EXPONENT = 15  # stored float16 elements stay below 2^15; the largest float16 is just below 2^16
TOO_LARGE = 2.0**127  # float16 may round what lies between here and infinity to infinity
NUMBERS = {"tokens": "<i4", "loss": "<f4", "gradient_norm": "<f4", "scale": "<f4"}  # columns that are hashed beside the vector


@dataclass(frozen=True)
class Rows:
    """Gradient rows of n documents."""

    doc_ids: list[str]
    content_hashes: list[str]
    sources: list[str]
    tokens: Int32[np.ndarray, " n"]  # predictions counted
    losses: Float32[np.ndarray, " n"]  # nats per token
    gradient_norms: Float32[np.ndarray, " n"]
    vectors: Float32[np.ndarray, "n dim"]

    def __len__(self) -> int:
        return len(self.doc_ids)

    def slice(self, start: int, stop: int) -> "Rows":
        """Rows start, ..., stop - 1, sharing memory."""
        return Rows(
            self.doc_ids[start:stop],
            self.content_hashes[start:stop],
            self.sources[start:stop],
            self.tokens[start:stop],
            self.losses[start:stop],
            self.gradient_norms[start:stop],
            self.vectors[start:stop],
        )

    @property
    def finite(self) -> np.ndarray:
        """Whether each row's loss, norm and vector are finite, stored in whatever type."""
        return (peaks(self.vectors) < TOO_LARGE) & np.isfinite(self.losses) & np.isfinite(self.gradient_norms)


def peaks(vectors: np.ndarray) -> np.ndarray:
    """Largest magnitude of each row; NaN where there is one."""
    return np.maximum(vectors.max(axis=1), -vectors.min(axis=1))


def row_scales(vectors: Float32[np.ndarray, "n dim"]) -> Float32[np.ndarray, " n"]:
    """The power of two per row that brings its largest element into [2^14, 2^15); 1 for a row of zeros.

    A power of two makes the division exact. Elements down to 2^-28 of the largest keep float16's 11 bits.
    """
    largest = peaks(vectors)
    _, exponents = np.frexp(largest)
    smallest_normal = -126  # of float32
    return np.ldexp(np.float32(1), np.where(largest > 0, np.maximum(exponents - TOP_EXPONENT, smallest_normal), 0)).astype(
        np.float32
    )


# to and from Arrow


def schema(identity: dict[str, Any]) -> pa.Schema:
    """Columns of a table, with its identity as metadata."""
    fields = {
        "doc_id": pa.string(),
        "content_hash": pa.string(),
        "source": pa.string(),
        "checkpoint": pa.int32(),
        "segment": pa.int32(),
        "tokens": pa.int32(),
        "loss": pa.float32(),
        "gradient_norm": pa.float32(),
        "scale": pa.float32(),
        "vector": pa.list_({"float16": pa.float16(), "float32": pa.float32()}[identity["dtype"]], identity["dim"]),
    }
    return pa.schema([pa.field(name, kind) for name, kind in fields.items()], metadata={"identity": canonical(identity)})


def encode(rows: Rows, identity: dict[str, Any]) -> pa.RecordBatch:
    """Rows as they are stored."""
    n = len(rows)
    scales = row_scales(rows.vectors) if identity["dtype"] == "float16" else np.ones(n, np.float32)
    stored = torch.from_numpy(rows.vectors / scales[:, None]).to(getattr(torch, identity["dtype"])).numpy()  # division is exact
    return pa.record_batch(
        [
            pa.array(rows.doc_ids, pa.string()),
            pa.array(rows.content_hashes, pa.string()),
            pa.array(rows.sources, pa.string()),
            pa.array(np.full(n, identity["checkpoint"], np.int32)),
            pa.array(np.full(n, identity["segment"], np.int32)),
            pa.array(rows.tokens),
            pa.array(rows.losses),
            pa.array(rows.gradient_norms),
            pa.array(scales),
            pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), identity["dim"]),
        ],
        schema=schema(identity),
    )


def decode(block: pa.Table, doc_ids: list[str]) -> Rows:
    """Rows of a stored block; without its vector column the vectors are of width 0."""
    vectors = np.empty((len(doc_ids), 0), np.float32)
    if "vector" in block.column_names:
        vectors = stored_vectors(block)
        if vectors.dtype == torch.float16:
            vectors = vectors.float().mul_(torch.tensor(number(block, "scale"))[:, None])
        vectors = vectors.numpy()
    return Rows(
        doc_ids=doc_ids,
        content_hashes=block["content_hash"].to_pylist(),
        sources=block["source"].to_pylist(),
        tokens=number(block, "tokens"),
        losses=number(block, "loss"),
        gradient_norms=number(block, "gradient_norm"),
        vectors=vectors,
    )


def stored_vectors(block: pa.Table) -> Tensor:
    """The vectors of a block as they are stored, (rows, dim), without a copy; not to be written to."""
    column = block["vector"]
    values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return torch.from_dlpack(values.flatten()).view(len(values), values.type.list_size)


def number(block: pa.Table, name: str) -> np.ndarray:
    """A column of numbers of a block."""
    return block[name].combine_chunks().to_numpy(zero_copy_only=False)


# digests


def canonical(identity: dict[str, Any]) -> str:
    """`identity` as JSON with sorted keys: equal values, equal text."""
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(identity: dict[str, Any]) -> str:
    """xxh3_128 of `identity` in its canonical form."""
    return xxhash.xxh3_128_hexdigest(canonical(identity).encode())


def documents_digest(documents: Sequence[tuple[str, str]]) -> str:
    """xxh3_128 of ids and content hashes in their order."""
    return xxhash.xxh3_128_hexdigest("".join(f"{doc}\0{content_hash}\0" for doc, content_hash in documents).encode())


def row_digests(block: pa.Table) -> np.ndarray:
    """xxh3_128 of each row of a stored block, (rows, 16): id, content hash, tokens, loss, gradient norm, scale, vector."""
    numbers = np.rec.fromarrays([number(block, name).astype(kind) for name, kind in NUMBERS.items()])
    vectors = stored_vectors(block).numpy()
    digests = np.empty((len(vectors), 16), np.uint8)
    for row, (doc, content_hash) in enumerate(zip(block["doc_id"].to_pylist(), block["content_hash"].to_pylist(), strict=True)):
        hasher = xxhash.xxh3_128(f"{doc}\0{content_hash}\0".encode())
        hasher.update(numbers[row].tobytes())
        hasher.update(vectors[row])
        digests[row] = np.frombuffer(hasher.digest(), np.uint8)
    return digests
