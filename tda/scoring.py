"""Scores of all documents on the target set: SOURCE and the baselines, from the stored gradient rows.

    targets -query_blocks-> full gradients -row_queries-> vectors in the space of the rows -_dots_with_rows-> scores

SOURCE's response to a query has the shape of a full gradient. Projected as the rows were, it becomes a vector; its dot product
with a document's row is, up to a factor, what that checkpoint contributes to the document's score. `tda query` and audits score
other queries and other documents in the same way.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from tda.artifacts import Workspace, one_after_another, read_json, read_table
from tda.baselines import bm25_scores, random_scores
from tda.checkpoints import load_checkpoint
from tda.config import Config
from tda.data import Documents, batches, load_documents
from tda.dynamics import curvature_rows, load_draw_shares, load_dynamics, load_exposure, load_segments
from tda.factors import SegmentFactors, load_factors, save_factors
from tda.ggn import pack
from tda.gradient_log import row_identity, segment_projections
from tda.gradients import QUERY_VALUES, project_queries, query_gradients, weighted_sum
from tda.influence import precondition
from tda.parallel import device_of
from tda.projection import Projection, project
from tda.row_curvature import row_curvature
from tda.row_products import dot_scores
from tda.scores import Scores, cosines, received_per_checkpoint
from tda.segments import Segment
from tda.source import Gradients, SegmentDynamics, walk_back
from tda.store import open_sealed
from tda.stored_rows import canonical
from tda.target_influence import target_influence
from tda.task import CausalLM

ROW_QUERY_VALUES = 1 << 28  # values of the vectors (of one kind) with which the rows are multiplied in one pass over the store

RowDot = Callable[[int, Tensor], np.ndarray]
"""`dot(checkpoint, queries)`: (document, query) dot products with the stored rows of a checkpoint."""


@dataclass(frozen=True)
class Scored:
    """Scores of all documents, as the files of the stage `scores`."""

    table: pl.DataFrame  # doc_id, content_hash, source, score_METHOD
    per_query: pl.DataFrame  # doc_id, scores (array over queries)
    facts: dict


@dataclass(frozen=True)
class Attribution:
    """What scoring any query needs: the run's segments, their curvature, and the manifests of the stored rows."""

    segments: list[Segment]
    dynamics: list[SegmentDynamics]
    factors: list[SegmentFactors]
    projections: list[dict[str, Projection]]  # by segment
    manifests: dict[int, dict]  # by checkpoint
    documents: Documents
    exposure: np.ndarray  # (document, segment)
    projected: bool  # whether factors, and hence queries, are in projected space

    @property
    def final_checkpoint(self) -> int:
        """The checkpoint at which the gradients of queries are taken."""
        return self.segments[-1].checkpoints[-1]

    def responses(self, query: Gradients) -> Iterator[tuple[Segment, Tensor, np.ndarray]]:
        """For every segment, last to first: the vectors (query, values) that SOURCE multiplies its rows by.

        The third item is the share of each query's response that the projection keeps.
        """
        inside: Tensor | float = 1.0
        if self.projected:
            projected = project(query, self.factors[0].layers, self.projections[0])
            inside = _squared_norms(projected) / _squared_norms(query)  # what a response loses is unknown: as much as the query
            query = projected
        for dynamics, response in walk_back(query, self.dynamics):
            u = self.as_rows(response, dynamics.index)
            kept = inside * u.square().sum(dim=1) / _squared_norms(response)
            yield self.segments[dynamics.index], u, kept.double().cpu().numpy()

    def by_checkpoint(self, query: Gradients) -> Iterator[tuple[int, np.ndarray, Tensor]]:
        """For every checkpoint, the last segment's first: its number, documents' factors, and the vectors (query, values).

        The SOURCE score of a document is the sum over checkpoints of its factor times the dot product of its row with the vector.
        """
        for segment, u, _kept in self.responses(query):
            received = received_per_checkpoint(segment, self.exposure)
            for checkpoint in segment.checkpoints:
                yield checkpoint, received, u

    def as_rows(self, response: Gradients, segment: int) -> Tensor:
        """A response as vectors (query, values) in the space of the segment's stored rows: projected, unless it already is."""
        layers = self.factors[0].layers
        if self.projected:
            return pack(response, layers)
        return project_queries(response, layers, self.projections[segment])


def _squared_norms(query: Gradients) -> Float[Tensor, " query"]:
    return sum(part.square().sum(dim=(1, 2)) for part in query.values())


def load_attribution(config: Config, workspace: Workspace, documents: Documents) -> Attribution:
    """Read everything that scoring needs, and check that it belongs together.

    A missing artifact is a FileNotFoundError that names the stage to run. A store that was made with other weights or another
    projection is a ValueError.
    """
    segments = load_segments(workspace)
    factors = [load_factors(workspace.curvature(segment.index)) for segment in segments]
    projections = [segment_projections(config, held) for held in factors]
    manifests = {}
    for segment, held in zip(segments, projections, strict=True):
        for checkpoint in segment.checkpoints:
            manifest = read_json(workspace.gradients(checkpoint), stage=f"gradients@{checkpoint}")
            open_sealed(workspace.store, manifest, identity=row_identity(config, workspace, checkpoint, held))
            manifests[checkpoint] = manifest
    exposure = load_exposure(workspace, documents)
    if config.curvature.space == "rows":
        factors = [
            _fitted_from_rows(
                held,
                workspace,
                segment,
                manifests=[manifests[checkpoint] for checkpoint in segment.checkpoints],
                doc_ids=[documents.ids[row] for row in curvature_rows(config.curvature, exposure, segment.index)],
            )
            for segment, held in zip(segments, factors, strict=True)
        ]
    return Attribution(
        segments=segments,
        dynamics=load_dynamics(workspace, segments, factors, adam=config.curvature.adam),
        factors=factors,
        projections=projections,
        manifests=manifests,
        documents=documents,
        exposure=exposure,
        projected=bool(factors[0].projections),
    )


def _fitted_from_rows(
    factors: SegmentFactors, workspace: Workspace, segment: Segment, *, manifests: list[dict], doc_ids: list[str]
) -> SegmentFactors:
    """`factors` with their curvature fitted from stored rows; cached beside the store by a digest of what it is made from."""
    made_from = {
        "rows": [manifest["digest"] for manifest in manifests],
        "documents": doc_ids,
        "tokens_per_document": segment.tokens_per_document,
    }
    digest = xxhash.xxh3_128_hexdigest(canonical(made_from).encode())
    path = workspace.store / f"curvature_{segment.index}_{digest[:12]}.safetensors"

    def blocks() -> Iterator[Tensor]:
        for manifest in manifests:
            for _positions, rows in open_sealed(workspace.store, manifest).scan(doc_ids):
                yield torch.from_numpy(rows.vectors)

    if not path.is_file():
        with one_after_another(workspace.store / "curvature.lock"):
            if not path.is_file():
                shapes = {name: (held.P_o.shape[1], held.P_i.shape[1]) for name, held in factors.projections.items()}
                plain = row_curvature(blocks, factors.layers, shapes, weight=1 / segment.tokens_per_document)
                for old in workspace.store.glob(f"curvature_{segment.index}_*"):
                    old.unlink()
                save_factors(path, replace(factors, plain=plain))
    return replace(factors, plain=load_factors(path).plain)  # all else may be newer than what is kept


def store_dot(config: Config, workspace: Workspace, attribution: Attribution, doc_ids: list[str]) -> RowDot:
    """Dot products with the stored rows of `doc_ids`, computed on the device that `compute` names."""
    device = device_of(config.compute)

    def dot(checkpoint: int, queries: Tensor) -> np.ndarray:
        table = open_sealed(workspace.store, attribution.manifests[checkpoint])
        return dot_scores(table, doc_ids, queries.float().cpu().numpy(), device=device).astype(np.float64)

    return dot


def query_blocks(
    config: Config, workspace: Workspace, attribution: Attribution, queries: Documents
) -> Iterator[tuple[Gradients, list[int]]]:
    """Full gradients of the queries at the final checkpoint, `QUERY_VALUES` at a time, with the queries' numbers."""
    device = device_of(config.compute)
    layers = attribution.factors[-1].layers
    model = load_checkpoint(workspace, attribution.final_checkpoint).to(device)
    size = max(1, QUERY_VALUES // sum(layer.d_in * layer.d_out for layer in layers))
    for start in range(0, len(queries), size):
        part = queries.select(range(start, min(start + size, len(queries))))
        held = (batch.to(device) for batch in batches(part, batch_tokens=config.gradients.batch_tokens))
        gradients, order = query_gradients(model, layers, held, task=CausalLM(config.scores.measurement))
        yield gradients, [start + row for row in order]


@dataclass(frozen=True)
class RowQueries:
    """Some queries as vectors (query, values) in the space of the stored rows, one kind for each method."""

    queries: list[int]  # their numbers
    responses: list[Tensor]  # for SOURCE, by segment
    conditioned: Tensor  # for EK-FAC influence, at the final checkpoint
    plain: Tensor  # for dot products and cosines of gradients, at the final checkpoint
    kept: np.ndarray  # (segment, query) share of a SOURCE response that the projection keeps

    @classmethod
    def joined(cls, parts: Sequence["RowQueries"]) -> "RowQueries":
        """The queries of all parts."""
        return cls(
            [row for part in parts for row in part.queries],
            [torch.cat(responses) for responses in zip(*(part.responses for part in parts), strict=True)],
            torch.cat([part.conditioned for part in parts]),
            torch.cat([part.plain for part in parts]),
            np.concatenate([part.kept for part in parts], axis=1),
        )


def row_queries(config: Config, workspace: Workspace, attribution: Attribution, queries: Documents) -> Iterator[RowQueries]:
    """The queries as row-space vectors, in blocks of about `ROW_QUERY_VALUES`.

    Full gradients take far more memory than these, so several blocks of them make one of these.
    """
    last = attribution.segments[-1].index
    layers, projections = attribution.factors[-1].layers, attribution.projections[-1]
    waiting: list[RowQueries] = []
    for query, rows in query_blocks(config, workspace, attribution, queries):
        answers = list(attribution.responses(query))[::-1]  # now the first segment is first
        at_end = project(query, layers, projections) if attribution.projected else query
        conditioned = precondition(at_end, attribution.factors[-1].plain, damping=config.scores.damping)
        waiting.append(
            RowQueries(
                rows,
                [u.cpu() for _segment, u, _kept in answers],
                attribution.as_rows(conditioned, last).cpu(),
                attribution.as_rows(at_end, last).cpu(),
                np.array([kept for _segment, _u, kept in answers]),
            )
        )
        if sum(part.plain.numel() for part in waiting) >= ROW_QUERY_VALUES:
            yield RowQueries.joined(waiting)
            waiting = []
    if waiting:
        yield RowQueries.joined(waiting)


def mean_gradient(config: Config, workspace: Workspace, attribution: Attribution, queries: Documents) -> Gradients:
    """The gradient of the measurement's mean over all predicted tokens of `queries`: one query, since scores are linear in it."""
    weights = torch.from_numpy(queries.num_loss_tokens / queries.num_loss_tokens.sum())
    return weighted_sum(query_blocks(config, workspace, attribution, queries), weights)


def source_scores(attribution: Attribution, query: Gradients, dot: RowDot) -> np.ndarray:
    """(document,) SOURCE scores for one query."""
    return sum(received * dot(checkpoint, u)[:, 0] for checkpoint, received, u in attribution.by_checkpoint(query))


def score_documents(config: Config, workspace: Workspace) -> Scored:
    """Score every training document on the scoring half of the targets.

    A document's score by an attribution method is the mean of its scores for the targets, weighted by their predicted tokens.
    """
    torch.set_num_threads(1)  # threads would change the order of sums, and with it the last bits
    documents = load_documents(workspace.documents)
    queries = load_documents(workspace.targets, half="score")
    attribution = load_attribution(config, workspace, documents)
    dot = store_dot(config, workspace, attribution, documents.ids)
    norms = _row_norms(workspace, attribution, documents.ids, attribution.final_checkpoint)
    shares = load_draw_shares(workspace, documents)

    shape = (len(queries), len(documents))
    values = {name: np.zeros(shape) for name in ("source", "ekfac_influence", "gradient_dot", "gradient_cosine")}
    kept = np.zeros(len(attribution.segments))
    for block in row_queries(config, workspace, attribution, queries):
        for name, part in _dots_with_rows(attribution, block, dot=dot, norms=norms, shares=shares).items():
            values[name][block.queries] = part.T
        kept += block.kept.sum(axis=1) / len(queries)

    tokens = queries.num_loss_tokens
    weights = tokens / tokens.sum()
    columns: dict[str, np.ndarray] = {}
    if config.scores.averaged_influence:
        columns["averaged_influence"] = target_influence(config, workspace, documents, queries)
    columns |= {name: Scores(held, queries.ids, documents.ids).aggregate(weights) for name, held in values.items()}
    texts = read_table(workspace.documents, stage="prepare", columns=["text"])["text"].to_list()
    targets = read_table(workspace.targets, stage="prepare").filter(pl.col("half") == "score")
    columns["bm25"] = bm25_scores(texts, targets["text"].to_list())
    columns["random"] = random_scores(documents.ids, seed=config.scores.seed)
    table = pl.DataFrame(
        {"doc_id": documents.ids, "content_hash": documents.content_hashes, "source": documents.sources}
        | {f"score_{name}": column for name, column in columns.items()}
    )
    per_query = pl.DataFrame({"doc_id": documents.ids, "scores": values["source"].T.astype(np.float32)})
    facts = {
        "measurement": config.scores.measurement,
        "unit": "rise of the targets' mean cost per token, in nats, when the document is left out",
        "query_ids": queries.ids,
        "num_documents": len(documents),
        "segment_times": [segment.time for segment in attribution.segments],
        "projection_keeps": kept.tolist(),
    }
    return Scored(table, per_query, facts)


def _dots_with_rows(
    attribution: Attribution, block: RowQueries, *, dot: RowDot, norms: np.ndarray, shares: np.ndarray
) -> dict[str, np.ndarray]:
    """(document, query) scores by method, in one pass over each checkpoint's table."""
    last, num = attribution.segments[-1], len(block.queries)
    values: dict[str, np.ndarray] = {"source": np.zeros((len(norms), num))}
    for segment, u in zip(attribution.segments, block.responses, strict=True):
        received = received_per_checkpoint(segment, attribution.exposure)[:, None]
        for checkpoint in segment.checkpoints:
            if checkpoint != attribution.final_checkpoint:
                values["source"] += received * dot(checkpoint, u)
                continue
            dots = dot(checkpoint, torch.cat([u, block.conditioned, block.plain]))
            values["source"] += received * dots[:, :num]
            values["ekfac_influence"] = dots[:, num : 2 * num] * shares[:, None] / last.tokens_per_document
            values["gradient_dot"] = dots[:, 2 * num :]
            values["gradient_cosine"] = cosines(dots[:, 2 * num :], norms, block.plain)
    return values


def _row_norms(workspace: Workspace, attribution: Attribution, doc_ids: list[str], checkpoint: int) -> np.ndarray:
    norms = np.zeros(len(doc_ids))
    table = open_sealed(workspace.store, attribution.manifests[checkpoint])
    for positions, rows in table.scan(doc_ids, with_vectors=False):
        norms[positions] = rows.gradient_norms
    return norms
