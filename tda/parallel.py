"""Work spread over single-threaded processes, with results that do not depend on their number."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from tda.config import Compute

PR_SET_PDEATHSIG = 1  # linux/prctl.h

DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)  # RuntimeErrors that do not mean "this is not supported"

Item = TypeVar("Item")
Result = TypeVar("Result")


def device_of(compute: Compute) -> torch.device:
    """The device that `compute.device` names; "auto" is CUDA if there is any.

    Raises:
        ValueError: CUDA is asked for and absent.
    """
    available = torch.cuda.is_available()
    if compute.device == "cuda" and not available:
        raise ValueError("compute.device: cuda was asked for, but torch finds no CUDA device; set it to auto or cpu")
    return torch.device("cuda" if available and compute.device != "cpu" else "cpu")


@contextlib.contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Inside the block a GPU may multiply float32 in TF32, which keeps 11 of its 24 bits; sums stay float32."""
    before = torch.get_float32_matmul_precision()
    if allowed:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def products_in_tf32(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside the block a GPU multiplies float32 in TF32 if `model` is in bfloat16, every value of which TF32 has too."""
    weight = next(model.parameters())
    return tf32(allowed=weight.dtype == torch.bfloat16 and weight.device.type != "cpu")


def num_workers(compute: Compute) -> int:
    """Processes for work that runs on the device: one for a GPU, else as many as `num_readers`."""
    return 1 if device_of(compute).type == "cuda" else num_readers(compute)


def num_readers(compute: Compute) -> int:
    """Processes for work that always runs on the CPU: `TDA_WORKERS` of the environment, `compute.workers`, or one per core."""
    return int(os.environ.get("TDA_WORKERS", 0)) or compute.workers or len(os.sched_getaffinity(0))


def parallel_map(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int, description: str, unit: str = "part"
) -> Iterator[Result]:
    """`function` of every item, in their order, with a progress bar; see `worker_pool`."""
    with worker_pool(function, workers=min(workers, len(items))) as call:
        yield from call(items, description, unit)


@contextlib.contextmanager
def worker_pool(
    function: Callable[[Item], Result], *, workers: int
) -> Iterator[Callable[[Sequence[Item], str, str], Iterator[Result]]]:
    """Yields `call(items, description, unit)`, which gives `function` of every item, in order, with a progress bar.

    Processes are forked when the block is entered, so `function` may be a closure, and libraries that start threads may be
    loaded afterwards. The first error or interrupt ends the rest at once.
    """
    if not torch.cuda.is_initialized():  # beside a GPU, work on the CPU is rare and large, and may use all cores
        torch.set_num_threads(1)
    if workers <= 1 or "lance" in sys.modules:  # Lance does not survive a fork: once it is loaded, work stays in this process
        yield lambda items, description, unit: _with_bar(map(function, items), len(items), description, unit)
        return
    _inherited["function"] = function
    fork = multiprocessing.get_context("fork")
    with warnings.catch_warnings(), ProcessPoolExecutor(workers, mp_context=fork, initializer=_start_worker) as pool:
        # Python 3.12 warns of fork beside threads; the children run torch on one thread and touch nothing else.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool.submit(os.getpid).result()  # starts every worker

        def call(items: Sequence[Item], description: str, unit: str) -> Iterator[Result]:
            try:
                yield from _with_bar(pool.map(_call, items), len(items), description, unit)
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"{description}: a worker process was killed, most often for want of memory; set compute.workers lower and "
                    "run again"
                ) from error

        processes = list(pool._processes.values())
        try:
            yield call
        except BaseException:
            for process in processes:
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _with_bar(results: Iterable[Result], total: int, description: str, unit: str) -> Iterator[Result]:
    for result in tqdm(results, total=total, desc=description, unit=unit, disable=not progress_is_shown()):
        yield result
        piece_done()


def piece_done() -> None:
    """Tell a running profile that a piece of work is done."""
    for call in between_pieces:
        call()


def progress_is_shown() -> bool:
    """Whether progress bars are drawn: on a terminal, or where `TDA_PROGRESS` is set."""
    return sys.stderr.isatty() or bool(os.environ.get("TDA_PROGRESS"))


between_pieces: list[Callable[[], None]] = []  # called after every piece of work; `profiling` adds itself
_inherited: dict[str, Callable[[Any], Any]] = {}  # what forked workers run; a closure cannot be pickled
_worker = {"at work": False, "asked to stop": False}


def _start_worker() -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed parent leaves no orphans
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_worker)


def _stop_worker(number: int, frame: object) -> None:
    """Unwind the item at hand, so that its half-written files go; half a result on its way would hang the parent."""
    _worker["asked to stop"] = True
    if _worker["at work"]:
        raise SystemExit


def _call(item: Any) -> Any:
    """The function of `item`, or a `BrokenProcessPool`: the executor goes on with the next item whatever is raised."""
    try:
        _worker["at work"] = True
        if _worker["asked to stop"]:
            raise SystemExit
        return _inherited["function"](item)
    except SystemExit:
        raise BrokenProcessPool("asked to stop") from None
    finally:
        _worker["at work"] = False
