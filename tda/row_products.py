"""Dot products of stored rows with queries, in one pass over a table: as fast as the disk or the matrix products, the slower one.

    disk -> buffers of stored bytes, READS of them being filled -> products, on a thread per core or on a GPU -> scores

On a GPU the buffers are pinned and the bytes travel as they are stored: a block's copy runs while the block before is multiplied.
"""

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from tda.store import GradientTable
from tda.stored_rows import peaks, unscaled

DEVICE_BLOCK_BYTES = 64 * 2**20  # of stored rows that a GPU multiplies at once: every block reads all queries again
READS = 4  # blocks being read at once; a disk that serves one request at a time idles between them


@dataclass(frozen=True)
class Block:
    """Rows that are multiplied together."""

    places: np.ndarray  # in the table, ascending
    positions: np.ndarray  # of their scores
    scales: np.ndarray


def dot_scores(
    table: GradientTable,
    doc_ids: Sequence[str],
    queries: Float32[np.ndarray, "q dim"],
    *,
    device: torch.device | str = "cpu",
    threads: int = 0,
    arithmetic: Literal["float32", "bfloat16"] = "float32",
) -> Float32[np.ndarray, "n q"]:
    """Dot product of every document's vector with every query, in one pass over the table.

    All matrix products have one shape and run on one thread each, so that a document's scores depend neither on where its row
    lies (a table that was interrupted and resumed gives the same bits) nor on `threads` (0: one per core). In "bfloat16" vectors,
    queries and products are rounded to 8 significant bits, each to within 2^-8 of itself, while sums stay float32: twice as fast
    on processors that have such instructions.

    Raises:
        ValueError: queries of another width, or not finite.
    """
    if queries.shape[1] != table.dim or not np.isfinite(peaks(queries)).all():
        raise ValueError(f"{table.name}: queries of shape {queries.shape}; expected rows of {table.dim} finite numbers")
    device = torch.device(device)
    columns = torch.from_numpy(np.require(queries, requirements="W")).to(device, getattr(torch, arithmetic)).T
    scores = np.empty((len(doc_ids), len(queries)), np.float32)

    def keep(block: Block, products: Tensor) -> None:
        scores[block.positions] = products[: len(block.places)].float().numpy() * block.scales[:, None]

    places, positions = table.places(doc_ids)
    scales = table.column("scale")[places]
    size = table.block_rows if device.type == "cpu" else max(1, DEVICE_BLOCK_BYTES // table.row_bytes)
    slices = [slice(start, start + size) for start in range(0, len(places), size)]
    blocks = [Block(places[part], positions[part], scales[part]) for part in slices]
    run = _on_cpu if device.type == "cpu" else _on_device
    with table.vectors() as read, _one_thread_each():
        run(blocks, read, keep, columns, table, size, threads or len(os.sched_getaffinity(0)))
    return scores


def dot_scores_at(
    table: GradientTable, places: np.ndarray, doc_ids: Sequence[str], queries: Float32[np.ndarray, "q dim"]
) -> Float32[np.ndarray, "n q"]:
    """Dot products with the rows of a few documents, whose places in the table are known.

    Refused with ValueError: other documents are there.
    """
    order = np.argsort(places)
    columns = torch.from_numpy(np.require(queries, requirements="W")).T
    scores = np.empty((len(places), len(queries)), np.float32)
    for start in range(0, len(order), table.block_rows):
        rows = order[start : start + table.block_rows]
        scales, stored = table.rows_at(places[rows], [doc_ids[row] for row in rows.tolist()])
        scores[rows] = (unscaled(stored, torch.empty(len(rows), table.dim)) @ columns).numpy() * scales[:, None]
    return scores


Read = Callable[[np.ndarray, Tensor], None]
Keep = Callable[[Block, Tensor], None]


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Matrix products on one thread each, whichever thread asks for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_cpu(blocks: list[Block], read: Read, keep: Keep, columns: Tensor, table: GradientTable, size: int, threads: int) -> None:
    scratch = threading.local()

    def multiply(block: Block, filled: Future, buffer: Tensor) -> None:
        try:
            filled.result()
            if not hasattr(scratch, "vectors"):
                scratch.vectors = torch.empty(size, table.dim, dtype=columns.dtype)
                scratch.products = torch.empty(size, columns.shape[1], dtype=columns.dtype)
            vectors = buffer if buffer.dtype == columns.dtype else unscaled(buffer, scratch.vectors)
            keep(block, torch.mm(vectors, columns, out=scratch.products))
        finally:
            free.put(buffer)

    free: queue.Queue[Tensor] = queue.Queue()
    for _ in range(min(READS + 2 * threads, len(blocks))):  # read, being multiplied, and waiting for that
        free.put(table.buffer(size))
    with (
        ThreadPoolExecutor(READS) as readers,
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers,
    ):
        pending: deque[Future] = deque()
        for block in blocks:
            buffer = free.get()
            while pending and pending[0].done():
                pending.popleft().result()  # raises what went wrong there
            pending.append(workers.submit(multiply, block, readers.submit(read, block.places, buffer), buffer))
        for multiplied in pending:
            multiplied.result()


def to_device(buffer: Tensor, out: Tensor) -> Tensor:
    """`out`, into which a pinned buffer is being copied; the one place where rows travel to a device."""
    return out.copy_(buffer, non_blocking=True)


def to_host(products: Tensor, out: Tensor) -> Tensor:
    """`out`, pinned, into which products are being copied."""
    return out.copy_(products, non_blocking=True)


class _Slot:
    """A buffer, its copy on the device, and its products there and here."""

    def __init__(self, table: GradientTable, columns: Tensor, size: int):
        device, shape = columns.device, (size, columns.shape[1])
        pinned = device.type == "cuda"
        self.buffer = table.buffer(size, pinned=pinned)
        self.stored = torch.empty_like(self.buffer, device=device)
        self.vectors = torch.empty(size, table.dim, dtype=columns.dtype, device=device)
        self.products = torch.empty(shape, dtype=columns.dtype, device=device)
        self.on_host = torch.empty(shape, dtype=columns.dtype, pin_memory=pinned)
        self.done = torch.cuda.Event() if pinned else None  # the products are on the host, and the buffer may be filled again

    def start(self, columns: Tensor, copies: "torch.cuda.Stream | None") -> None:
        """Begin a block whose bytes are in the buffer; nothing waits."""
        if self.done is None:
            to_device(self.buffer, self.stored)
            self._multiply(columns)
            return
        with torch.cuda.stream(copies):
            to_device(self.buffer, self.stored)
        torch.cuda.current_stream().wait_stream(copies)
        self._multiply(columns)
        self.done.record()

    def _multiply(self, columns: Tensor) -> None:
        vectors = self.stored if self.stored.dtype == columns.dtype else unscaled(self.stored, self.vectors)
        to_host(torch.mm(vectors, columns, out=self.products), self.on_host)

    def finish(self) -> Tensor:
        """The products, once they are on the host."""
        if self.done is not None:
            self.done.synchronize()
        return self.on_host


def _on_device(
    blocks: list[Block], read: Read, keep: Keep, columns: Tensor, table: GradientTable, size: int, _threads: int
) -> None:
    """Each block is one copy of its stored bytes there and one of its products back; the host waits for finished blocks alone.

    While a block is copied the one before it is multiplied, the one before that is taken, and the next ones are read.
    """
    copies = torch.cuda.Stream(columns.device) if columns.device.type == "cuda" else None
    slots = [_Slot(table, columns, size) for _ in range(min(READS + 2, len(blocks)))]
    if copies is not None:
        copies.wait_stream(torch.cuda.current_stream(columns.device))  # which made the slots
    with ThreadPoolExecutor(READS) as readers:

        def fill(number: int) -> Future | None:
            return (
                readers.submit(read, blocks[number].places, slots[number % len(slots)].buffer) if number < len(blocks) else None
            )

        filled = deque(fill(number) for number in range(len(slots)))
        started: deque[int] = deque()

        def take() -> None:
            number = started.popleft()
            keep(blocks[number], slots[number % len(slots)].finish())
            filled.append(fill(number + len(slots)))

        for number in range(len(blocks)):
            filled.popleft().result()
            slots[number % len(slots)].start(columns, copies)
            started.append(number)
            if len(started) == 2:
                take()
        while started:
            take()
