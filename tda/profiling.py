"""Profiling a stage (`--profile`): a Chrome trace, and a table of operators with the share of each kind of work."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tda.artifacts import whole
from tda.parallel import between_pieces
from tda.text_table import text_table

RECORDED_SECONDS = 60.0  # after which recording stops and the stage goes on: a trace takes megabytes per second
OPERATORS = 40  # in the table
KINDS = {  # of work, by the operator's or kernel's name; the first that matches counts
    "attention": r"attention|flash|fmha",
    "matrix products": r"mm\b|mm_|matmul|linear$|gemm|cutlass|bmm|dot$|einsum|xmma",
    "decompositions": r"linalg|eigh|svd|qr\b|cholesky|syevd",
    "copies": r"copy|clone|contiguous|memcpy|_to$|::to$|pin_memory",
    "indexing": r"index|gather|scatter|select|slice|embedding|nonzero|where|masked|cat$|stack",
    "reductions": r"sum|mean|max|min|norm|softmax|argm|sort|cum",
    "memory": r"empty|zeros|ones|fill|zero_|malloc|free|resize|memset",
    "optimizer": r"adam|foreach|optimizer",
    "elementwise": r"add|mul|sub|div|exp|log|sqrt|rsqrt|silu|gelu|sigmoid|tanh|pow|neg|triton|elementwise|where|cos|sin",
}


class _Recording:
    """Torch's profiler, started at once and stopped after `seconds` or with the stage."""

    def __init__(self, seconds: float):
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profiler = profile(activities=activities)
        self.until = time.monotonic() + seconds
        self.profiler.start()
        self.started, self.seconds = time.monotonic(), 0.0

    def stop_when_due(self) -> None:
        if time.monotonic() >= self.until:
            self.stop()

    def stop(self) -> None:
        if not self.seconds:
            self.seconds = time.monotonic() - self.started
            self.profiler.stop()


@contextlib.contextmanager
def profiled(folder: Path, *, seconds: float = RECORDED_SECONDS) -> Iterator[None]:
    """Inside the block torch's profiler records this process; afterwards `trace.json.gz` and `table.txt` lie in `folder`."""
    recording = _Recording(seconds)
    between_pieces.append(recording.stop_when_due)
    try:
        yield
    finally:
        between_pieces.remove(recording.stop_when_due)
        recording.stop()
    events = recording.profiler.key_averages()
    with whole(folder) as part:
        part.mkdir(parents=True)
        recording.profiler.export_chrome_trace(str(part / "trace.json.gz"))
        (part / "table.txt").write_text(render(events, seconds=recording.seconds), encoding="utf-8")


def kind_of(name: str) -> str:
    """The kind of work that an operator or kernel does, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")


def render(events: Any, *, seconds: float) -> str:
    """The table: shares by kind of work, then the operators that took most, by their own time, on the GPU if there is one."""
    on_gpu = any(event.self_device_time_total > 0 for event in events)

    def own(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

    total = sum(map(own, events))
    kinds: dict[str, float] = {}
    for event in events:
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + own(event)
    by_kind = sorted(kinds.items(), key=lambda item: -item[1])
    where = "GPU" if on_gpu else "CPU"
    shares = [(kind, f"{spent:.3f}", f"{spent / max(total, 1e-9):.1%}") for kind, spent in by_kind if spent >= total / 1000]
    operators = [
        (event.key[:60], kind_of(event.key), str(event.count), f"{own(event):.3f}", f"{own(event) / max(total, 1e-9):.1%}")
        for event in sorted(events, key=own, reverse=True)[:OPERATORS]
    ]
    return "\n".join([
        f"{seconds:.1f} s recorded; {total:.1f} s in operators on the {where}, of all threads; seconds of their own:\n",
        text_table(("kind of work", "seconds", "share"), shares),
        "",
        text_table(("operator", "kind of work", "calls", "seconds", "share"), operators),
        "",
    ])
