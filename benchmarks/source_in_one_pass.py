"""Claim: SOURCE over six checkpoints costs at most 1.3 times six frozen forward and backward passes, its curvature from rows.

The reference of a checkpoint is its documents' batches through transformers' own forward and loss, and autograd's backward to the
input embeddings. Against it: rows of every checkpoint logged into the store, EK-FAC of every segment fitted from them
(`curvature.space: rows`), and scores of `--queries` queries from the store. Processor time of the whole process; the models are
at hand. What was fitted from the store is checked against rows that were never stored. Prints one JSON line.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import ROOT, facts, frozen_pass, in_turns, made_batches, made_documents, made_model, options, speed
from tda.config import load_config
from tda.data import Batch
from tda.gradient_log import numbers_of, write_rows
from tda.gradients import gradient_rows
from tda.model import tracked_layers
from tda.preconditioner import plain
from tda.projection import random_projections
from tda.row_curvature import by_layer, row_curvature
from tda.row_products import dot_scores
from tda.scores import source_values
from tda.segments import Segment
from tda.source import SegmentDynamics
from tda.store import GradientTable, open_sealed, open_table
from tda.task import CausalLM

SEGMENTS, PER_SEGMENT, QUERIES = 3, 2, 16


def main(arguments: Sequence[str]) -> None:
    chosen = options(arguments, __doc__)
    config = load_config(ROOT / "params.yaml")
    torch.set_num_threads(1)
    model, documents = made_model(chosen, config=config), made_documents(chosen)
    model.requires_grad_(False)
    layers = tracked_layers(model)
    projections = random_projections(layers, rank=chosen.rank, seed=0)
    shapes = {name: (held.P_o.shape[1], held.P_i.shape[1]) for name, held in projections.items()}
    batches = made_batches(documents, chosen)
    tokens = float(documents.num_loss_tokens.mean())
    segments = [
        Segment(
            index=index,
            checkpoints=list(range(index * PER_SEGMENT, (index + 1) * PER_SEGMENT)),
            first_step=index * 100 + 1,
            last_step=(index + 1) * 100,
            num_steps=100,
            mean_learning_rate=1e-3,
            tokens_per_document=tokens,
        )
        for index in range(SEGMENTS)
    ]
    exposure = np.full((len(documents), SEGMENTS), 1 / len(documents))
    queries = torch.randn(QUERIES, sum(held.size for held in projections.values()), generator=torch.Generator().manual_seed(0))
    query = by_layer(queries, layers, shapes)
    folder = Path(tempfile.mkdtemp(prefix="one-pass-"))
    stores = iter(range(chosen.rounds + 2))

    def computed(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient_rows(model, layers, batch, task=CausalLM(), projections=projections)

    def logged(store: Path, checkpoint: int, segment: int) -> dict:
        table = open_table(
            store, checkpoint=checkpoint, segment=segment, identity={}, dim=queries.shape[1], dtype=config.gradients.dtype
        )
        numbers = (numbers_of(*found) for found in map(computed, batches))
        write_rows(table, documents, [batch.rows for batch in batches], numbers, device=torch.device(chosen.device))
        return table.seal(list(zip(documents.ids, documents.content_hashes, strict=True)))

    def attributed() -> tuple[dict, np.ndarray]:
        store = folder / str(next(stores))
        manifests, dynamics = {}, []
        for segment in segments:
            manifests |= {checkpoint: logged(store, checkpoint, segment.index) for checkpoint in segment.checkpoints}
            tables = [open_sealed(store, manifests[checkpoint]) for checkpoint in segment.checkpoints]
            scanned = partial(vectors_of, tables, documents.ids)
            factors = row_curvature(scanned, layers, shapes, weight=1 / segment.tokens_per_document)
            curvature = {name: plain(held) for name, held in factors.items()}
            dynamics.append(SegmentDynamics(index=segment.index, curvature=curvature, time=segment.time, weight_decay=0.0))

        def dot(checkpoint: int, response: dict) -> np.ndarray:
            u = torch.cat([response[layer.name].flatten(1) for layer in layers], dim=1).numpy()
            return dot_scores(open_sealed(store, manifests[checkpoint]), documents.ids, u)

        return factors, source_values(query, dynamics, segments, exposure=exposure, dot=dot)

    try:
        check(
            attributed(), [computed(batch) for batch in batches], layers, shapes, weight=1 / tokens, num_documents=len(documents)
        )
        passes = SEGMENTS * PER_SEGMENT
        spent = in_turns(
            {"reference": lambda: [frozen_pass(model, batch) for _ in range(passes) for batch in batches], "source": attributed},
            rounds=chosen.rounds,
            device=chosen.device,
        )
    finally:
        shutil.rmtree(folder)
    measured = {
        name: speed(times, spent["reference"], num_tokens=passes * int(documents.lengths.sum())) for name, times in spent.items()
    }
    cost = round(1 / measured["source"]["ratio"], 3)
    print(json.dumps({"claim": "source_in_one_pass", **facts(chosen, documents), "cost_of_six_passes": cost, **measured}))


def vectors_of(tables: Sequence[GradientTable], doc_ids: Sequence[str]) -> Iterator[torch.Tensor]:
    for table in tables:
        for _positions, part in table.scan(doc_ids):
            yield torch.from_numpy(part.vectors)


def check(attributed, batches_of_rows, layers, shapes, *, weight: float, num_documents: int) -> None:
    """Curvature from the store has the trace and top of that of the rows in memory, and every score is a number."""
    factors, values = attributed
    expected = row_curvature(lambda: [rows for rows, _losses in batches_of_rows], layers, shapes, weight=weight)
    for name, held in expected.items():
        for got, wanted in ((factors[name].Lambda.sum(), held.Lambda.sum()), (factors[name].Lambda.max(), held.Lambda.max())):
            error = float(abs(got / wanted - 1))
            assert error < 0.02, f"{name}: sum or largest of the eigenvalues is off by {error} of it"  # of rows in 8 bits
    assert values.shape == (QUERIES, num_documents)
    assert np.isfinite(values).all()


if __name__ == "__main__":
    main(sys.argv[1:])
