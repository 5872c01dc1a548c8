"""Results on their way from the device to a thread that writes them, while the next are computed.

A result is copied into one of a ring of host buffers, page-locked if the device is a GPU. Only the writing thread waits for
that copy; the thread that computes never waits for the device. On a CPU the same code runs with plain memory.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
Copy = Callable[[Tensor, Tensor], object]  # (target, source): starts a copy between host and device

AHEAD = 1  # items that may wait while one is consumed and another is made
BUFFERS = AHEAD + 2  # so that the buffer being filled is neither waiting nor being consumed
CHECK_SECONDS = 0.2  # how often the producer checks whether the consumer has failed


def start_copy(target: Tensor, source: Tensor) -> None:
    """Copy without waiting, if one side is a GPU and the other is page-locked."""
    target.copy_(source, non_blocking=True)


def to_device(values: Tensor, device: torch.device, *, copy: Copy = start_copy) -> Tensor:
    """Host `values` on `device`, by one copy that is not waited for; no copy if they are there already.

    Tests give a `copy` of their own, to see even on a CPU what a GPU would be sent.
    """
    if device.type == values.device.type and copy is start_copy:
        return values
    target = torch.empty(values.shape, dtype=values.dtype, device=device)
    copy(target, values.pin_memory() if device.type == "cuda" else values)
    return target


@dataclass(frozen=True)
class Arriving:
    """A buffer that is being filled."""

    buffer: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> np.ndarray:
        """Waits for the values and returns them; they are valid until `BUFFERS` more have been fetched."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.buffer.numpy()


class HostBuffers:
    """A ring of host buffers of `rows` by `columns`, which are filled in turn."""

    def __init__(self, rows: int, columns: int, *, device: torch.device, copy: Copy = start_copy):
        self._on_gpu = device.type == "cuda"
        self._ring = itertools.cycle([torch.empty(rows, columns, pin_memory=self._on_gpu) for _ in range(BUFFERS)])
        self._copy = copy

    def fetch(self, values: Tensor) -> Arriving:
        """Start the one copy of `values` (at most `rows` of them, in float32) into the next buffer."""
        buffer = next(self._ring)[: len(values)]
        self._copy(buffer, values)
        if not self._on_gpu:
            return Arriving(buffer, None)
        arrived = torch.cuda.Event()
        arrived.record()
        return Arriving(buffer, arrived)


class AbandonedError(RuntimeError):
    """Raised in a consumer in place of the next item, if making that failed or was interrupted."""


def in_background(consume: Callable[[Iterator[Item]], Result], items: Iterable[Item]) -> Result:
    """Run `consume(items)` in a thread of its own, while this thread makes the items; returns what `consume` returns.

    An error on either side ends both and is raised here. If making an item fails, `consume` gets an `AbandonedError`.
    """
    waiting: queue.Queue = queue.Queue(AHEAD)
    outcome: dict[str, Any] = {}

    def arriving() -> Iterator[Item]:
        while True:
            kind, item = waiting.get()
            if kind == "end":
                return
            if kind == "abandoned":
                raise AbandonedError("the rest is not coming")
            yield item

    def work() -> None:
        try:
            outcome["result"] = consume(arriving())
        except BaseException as error:
            outcome["error"] = error

    def hand_over(kind: str, item: Item | None = None) -> None:
        while consumer.is_alive():
            try:
                waiting.put((kind, item), timeout=CHECK_SECONDS)
                return
            except queue.Full:
                continue

    consumer = threading.Thread(target=work, name="writer", daemon=True)
    consumer.start()
    try:
        for item in items:
            hand_over("item", item)
            if not consumer.is_alive():
                break
        hand_over("end")
    except BaseException:
        hand_over("abandoned")
        consumer.join()
        raise
    consumer.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
