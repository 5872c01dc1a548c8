"""Logging the gradient rows of documents at one checkpoint into the store."""

from collections.abc import Iterable

import numpy as np
import torch
import xxhash
from torch import Tensor

from tda.artifacts import Workspace
from tda.checkpoints import load_checkpoint, weights_digest
from tda.config import Config
from tda.data import Documents, batch_plan
from tda.dynamics import load_segments
from tda.factors import SegmentFactors, load_factors
from tda.gradients import gradient_rows
from tda.parallel import device_of, num_workers, worker_pool
from tda.projection import Projection
from tda.store import open_table
from tda.stored_rows import Rows
from tda.streaming import HostBuffers, in_background
from tda.task import CausalLM


def segment_projections(config: Config, factors: SegmentFactors) -> dict[str, Projection]:
    """How gradients of the segment become rows; a function of the factors and `gradients` alone."""
    return factors.row_projections(kind=config.gradients.projection, rank=config.gradients.rank, seed=config.gradients.seed)


def row_identity(config: Config, workspace: Workspace, checkpoint: int, projections: dict[str, Projection]) -> dict:
    """Everything the rows of a checkpoint depend on beside the documents; rows of another identity never mix."""
    digest = xxhash.xxh3_128()
    for name, projection in projections.items():
        digest.update(name.encode())
        digest.update(projection.P_i.cpu().numpy().tobytes())
        digest.update(projection.P_o.cpu().numpy().tobytes())
    return {
        "weights": weights_digest(workspace.checkpoint(checkpoint)),
        "projection": digest.hexdigest(),
        "projection_kind": config.gradients.projection,
        "rank": config.gradients.rank,
        "dtype": config.gradients.dtype,
        "loss": "summed over the document's predicted tokens",
        "layers": list(projections),
    }


def log_rows(config: Config, workspace: Workspace, documents: Documents, *, checkpoint: int) -> dict:
    """Write the rows of all `documents` that the table lacks; its manifest.

    Documents that were there when the table was sealed last are not computed again. The rest are batched as a function of
    themselves alone, and a batch that was not committed whole is done again whole: a run that was killed ends with the same rows.
    """
    segment = next(segment for segment in load_segments(workspace) if checkpoint in segment.checkpoints)
    factors = load_factors(workspace.curvature(segment.index))
    device = device_of(config.compute)
    projections = {
        name: Projection(held.P_i.to(device), held.P_o.to(device)) for name, held in segment_projections(config, factors).items()
    }
    model = load_checkpoint(workspace, checkpoint).to(device)

    def rows_of(batch_rows: list[int]) -> Tensor | np.ndarray:
        rows, losses = gradient_rows(
            model, factors.layers, documents.batch(batch_rows).to(device), task=CausalLM(), projections=projections
        )
        both = torch.cat([rows.float(), losses.float()[:, None]], dim=1)  # one copy to the host
        return both if both.is_cuda else both.numpy()  # as an array it can come from another process

    dim = sum(held.size for held in projections.values())
    with worker_pool(rows_of, workers=num_workers(config.compute)) as call:
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
        plan = [[new[place] for place in batch] for batch in _plan(config, documents, new)]
        missing = [batch for batch in plan if _lacking(documents, batch, present)]
        table.check_space(sum(map(len, missing)))
        results = call(missing, f"gradients at checkpoint {checkpoint}", "batch")
        buffers = HostBuffers(max(map(len, missing), default=0), dim + 1, device=device)
        copies = ((rows, buffers.fetch(torch.as_tensor(result))) for rows, result in zip(missing, results, strict=True))
        in_background(lambda arriving: table.write(_as_rows(documents, rows, copy.wait()) for rows, copy in arriving), copies)
        layers = [{"name": name, "rows": held.P_o.shape[1], "columns": held.P_i.shape[1]} for name, held in projections.items()]
        return table.seal(list(zip(documents.ids, documents.content_hashes, strict=True)), layers=layers)


def _lacking(documents: Documents, rows: Iterable[int], present: dict[str, str]) -> list[int]:
    return [row for row in rows if present.get(documents.ids[row]) != documents.content_hashes[row]]


def _plan(config: Config, documents: Documents, rows: list[int]) -> list[list[int]]:
    return batch_plan(documents.lengths[rows], batch_tokens=config.gradients.batch_tokens)


def _as_rows(documents: Documents, rows: list[int], numbers: np.ndarray) -> Rows:
    """Rows of the store of vectors with the loss as their last column; nothing that outlives its block refers to `numbers`."""
    vectors = numbers[:, :-1]
    return Rows(
        doc_ids=[documents.ids[row] for row in rows],
        content_hashes=[documents.content_hashes[row] for row in rows],
        sources=[documents.sources[row] for row in rows],
        tokens=documents.num_loss_tokens[rows].astype(np.int32),
        losses=numbers[:, -1].copy(),
        gradient_norms=np.linalg.norm(vectors, axis=1),
        vectors=vectors,
    )
