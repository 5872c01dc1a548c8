"""Stage `prepare`: documents and targets read, cleaned, split, damaged in part as a positive control, and tokenised."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from tda.artifacts import Workspace, whole, write_json, write_table
from tda.clean import long_enough, without_copies, without_near_copies
from tda.config import Prepare
from tda.corpus import GENERAL_SOURCES, TARGET_SOURCES, python_texts
from tda.damage import Truth, damage_documents
from tda.ingest import Document, Fields, Reading, content_hash, part_of, read_documents
from tda.split import check_sources, draw_by_part, split_documents
from tda.tokens import Encoded, Row, encode_documents, load_tokenizer, train_tokenizer

BUILTIN = "builtin:python"
BUILT_HERE = "llama"  # train.model of a model that is built here, whose tokenizer is trained here too

REMOVED = {  # what cleaning counts, in words
    "too_short": "too short",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "targets_too_short_or_duplicate": "too short or duplicate own targets",
}

SCHEMA = {
    "id": pl.String,
    "source": pl.String,
    "part": pl.String,
    "text": pl.String,
    "prompt": pl.String,
    "completion": pl.String,
    "content_hash": pl.String,
    "tokens": pl.List(pl.Int32),
    "loss_start": pl.Int32,
    "num_tokens": pl.Int32,
}


@dataclass(frozen=True)
class Prepared:
    """All that the stage makes; the tables have the columns of `tda/README.md` and are sorted by id."""

    documents: pl.DataFrame
    targets: pl.DataFrame
    heldout: pl.DataFrame
    damage: pl.DataFrame
    tokenizer: Any
    quarantine: list[dict]
    stats: dict


def prepare_documents(config: Prepare, *, model: str, workers: int = 1) -> Prepared:
    """Documents read, cleaned, split, damaged where asked for, and tokenised for `model` (`train.model`).

    The same for any number of `workers`. Raises FileNotFoundError or ValueError where the configuration, or what it points
    to, cannot be used.
    """
    reading, general, target_sources = _read(config, workers=workers)
    own = _read_targets(config)
    documents, targets, cleaned = _clean(reading.documents, own.documents if own else [], config)
    documents = [replace(one, part=part_of(one, general)) for one in documents]
    if own:
        target_sources = ()
    check_sources(documents, general_sources=general, target_sources=target_sources, targets_given=own is not None)
    split = split_documents(
        documents,
        targets,
        target_sources=target_sources,
        num_targets=config.num_targets,
        num_heldout=config.num_heldout,
        max_documents=config.max_documents,
        seed=config.seed,
        removed=", ".join(f"{cleaned[key]} {words}" for key, words in REMOVED.items() if cleaned[key]),
    )
    damaged, truth = damage_documents(split.training, share=config.damage, seed=config.seed)

    tokenizer, end = made_tokenizer(damaged, config=config, model=model)
    parts = {"documents": damaged, "targets": split.targets, "heldout": split.heldout}
    encoded = {name: encode_documents(some, tokenizer, context=config.context, end=end) for name, some in parts.items()}
    rows, dropped = _fit(encoded, halves=split.halves, config=config)
    tables = {
        "documents": document_table(rows["documents"]),
        "targets": document_table(rows["targets"], half=[split.halves[row.origin] for row in rows["targets"]]),
        "heldout": document_table(rows["heldout"]),
    }
    truth_table = _truth_table(rows["documents"], truth, originals={one.id: one.text for one in split.training})

    quarantine = reading.quarantine + (own.quarantine if own else [])
    stats = {
        "read": {"rows": reading.num_rows, "target_rows": own.num_rows if own else 0, "ids_made": reading.num_ids_made},
        "quarantined": dict(Counter(row["reason"] for row in quarantine)),
        **cleaned,
        "dropped_rows": dropped,
        "encoding": {name: {key: int(count) for key, count in some.counts.items()} for name, some in encoded.items()},
        "damaged": dict(truth_table.filter("damaged")["kind"].value_counts().sort("kind").iter_rows()),
        "documents": _nested(tables["documents"], "source", "part"),
        "targets": _nested(tables["targets"], "source", "half"),
        "heldout": _nested(tables["heldout"], "source", "part"),
        "tokens": {name: _token_statistics(table) for name, table in tables.items()},
        "vocabulary": len(tokenizer),
    }
    return Prepared(**tables, damage=truth_table, tokenizer=tokenizer, quarantine=quarantine, stats=stats)


def write_prepared(prepared: Prepared, workspace: Workspace) -> None:
    """Write all artifacts of the stage, each whole or not at all."""
    write_table(workspace.documents, prepared.documents)
    write_table(workspace.targets, prepared.targets)
    write_table(workspace.heldout, prepared.heldout)
    write_table(workspace.damage, prepared.damage)
    with whole(workspace.tokenizer) as folder:
        prepared.tokenizer.save_pretrained(str(folder))
    with whole(workspace.quarantine) as part:
        lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in prepared.quarantine)
        part.write_text("".join(lines), encoding="utf-8")
    write_json(workspace.preparation, prepared.stats)


# Reading and cleaning


def _read(config: Prepare, *, workers: int) -> tuple[Reading, tuple[str, ...], tuple[str, ...]]:
    """The documents; the sources of the first training stage; the sources that targets are drawn from."""
    general, target_sources = tuple(config.general_sources), tuple(config.target_sources)
    reading = read_source(config, config.documents, key="prepare.documents", workers=workers)
    check_fields(config, reading)
    if config.documents == BUILTIN:
        return reading, general or GENERAL_SOURCES, target_sources or TARGET_SOURCES
    return reading, general, target_sources


def _read_targets(config: Prepare) -> Reading | None:
    return read_source(config, config.targets, key="prepare.targets") if config.targets else None


def read_source(config: Prepare, location: str, *, key: str, workers: int = 1) -> Reading:
    """All documents at `location`, which stands under `key` in `params.yaml`, by the fields and the split that `config` names."""
    if location == BUILTIN:
        texts = python_texts(workers=workers)
        documents = [Document(f"{text.source}/{text.name}", text.source, text.text) for text in texts]
        return Reading(documents, num_rows=len(documents))
    return read_documents(location, fields=fields_of(config), split=config.split, max_bad_rows=config.max_bad_rows, key=key)


def check_fields(config: Prepare, reading: Reading) -> None:
    """Refuse a field that `config` names and no row of `prepare.documents` has.

    Documents need no ids and no sources, so those may lack the names with which `params.yaml` is shipped.
    """
    for key, shipped in (("id_field", "id"), ("source_field", "source"), ("part_field", "")):
        name = getattr(config, key)
        if name in reading.absent and name != shipped:
            raise ValueError(
                f"prepare.{key}: no row of {config.documents} has the field {name!r}; expected one of the fields found: "
                f"{', '.join(reading.names) or 'none'}; correct the name, or set prepare.{key} to {json.dumps(shipped)}"
            )


def fields_of(config: Prepare) -> Fields:
    """The fields that `config` names."""
    return Fields(
        text=config.text_field,
        prompt=config.prompt_field,
        completion=config.completion_field,
        id=config.id_field,
        source=config.source_field,
        part=config.part_field,
    )


def _clean(documents: list[Document], targets: list[Document], config: Prepare) -> tuple[list[Document], list[Document], dict]:
    """Documents and own targets without what is too short or said twice, and the counts of it.

    Raises:
        ValueError: nothing is left, or a target is also a training document.
    """
    long = long_enough(documents, min_characters=config.min_characters)
    unique = without_copies(long)
    own = without_near_copies(
        without_copies(long_enough(targets, min_characters=config.min_characters)), threshold=config.near_duplicate_threshold
    )
    _refuse_overlap(unique, targets)
    kept = without_near_copies(unique, threshold=config.near_duplicate_threshold, of=own)
    if not kept:
        raise ValueError(
            f"prepare.documents: no document of {config.documents} is left: expected some of at least {config.min_characters} "
            f"characters that are no near duplicate of a target; got {len(documents)} documents, {len(documents) - len(long)} of "
            "them shorter; lower prepare.min_characters or give other documents"
        )
    if config.targets and not own:
        raise ValueError(
            f"prepare.targets: no target of {config.targets} is left: expected some of at least {config.min_characters} "
            f"characters; got {len(targets)} shorter ones; lower prepare.min_characters or give longer targets"
        )
    counts = {
        "too_short": len(documents) - len(long),
        "exact_duplicates": len(long) - len(unique),
        "near_duplicates": len(unique) - len(kept),
        "targets_too_short_or_duplicate": len(targets) - len(own),
    }
    return kept, own, counts


def _refuse_overlap(documents: list[Document], targets: list[Document]) -> None:
    ids = {one.id for one in targets}
    hashes = {content_hash(one.text) for one in targets}
    both = [one.id for one in documents if one.id in ids or content_hash(one.text) in hashes]
    if both:
        raise ValueError(
            f"prepare.targets: a target document that is also a training document proves nothing: expected none, got {len(both)} "
            f"with the same id or text, first {both[0]!r}; take them out of prepare.documents or of prepare.targets"
        )


# Tokens and tables


def made_tokenizer(documents: list[Document], *, config: Prepare, model: str) -> tuple[Any, bool]:
    """The tokenizer, and whether it is one trained here, of which an end-of-text token closes each document."""
    if closes_documents(config, model=model):
        return train_tokenizer((one.text for one in documents), vocabulary=config.vocabulary), True
    if config.tokenizer:
        return load_tokenizer(config.tokenizer), False
    return load_tokenizer(model, key="train.model"), False


def closes_documents(config: Prepare, *, model: str) -> bool:
    """Whether the tokenizer is one trained here, of which an end-of-text token closes each document."""
    return model == BUILT_HERE and not config.tokenizer


def _fit(encoded: dict[str, Encoded], *, halves: dict[str, str], config: Prepare) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """The rows that are kept, and counts of the others: parts with a text that is there already, or beyond the numbers asked for.

    Parts of one document stay on one side: a target's in its half, and none of them among the training documents.
    """
    limits = {"targets": config.num_targets, "heldout": config.num_heldout, "documents": config.max_documents}
    seen: set[str] = set()
    kept: dict[str, list[Row]] = {}
    dropped: dict[str, int] = {}
    for name in ("targets", "heldout", "documents"):
        fresh = []
        for row in encoded[name].rows:
            digest = content_hash(row.document.text)
            if digest not in seen:
                seen.add(digest)
                fresh.append(row)
        group = {row.document.id: f"{halves.get(row.origin, '')}/{row.document.source}" for row in fresh}
        some, rest = draw_by_part(
            fresh,
            limits[name] or len(fresh),
            key=lambda row: row.document.id,
            source=lambda row, group=group: group[row.document.id],
            part=lambda row: row.document.part,
            salt=f"rows/{config.seed}",
        )
        kept[name] = sorted(some, key=lambda row: row.document.id)
        dropped[f"{name}_same_text"] = len(encoded[name].rows) - len(fresh)
        dropped[f"{name}_beyond_number"] = len(rest)
        _check_rows(kept[name], name=name)
    return kept, dropped


def _check_rows(rows: list[Row], *, name: str) -> None:
    if not rows:
        raise ValueError(
            f"prepare: no {name} are left after tokenisation: expected texts of several tokens; got none; check the texts"
        )
    twice = [row_id for row_id, count in Counter(row.document.id for row in rows).items() if count > 1]
    if twice:
        raise ValueError(
            f"prepare: the id {twice[0]!r} is that of a document and of a part of another: expected ids that do not end in "
            "#1, #2, ...; rename the document"
        )


def document_table(rows: list[Row], **more: list) -> pl.DataFrame:
    """The rows as a table with the columns of `documents.parquet`, and `more` of them."""
    documents = [row.document for row in rows]
    columns = {
        "id": [one.id for one in documents],
        "source": [one.source for one in documents],
        "part": [one.part for one in documents],
        "text": [one.text for one in documents],
        "prompt": [one.prompt for one in documents],
        "completion": [one.completion for one in documents],
        "content_hash": [content_hash(one.text) for one in documents],
        "tokens": [row.tokens for row in rows],
        "loss_start": [row.loss_start for row in rows],
        "num_tokens": [len(row.tokens) for row in rows],
    }
    return pl.DataFrame({**columns, **more}, schema={**SCHEMA, **dict.fromkeys(more, pl.String)})


def _truth_table(rows: list[Row], truth: list[Truth], *, originals: dict[str, str]) -> pl.DataFrame:
    """The truth about every row; a part that the damage to its document left alone is not damaged."""
    kinds = {one.id: one.kind for one in truth}
    found = ["" if row.document.text in originals[row.origin] else kinds[row.origin] for row in rows]
    columns = {"id": [row.document.id for row in rows], "damaged": [bool(kind) for kind in found], "kind": found}
    return pl.DataFrame(columns, schema={"id": pl.String, "damaged": pl.Boolean, "kind": pl.String})


# Counts


def _nested(table: pl.DataFrame, outer: str, inner: str) -> dict[str, dict[str, int]]:
    """Number of documents by two columns."""
    counts: dict[str, dict[str, int]] = {}
    for one, other, number in table.group_by(outer, inner).len().sort(outer, inner).iter_rows():
        counts.setdefault(one, {})[other] = number
    return counts


def _token_statistics(table: pl.DataFrame) -> dict[str, int | float]:
    lengths = table["num_tokens"]
    return {
        "documents": len(lengths),
        "total": int(lengths.sum()),
        "predicted": int((lengths - table["loss_start"]).sum()),
        "median": float(lengths.median()),
        "longest": int(lengths.max()),
    }
