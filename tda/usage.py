"""Processor time and peak memory that a piece of work takes in this process; and the memory that is free."""

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROC = Path("/proc/self")
RESET_PEAK = "5"  # to clear_refs: proc_pid_clear_refs(5)


@dataclass
class Usage:
    """What a piece of work took."""

    cpu_seconds: float = 0.0  # of this process, all its threads
    peak_mib: float = 0.0  # resident memory of the whole process, interpreter and libraries included
    peak_rise_mib: float = 0.0  # how far above where it began


@contextlib.contextmanager
def measured() -> Iterator[Usage]:
    """Measure the block; the result is filled in at its end. Only Linux can reset the peak: elsewhere earlier ones count too."""
    with contextlib.suppress(OSError):
        (PROC / "clear_refs").write_text(RESET_PEAK)
    usage, began, before = Usage(), time.process_time(), _mib("VmRSS")
    yield usage
    usage.cpu_seconds = time.process_time() - began
    usage.peak_mib = _mib("VmHWM")
    usage.peak_rise_mib = max(0.0, usage.peak_mib - before)


def in_turn(parts: Sequence[Usage]) -> Usage:
    """The usage of several pieces of work, done one after the other."""
    return Usage(
        cpu_seconds=sum(part.cpu_seconds for part in parts),
        peak_mib=max(part.peak_mib for part in parts),
        peak_rise_mib=max(part.peak_rise_mib for part in parts),
    )


def free_memory(device: "torch.device | None" = None) -> int:
    """Bytes that processes can still allocate; on a GPU, bytes that this process can."""
    if device is not None and device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return min([available, *left_by_control_groups()])


def memory_rise(action: Callable[[], object], *, device: "torch.device") -> int:
    """The most bytes that `action` allocates on a GPU at once; 0 on any other device, where it cannot be measured."""
    if device.type != "cuda":
        action()
        return 0
    import torch

    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return torch.cuda.max_memory_allocated(device) - before


def left_by_control_groups(root: Path = Path("/")) -> list[int]:
    """Bytes that each control group of this process, such as a container, leaves of its limit (cgroups(7), versions 2 and 1)."""
    left = []
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _number, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                mount = root / "sys/fs/cgroup" / controllers
                inner = Path(path).relative_to("/")
                folders = [mount / inner, *(mount / parent for parent in inner.parents)]
                left += [room for folder in folders if (room := _left(folder, _FILES[controllers])) is not None]
    return left


_FILES = {  # by controller: limit, usage, and the statistic that counts pages of files, which can be evicted
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _left(folder: Path, names: tuple[str, str, str]) -> int | None:
    limit, usage, cached = names
    try:
        allowed = (folder / limit).read_text().strip()
        if allowed == "max":
            return None
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int(allowed) - int((folder / usage).read_text()) + int(statistics.get(cached, 0)))
    except (OSError, ValueError):
        return None


def _mib(field: str) -> float:
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
