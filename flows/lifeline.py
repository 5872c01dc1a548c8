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


def _end_group(number: int, frame: object) -> None:
    """Ask the other processes of the group to stop, after which `dvc` ends by itself; kill what has not stopped in time.

    Only once: the system may signal the end of each of the parent's threads, and a second request would interrupt the first.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    kill = threading.Timer(GRACE_SECONDS, os.killpg, (0, signal.SIGKILL))
    kill.daemon = True
    kill.start()


def _run_dvc(parent: int, arguments: list[str]) -> int:
    """DVC's exit code."""
    signal.signal(signal.SIGHUP, _end_group)
    end_with(parent, signal.SIGHUP)
    from dvc.cli import main

    return main(arguments)


if __name__ == "__main__":
    sys.exit(_run_dvc(int(sys.argv[1]), sys.argv[2:]))
