"""Stage `gradients`: the gradient rows of all documents at one checkpoint, computed and written to the store.

documents -RowEngine.plan-> batches -RowEngine.numbers-> rows and losses -write_rows-> store -seal-> manifest
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tda.adapters import CONFIG_FILE
from tda.artifacts import MEAN_FILE, Workspace, damaged, read_json
from tda.checkpoints import load_checkpoint, weights_digest
from tda.config import Config
from tda.data import Documents, batch_plan
from tda.dynamics import segment_with
from tda.factors import SegmentFactors, load_factors
from tda.gradients import gradient_rows
from tda.model import Layer
from tda.packing import pack, pack_plan, packs, within_documents
from tda.parallel import device_of, num_workers, products_in_tf32, worker_pool
from tda.projection import Projection
from tda.row_layers import row_layers
from tda.store import GradientTable, open_table
from tda.stored_rows import Rows
from tda.streaming import Copy, HostBuffers, in_background, start_copy
from tda.task import CausalLM

WORTH_PACKING = 0.2  # share of padding; on a CPU, packing takes 1.0 times as long at a share of 0.1, 0.88 times at 0.25


def segment_projections(config: Config, factors: SegmentFactors) -> dict[str, Projection]:
    """How gradients of a segment become rows: decided by its factors and the settings `gradients`, nothing else."""
    return factors.row_projections(kind=config.gradients.projection, rank=config.gradients.rank, seed=config.gradients.seed)


def row_identity(config: Config, workspace: Workspace, checkpoint: int, projections: dict[str, Projection]) -> dict:
    """Everything that the rows of a checkpoint depend on except the documents; a table has rows of one identity only.

    A checkpoint whose weights are damaged is refused with ValueError.
    """
    folder = workspace.checkpoint(checkpoint)
    _check_weights(folder)
    base = read_json(workspace.training, stage="train").get("start_digest") if (folder / "model" / CONFIG_FILE).exists() else None
    digest = xxhash.xxh3_128()
    for name, projection in projections.items():
        digest.update(name.encode())
        digest.update(projection.P_i.cpu().numpy().tobytes())
        digest.update(projection.P_o.cpu().numpy().tobytes())
    return {
        "weights": weights_digest(folder),
        "projection": digest.hexdigest(),
        "projection_kind": config.gradients.projection,
        "rank": config.gradients.rank,
        "dtype": config.gradients.dtype,
        "loss": "summed over the document's predicted tokens",
        "layers": list(projections),
        **({"base": base} if base else {}),
        **({} if config.gradients.precision == "float32" else {"precision": config.gradients.precision}),
    }


def _check_weights(folder: Path) -> None:
    """Refuse weights that are not a whole file. Their digest would only show that they differ, not why."""
    mean = folder / MEAN_FILE
    for path in [mean] if mean.exists() else sorted((folder / "model").glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(damaged(path, error, stage="train")) from error


@dataclass(frozen=True)
class RowEngine:
    """How documents become rows, eagerly or by compiled layers."""

    plan: Callable[[np.ndarray], list[list[int]]]  # lengths of documents to batches of their numbers
    numbers: Callable[[Documents, list[int]], Tensor]  # (document, values + 1) in float32: row, then mean loss, for a single copy


@contextlib.contextmanager
def row_engine(
    config: Config,
    model: nn.Module,
    layers: Sequence[Layer],
    projections: dict[str, Projection],
    *,
    device: torch.device,
    copy: Copy = start_copy,
) -> Iterator[RowEngine]:
    """The engine that `compute.compile` asks for: packed documents through compiled layers, or documents of similar length.

    The latter are packed only where they would have much padding, which is rare: packing makes attention copy, which costs
    time.

    Raises:
        ValueError: layers shall be compiled, but the model cannot keep packed documents apart.
    """
    batch_tokens = config.gradients.batch_tokens
    held = {name: one.to(device, model.dtype) for name, one in projections.items()}
    wanted = config.compute.compile
    if wanted == "always" and not packs(model):
        raise ValueError(
            f"compute.compile: {type(model).__name__} mixes documents that stand in one row, as with attention to a window only; "
            "expected a model that can keep them apart; set it to auto or never"
        )
    compiled = wanted == "always" or (wanted == "auto" and device.type != "cpu" and packs(model))
    if wanted == "auto" and device.type != "cpu" and not compiled:
        print(
            f"tda gradients: {type(model).__name__} mixes documents that stand in one row: they are padded and not "
            "compiled, which is slower",
            file=sys.stderr,
        )
    if not compiled:

        def eager(documents: Documents, rows: list[int]) -> Tensor:
            take = functools.partial(gradient_rows, model, layers, task=CausalLM(), projections=held)
            lengths = documents.lengths[rows]
            if lengths.sum() > (1 - WORTH_PACKING) * len(rows) * lengths.max() or not packs(model):
                return numbers_of(*take(documents.batch(rows).to(device)))
            with within_documents(model):
                return numbers_of(*take(pack(documents, rows).to(device, copy=copy)))

        with products_in_tf32(model):
            yield RowEngine(functools.partial(batch_plan, batch_tokens=batch_tokens), eager)
        return
    with products_in_tf32(model), row_layers(model, layers, task=CausalLM(), projections=held) as rows_of:

        def packed(documents: Documents, rows: list[int]) -> Tensor:
            return numbers_of(*rows_of(pack(documents, rows, fill_to=batch_tokens).to(device, copy=copy)))

        yield RowEngine(functools.partial(pack_plan, batch_tokens=batch_tokens), packed)


def log_rows(config: Config, workspace: Workspace, documents: Documents, *, checkpoint: int) -> dict:
    """Write the rows of `documents` that the table lacks, seal it, and return its manifest.

    Documents that the last sealed version has are skipped. The batches of the others depend on these documents alone, and a
    batch that was not committed whole is computed again whole, so a run that was killed ends with the same rows.
    """
    segment = segment_with(workspace, checkpoint)
    factors = load_factors(workspace.curvature(segment.index))
    device = device_of(config.compute)
    projections = segment_projections(config, factors)
    model = load_checkpoint(workspace, checkpoint, dtype=getattr(torch, config.gradients.precision)).to(device)
    dim = sum(held.size for held in projections.values())
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(row_engine(config, model, factors.layers, projections, device=device))

        def computed(rows: list[int]) -> Tensor | np.ndarray:
            numbers = engine.numbers(documents, rows)
            return numbers.numpy() if device.type == "cpu" else numbers  # arrays can be sent from a worker process

        call = stack.enter_context(worker_pool(computed, workers=num_workers(config.compute)))
        table = open_table(
            workspace.store,
            checkpoint=checkpoint,
            segment=segment.index,
            identity=row_identity(config, workspace, checkpoint, projections),
            dim=dim,
            dtype=config.gradients.dtype,
        )
        new = _lacking(documents, range(len(documents)), table.sealed())
        present = table.present()
        plan = [[new[place] for place in batch] for batch in engine.plan(documents.lengths[new])]
        missing = [batch for batch in plan if _lacking(documents, batch, present)]
        table.check_space(sum(map(len, missing)))
        numbers = call(missing, f"gradients at checkpoint {checkpoint}", "batch")
        write_rows(table, documents, missing, map(torch.as_tensor, numbers), device=device)
        layers = [{"name": name, "rows": held.P_o.shape[1], "columns": held.P_i.shape[1]} for name, held in projections.items()]
        return table.seal(list(zip(documents.ids, documents.content_hashes, strict=True)), layers=layers)


def write_rows(
    table: GradientTable, documents: Documents, batches: Sequence[list[int]], numbers: Iterable[Tensor], *, device: torch.device
) -> None:
    """Write the `RowEngine.numbers` of every batch: one copy to the host, and a thread that writes while the next is computed."""
    buffers = HostBuffers(max(map(len, batches), default=0), table.dim + 1, device=device)
    copies = ((rows, buffers.fetch(one)) for rows, one in zip(batches, numbers, strict=True))
    in_background(lambda arriving: table.write(_as_rows(documents, rows, copy.wait()) for rows, copy in arriving), copies)


def numbers_of(rows: Tensor, losses: Tensor) -> Tensor:
    """A batch's rows and mean losses in the layout of `RowEngine.numbers`."""
    return torch.cat([rows.float(), losses.float()[:, None]], dim=1)


def _lacking(documents: Documents, rows: Iterable[int], present: dict[str, str]) -> list[int]:
    return [row for row in rows if present.get(documents.ids[row]) != documents.content_hashes[row]]


def _as_rows(documents: Documents, rows: list[int], numbers: np.ndarray) -> Rows:
    """`RowEngine.numbers` as rows of the store. Copies, since the memory of `numbers` is used again."""
    vectors = numbers[:, :-1].copy()
    return Rows(
        doc_ids=[documents.ids[row] for row in rows],
        content_hashes=[documents.content_hashes[row] for row in rows],
        sources=[documents.sources[row] for row in rows],
        tokens=documents.num_loss_tokens[rows].astype(np.int32),
        losses=numbers[:, -1].copy(),
        gradient_norms=np.linalg.norm(vectors, axis=1),
        vectors=vectors,
    )
