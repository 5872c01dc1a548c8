"""What tests ask of processes that they started."""

import time
from collections.abc import Callable
from pathlib import Path

ENOUGH = 240  # seconds for what takes a moment, or a few seconds, on a machine that has nothing else to do


def wait_until(condition: Callable[[], object], seconds: float = ENOUGH) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def processes_with(variable: str) -> dict[int, str]:
    """Number and command line of every process started with `variable`, as in `NAME=value`, in its environment."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (entry / "environ").read_bytes().split(b"\0") and (entry / "cmdline").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found
