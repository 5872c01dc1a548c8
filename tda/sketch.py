"""Sketches of stored rows: a few bytes per row that approximate its scores, so that only few rows need to be read.

With W diagonal and V the leading principal directions of the rows W g, a score is

    u . g  =  (V^T W^-1 u) . (V^T W g)  +  rest

A sketch keeps V^T W g, with every coordinate divided by its standard deviation, in 8 bits and with a scale per row. W is the
size of the rows' values to the power -1/2. That is half way between plain rows, which suit queries that are gradients, and
whitened rows, which suit queries that an inverse curvature was applied to. On real rows of 16,128 values, the scores of
128-byte sketches correlate with SOURCE's by .97.

A sketch belongs to one tag of a table. Its file is beside the table, is made when it is first needed, and records what it was
made from.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int8, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tda.artifacts import one_after_another, whole
from tda.row_products import dot_scores
from tda.store import GradientTable, sketch_path

SIZE = 128  # coordinates of a row's sketch, a byte each
SAMPLE = 2048  # rows from which the directions are taken
SLICE = 1 << 17  # rows whose coordinates are in memory at once
BLOCK = 4096  # rows that are scored at once; their float32 coordinates fit a core's cache
FLOOR = 0.01  # of the overall mean square; it is added to that of every value


@dataclass(frozen=True)
class Sketch:
    """Sketches of the rows of n documents, in their order."""

    lift: Float32[Tensor, "k dim"]  # turns a query into what sketches are multiplied by
    codes: Int8[Tensor, "n k"]
    scales: Float32[Tensor, " n"]
    norms: Float32[Tensor, " n"]  # of the rows
    places: Int64[Tensor, " n"]  # in the table

    def scores(self, query: Float32[np.ndarray, " dim"]) -> Float32[np.ndarray, " n"]:
        """The approximate dot product of every row with a query."""
        lifted = self.lift @ torch.from_numpy(query)
        scores = torch.empty(len(self.codes))

        def score(start: int) -> None:
            block = slice(start, start + BLOCK)
            torch.mv(self.codes[block].float(), lifted, out=scores[block])

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,)) as threads:
            list(threads.map(score, range(0, len(self.codes), BLOCK)))
        return scores.mul_(self.scales).numpy()


def open_sketch(table: GradientTable, manifest: dict[str, Any], doc_ids: Sequence[str], *, size: int = SIZE) -> Sketch:
    """The sketch of a sealed table, for the manifest's documents in their order; made first if there is none of these rows."""
    path = sketch_path(table.store, manifest["table"], manifest["tag"])
    made_from = {"digest": manifest["digest"], "documents": manifest["documents"], "version": table.version, "size": size}
    if _made_from(path) != made_from:
        with one_after_another(table.store / "sketch.lock"):
            if _made_from(path) != made_from:
                save(make_sketch(table, doc_ids, size=size), path, made_from=made_from)
    return load(path)


def save(sketch: Sketch, path: Path, *, made_from: dict[str, Any] | None = None) -> None:
    """Write a sketch and what it was made from."""
    with whole(path) as part:
        save_file(vars(sketch), part, metadata={"made_from": json.dumps(made_from)})


def load(path: Path) -> Sketch:
    """The sketch in `path`; its parts are read when they are used."""
    with safe_open(path, "pt") as file:
        return Sketch(**{name: file.get_tensor(name) for name in Sketch.__dataclass_fields__})


def _made_from(path: Path) -> dict[str, Any] | None:
    """What the sketch in `path` was made from; None if there is none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["made_from"])
    except (FileNotFoundError, SafetensorError):
        return None


def make_sketch(table: GradientTable, doc_ids: Sequence[str], *, size: int = SIZE, seed: int = 0) -> Sketch:
    """Sketches of the rows of `doc_ids`: directions from a sample of the rows, then one pass over all of them."""
    n = len(doc_ids)
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(SAMPLE, n), replace=False))
    sample = np.empty((len(chosen), table.dim), np.float32)
    for positions, rows in table.scan([doc_ids[row] for row in chosen]):
        sample[positions] = rows.vectors
    directions, lift = principal_directions(torch.from_numpy(sample), size)
    codes = torch.empty(n, len(directions), dtype=torch.int8)
    scales = torch.empty(n)
    for start in range(0, n, SLICE):
        part = slice(start, start + SLICE)
        coordinates = torch.from_numpy(dot_scores(table, doc_ids[part], directions.numpy()))
        scales[part] = coordinates.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        codes[part] = (coordinates / scales[part, None]).round_().to(torch.int8)
    places, positions = table.places(doc_ids)
    of_row = np.empty(n, np.int64)
    of_row[positions] = places
    norms = table.column("gradient_norm")[of_row]
    return Sketch(lift, codes, scales, torch.from_numpy(norms), torch.from_numpy(of_row))


def principal_directions(rows: Float32[Tensor, "n dim"], size: int) -> tuple[Float32[Tensor, "k dim"], Float32[Tensor, "k dim"]]:
    """Maps from rows to coordinates of mean square 1, and from queries to what these are multiplied by; k is at most `size`."""
    squares = rows.square().mean(dim=0)
    weights = (squares + FLOOR * squares.mean() + torch.finfo(torch.float32).tiny) ** -0.25
    weighted = rows * weights
    squared, left = torch.linalg.eigh((weighted @ weighted.T).double())
    held = squared > squared[-1] * 1e-6  # float32's products of rows hold no more
    squared, left = squared[held].flip(0)[:size], left[:, held].flip(1)[:, :size]
    directions = (left.T / squared[:, None] * len(rows) ** 0.5) @ weighted.double()  # over its standard deviation
    spread = squared[:, None] / len(rows)
    return (directions * weights).float(), (directions * spread / weights).float()
