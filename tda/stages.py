"""One function per stage of the pipeline: read artifacts, call the maths, write artifacts.

Every function imports what it uses inside its body. These imports tell which modules a stage depends on, and `flows/deps.py`
keeps the dependencies in `dvc.yaml` equal to them.
"""

from typing import TYPE_CHECKING

from tda.artifacts import Workspace
from tda.config import Config

if TYPE_CHECKING:
    from tda.audit import AuditResult


def prepare(config: Config, workspace: Workspace) -> None:
    """Make documents, targets, held-out documents and tokenizer, with some documents damaged as a positive control."""
    from tda.parallel import num_readers
    from tda.prepare import prepare_documents, write_prepared

    prepared = prepare_documents(config.prepare, model=config.train.model, workers=num_readers(config.compute))
    write_prepared(prepared, workspace)


def train(config: Config, workspace: Workspace) -> None:
    """Train the model, or adopt an existing run. Leaves checkpoints and the trajectory."""
    from tda.adopt import adopt_run
    from tda.data import load_documents
    from tda.parallel import device_of
    from tda.run import train_run

    documents = load_documents(workspace.documents)
    if config.train.run:
        adopt_run(config.train, documents, workspace)
    else:
        train_run(config.train, documents, workspace, context=config.prepare.context, device=device_of(config.compute))


def segments(config: Config, workspace: Workspace) -> None:
    """Divide the run's checkpoints into segments, and find every document's exposure in each."""
    from dataclasses import asdict

    import numpy as np
    import polars as pl

    from tda.artifacts import read_json, read_table, write_json, write_table
    from tda.data import load_documents
    from tda.segments import document_exposure, effective_learning_rates, make_segments, segment_ends

    documents = load_documents(workspace.documents)
    training = read_json(workspace.training, stage="train")
    trajectory = read_table(workspace.trajectory, stage="train")
    steps = training["checkpoint_steps"]
    rates = effective_learning_rates(trajectory, optimizer=training["optimizer"], momentum=training["momentum"])
    ends = segment_ends(
        steps, len(config.segments.indices), by=config.segments.by, rates=rates, stage_ends=training["stage_ends"]
    )
    last_steps = [steps[end - 1] for end in ends]
    exposure = None
    if training["batches_known"]:
        exposure = document_exposure(trajectory, last_steps, rates=rates, num_documents=len(documents))
    made = make_segments(steps, ends, rates=rates, exposure=exposure, tokens=documents.num_loss_tokens)
    if exposure is None:
        exposure = np.full((len(documents), len(made)), 1 / len(documents))
    columns = {f"segment_{segment.index}": exposure[:, segment.index] for segment in made}
    write_table(workspace.exposure, pl.DataFrame({"doc_id": documents.ids, **columns}))
    write_json(workspace.segments, {"by": config.segments.by, "segments": [asdict(segment) for segment in made]})


def curvature(config: Config, workspace: Workspace, index: int) -> None:
    """Fit the EK-FAC factors of one segment. With `curvature.space: rows`, only its projections are determined here."""
    import sys

    import torch

    from tda.artifacts import read_json
    from tda.checkpoints import load_checkpoint, preconditioner
    from tda.data import load_documents
    from tda.dynamics import curvature_rows, load_exposure, segment_at
    from tda.factors import save_factors
    from tda.fit_factors import fit_factors
    from tda.model import EVERY_LAYER, tracked_layers, what_is_left_out
    from tda.parallel import device_of, num_workers
    from tda.projection import random_projections
    from tda.task import CausalLM

    documents, device = load_documents(workspace.documents), device_of(config.compute)
    segment = segment_at(workspace, index)
    chosen = curvature_rows(config.curvature, load_exposure(workspace, documents), index)
    training = read_json(workspace.training, stage="train")
    last = load_checkpoint(workspace, segment.checkpoints[-1])
    layers = tracked_layers(last, config.curvature.layers)
    if config.curvature.layers == EVERY_LAYER and (said := what_is_left_out(last, layers)):
        print(f"tda curvature: {said}", file=sys.stderr)
    del last  # free it: fitting loads its own
    P = {}
    if training["optimizer"] == "adamw" and config.curvature.adam != "none":
        P = preconditioner(workspace, segment.checkpoints, layers, beta2=training["beta2"], epsilon=training["epsilon"])
    space = config.curvature.space

    def projections(layers: list) -> dict:
        return random_projections(layers, rank=config.gradients.rank, seed=config.gradients.seed)

    factors = fit_factors(
        segment.checkpoints,
        lambda checkpoint: load_checkpoint(workspace, checkpoint, dtype=getattr(torch, config.curvature.precision)),
        documents.select(chosen),
        task=CausalLM(),
        pattern=config.curvature.layers,
        weight=1 / segment.tokens_per_document,
        P=P,
        adam=config.curvature.adam if P else "none",
        projections=projections if space != "full" else None,
        fitted=space != "rows",
        batch_tokens=config.gradients.batch_tokens,
        seed=config.curvature.seed * 1000 + index,
        workers=num_workers(config.compute),
        device=device,
        packed=device.type != "cpu",
        room=config.compute.factor_gib * 2**30 or None,
    )
    save_factors(workspace.curvature(index), factors)


def gradients(config: Config, workspace: Workspace, index: int) -> None:
    """Write the gradient row of every document at one checkpoint to the store."""
    from tda.artifacts import write_json
    from tda.data import load_documents
    from tda.gradient_log import log_rows

    documents = load_documents(workspace.documents)
    write_json(workspace.gradients(index), log_rows(config, workspace, documents, checkpoint=index))


def scores(config: Config, workspace: Workspace) -> None:
    """Score every document on the targets, by every method."""
    from tda.artifacts import write_json, write_table
    from tda.scoring import score_documents

    scored = score_documents(config, workspace)
    write_table(workspace.scores, scored.table)
    write_table(workspace.query_scores, scored.per_query)
    write_json(workspace.scoring, scored.facts)


def curation(config: Config, workspace: Workspace) -> None:
    """Decide on every document, and write the curated data set."""
    from tda.artifacts import read_table, whole, write_json, write_table
    from tda.curate import count_decisions, curate, curated_documents

    column = f"score_{config.curation.method}"
    table = read_table(workspace.scores, stage="scores", columns=["doc_id", "content_hash", "source", column])
    manifest = curate(table.rename({column: "score"}), config.curation)
    curated = curated_documents(read_table(workspace.documents, stage="prepare"), manifest)
    write_table(workspace.manifest, manifest)
    write_table(workspace.curated, curated)
    with whole(workspace.curated_jsonl) as part:
        curated.write_ndjson(part)
    write_json(workspace.curation, {"settings": config.curation.model_dump(), **count_decisions(manifest)})


def retraining(config: Config, workspace: Workspace) -> None:
    """Retrain on all, on curated and on randomly reduced data, with the same seeds."""
    from tda.artifacts import write_table
    from tda.retrain import retrain_arms

    write_table(workspace.retraining, retrain_arms(config, workspace))


def evaluation(config: Config, workspace: Workspace) -> None:
    """Give the verdict, and measure how well the planted damage was found."""
    from tda.artifacts import read_table
    from tda.evaluate import evaluate, write_evaluation

    evaluation = evaluate(
        read_table(workspace.retraining, stage="retraining"),
        scores=read_table(workspace.scores, stage="scores"),
        manifest=read_table(workspace.manifest, stage="curation"),
        trajectory=read_table(workspace.trajectory, stage="train"),
        truth=read_table(workspace.damage, stage="prepare"),
        target_sources=read_table(workspace.targets, stage="prepare")["source"].unique().sort().to_list(),
        rule=config.evaluation,
    )
    write_evaluation(evaluation, workspace)


def report(config: Config, workspace: Workspace) -> None:
    """Write the page."""
    from tda.artifacts import whole
    from tda.report import build_report

    with whole(workspace.report) as part:
        part.write_text(build_report(workspace, config), encoding="utf-8")


def audit(config: Config, workspace: Workspace, *, date: str) -> "AuditResult":
    """Score documents with the existing checkpoints, against limits and the previous audit. Not a stage of `dvc.yaml`."""
    from tda import audit as audits
    from tda.audit_scores import audit_scores

    scored = audit_scores(config, workspace)
    return audits.audit(config, workspace, date=date, scored=scored.table, counts=scored.counts, quarantine=scored.quarantine)
