"""Gradient rows of documents: in memory, as the store keeps them, and their digests.

Vectors of all types but float32 are stored divided by a power of two per row (`scale`), so that the largest element uses the
type's range and the division itself is exact; they come back multiplied by it. In 8 bits the values of a group of `GROUP` share
an exponent as well (a block format, as MXINT8 of the OCP Microscaling specification is, with larger blocks): real rows differ
much in size from layer to layer, and one scale alone leaves the small layers few bits. The exponents e of the groups stand behind
the codes c in the same vector, and value i is exactly

    scale * 2^-e[i // GROUP] * c[i],     |c| <= 127,  0 <= e <= 127.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Float, Float32, Int8, Int32, Shaped
from torch import Tensor

TOP_EXPONENT = 15  # stored 16-bit elements stay below 2^15; the largest float16 is just below 2^16
TOO_LARGE = 2.0**127  # float16 may round what lies between here and infinity to infinity
GROUP = 64  # values that share an exponent in 8 bits; a real row loses 1.4% of its norm, with 32 1.2%, with 128 1.7%
MOST_CODE, MOST_EXPONENT = 127, 127
ARROW = {"float32": pa.float32(), "float16": pa.float16(), "bfloat16": pa.uint16(), "int8": pa.int8()}  # Arrow has no bfloat16
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


def row_scales(vectors: Float32[np.ndarray, "n dim"], *, top: int = TOP_EXPONENT) -> Float32[np.ndarray, " n"]:
    """The power of two per row that brings its largest element into [2^(top - 1), 2^top); 1 for a row of zeros.

    A power of two makes the division exact. Elements down to 2^-28 of the largest keep float16's 11 bits.
    """
    largest = peaks(vectors)
    _, exponents = np.frexp(largest)
    smallest_normal = -126  # of float32
    return np.ldexp(np.float32(1), np.where(largest > 0, np.maximum(exponents - top, smallest_normal), 0)).astype(np.float32)


# as they are stored


def stored_width(dim: int, dtype: str) -> int:
    """Elements of a stored vector of `dim` values: in 8 bits the groups' exponents too."""
    return dim + -(-dim // GROUP) if dtype == "int8" else dim


def stored_bytes(dim: int, dtype: str) -> int:
    """Bytes of a stored vector of `dim` values."""
    return stored_width(dim, dtype) * getattr(torch, dtype).itemsize


def to_stored(vectors: Float32[np.ndarray, "n dim"], dtype: str) -> tuple[Float32[np.ndarray, " n"], Shaped[Tensor, "n width"]]:
    """Scale and stored vector of each row."""
    if dtype == "float32":
        return np.ones(len(vectors), np.float32), torch.from_numpy(vectors)
    if dtype == "int8":
        scales = row_scales(vectors, top=7)
        return scales, torch.from_numpy(_codes(vectors / scales[:, None]))
    scales = row_scales(vectors)
    return scales, torch.from_numpy(vectors / scales[:, None]).to(getattr(torch, dtype))


def _codes(scaled: Float32[np.ndarray, "n dim"]) -> Int8[np.ndarray, "n width"]:
    """Codes and exponents of rows whose elements are below 2^7."""
    n, dim = scaled.shape
    num_groups = -(-dim // GROUP)
    groups = np.zeros((n, num_groups * GROUP), np.float32)
    groups[:, :dim] = scaled
    groups = groups.reshape(n, num_groups, GROUP)
    largest = np.abs(groups).max(axis=2)
    _, exponents = np.frexp(largest * np.float32(128 / (MOST_CODE + 0.5)))  # what rounds to 128 has no code: one step coarser
    exponents = np.where(largest > 0, np.clip(7 - exponents, 0, MOST_EXPONENT), 0)
    groups *= np.ldexp(np.float32(1), exponents)[:, :, None]
    codes = np.clip(np.rint(groups, out=groups), -MOST_CODE, MOST_CODE, out=groups)
    return np.concatenate([codes.reshape(n, -1)[:, :dim].astype(np.int8), exponents.astype(np.int8)], axis=1)


def unscaled(stored: Shaped[Tensor, "n width"], out: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """`out`, filled with the values over their row's scale; in bfloat16 exact if the stored type is bfloat16 or int8."""
    dim = out.shape[1]
    if stored.dtype == torch.float16 and out.dtype == torch.bfloat16:
        stored = stored.float()  # 15 times as fast as torch's direct conversion
    out.copy_(stored[:, :dim])
    if stored.dtype == torch.int8:
        steps = torch.exp2(-stored[:, dim:].to(torch.float32)).to(out.dtype)[:, :, None]
        whole = dim // GROUP
        out[:, : whole * GROUP].unflatten(1, (whole, GROUP)).mul_(steps[:, :whole])
        out[:, whole * GROUP :].mul_(steps[:, whole:].flatten(1))
    return out


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
        "vector": pa.list_(ARROW[identity["dtype"]], stored_width(identity["dim"], identity["dtype"])),
    }
    return pa.schema([pa.field(name, kind) for name, kind in fields.items()], metadata={"identity": canonical(identity)})


def encode(rows: Rows, identity: dict[str, Any]) -> pa.RecordBatch:
    """Rows as they are stored."""
    n = len(rows)
    scales, stored = to_stored(rows.vectors, identity["dtype"])
    elements = stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored
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
            pa.FixedSizeListArray.from_arrays(pa.array(elements.flatten().numpy()), stored.shape[1]),
        ],
        schema=schema(identity),
    )


def decode(block: pa.Table, doc_ids: list[str], *, dim: int) -> Rows:
    """Rows of a stored block with vectors of `dim` values; without its vector column they are of width 0."""
    vectors = np.empty((len(doc_ids), 0), np.float32)
    if "vector" in block.column_names:
        stored = stored_vectors(block)
        if stored.dtype == torch.float32:
            vectors = stored.numpy()
        else:
            vectors = unscaled(stored, torch.empty(len(doc_ids), dim)).numpy()
            vectors *= number(block, "scale")[:, None]
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
    """The vectors of a block as they are stored, (rows, width), without a copy; not to be written to."""
    column = block["vector"]
    values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    elements = torch.from_dlpack(values.flatten()).view(len(values), values.type.list_size)
    return elements.view(torch.bfloat16) if elements.dtype == torch.uint16 else elements


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
    vectors = stored_vectors(block).view(torch.uint8).numpy()
    digests = np.empty((len(vectors), 16), np.uint8)
    for row, (doc, content_hash) in enumerate(zip(block["doc_id"].to_pylist(), block["content_hash"].to_pylist(), strict=True)):
        hasher = xxhash.xxh3_128(f"{doc}\0{content_hash}\0".encode())
        hasher.update(numbers[row].tobytes())
        hasher.update(vectors[row])
        digests[row] = np.frombuffer(hasher.digest(), np.uint8)
    return digests
