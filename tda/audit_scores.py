"""Scores for an audit: SOURCE scores of training documents and of new ones, for the scoring half of the targets.

The existing checkpoints are used. New documents get gradient rows in the store's tables, beside those of the training
documents, and are scored as if they had been seen as often as the average document, for 1/N of every segment's learning rate.
The pipeline's own manifests and tags stay as they are.
"""

import contextlib
import re
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor

from tda.artifacts import Workspace, existing, only_run, read_table
from tda.clean import long_enough, without_copies
from tda.config import Config
from tda.data import as_documents
from tda.gradient_log import log_rows
from tda.ingest import content_hash
from tda.parallel import num_readers
from tda.prepare import closes_documents, document_table, read_source
from tda.scoring import Attribution, RowDot, load_attribution, source_scores, store_dot
from tda.tokens import encode_documents, load_tokenizer

PART = "mixed"  # the part of new documents: as training has not seen them, nothing depends on it


@dataclass(frozen=True)
class NewDocuments:
    """The documents of `audit.documents` that training has not seen, counts of the others, and malformed rows."""

    table: pl.DataFrame  # columns of `prepare/documents.parquet`, by id
    counts: dict[str, int]
    quarantine: list[dict]


@dataclass(frozen=True)
class AuditScores:
    """What an audit judges: doc_id, content_hash, source, text, score, is_new."""

    table: pl.DataFrame
    counts: dict[str, int]  # of `audit.documents`; empty without
    quarantine: list[dict]


def audit_scores(config: Config, workspace: Workspace) -> AuditScores:
    """SOURCE scores of the documents that `audit.scope` names.

    Raises:
        ValueError: the scope is new, and there is no new document.
    """
    torch.set_num_threads(1)  # sums on several threads are taken in another order
    trained = read_table(workspace.documents, stage="prepare")
    targets = read_table(workspace.targets, stage="prepare")
    new = new_documents(config, workspace, known=[trained, targets])
    if config.audit.scope == "new" and new.table.is_empty():
        raise ValueError(f"audit.scope: new, but {_why_none(config.audit.documents, new.counts)}; or set audit.scope to all")
    documents = as_documents(trained)
    queries = as_documents(targets.filter(pl.col("half") == "score"))
    attribution = load_attribution(config, workspace, documents)
    audited = trained if config.audit.scope == "all" else trained.head(0)
    with contextlib.ExitStack() as held:
        for checkpoint in attribution.manifests if len(new.table) else ():
            # Nobody else may write to the tables now, nor take away what was written.
            held.enter_context(only_run(workspace.work / f"gradients-{checkpoint}.lock"))
        attribution, dot = _with_new(config, workspace, attribution, audited=audited, new=new.table)
        score = source_scores(config, workspace, attribution, queries, dot)
    both = pl.concat([audited.select(new.table.columns), new.table])
    is_new = np.arange(len(both)) >= len(audited)
    table = both.select("content_hash", "source", "text", doc_id="id").with_columns(score=score, is_new=is_new)
    return AuditScores(table, new.counts, new.quarantine)


def _why_none(location: str, counts: dict[str, int]) -> str:
    if not location:
        return "audit.documents names none; set it to a file, a folder or hub:<data set id> that has new documents"
    listed = ", ".join(f"{kind.replace('_', ' ')}: {count}" for kind, count in counts.items() if count)
    return f"no document of {location} is new ({listed}); add some to it"


def new_documents(config: Config, workspace: Workspace, *, known: list[pl.DataFrame]) -> NewDocuments:
    """The documents of `audit.documents`, read and tokenised as `prepare` does, without those whose id or text is `known`."""
    recipe, location = config.prepare, config.audit.documents
    if not location:
        return NewDocuments(known[0].head(0), {}, [])
    reading = read_source(recipe, location, key="audit.documents", workers=num_readers(config.compute))
    long = long_enough(reading.documents, min_characters=recipe.min_characters)
    unique = without_copies(long)
    ids = {name for table in known for name in table["id"]}
    hashes = {digest for table in known for digest in table["content_hash"]}
    split = {name.rpartition("#")[0] for name in ids if re.search(r"#\d+$", name)}
    fresh = [one for one in unique if one.id not in ids | split and content_hash(one.text) not in hashes]
    tokenizer = load_tokenizer(str(existing(workspace.tokenizer, stage="prepare")))
    encoded = encode_documents(
        [replace(one, part=one.part or PART) for one in fresh],
        tokenizer,
        context=recipe.context,
        end=closes_documents(recipe, model=config.train.model),
    )
    rows = [row for row in encoded.rows if row.document.id not in ids and content_hash(row.document.text) not in hashes]
    table = document_table(rows).unique("content_hash", keep="first", maintain_order=True).sort("id")
    counts = {
        "rows": reading.num_rows,
        "quarantined": len(reading.quarantine),
        "too_short": len(long_enough(reading.documents, min_characters=0)) - len(long),
        "exact_duplicates": len(long) - len(unique),
        "in_training_or_targets": len(unique) - len(fresh),
        "without_tokens": encoded.counts["without_tokens"],
        "parts_in_training_or_targets": len(encoded.rows) - len(table),
        "new": len(table),
    }
    return NewDocuments(table, counts, reading.quarantine)


def _with_new(
    config: Config, workspace: Workspace, attribution: Attribution, *, audited: pl.DataFrame, new: pl.DataFrame
) -> tuple[Attribution, RowDot]:
    """The attribution for the audited training documents, then the new ones; and dot products with the rows of both."""
    num_trained, num_segments = attribution.exposure.shape
    exposure = np.concatenate([attribution.exposure[: len(audited)], np.full((len(new), num_segments), 1 / num_trained)])
    trained_dot = store_dot(config, workspace, attribution, audited["id"].to_list())
    if new.is_empty():
        return replace(attribution, exposure=exposure), trained_dot
    appended = as_documents(new)
    manifests = {number: log_rows(config, workspace, appended, checkpoint=number) for number in attribution.manifests}
    new_dot = store_dot(config, workspace, replace(attribution, manifests=manifests), appended.ids)

    def dot(checkpoint: int, queries: Tensor) -> np.ndarray:
        rows = [trained_dot(checkpoint, queries)] if len(audited) else []
        return np.concatenate([*rows, new_dot(checkpoint, queries)])

    return replace(attribution, exposure=exposure), dot
