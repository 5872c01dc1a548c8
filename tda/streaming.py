"""Numbers on their way from the device to what writes them, while the next are computed.

Nothing here waits for the device but the thread that writes: a copy is started into one of a ring of host buffers, page-locked
where the device is a GPU, and the writer waits for that copy alone. On a CPU the same happens with plain memory.
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

AHEAD = 1  # items that may wait while one is consumed and another made
BUFFERS = AHEAD + 2  # so that the one being filled is neither waiting nor being consumed
CHECK_SECONDS = 0.2  # how often the maker looks whether the consumer has failed


def start_copy(target: Tensor, source: Tensor) -> None:
    """Copy, without waiting where one side is a GPU and the other page-locked."""
    target.copy_(source, non_blocking=True)


def to_device(values: Tensor, device: torch.device, *, copy: Copy = start_copy) -> Tensor:
    """`values` of the host on `device`: one copy, which is not waited for; none where they are there already.

    With a `copy` of its own a caller sees on a CPU too what a GPU would be sent.
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
        """The numbers once they are all there; good until `BUFFERS` more have been fetched."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.buffer.numpy()


class HostBuffers:
    """A ring of host buffers of `rows` by `columns`, filled one after the other."""

    def __init__(self, rows: int, columns: int, *, device: torch.device, copy: Copy = start_copy):
        self._on_gpu = device.type == "cuda"
        self._ring = itertools.cycle([torch.empty(rows, columns, pin_memory=self._on_gpu) for _ in range(BUFFERS)])
        self._copy = copy

    def fetch(self, values: Tensor) -> Arriving:
        """`values` (at most `rows` of them, in float32), on their way into the next buffer: one copy."""
        buffer = next(self._ring)[: len(values)]
        self._copy(buffer, values)
        if not self._on_gpu:
            return Arriving(buffer, None)
        arrived = torch.cuda.Event()
        arrived.record()
        return Arriving(buffer, arrived)


class AbandonedError(RuntimeError):
    """What a consumer meets where the next item should be, when making it has failed or was interrupted."""


def in_background(consume: Callable[[Iterator[Item]], Result], items: Iterable[Item]) -> Result:
    """What `consume` makes of `items`, which it reads in a thread of its own while the next are made in this one.

    An error on either side ends both, and is raised here; the consumer meets an `AbandonedError` if `items` fails.
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
