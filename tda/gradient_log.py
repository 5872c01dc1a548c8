"""Logging the gradient rows of documents at one checkpoint into the store."""

from collections.abc import Iterator

import numpy as np
import xxhash

from tda.artifacts import Workspace
from tda.checkpoints import load_checkpoint, weights_digest
from tda.config import Config
from tda.data import Documents, batch_plan, make_batch
from tda.dynamics import load_segments
from tda.factors import SegmentFactors, load_factors
from tda.gradients import gradient_rows
from tda.parallel import device_of, num_workers, worker_pool
from tda.projection import Projection
from tda.store import Rows, open_table

CHUNK_BYTES = 1 << 28  # rows are committed to the table in chunks of this size: what a kill can cost


def segment_projections(config: Config, factors: SegmentFactors) -> dict[str, Projection]:
    """How gradients of the segment become rows; a function of the factors and `gradients` alone."""
    return factors.row_projections(kind=config.gradients.projection, rank=config.gradients.rank, seed=config.gradients.seed)


def row_identity(config: Config, workspace: Workspace, checkpoint: int, projections: dict[str, Projection]) -> dict:
    """Everything the rows of a checkpoint depend on beside the documents; rows of another identity never mix."""
    digest = xxhash.xxh3_128()
    for name, projection in projections.items():
        digest.update(name)
        digest.update(projection.P_i.cpu().numpy().tobytes())
        digest.update(projection.P_o.cpu().numpy().tobytes())
    return {
        "weights": weights_digest(workspace.checkpoint(checkpoint) / "model"),
        "projection": digest.hexdigest(),
        "projection_kind": config.gradients.projection,
        "rank": config.gradients.rank,
        "dtype": config.gradients.dtype,
        "loss": "summed over the document's predicted tokens",
        "layers": list(projections),
    }


def log_rows(config: Config, workspace: Workspace, documents: Documents, *, checkpoint: int) -> dict:
    """Write the rows of all `documents` that the table lacks; its manifest.

    Batches are a function of the documents alone, and one that was not committed is done again whole: a run that was killed ends with the
    same rows. A document whose row is there is not computed again.
    """
    segment = next(segment for segment in load_segments(workspace) if checkpoint in segment.checkpoints)
    factors = load_factors(workspace.curvature(segment.index))
    device = device_of(config.compute)
    projections = {
        name: Projection(held.P_i.to(device), held.P_o.to(device)) for name, held in segment_projections(config, factors).items()
    }
    model = load_checkpoint(workspace, checkpoint).to(device)
    plan = batch_plan(documents.lengths, batch_tokens=config.gradients.batch_tokens)

    def rows_of(batch_rows: list[int]) -> tuple[list[int], np.ndarray, np.ndarray]:
        rows, losses = gradient_rows(model, factors.layers, make_batch(documents, batch_rows).to(device), projections=projections)
        return batch_rows, rows.float().cpu().numpy(), losses.float().cpu().numpy()

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
        present = table.present()
        have = [present.get(doc_id) == content for doc_id, content in zip(documents.ids, documents.content_hashes, strict=True)]
        missing = [batch for batch in plan if not all(have[row] for row in batch)]
        for chunk in _chunks(call(missing, f"gradients at checkpoint {checkpoint}", "batch"), dim):
            table.upsert(_as_rows(documents, chunk))
    layers = [
        {"name": name, "rows": held.P_o.shape[1], "columns": held.P_i.shape[1]} for name, held in projections.items()
    ]
    return {**table.seal(list(zip(documents.ids, documents.content_hashes, strict=True))), "layers": layers}


Chunk = list[tuple[list[int], np.ndarray, np.ndarray]]


def _chunks(results: Iterator, dim: int) -> Iterator[Chunk]:
    chunk: Chunk = []
    held = 0
    for result in results:
        chunk.append(result)
        held += len(result[0])
        if held * dim * 4 >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _as_rows(documents: Documents, chunk: Chunk) -> Rows:
    order = [row for rows, _, _ in chunk for row in rows]
    vectors = np.concatenate([vectors for _, vectors, _ in chunk])
    return Rows(
        doc_ids=[documents.ids[row] for row in order],
        content_hashes=[documents.content_hashes[row] for row in order],
        sources=[documents.sources[row] for row in order],
        tokens=documents.num_loss_tokens[order].astype(np.int32),
        losses=np.concatenate([losses for _, _, losses in chunk]),
        gradient_norms=np.linalg.norm(vectors, axis=1),
        vectors=vectors,
    )
