"""Child processes that end with their parent. Run as a script, it is `dvc`, and ends everything it started if its flow is killed.

It is started by its path, not with `-m`, because it runs in the workspace, where this package may not be importable.
"""

import ctypes
import os
import signal
import sys
import threading

GRACE_SECONDS = 10  # between the request to stop and the kill
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int, number: int) -> None:
    """Ask the system to send this process the signal `number` when the thread of `parent` that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), number)


def _stop(number: int, frame: object) -> None:
    """Stop DVC where it can be: it writes its files in place, and half a file of its locks would fail every later run.

    It ends with its command, or instead of starting one or of waiting for a lock. Only once: the system may signal the end of
    each of the parent's threads, and a second request would interrupt the first.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.addaudithook(_neither_start_nor_wait)
    if number == signal.SIGHUP:  # for this process alone, whereas who sends SIGTERM asks the whole group
        os.killpg(0, signal.SIGTERM)
    kill = threading.Timer(GRACE_SECONDS, os.killpg, (0, signal.SIGKILL))
    kill.daemon = True
    kill.start()


def _neither_start_nor_wait(event: str, arguments: tuple) -> None:
    if event in ("subprocess.Popen", "time.sleep"):
        raise InterruptedError("the flow was stopped")


def _run_dvc(parent: int, arguments: list[str]) -> int:
    """DVC's exit code."""
    end_with(parent, signal.SIGHUP)
    from dvc.cli import main

    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, _stop)
    return main(arguments)


if __name__ == "__main__":
    sys.exit(_run_dvc(int(sys.argv[1]), sys.argv[2:]))
