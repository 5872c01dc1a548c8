"""The corpus of a planned run: read if `prepare` has run, else estimated from a sample of its documents.

The sample is read, cleaned and tokenised as `prepare` would, which also shows what that costs.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl

from tda.artifacts import Workspace, read_json
from tda.clean import long_enough, without_copies, without_near_copies
from tda.config import Prepare
from tda.corpus import GENERAL_SOURCES, TARGET_SOURCES, file_texts, source_files
from tda.data import Documents, load_documents
from tda.ingest import Document, Reading, part_of, read_documents
from tda.prepare import BUILTIN, check_fields, document_table, fields_of, made_tokenizer
from tda.readers import rows, share_of_bytes
from tda.split import HALVES, fair_shares
from tda.tokens import Row, encode_documents

EVERY = 20  # one in so many files of the built-in corpus is read
SAMPLE = 2000  # rows of a user's file that are read


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents, real ones or drawn from a sample, and what `prepare` takes to make them."""

    documents: Documents
    scored: Documents  # the half of the targets that scores use
    unseen: Documents  # the half on which the verdict is measured
    heldout: Documents
    num_bytes: int  # of all files of `prepare`
    spread_seconds: float  # processor time of `prepare` that is spread over workers
    seconds: float  # processor time of the rest of `prepare`
    vocabulary: int
    origin: str  # where the numbers come from, in words


@dataclass(frozen=True)
class _Sample:
    documents: list[Document]
    share: float  # of all documents
    spread_seconds: float
    seconds: float
    what: str


def expected_corpus(config: Prepare, workspace: Workspace, *, model: str) -> Corpus:
    """The corpus that `config` describes, for `model` (`train.model`).

    Raises FileNotFoundError or ValueError where the documents cannot be read, as `prepare` does.
    """
    general, target_sources = tuple(config.general_sources), tuple(config.target_sources)
    if config.documents == BUILTIN:
        general, target_sources = general or GENERAL_SOURCES, target_sources or TARGET_SOURCES
    sample = _read(config)
    if config.targets not in ("", BUILTIN):
        _sampled(config, config.targets, key="prepare.targets")  # what `prepare` would refuse
    without_near_copies(sample.documents[:1], threshold=config.near_duplicate_threshold)  # loads what it needs, once
    began = time.process_time()
    kept = without_copies(long_enough(sample.documents, min_characters=config.min_characters))
    kept = without_near_copies(kept, threshold=config.near_duplicate_threshold)
    cleaning = time.process_time() - began
    if not kept:
        raise ValueError(
            f"prepare.documents: none of the {len(sample.documents)} documents read from {config.documents} has "
            f"{config.min_characters} characters or more; lower prepare.min_characters or give other documents"
        )
    began = time.process_time()
    tokenizer, end = made_tokenizer(kept, config=config, model=model)
    encoded = encode_documents(kept, tokenizer, context=config.context, end=end).rows
    table = document_table(encoded)
    tokenising = time.process_time() - began
    wanted = _numbers(config, encoded, share=sample.share, general=general, target_sources=target_sources)
    num_rows = sum(wanted.values())
    seconds = sample.seconds + cleaning / sample.share + tokenising * num_rows / len(encoded)
    work = {"spread_seconds": sample.spread_seconds, "seconds": seconds}
    if workspace.documents.exists():
        return _prepared(workspace, work)
    return Corpus(
        **_drawn(encoded, wanted, general),
        num_bytes=round(_parquet_bytes(table) * num_rows / len(encoded)) + _tokenizer_bytes(tokenizer),
        vocabulary=len(tokenizer),
        origin=f"estimated from {sample.what}",
        **work,
    )


def _prepared(workspace: Workspace, work: dict) -> Corpus:
    """The corpus that `prepare` has left."""
    paths = [workspace.documents, workspace.targets, workspace.heldout, workspace.quarantine, workspace.damage]
    paths += list(workspace.tokenizer.glob("*"))
    return Corpus(
        documents=load_documents(workspace.documents),
        scored=load_documents(workspace.targets, half=HALVES[0]),
        unseen=load_documents(workspace.targets, half=HALVES[1]),
        heldout=load_documents(workspace.heldout),
        num_bytes=sum(path.stat().st_size for path in paths if path.exists()),
        vocabulary=read_json(workspace.preparation, stage="prepare")["vocabulary"],
        origin=f"{workspace.documents.parent}, as it is now",
        **work,
    )


def _drawn(encoded: Sequence[Row], wanted: dict[str, int], general: Sequence[str]) -> dict[str, Documents]:
    """As many documents as are wanted of each set, drawn with replacement from the sample."""
    random = np.random.default_rng(0)
    parts = {"general": [], "mixed": []}
    for row in encoded:
        parts[part_of(row.document, general)].append(row)

    def drawn(number: int, part: str) -> list[Row]:
        pool = parts[part] or encoded
        return [pool[place] for place in random.integers(len(pool), size=number)]

    training = drawn(wanted["general"], "general") + drawn(wanted["mixed"], "mixed")
    labels = ["general"] * wanted["general"] + ["mixed"] * wanted["mixed"]
    num_scored = wanted["targets"] // 2
    return {
        "documents": _documents(training, labels),
        "scored": _documents(drawn(num_scored, "mixed"), []),
        "unseen": _documents(drawn(wanted["targets"] - num_scored, "mixed"), []),
        "heldout": _documents(drawn(wanted["heldout"], "general"), []),
    }


def _read(config: Prepare) -> _Sample:
    began = time.process_time()
    if config.documents == BUILTIN:
        files = source_files()
        sizes = [file.path.stat().st_size if file.path.is_file() else 0 for file in files]
        listing = time.process_time() - began
        chosen = files[::EVERY]
        texts = [text for file in chosen for text in file_texts(file)]
        share = sum(sizes[::EVERY]) / sum(sizes)
        documents = [Document(f"{text.source}/{text.name}", text.source, text.text) for text in texts]
        reading = (time.process_time() - began - listing) / share
        what = f"{len(chosen)} of {len(files)} source files, {len(documents)} documents"
        return _Sample(documents, share, reading, listing, what)
    reading = _sampled(config, config.documents, key="prepare.documents")
    if reading.whole:
        check_fields(config, reading)
    number = reading.num_rows if reading.whole else _num_rows(config)
    share = min(1.0, reading.num_rows / number)
    seconds = (time.process_time() - began) / share
    words = f"all {number} rows" if reading.whole else f"the first {reading.num_rows} of about {number} rows"
    return _Sample(reading.documents, share, 0.0, seconds, words)


def _sampled(config: Prepare, location: str, *, key: str) -> Reading:
    """The first rows at `location`; refused as by `prepare` if they are all, or none is a document."""
    return read_documents(
        location, fields=fields_of(config), split=config.split, max_bad_rows=config.max_bad_rows, key=key, at_most=SAMPLE
    )


def _num_rows(config: Prepare) -> int:
    """Rows at `prepare.documents`, more than `SAMPLE`: by the share of a file that those take, else counted."""
    path = Path(config.documents)
    if path.is_file() and path.suffix == ".parquet":
        return pl.scan_parquet(path).select(pl.len()).collect().item()
    if path.is_file():
        return max(SAMPLE + 1, round(SAMPLE / share_of_bytes(path, SAMPLE)))
    return sum(1 for _ in rows(config.documents, split=config.split))


def _numbers(
    config: Prepare, encoded: Sequence[Row], *, share: float, general: Sequence[str], target_sources: Sequence[str]
) -> dict[str, int]:
    """How many rows there will be of either part of the training documents, of targets, and of held-out documents."""
    places = {"general": 0, "mixed": 0}
    for row in encoded:
        places[part_of(row.document, general)] += 1
    there = {part: round(number / share) for part, number in places.items()}
    targets = config.num_targets
    if not config.targets:
        from_sources = sum(row.document.source in target_sources for row in encoded) / share
        targets = min(targets, round(from_sources / 2))
        there["mixed"] -= targets
    part = "general" if there["general"] else "mixed"
    heldout = min(config.num_heldout, there[part] // 2)
    there[part] -= heldout
    shares = fair_shares({part: max(0, number) for part, number in there.items()}, config.max_documents or sum(there.values()))
    return shares | {"targets": max(2, targets), "heldout": max(1, heldout)}


def _documents(chosen: Sequence[Row], parts: Sequence[str]) -> Documents:
    names = [f"{row.document.id}/{place}" for place, row in enumerate(chosen)]
    return Documents(
        ids=names,
        sources=[row.document.source for row in chosen],
        parts=list(parts) or ["mixed"] * len(chosen),
        content_hashes=["0" * 32] * len(chosen),
        tokens=[np.array(row.tokens, np.int32) for row in chosen],
        loss_starts=np.array([row.loss_start for row in chosen], np.int64),
    )


def _parquet_bytes(table: pl.DataFrame) -> int:
    buffer = BytesIO()
    table.write_parquet(buffer, compression="zstd", statistics=False)
    return buffer.tell()


def _tokenizer_bytes(tokenizer: object) -> int:
    with tempfile.TemporaryDirectory(prefix="tda-plan-") as folder:
        tokenizer.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*"))
