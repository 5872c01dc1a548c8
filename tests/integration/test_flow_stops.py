"""A flow in a shell is asked to stop, or killed: what it says, how it exits, and that nothing of it is left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes import ENOUGH, processes_with, wait_until

WILLING = """
import os, subprocess, sys, time
from flows.shell import supervise
supervise("toy")
subprocess.Popen(["sleep", "600"])
open("begun", "w").write(str(os.getpid()))
try:
    time.sleep(600)
finally:
    print("a word from every task", file=sys.stderr)
"""
DEAF = WILLING.replace("subprocess.Popen", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); subprocess.Popen")
SAID = "toy: interrupted; run the same command again to go on\n"

Start = Callable[[str], tuple[subprocess.Popen, int]]


@pytest.fixture
def start(tmp_path) -> Iterator[Start]:
    """Starts a script; its process, and the number of the one that runs the flow."""
    processes = []

    def started(script: str) -> tuple[subprocess.Popen, int]:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=os.environ | {"FLOW_OF": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        wait_until(lambda: (tmp_path / "begun").read_text())
        return process, int((tmp_path / "begun").read_text())

    yield started
    for number in left(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    for process in processes:
        process.communicate()


def left(folder: Path) -> list[int]:
    """The processes that were started in `folder` and still run."""
    return list(processes_with(f"FLOW_OF={folder}"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_is_obeyed_with_one_line(start, tmp_path, number):
    process, _ = start(WILLING)
    os.killpg(process.pid, number)
    assert process.communicate(timeout=ENOUGH)[1] == SAID
    assert process.returncode == 130
    assert left(tmp_path) == []


def test_one_signal_asks_for_all(start, tmp_path):
    """Of two that come together the second may reach a thread that runs no handlers, while the main thread sleeps on."""
    noted = "import os; kill = os.kill; os.kill = lambda to, number: (open('sent', 'a').write(number.name), kill(to, number))"
    process, _ = start(noted + WILLING)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=ENOUGH)
    assert (tmp_path / "sent").read_text() == "SIGUSR1"


def test_a_second_request_ends_a_flow_that_does_not_obey(start, tmp_path):
    process, _ = start(DEAF)
    os.killpg(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=ENOUGH)[1] == SAID
    assert process.returncode == 130
    assert left(tmp_path) == []


def test_a_flow_that_does_not_obey_is_killed_in_time(start, tmp_path):
    process, _ = start("import flows.shell; flows.shell.STOP_SECONDS = 1" + DEAF)
    asked = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=ENOUGH)[1] == SAID
    assert time.monotonic() - asked > 0.9
    assert process.returncode == 130
    assert left(tmp_path) == []


def test_a_killed_flow_takes_its_server_with_it_and_says_so(start, tmp_path):
    process, flow = start(WILLING)
    os.kill(flow, signal.SIGKILL)
    assert process.communicate(timeout=ENOUGH)[1] == "toy: killed by SIGKILL; run the same command again to go on\n"
    assert process.returncode == 128 + signal.SIGKILL
    assert left(tmp_path) == []


def test_the_flow_stops_when_the_command_is_killed(start, tmp_path):
    process, flow = start(WILLING.replace('subprocess.Popen(["sleep", "600"])', ""))
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: flow not in left(tmp_path))


def test_nothing_is_left_when_both_are_killed(start, tmp_path):
    process, flow = start(WILLING)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for one in (process.pid, flow):
            os.kill(one, number)
    wait_until(lambda: not left(tmp_path))


def test_the_command_exits_as_the_flow_does(tmp_path):
    script = "import sys; from flows.shell import supervise; supervise('toy'); print('done'); sys.exit(3)"
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=ENOUGH, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "done\n", "")
