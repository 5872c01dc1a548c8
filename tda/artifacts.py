"""Files between stages: where each is, and reading and writing them, whole or not at all.

Everything is written to `NAME.part` and renamed when it is whole, so a file that has its name is complete.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the system's numbers for a disk that is full
PROBE_BYTES = 1 << 16  # more than fits into a file's last block
MEAN_FILE = "mean.safetensors"  # in a checkpoint's folder: the mean weights at which it is attributed


@dataclass(frozen=True)
class Workspace:
    """Where every artifact is, below `root`. Nothing else knows file names."""

    root: Path = Path()

    def _at(self, *parts: str) -> Path:
        return self.root.joinpath("data", *parts)

    # prepare
    @property
    def documents(self) -> Path:
        """Training documents, a row each (columns: tda/README.md)."""
        return self._at("prepare", "documents.parquet")

    @property
    def targets(self) -> Path:
        """Target documents of both halves (column `half`: score or verdict)."""
        return self._at("prepare", "targets.parquet")

    @property
    def heldout(self) -> Path:
        """General documents that nothing is trained on."""
        return self._at("prepare", "heldout.parquet")

    @property
    def tokenizer(self) -> Path:
        """Tokenizer, as `save_pretrained` leaves it."""
        return self._at("prepare", "tokenizer")

    @property
    def preparation(self) -> Path:
        """Counts of `prepare` (JSON)."""
        return self._at("prepare", "prepare.json")

    @property
    def quarantine(self) -> Path:
        """Malformed rows with line number and reason (JSON lines)."""
        return self._at("prepare", "quarantine.jsonl")

    @property
    def damage(self) -> Path:
        """Which documents were damaged, and how. Only `evaluation` may read it."""
        return self._at("truth", "damage.parquet")

    # train
    @property
    def training(self) -> Path:
        """Recipe, sizes and checkpoint list of the run (JSON)."""
        return self._at("train", "train.json")

    @property
    def trajectory(self) -> Path:
        """A row per optimizer step (columns: tda/README.md)."""
        return self._at("train", "trajectory.parquet")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints 0, 1, ..."""
        return self._at("train", "checkpoints")

    def checkpoint(self, index: int) -> Path:
        """One checkpoint: `model/` by `save_pretrained`, `mean.safetensors`, `optimizer.safetensors`, `state.json`."""
        return self.checkpoints / str(index)

    # segments
    @property
    def segments(self) -> Path:
        """The segments (JSON)."""
        return self._at("segments", "segments.json")

    @property
    def exposure(self) -> Path:
        """How much of each segment's learning rate every document received."""
        return self._at("segments", "exposure.parquet")

    # curvature, gradients
    def curvature(self, segment: int) -> Path:
        """EK-FAC factors of one segment (safetensors)."""
        return self._at("curvature", f"{segment}.safetensors")

    def gradients(self, checkpoint: int) -> Path:
        """Manifest of one checkpoint's rows in the store (JSON): table, tag, rows, digest, fingerprint."""
        return self._at("gradients", f"{checkpoint}.json")

    @property
    def store(self) -> Path:
        """The LanceDB folder. Not versioned; the manifests are."""
        return self._at("store")

    def profile(self, stage: str) -> Path:
        """Folder of the profile of a stage, or of a part of it (`curvature-0`): `trace.json.gz`, `table.txt`. Not versioned."""
        return self._at("profile", stage)

    # scores, curation
    @property
    def scores(self) -> Path:
        """A row per training document: doc_id, content_hash, source, score_METHOD for every method."""
        return self._at("scores", "scores.parquet")

    @property
    def query_scores(self) -> Path:
        """SOURCE per query: doc_id and `scores`, an array over the scoring half of the targets."""
        return self._at("scores", "query_scores.parquet")

    @property
    def scoring(self) -> Path:
        """Query ids, units, diagnostics of `scores` (JSON)."""
        return self._at("scores", "scores.json")

    @property
    def manifest(self) -> Path:
        """The decision: doc_id, content_hash, source, score, rank, keep, weight, reason."""
        return self._at("curation", "manifest.parquet")

    @property
    def curated(self) -> Path:
        """The curated documents (Parquet)."""
        return self._at("curation", "curated.parquet")

    @property
    def curated_jsonl(self) -> Path:
        """The curated documents (JSON lines)."""
        return self._at("curation", "curated.jsonl")

    @property
    def curation(self) -> Path:
        """Counts of the decision (JSON)."""
        return self._at("curation", "curation.json")

    # retraining, evaluation, report, audit
    @property
    def retraining(self) -> Path:
        """A row per retrained model (columns: tda/README.md)."""
        return self._at("retraining", "runs.parquet")

    @property
    def verdict(self) -> Path:
        """The verdict with its paired differences and intervals (JSON)."""
        return self._at("evaluation", "verdict.json")

    @property
    def summary(self) -> Path:
        """The few metrics that `dvc metrics show` prints (JSON)."""
        return self._at("evaluation", "summary.json")

    @property
    def metrics(self) -> Path:
        """All metrics (JSON)."""
        return self._at("evaluation", "metrics.json")

    @property
    def plots(self) -> Path:
        """Folder of CSV files that `dvc plots` shows."""
        return self._at("evaluation", "plots")

    @property
    def report(self) -> Path:
        """The page."""
        return self._at("report", "index.html")

    @property
    def audits(self) -> Path:
        """Folder of dated audits with their history."""
        return self._at("audit")

    @property
    def work(self) -> Path:
        """Unfinished work that a killed stage left to be resumed. Not versioned."""
        return self._at("work")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield `NAME.part` beside `path` (a file or a folder), and rename it to `path` if the block succeeds.

    On an error the part is removed, and whatever is at `path` stays as it was.

    Raises:
        OSError: the disk is full; the message says so and what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    remove(part)
    try:
        yield part
        if path.is_dir():
            remove(path)
        part.replace(path)
    except Exception as error:
        code = _full_disk(error, part)
        remove(part)
        if code:
            raise OSError(
                code, f"no space left while writing {path}; nothing was lost: free some space and run the same command again"
            ) from error
        raise
    except BaseException:
        remove(part)
        raise


def _full_disk(error: Exception, part: Path) -> int:
    """The system's error number if `error` comes from a full disk, else 0.

    Libraries in other languages give the number only in their message, or not at all; then another write to the file shows it.
    """
    named = re.search(r"os error (\d+)", str(error))
    code = (error.errno if isinstance(error, OSError) else None) or (int(named[1]) if named else 0)
    if not code and part.is_file():
        try:
            with part.open("ab", buffering=0) as file:
                file.write(bytes(PROBE_BYTES))
        except OSError as refused:
            code = refused.errno or 0
    return code if code in FULL else 0


def remove(path: Path) -> None:
    """Remove a file or folder if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` with sorted keys, so that equal values give equal bytes."""
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


class _LackingError(KeyError, ValueError):
    """A key that a file lacks. Unlike a KeyError, its message is printed without quotes."""

    __str__ = ValueError.__str__


class _Object(dict):
    """An object of a JSON file; the error for a missing key names the file."""

    def __init__(self, values: dict, *, path: Path, stage: str):
        super().__init__(values)
        self._path, self._stage = path, stage

    def __missing__(self, key: str) -> Any:
        raise _LackingError(damaged(self._path, ValueError(f"it has no {key}"), stage=self._stage))


def read_json(path: Path, *, stage: str) -> Any:
    """The object in `path`, which `stage` makes.

    Raises:
        ValueError: the file is damaged. Looking up a key that it lacks raises one too.
    """
    try:
        value = json.loads(
            existing(path, stage=stage).read_text(encoding="utf-8"),
            object_hook=functools.partial(_Object, path=path, stage=stage),
        )
        if not isinstance(value, dict):
            raise ValueError(f"it is no object but {type(value).__name__}")
    except ValueError as error:
        raise ValueError(damaged(path, error, stage=stage)) from error
    return value


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Write `table` as Parquet; equal tables give equal bytes."""
    with whole(path) as part:
        table.write_parquet(part, compression="zstd", statistics=False)


def read_table(path: Path, *, stage: str, columns: list[str] | None = None) -> pl.DataFrame:
    """The table in `path`, which `stage` makes.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return pl.read_parquet(existing(path, stage=stage), columns=columns)
    except pl.exceptions.PolarsError as error:
        raise ValueError(damaged(path, error, stage=stage)) from error


def damaged(path: Path, error: Exception, *, stage: str) -> str:
    """The message for a file, made by `stage`, that cannot be read."""
    return (
        f"{path} cannot be read: {str(error).splitlines()[0]}; expected the whole file that stage {stage} wrote; run "
        f"`dvc checkout --force {path}`, or `dvc repro --single-item --force {stage}`"
    )


def existing(path: Path, *, stage: str) -> Path:
    """`path`, if it exists.

    Raises:
        FileNotFoundError: it does not; the message names the stage that makes it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; stage {stage} makes it: run `dvc repro {stage}`")
    return path


@contextlib.contextmanager
def one_after_another(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for the block, after whoever holds it now."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def only_run(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for the block; a second run at the same time is refused.

    Raises:
        RuntimeError: another process holds it; the message gives its number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise RuntimeError(f"{path}: process {holder} is doing this already; wait until it ends, or stop it") from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield
