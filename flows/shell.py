"""Flows started from a shell: Ctrl-C ends the flow, its stages and Prefect's temporary server within seconds, with one line."""

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from flows.lifeline import GRACE_SECONDS, end_with
from tda.cli import FAILED, INTERRUPTED, OK, TERMINATED

if TYPE_CHECKING:
    from prefect.states import State

STOP_SECONDS = GRACE_SECONDS + 5  # for the stages to stop and Prefect to record it; then the flow is killed
LAST_WATCH = 'read -r _; kill -s KILL -- "-$0"'  # the read ends once nobody holds the other end of the pipe


def supervise(name: str) -> None:
    """Fork: returns in a child process, in which the flow is to run, while this process waits for it and exits with its code.

    Call it before anything heavy is imported, so that an interrupt finds no half-loaded module. The flow gets a session of its
    own. So a terminal's Ctrl-C reaches only this process, and Prefect's server lives long enough to be told how the run ended.
    The flow could not handle Ctrl-C itself: polars takes over SIGINT, which then does not wake a main thread that waits for its
    tasks. If both processes are killed, a shell with another name and session ends what they leave behind: the server.
    """
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    watched, held = os.pipe()  # held by the flow and by this process, and by nothing that they start
    flow = os.fork()
    if flow == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _leave)
        signal.signal(signal.SIGUSR1, _stop_quietly)
        end_with(parent, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        return
    nowhere = subprocess.DEVNULL
    watch = subprocess.Popen(
        ["sh", "-c", LAST_WATCH, str(flow)], stdin=watched, stdout=nowhere, stderr=nowhere, start_new_session=True
    )
    code = _exit_code(name, flow)
    os.close(held)
    watch.wait()
    sys.exit(code)


def exit_code(name: str, state: "State") -> int:
    """0 of a flow that ended well; else what went wrong is said in one line, below Prefect's log of it."""
    if state.is_completed():
        return OK
    print(f"{name}: {state.result(raise_on_failure=False)}", file=sys.stderr)
    return FAILED


def _leave(number: int, frame: object) -> None:
    """Exit on SIGTERM. While a flow runs, Prefect has a handler of its own, which calls this one at its end."""
    raise SystemExit(TERMINATED)


def _stop_quietly(number: int, frame: object) -> None:
    """Stop the flow without output: the user knows that it ends, and need not read what each of its tasks says about it.

    One signal asks for both. If two came together, the system could deliver the second to another thread, and the main thread,
    which alone runs handlers, would sleep on.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    signal.raise_signal(signal.SIGTERM)


def _exit_code(name: str, flow: int) -> int:
    """The exit code of the process `flow`, or `INTERRUPTED`. A second request to stop kills it, and so does a slow stop."""
    asked = []

    def stop(number: int, frame: object) -> None:
        if asked:
            _kill(flow)
        else:
            os.kill(flow, signal.SIGUSR1)
            signal.alarm(STOP_SECONDS)
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    os.waitid(os.P_PID, flow, os.WEXITED | os.WNOWAIT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    _kill(flow)  # what it left: the server, if it was killed
    code = os.waitstatus_to_exitcode(os.waitpid(flow, 0)[1])
    if asked:
        print(f"{name}: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    if code < 0:
        print(f"{name}: killed by {signal.Signals(-code).name}; run the same command again to go on", file=sys.stderr)
        return 128 - code
    return code


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
