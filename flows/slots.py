"""Slots for the parts of a stage that run side by side: one GPU each, or a share of the cores.

A stage without parts has the whole machine. The parts of `gradients` and `curvature` run at the same time, as many as there are
slots; a part learns its slot from environment variables, which the compute code reads.
"""

import contextlib
import os
import queue
import subprocess
from collections.abc import Iterator

from tda.config import Compute


class Slots:
    """A queue of environments, one for each slot."""

    def __init__(self, environments: list[dict[str, str]]):
        self._free = queue.SimpleQueue()
        for environment in environments:
            self._free.put(environment)

    @contextlib.contextmanager
    def one(self) -> Iterator[dict[str, str]]:
        """Wait for a slot, and hold it for the block."""
        environment = self._free.get()
        try:
            yield environment
        finally:
            self._free.put(environment)


def environments(num_parts: int, compute: Compute) -> list[dict[str, str]]:
    """The slots for `num_parts` parts on this machine; together they have as many workers as `compute.workers` allows."""
    gpus = [] if compute.device == "cpu" else visible_gpus()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    workers = compute.workers or len(os.sched_getaffinity(0))
    places = max(1, min(workers, num_parts))
    return [{"TDA_WORKERS": str(workers // places)}] * places


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    if (allowed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in allowed.split(",") if gpu not in {"", "-1"}]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(listed)


def parse_gpus(listed: str) -> list[str]:
    """The ids in the output of `nvidia-smi --list-gpus`; of a GPU that is divided (MIG), those of its divisions."""
    ids = [line.rpartition("UUID: ")[2].rstrip(") ") for line in listed.splitlines() if "UUID: " in line]
    return [name for name in ids if name.startswith("MIG-")] or ids
