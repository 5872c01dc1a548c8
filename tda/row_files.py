"""Stored vectors read straight from Lance's files, where they lie one after the other.

Lance's own reads copy each byte several times and take a core's whole time at about 1 GB/s, a plain read a fraction of it
(benchmarks/scores_from_the_store.py). Where a file is laid out otherwise there are no extents, and Lance reads as before.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


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
        self._files: dict[Path, int] = {}

    def __enter__(self) -> "RowFiles":
        for extent in self._extents:
            if extent.path not in self._files:
                self._files[extent.path] = os.open(extent.path, os.O_RDONLY)
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
            self._read_whole(extent, inside * self._row_bytes, memoryview(out[done : done + rows]).cast("B"))
            done += rows

    def _read_whole(self, extent: Extent, offset: int, into: memoryview) -> None:
        read = 0
        while read < len(into):
            got = os.preadv(self._files[extent.path], [into[read:]], extent.offset + offset + read)
            if not got:
                raise OSError(f"{extent.path} ends at byte {extent.offset + offset + read}, inside a row; run `tda verify`")
            read += got
