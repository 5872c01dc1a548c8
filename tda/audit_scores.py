"""Scores for an audit, for the scoring half of the targets: those of training documents from stage `scores`, and of new ones.

New documents are scored as if they had been seen as often as the average document, for 1/N of the learning rate, with the
checkpoints that are there. By SOURCE, they get gradient rows in the store's tables, beside those of the training documents; the
pipeline's own manifests and tags stay as they are.
"""

import contextlib
import re
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from tda.artifacts import Workspace, existing, only_run, read_table
from tda.clean import long_enough, without_copies
from tda.config import Config
from tda.data import Documents, as_documents
from tda.gradient_log import log_rows
from tda.ingest import content_hash
from tda.parallel import num_readers
from tda.prepare import closes_documents, document_table, read_source
from tda.scoring import load_attribution, mean_gradient, source_scores, store_dot
from tda.target_influence import influence_of_new
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
    """Scores of the documents that `audit.scope` names.

    Raises:
        ValueError: the scope is new, and there is no new document; or the scores are those of other documents.
    """
    torch.set_num_threads(1)  # sums on several threads are taken in another order
    trained = read_table(workspace.documents, stage="prepare")
    targets = read_table(workspace.targets, stage="prepare")
    new = new_documents(config, workspace, known=[trained, targets])
    if config.audit.scope == "new" and new.table.is_empty():
        raise ValueError(f"audit.scope: new, but {_why_none(config.audit.documents, new.counts)}; or set audit.scope to all")
    parts = []
    if config.audit.scope == "all":
        parts.append(trained.with_columns(score=_known_scores(config, workspace, trained), is_new=pl.lit(value=False)))
    if len(new.table):
        queries = as_documents(targets.filter(pl.col("half") == "score"))
        scores = _scores_of_new(config, workspace, as_documents(trained), queries, as_documents(new.table))
        parts.append(new.table.with_columns(score=scores, is_new=pl.lit(value=True)))
    columns = ["doc_id", "content_hash", "source", "text", "score", "is_new"]
    return AuditScores(pl.concat([part.rename({"id": "doc_id"}).select(columns) for part in parts]), new.counts, new.quarantine)


def _known_scores(config: Config, workspace: Workspace, trained: pl.DataFrame) -> pl.Series:
    column = f"score_{config.scores.answering}"
    scores = read_table(workspace.scores, stage="scores", columns=["doc_id", "content_hash", column])
    if not scores.select(id="doc_id", content_hash="content_hash").equals(trained.select("id", "content_hash")):
        raise ValueError(
            f"{workspace.scores} has the scores of other documents than {workspace.documents} has; expected the same; run "
            "`dvc repro scores`"
        )
    return scores[column]


def _scores_of_new(
    config: Config, workspace: Workspace, documents: Documents, queries: Documents, new: Documents
) -> Float[np.ndarray, " new"]:
    """By averaged influence if it is on, from full gradients; otherwise by SOURCE, from rows that are added to the store."""
    if config.scores.averaged_influence:
        return influence_of_new(config, workspace, documents, queries, new=new)
    attribution = load_attribution(config, workspace, documents)
    query = mean_gradient(config, workspace, attribution, queries)
    with contextlib.ExitStack() as held:
        for checkpoint in attribution.manifests:
            # Nobody else may write to the tables now, nor take away what was written.
            held.enter_context(only_run(workspace.work / f"gradients-{checkpoint}.lock"))
        manifests = {number: log_rows(config, workspace, new, checkpoint=number) for number in attribution.manifests}
        exposure = np.full((len(new), len(attribution.segments)), 1 / len(documents))
        appended = replace(attribution, manifests=manifests, documents=new, exposure=exposure)
        return source_scores(appended, query, store_dot(config, workspace, appended, new.ids))


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
