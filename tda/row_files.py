"""Stored vectors read straight from Lance's files, where they lie one after the other.

Lance's own reads copy each byte several times and take a core's whole time at about 1 GB/s, a plain read a fraction of it
(benchmarks/scores_from_the_store.py). Where a file is laid out otherwise there are no extents, and Lance reads as before.

Rows that memory has no room to keep are read past the system's cache of files (O_DIRECT of open(2)), which takes a third of the
processor time or less, and leaves in the cache what else is there.
"""

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tda.usage import free_memory

DISK_BLOCK = 4096  # bytes; reads past the cache begin and end at multiples of it, in the file and in memory, whatever the disk


@dataclass(frozen=True)
class Extent:
    """Rows of a table whose vectors are next to each other in a file."""

    path: Path
    offset: int  # of the first vector, in bytes
    first: int  # place of the first row in the table
    num_rows: int


class RowFiles:
    """The files of `extents`, which are in the order of the table and without gaps; a context manager."""

    def __init__(self, extents: Sequence[Extent], *, row_bytes: int):
        self._extents = extents
        self._row_bytes = row_bytes
        self._firsts = np.array([extent.first for extent in extents])
        self._past_cache = row_bytes * sum(extent.num_rows for extent in extents) > free_memory()
        self._files: dict[Path, int] = {}
        self._held = threading.local()  # blocks of the disk, of each thread that reads

    def __enter__(self) -> "RowFiles":
        for path in {extent.path for extent in self._extents}:
            self._files[path] = self._open(path)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def __bool__(self) -> bool:
        return bool(self._extents)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (rows, bytes of a row) with the vectors of the rows from place `start` on; any number of threads may.

        A file that ends before the rows do is refused with OSError.
        """
        done = 0
        while done < len(out):
            extent = self._extents[np.searchsorted(self._firsts, start + done, side="right") - 1]
            inside = start + done - extent.first
            rows = min(extent.num_rows - inside, len(out) - done)
            self._read_whole(extent, inside * self._row_bytes, out[done : done + rows])
            done += rows

    def _open(self, path: Path) -> int:
        if self._past_cache:
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._past_cache = False  # a file system that has no such reads
        return os.open(path, os.O_RDONLY)

    def _read_whole(self, extent: Extent, offset: int, rows: np.ndarray) -> None:
        start, into = extent.offset + offset, memoryview(rows).cast("B")
        in_blocks = all(place % DISK_BLOCK == 0 for place in (start, len(into), rows.ctypes.data))
        if in_blocks or not self._past_cache:
            self._read(extent.path, start, into, needed=len(into))
            return
        before = start % DISK_BLOCK
        needed = before + len(into)
        blocks = self._blocks(-(-needed // DISK_BLOCK) * DISK_BLOCK)
        self._read(extent.path, start - before, blocks, needed=needed)
        into[:] = blocks[before:needed]

    def _blocks(self, num_bytes: int) -> memoryview:
        """So many bytes that begin at a page, as reads past the cache want them."""
        if len(getattr(self._held, "blocks", b"")) < num_bytes:
            self._held.blocks = mmap.mmap(-1, num_bytes)
        return memoryview(self._held.blocks)[:num_bytes]

    def _read(self, path: Path, start: int, into: memoryview, *, needed: int) -> None:
        """At least the first `needed` bytes of `into`, from byte `start` of the file."""
        read = 0
        while read < needed:
            got = os.preadv(self._files[path], [into[read:]], start + read)
            if not got:
                raise OSError(f"{path} ends at byte {start + read}, inside a row; run `tda verify`")
            read += got
