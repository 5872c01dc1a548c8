"""The gradient store: one LanceDB table per checkpoint, one row per document.

A table is written by one process at a time, in chunks that are committed one by one, and then sealed: a tag on that version and a
manifest with a digest of its rows. Readers open the tag, so they see the sealed rows whatever is written later. The manifest is a
function of the rows alone: neither the order in which they came nor the number of interruptions changes it.

lancedb and lance are imported inside functions: they start threads, and a stage forks its workers before it opens a table.
"""

import contextlib
import errno
import json
import mmap
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from torch import Tensor

from tda.artifacts import FULL
from tda.row_files import Extent, RowFiles
from tda.stored_rows import (
    NUMBERS,
    Rows,
    canonical,
    decode,
    documents_digest,
    encode,
    fingerprint,
    number,
    row_digests,
    schema,
    stored_bytes,
    stored_vectors,
    stored_width,
)

CHUNK_BYTES = 256 * 2**20  # of stored rows between commits: what a kill can lose
CHUNK_SECONDS = 60.0  # or this long, whichever comes first
BLOCK_BYTES = 4 * 2**20  # of stored vectors read at once; larger blocks scan no faster and are multiplied 10% slower
FRAGMENT_BYTES = 256 * 2**20  # of a file after compaction
CHECKED_PAGES = 32  # of a table, whose layout is compared with what Lance reads
MAX_FRAGMENTS = 64  # small files that a sealed table may keep
SPARE_BYTES = 64 * 2**20  # left free beside the rows: Lance's own files, the system


class GradientTable:
    """The rows of one checkpoint; made by `open_table` (to write) or `open_sealed` (to read)."""

    def __init__(self, store: Path, name: str, identity: dict[str, Any], dataset: Any):
        self.store = store
        self.name = name
        self.identity = identity  # all that the rows depend on beside the documents
        self.checkpoint: int = identity["checkpoint"]
        self.segment: int = identity["segment"]
        self.dim: int = identity["dim"]
        self.dtype: str = identity["dtype"]
        self._dataset = dataset
        self._known: set[str] | None = None  # ids in the table, of a writer

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored vector."""
        return stored_bytes(self.dim, self.dtype)

    @property
    def block_rows(self) -> int:
        """Rows of a block of `BLOCK_BYTES`."""
        return max(1, BLOCK_BYTES // self.row_bytes)

    @property
    def version(self) -> int:
        """Lance's number of what this object reads; the rows' places belong to it."""
        return self._dataset.version

    def __len__(self) -> int:
        return self._dataset.count_rows()

    # writing

    def present(self) -> dict[str, str]:
        """Content hash of every document that has a row, by its id."""
        with self._readable():
            return _contents(self._dataset)

    def sealed(self) -> dict[str, str]:
        """Content hash of every document that had a row when the table was sealed last, by its id; empty if it never was."""
        import lance

        with self._readable():
            versions = [tag["version"] for tag in self._dataset.tags.list().values()]
            if not versions:
                return {}
            return _contents(lance.dataset(table_path(self.store, self.name), version=max(versions)))

    def check_space(self, num_rows: int) -> None:
        """Refuse to start on `num_rows` more rows if the disk cannot hold them.

        Raises:
            OSError: too little space is free.
        """
        needed, free = num_rows * self.row_bytes + SPARE_BYTES, shutil.disk_usage(self.store).free
        if num_rows and needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{self.store}: {num_rows} more gradient rows of checkpoint {self.checkpoint} need {needed / 1e9:.2f} GB, "
                f"{free / 1e9:.2f} GB are free; free some space, or lower gradients.rank, and run the same command again",
            )

    def write(self, stream: Iterable[Rows], *, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Write all rows of `stream`: a commit whenever a chunk is full or old enough, and at the end.

        The row of a document that is in the table already is replaced. What was committed stays, whatever happens later:
        `present` tells a new run what is left to do. Refused are rows of another width, repeated documents and numbers that are
        not finite (ValueError), and a full disk (OSError).
        """
        pending: set[str] = set()
        batches: list[pa.RecordBatch] = []
        num_bytes, since = 0, time.monotonic()
        for rows in stream:
            for start in range(0, len(rows), self.block_rows):
                part = rows.slice(start, start + self.block_rows)
                self._check(part, pending)
                batches.append(encode(part, self.identity))
                pending.update(part.doc_ids)
                num_bytes += batches[-1].nbytes
                if num_bytes >= chunk_bytes or time.monotonic() - since >= CHUNK_SECONDS:
                    self._commit(batches)
                    pending, batches, num_bytes, since = set(), [], 0, time.monotonic()
        self._commit(batches)

    def _check(self, rows: Rows, pending: set[str]) -> None:
        columns = (rows.content_hashes, rows.sources, rows.tokens, rows.losses, rows.gradient_norms, rows.vectors)
        if {len(column) for column in columns} != {len(rows)} or rows.vectors.shape[1] != self.dim:
            raise ValueError(
                f"{self.name}: {len(rows)} documents with columns of {[len(column) for column in columns]} rows and vectors of "
                f"{rows.vectors.shape[1]} numbers; expected one row of {self.dim} numbers per document"
            )
        if len(set(rows.doc_ids)) < len(rows) or not pending.isdisjoint(rows.doc_ids):
            repeated = next(doc for place, doc in enumerate(rows.doc_ids) if doc in pending or doc in rows.doc_ids[:place])
            raise ValueError(f"{self.name}: document {repeated} comes twice; expected one row per document")
        if not rows.finite.all():
            bad = [rows.doc_ids[row] for row in np.flatnonzero(~rows.finite)]
            raise ValueError(
                f"checkpoint {self.checkpoint}: loss or gradient of {len(bad)} documents is not finite: {', '.join(bad[:5])}"
                f"{', ...' if len(bad) > 5 else ''}; expected numbers; look at these documents, and whether training diverged "
                "(then lower train.learning_rate)"
            )

    def _commit(self, batches: list[pa.RecordBatch]) -> None:
        """New documents by an append, known ones by a merge: five to ten times slower, but few documents change."""
        import lance

        if not batches:
            return
        if self._dataset.latest_version != self._dataset.version:
            raise RuntimeError(f"{self.store}/{self.name}: another process writes to it; wait until it ends, then run again")
        self.check_space(sum(batch.num_rows for batch in batches))
        known = self._known if self._known is not None else set(self.present())
        self._known = None  # until it is certain again what the table holds
        ids = [batch["doc_id"].to_pylist() for batch in batches]
        masks = [np.array([doc in known for doc in of_batch]) for of_batch in ids]
        new = [_select(batch, ~mask) for batch, mask in zip(batches, masks, strict=True) if not mask.all()]
        changed = [_select(batch, mask) for batch, mask in zip(batches, masks, strict=True) if mask.any()]
        with _clear_when_full(self.store, self.name, self._dataset):
            if new:
                self._dataset = lance.write_dataset(iter(new), self._dataset, schema=new[0].schema, mode="append")
            if changed:
                merge = self._dataset.merge_insert("doc_id").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(pa.RecordBatchReader.from_batches(changed[0].schema, changed))
        self._known = known.union(*ids)

    def seal(self, documents: Sequence[tuple[str, str]], **also: Any) -> dict[str, Any]:
        """The manifest of the rows of `documents` (id, content hash), at a tag that readers open; `also` is put into it.

        Rows of other documents may stay in the table; they are no part of the digest.

        Raises:
            ValueError: a document has no row, or one of other content.
        """
        have = self.present()
        lacking = [doc for doc, content_hash in documents if have.get(doc) != content_hash]
        if lacking:
            raise ValueError(
                f"{self.name}: {len(lacking)} of {len(documents)} documents have no row of their present content, "
                f"{lacking[0]} first; expected a row each: run `dvc repro gradients@{self.checkpoint}`"
            )
        with _clear_when_full(self.store, self.name, self._dataset):
            self._compact()
            digest = self.digest([doc for doc, _ in documents])
            tag = f"run-{digest[:12]}"
            put = self._dataset.tags.update if tag in self._dataset.tags.list() else self._dataset.tags.create
            put(tag, self._dataset.version)
            _clean(self._dataset)
        return also | {
            "table": self.name,
            "tag": tag,
            "rows": len(documents),
            "dim": self.dim,
            "dtype": self.dtype,
            "digest": digest,
            "documents": documents_digest(documents),
            "fingerprint": fingerprint(self.identity),
            "identity": self.identity,
            "checkpoint": self.checkpoint,
            "segment": self.segment,
        }

    def _compact(self) -> None:
        """Merge many small files into few, if there are many and the disk holds the copy meanwhile."""
        num_files, num_bytes = len(self._dataset.get_fragments()), len(self) * self.row_bytes
        if num_files <= MAX_FRAGMENTS or num_bytes >= num_files * FRAGMENT_BYTES // 4:
            return
        if shutil.disk_usage(self.store).free > num_bytes + SPARE_BYTES:
            rows = max(1, FRAGMENT_BYTES // self.row_bytes)
            self._dataset.optimize.compact_files(target_rows_per_fragment=rows, num_threads=1, batch_size=self.block_rows)

    # reading

    def digest(self, doc_ids: Sequence[str]) -> str:
        """xxh3_128 of the rows of `doc_ids` in that order (`stored_rows.row_digests`).

        Each row is hashed where it is met in the table, then the 16 bytes per row in order: one pass, whatever the table's order.
        """
        digests = np.empty((len(doc_ids), 16), np.uint8)
        columns = ["doc_id", "content_hash", *NUMBERS, "vector"]
        for positions, block in self.blocks(doc_ids, columns=columns, block_rows=self.block_rows):
            digests[positions] = row_digests(block)
        return xxhash.xxh3_128_hexdigest(digests)

    def scan(
        self, doc_ids: Sequence[str], *, block_rows: int = 4096, with_vectors: bool = True
    ) -> Iterator[tuple[np.ndarray, Rows]]:
        """Blocks of the rows of `doc_ids`, each with its positions in `doc_ids`, in the order in which the table has them.

        A block has at most `block_rows` rows, and with vectors at most `BLOCK_BYTES` of them as stored; without, their width
        is 0. A document that has no row or is asked for twice is refused (ValueError).
        """
        columns = ["content_hash", "source", *NUMBERS, *(["vector"] if with_vectors else [])]
        if with_vectors:
            block_rows = min(block_rows, self.block_rows)
        for positions, block in self.blocks(doc_ids, columns=columns, block_rows=block_rows):
            yield positions, decode(block, [doc_ids[position] for position in positions.tolist()], dim=self.dim)

    def blocks(self, doc_ids: Sequence[str], *, columns: list[str], block_rows: int) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Stored columns of the rows of `doc_ids` with positions in it; every block but the last has `block_rows` rows.

        Rows are taken by their place in the table, in ascending order: faster than Lance's own scan where they are next to each
        other (benchmarks/store_scan_keeps_up.py), and only one block is in memory.
        """
        places, positions = self.places(doc_ids)
        for start in range(0, len(places), block_rows):
            block = slice(start, start + block_rows)
            yield positions[block], self._take(places[block], columns)

    def places(self, doc_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Places in the table of the rows of `doc_ids`, ascending, and the position in `doc_ids` of each."""
        with self._readable():
            ids = self._dataset.to_table(columns=["doc_id"])["doc_id"]
        found = pc.index_in(ids, value_set=pa.array(doc_ids, pa.string())).combine_chunks()
        places = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
        positions = found.drop_null().to_numpy()
        self._check_found(doc_ids, positions)
        return places, positions

    def rows_at(self, places: np.ndarray, doc_ids: Sequence[str]) -> tuple[np.ndarray, Tensor]:
        """Scales and stored vectors of the rows at ascending `places`, which must be those of `doc_ids` (ValueError)."""
        block = self._take(places, ["doc_id", "scale", "vector"])
        if block["doc_id"].to_pylist() != list(doc_ids):
            raise ValueError(f"{self.name}: other documents lie at these places than expected; run `tda verify`")
        return number(block, "scale"), stored_vectors(block)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, of all rows in the order of the table."""
        with self._readable():
            return number(self._dataset.to_table(columns=[name]), name)

    def buffer(self, rows: int, *, pinned: bool = False) -> Tensor:
        """Zeros for a block of stored vectors, (rows, width), at a page's beginning, where `RowFiles` can read to directly."""
        shape, dtype = (rows, stored_width(self.dim, self.dtype)), getattr(torch, self.dtype)
        if pinned:
            return torch.zeros(shape, dtype=dtype, pin_memory=True)
        return torch.frombuffer(mmap.mmap(-1, rows * self.row_bytes), dtype=dtype).view(shape)

    @contextlib.contextmanager
    def vectors(self) -> Iterator[Callable[[np.ndarray, Tensor], None]]:
        """Inside the block, `read(places, buffer)` fills a buffer's first rows with the stored vectors at those places.

        Rows next to each other come straight from the file where they lie there so (`row_files.py`), others by Lance's take.
        """
        with RowFiles(self._extents(), row_bytes=self.row_bytes) as files:

            def read(places: np.ndarray, buffer: Tensor) -> None:
                if files and len(places) == places[-1] - places[0] + 1:
                    files.read(int(places[0]), buffer.view(torch.uint8).numpy()[: len(places)])
                else:
                    buffer[: len(places)] = stored_vectors(self._take(places, ["vector"]))

            yield read

    def _extents(self) -> list[Extent]:
        """Where all vectors lie; nothing if any of them is deleted, or not as it is in memory.

        What a page holds follows from its size, and of some pages is held against Lance's own answer at the first and last row.
        """
        from lance.file import LanceFileReader

        field = self._dataset.lance_schema.field("vector").id()
        found: list[Extent] = []
        first = 0
        for fragment in self._dataset.get_fragments():
            files = [file for file in fragment.data_files() if field in file.fields]
            if fragment.metadata.deletion_file is not None or len(files) != 1:
                return []
            path = table_path(self.store, self.name) / "data" / files[0].path
            column = files[0].column_indices[files[0].fields.index(field)]
            with self._readable():
                pages = LanceFileReader(str(path)).metadata().columns[column].pages
            for page in pages:
                if len(page.buffers) != 1 or page.buffers[0].size % self.row_bytes:
                    return []
                found.append(Extent(path, page.buffers[0].position, first, page.buffers[0].size // self.row_bytes))
                first += found[-1].num_rows
        return found if first == len(self) and self._are_plain(found) else []

    def _are_plain(self, extents: list[Extent]) -> bool:
        some = extents[:: max(1, len(extents) // CHECKED_PAGES)]
        ends = np.array([[extent.first, extent.first + extent.num_rows - 1] for extent in some], np.int64).flatten()
        if not len(ends):
            return True
        expected = stored_vectors(self._take(ends, ["vector"])).view(torch.uint8).numpy()
        rows = np.empty_like(expected)
        with RowFiles(extents, row_bytes=self.row_bytes) as files:
            for place, row in zip(ends.tolist(), rows, strict=True):
                files.read(place, row[None])
        return np.array_equal(rows, expected)

    def _take(self, places: np.ndarray, columns: list[str]) -> pa.Table:
        with self._readable():
            return self._dataset.take(places, columns=columns)

    def _readable(self) -> contextlib.AbstractContextManager[None]:
        return _readable(table_path(self.store, self.name), self.checkpoint)

    def _check_found(self, doc_ids: Sequence[str], positions: np.ndarray) -> None:
        rows = np.bincount(positions, minlength=len(doc_ids))
        if (rows == 1).all():
            return
        if len(set(doc_ids)) < len(doc_ids):
            raise ValueError(f"{self.name}: asked for {len(doc_ids)} rows of {len(set(doc_ids))} documents; expected each once")
        wrong = np.flatnonzero(rows != 1)
        raise ValueError(
            f"{self.store}/{self.name}: {len(wrong)} of {len(doc_ids)} documents do not have one row, "
            f"{doc_ids[wrong[0]]} first ({rows[wrong[0]]} rows); run "
            f"`dvc repro --single-item --force gradients@{self.checkpoint}`"
        )


def open_table(store: Path, *, checkpoint: int, segment: int, identity: dict[str, Any], dim: int, dtype: str) -> GradientTable:
    """The table to which rows of `checkpoint` are written, made if there is none; what a killed run left is put in order.

    `identity` is all that a row depends on beside its document (weights, projection, loss, ...); a table is for one identity, and
    one that has another is refused (ValueError). Only one process may write to a table: hold `artifacts.only_run`, and fork
    nothing afterwards.
    """
    import lance

    identity = _whole_identity(identity, checkpoint=checkpoint, segment=segment, dim=dim, dtype=dtype)
    name = f"gradients_{checkpoint}_{fingerprint(identity)[:12]}"
    path = table_path(store, name)
    if not _is_table(path):
        import lancedb

        store.mkdir(parents=True, exist_ok=True)
        with _clear_when_full(store, name):
            lancedb.connect(store).create_table(name, schema=schema(identity))
    with _readable(path, checkpoint):
        dataset = lance.dataset(path)
    _check_identity(path, checkpoint, stored=_stored_identity(dataset), expected=identity)
    with _readable(path, checkpoint):
        _clean(dataset)
        doubles = _doubles(dataset)
    if doubles:
        quoted = ", ".join("'" + doc.replace("'", "''") + "'" for doc in doubles)
        dataset.delete(f"doc_id IN ({quoted})")
    return GradientTable(store, name, identity, dataset)


def open_sealed(store: Path, manifest: dict[str, Any], *, identity: dict[str, Any] | None = None) -> GradientTable:
    """The table of `manifest` at its tag, to read; `identity`, if given, is what the rows must have been made with.

    A store made with something else than `identity` or the manifest says is refused (ValueError).

    Raises:
        FileNotFoundError: table, tag or rows are gone.
    """
    import lance

    name, tag, checkpoint = manifest["table"], manifest["tag"], manifest["checkpoint"]
    fixed = {key: manifest[key] for key in ("checkpoint", "segment", "dim", "dtype")}
    parts = f"gradients@{checkpoint}" if table_names(store) else "gradients"  # all are missing in a clone
    remedy = f"the store is not versioned, only its manifests are: run `dvc repro --single-item --force {parts}`"
    path = table_path(store, name)
    if not _is_table(path):
        raise FileNotFoundError(f"{path} is missing; {remedy}")
    with _readable(path, checkpoint):
        dataset = lance.dataset(path)
        tags = dataset.tags.list()
    if tag not in tags:
        raise FileNotFoundError(f"{path} has no version {tag}, which the manifest names; {remedy}")
    with _readable(path, checkpoint):
        dataset = lance.dataset(path, version=tag)
    if dataset.count_rows() < manifest["rows"]:
        raise FileNotFoundError(f"{path} has {dataset.count_rows()} rows at {tag}, the manifest {manifest['rows']}; {remedy}")
    stored = _stored_identity(dataset)
    _check_identity(path, checkpoint, stored=stored, expected=manifest["identity"] | fixed)
    if identity is not None:
        _check_identity(path, checkpoint, stored=stored, expected=_whole_identity(identity, **fixed))
    return GradientTable(store, name, stored, dataset)


def _select(batch: pa.RecordBatch, mask: np.ndarray) -> pa.RecordBatch:
    """The rows of `batch` under `mask`; all of them without a copy."""
    return batch if mask.all() else batch.filter(pa.array(mask))


def _whole_identity(identity: dict[str, Any], **fixed: Any) -> dict[str, Any]:
    """`identity` with place and form of the rows, as it comes back from JSON."""
    return json.loads(canonical(identity | fixed))


def _contents(dataset: Any) -> dict[str, str]:
    table = dataset.to_table(columns=["doc_id", "content_hash"])
    return dict(zip(table["doc_id"].to_pylist(), table["content_hash"].to_pylist(), strict=True))


def _stored_identity(dataset: Any) -> dict[str, Any]:
    return json.loads((dataset.schema.metadata or {}).get(b"identity", b"{}"))


def _check_identity(path: Path, checkpoint: int, *, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    differing = sorted(key for key in stored.keys() | expected.keys() if stored.get(key) != expected.get(key))
    if differing:
        listed = "; ".join(f"{key}: expected {_short(expected.get(key))}, got {_short(stored.get(key))}" for key in differing)
        raise ValueError(
            f"{path}: rows made with other {', '.join(differing)} ({listed}); "
            f"run `dvc repro gradients@{checkpoint}` to make rows that fit"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# damage, versions and left-overs


@contextlib.contextmanager
def _readable(path: Path, checkpoint: int) -> Iterator[None]:
    """Make Lance's error of a file that it cannot read one that says what to do; what the system refuses is no damage."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        system = re.search(r"\(os error (\d+)\)", str(error))
        if system and int(system.group(1)) != errno.ENOENT:
            raise
        reason = re.sub(r"External error: |LanceError\(\w+\): |, /\S+\.rs:\d+:\d+", "", str(error).partition("\n")[0])
        raise ValueError(
            f"{path} is damaged: its rows cannot be read ({reason}); delete {path} and run "
            f"`dvc repro --single-item --force gradients@{checkpoint}`"
        ) from error


@contextlib.contextmanager
def _clear_when_full(store: Path, name: str, dataset: Any = None) -> Iterator[None]:
    """Make Lance's error of a full disk one that says what to do, and remove the unfinished files."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        code = next((code for code in FULL if f"(os error {code})" in str(error)), None)
        if code is None:
            raise
        if dataset is not None:
            with contextlib.suppress(OSError, RuntimeError):
                _clean(dataset)
        raise OSError(
            code,
            f"no space left while writing {store}/{name}; the rows committed before are safe: "
            "free some space and run the same command again",
        ) from error


def _clean(dataset: Any) -> None:
    """Remove unfinished files and untagged versions but the latest; only the one writer may."""
    dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False)


def _doubles(dataset: Any) -> list[str]:
    """Documents with several rows: only two writers at once could make them; all go, and are computed again."""
    counts = dataset.to_table(columns=["doc_id"])["doc_id"].value_counts()
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()


def _is_table(path: Path) -> bool:
    """Whether a version was ever committed there; a kill can leave a folder without."""
    return any(path.glob("_versions/*.manifest"))


def table_path(store: Path, name: str) -> Path:
    """Where LanceDB keeps table `name`."""
    return store / f"{name}.lance"


def sketch_path(store: Path, name: str, tag: str) -> Path:
    """Where the sketch of a tag of table `name` is kept (`sketch.py`)."""
    return store / f"{name}.{tag}.sketch"


def _sketches(store: Path, name: str, *, keep_tags: Iterable[str] = ()) -> list[Path]:
    kept = {sketch_path(store, name, tag) for tag in keep_tags}
    return [path for path in store.glob(f"{name}.*.sketch") if path not in kept]


def _remove_files(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink()


def table_names(store: Path) -> list[str]:
    """Names of the gradient tables in `store`."""
    return sorted(path.stem for path in store.glob("gradients_*_*.lance"))


def table_checkpoint(name: str) -> int:
    """The checkpoint whose rows table `name` has."""
    return int(name.split("_")[1])


def drop_table(store: Path, name: str, *, dry_run: bool) -> int:
    """Bytes freed by removing table `name`."""
    sketches = _sketches(store, name)
    num_bytes = _folder_bytes(table_path(store, name)) + _bytes(sketches)
    if not dry_run:
        _remove_files(sketches)
        shutil.rmtree(table_path(store, name))
    return num_bytes


def prune(store: Path, name: str, *, keep_tags: set[str], dry_run: bool) -> tuple[list[str], int]:
    """Tags of table `name` that are not in `keep_tags`, and bytes freed by removing them.

    Untagged versions go too, but the latest. A dry run counts the vectors' files alone, which is nearly all.
    """
    import lance

    path = table_path(store, name)
    dataset = lance.dataset(path)
    tags = set(dataset.tags.list())
    stale = sorted(tags - keep_tags)
    sketches = _sketches(store, name, keep_tags=keep_tags)
    of_sketches = _bytes(sketches)
    if dry_run:
        used = _data_files(dataset).union(*(_data_files(lance.dataset(path, version=tag)) for tag in keep_tags & tags))
        return stale, of_sketches + _bytes(file for file in path.glob("data/*") if file.name not in used)
    before = _folder_bytes(path)
    for tag in stale:
        dataset.tags.delete(tag)
    _clean(dataset)
    _remove_files(sketches)
    return stale, of_sketches + before - _folder_bytes(path)


def _data_files(dataset: Any) -> set[str]:
    return {Path(file.path).name for fragment in dataset.get_fragments() for file in fragment.data_files()}


def _folder_bytes(path: Path) -> int:
    return _bytes(file for file in path.rglob("*") if file.is_file())


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
