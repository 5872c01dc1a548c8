"""Rows of a user's files, with their places: JSON lines, CSV, Parquet, saved data sets, the Hugging Face hub.

JSON lines and CSV may be compressed (.gz). A folder is a data set saved by `datasets`, or all files of these kinds and all such
data sets in it and its sub-folders, hidden ones left out. The hub is `hub:ID` or `hub:ID:CONFIGURATION`. What cannot be read
as a row comes as `Malformed` in its place.
"""

import csv
import gzip
import itertools
import json
import zlib
from collections import deque
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".csv.gz")
MAX_LINE = 64 * 2**20  # bytes of a line of JSON, characters of a field of CSV
EXCERPT = 200  # characters of a malformed row that are kept
ROWS_AT_ONCE = 1024  # of Parquet
PIECE = 4096  # bytes of a packed file
GZIP = 31  # zlib's number of the format


class Malformed(NamedTuple):
    """A row that cannot be read, with the reason and its beginning."""

    reason: str
    excerpt: str = ""


class Row(NamedTuple):
    """A row and its place; `line` counts from 1: the row's first line in a text file, rows of a table."""

    file: str  # below the location, if that is a folder
    line: int
    value: Any  # a dict of the row's fields, if all is well


def rows(location: str, *, split: str) -> Iterator[Row]:
    """All rows at `location`, in order. Raises FileNotFoundError or ValueError if there is nothing that can be read."""
    if location.startswith("hub:"):
        return _hub(location, split=split)
    path = Path(location)
    if not path.exists():
        raise FileNotFoundError(
            f"{location} does not exist: expected builtin:python, a file, a folder or hub:<data set id>; correct the path"
        )
    if path.is_file():
        return _file(path)
    if _is_saved_data_set(path):
        return _saved_data_set(path, split=split)
    found = [one for one in _below(path) if _is_known(one)]
    if not found:
        raise ValueError(
            f"{location}: nothing to read in this folder: expected files ending in {', '.join(SUFFIXES)}, or a data set saved by "
            "`datasets` (save_to_disk); name the right folder or convert the files"
        )
    return (row._replace(file=one.relative_to(path).as_posix()) for one in found for row in rows(str(one), split=split))


def not_read(location: str) -> list[str]:
    """Names of the files in a folder that `rows` passes over because they are of no known kind."""
    path = Path(location)
    if not path.is_dir() or _is_saved_data_set(path):
        return []
    return [one.relative_to(path).as_posix() for one in _below(path) if not _is_known(one)]


def _below(folder: Path) -> Iterator[Path]:
    """Files and saved data sets in a folder and its sub-folders, in order of their names, hidden ones left out."""
    around = {folder.resolve(), *folder.resolve().parents}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.resolve() in around:  # a link back would never end
            continue
        if path.is_dir() and not _is_saved_data_set(path):
            yield from _below(path)
        else:
            yield path


def _is_known(path: Path) -> bool:
    return path.is_dir() or path.name.endswith(SUFFIXES)


def _is_saved_data_set(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json", "dataset_info.json"))


def stem(name: str) -> str:
    """The name of a file or data set without suffixes; the source of rows that name none."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return name


def _file(path: Path) -> Iterator[Row]:
    if not path.name.endswith(SUFFIXES):
        raise ValueError(
            f"{path} is of no known kind: expected {', '.join(SUFFIXES)}; got {path.suffix or 'no suffix'}; convert it"
        )
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from _parquet(path)
        return
    read = _csv if name.endswith(".csv") else _json_lines
    try:
        with _opened(path) as stream:
            for line, value in read(stream):
                yield Row(path.name, line, value)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}; expected a whole gzip file; copy it again") from error
    except csv.Error as error:  # of a row below the header it is put aside
        raise ValueError(
            f"{path}: line 1 is not CSV: {error}; expected the names of the columns, separated by commas; mend its quotes"
        ) from error


def _opened(path: Path) -> BufferedIOBase:
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")


def neighbouring_form(path: Path) -> str:
    """What a text file whose rows cannot be read seems to be instead, and what was expected; empty if nothing is to be said."""
    if not path.is_file() or not path.name.endswith(SUFFIXES) or path.name.endswith(".parquet"):
        return ""
    with _opened(path) as stream:
        head = stream.read(PIECE).removeprefix(b"\xef\xbb\xbf").lstrip(b" \r\n")
    if not path.name.removesuffix(".gz").endswith(".csv"):
        return "seems to be one JSON array: expected one object a line; write it so" if head.startswith(b"[") else ""
    header = head.partition(b"\n")[0]
    for name, separator in (("semicolons", b";"), ("tabs", b"\t")):
        if separator in header and b"," not in header:
            return f"seems to separate its columns by {name}: expected commas; write it so"
    return ""


def share_of_bytes(path: Path, number: int) -> float:
    """The share of a text file that its first `number` rows take, of its packed bytes if it is packed."""
    read = _csv if path.name.removesuffix(".gz").endswith(".csv") else _json_lines
    with _opened(path) as stream:
        for _ in itertools.islice(read(stream), number):
            pass
        end = stream.tell()
    return (_packed(path, end) if path.name.endswith(".gz") else end) / path.stat().st_size


def _packed(path: Path, num_bytes: int) -> float:
    """Packed bytes that the first `num_bytes` of a gzip file's content take."""
    unpacker, unpacked = zlib.decompressobj(wbits=GZIP), 0
    with path.open("rb") as file:
        while unpacked < num_bytes and (piece := file.read(PIECE)):
            while piece:
                unpacked += len(unpacker.decompress(piece))
                piece = unpacker.unused_data.lstrip(b"\0")  # the next of several members, or padding
                if unpacker.eof:
                    unpacker = zlib.decompressobj(wbits=GZIP)
        return file.tell() * min(1.0, num_bytes / max(1, unpacked))


def _json_lines(stream: BufferedIOBase) -> Iterator[tuple[int, Any]]:
    line = 0
    while raw := stream.readline(MAX_LINE + 1):
        line += 1
        if len(raw) > MAX_LINE:
            excerpt = _decoded(raw)
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_LINE)
            yield line, Malformed("line too long", excerpt)
        elif raw.strip(b"\xef\xbb\xbf \t\r\n"):
            yield line, _json(raw)


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Malformed("not UTF-8", _decoded(raw))
    except (ValueError, RecursionError):
        return Malformed("not JSON", _decoded(raw))


def _decoded(raw: bytes) -> str:
    return raw[:EXCERPT].strip().decode("utf-8", "backslashreplace")


def _csv(stream: BufferedIOBase) -> Iterator[tuple[int, Any]]:
    """Rows below the header; the line is the row's first. Bytes that are not UTF-8 become surrogates, refused later.

    Of a row that is not CSV, as one whose quote is never closed, the first line is put aside, and the next ones are read again:
    else an open quote would take the rows below it along.
    """
    limit = csv.field_size_limit(MAX_LINE)
    lines = _Lines(stream)
    try:
        reader = csv.reader(lines, strict=True)
        header = [name.removeprefix("\ufeff") for name in next(reader, [])]
        while True:
            line = lines.start_row()
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, Malformed("not CSV", f"{error}: {_decoded(lines.row[0])}")
                lines.read_again_from_second()
                reader = csv.reader(lines, strict=True)
                continue
            if values and len(values) != len(header):
                yield line, Malformed("not as many columns as the header", str(values)[:EXCERPT])
            elif values:
                yield line, dict(zip(header, values, strict=True))
    finally:
        csv.field_size_limit(limit)


class _Lines:
    """The lines of a stream as text; those of the row that is being read are kept, so that they can be read again."""

    def __init__(self, stream: BufferedIOBase):
        self.row: list[bytes] = []
        self._stream, self._again, self._before = stream, deque(), 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        raw = self._again.popleft() if self._again else self._stream.readline()
        if not raw:
            raise StopIteration
        self.row.append(raw)
        return raw.decode("utf-8", "surrogateescape")

    def start_row(self) -> int:
        """Let a row begin here; the number of its first line, from 1."""
        self._before += len(self.row)
        self.row.clear()
        return self._before + 1

    def read_again_from_second(self) -> None:
        """Give all lines of the row but the first once more."""
        self._again.extendleft(reversed(self.row[1:]))
        del self.row[1:]


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                for place in range(batch.num_rows):
                    line += 1
                    yield Row(path.name, line, _arrow_row(batch, place))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected a whole Parquet file; write or copy it again") from error


def _arrow_row(batch: Any, place: int) -> Any:
    try:
        return {name: column[place].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:
        return Malformed("not UTF-8", _decoded(error.object))
    except (ValueError, OverflowError) as error:
        return Malformed("a value cannot be read", str(error)[:EXCERPT])


def _saved_data_set(path: Path, *, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be loaded: {error}; expected a folder written by save_to_disk; save it again") from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise ValueError(f"{path} has no split {split!r}: it has {', '.join(found)}; set prepare.split to one of them")
        found = found[split]
    for place, value in enumerate(found):
        yield Row(path.name, place + 1, value)


def _hub(location: str, *, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    name, _, configuration = location.removeprefix("hub:").partition(":")
    try:
        found = load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{location} (split {split!r}) could not be loaded: {type(error).__name__}: {error}; expected a data set that the "
            "Hugging Face hub or its local cache has; where the hub is out of reach, run load_dataset(...).save_to_disk(FOLDER) "
            "on a machine that reaches it, copy the folder, and name it instead of hub:..."
        ) from error
    for place, value in enumerate(found):
        yield Row(Path(name).name, place + 1, value)
