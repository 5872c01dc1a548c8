"""DVC's graph of stages, and running one stage of it as a process. Knows DVC, and nothing of Prefect.

DVC decides what is stale. A stage runs as `dvc repro --single-item`, in a process group of its own. The group is recorded under
`.dvc/tmp/flow` while it runs, so that the flow can end it, and so that the next flow can end what a killed one has left
(`reap`).
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import networkx
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, RWLockFileCorruptedError, RWLockFileFormatError, rwlock
from dvc.stage import PipelineStage, Stage
from dvc.utils.serialize import dump_yaml, load_yaml

from flows import lifeline
from flows.lifeline import GRACE_SECONDS
from tda.artifacts import only_run

QUIET_LOGS = {"TQDM_MININTERVAL": "15", "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}


class StageError(RuntimeError):
    """A stage did not finish; `by_chance` says whether another try could succeed."""

    def __init__(self, message: str, *, by_chance: bool = False):
        super().__init__(message)
        self.by_chance = by_chance


def load_graph(root: Path) -> dict[str, list[str]]:
    """Every stage with the stages that it needs, in the order in which `dvc repro` runs them."""
    with Repo(str(root)) as repo:
        graph = repo.index.graph
        names = {stage: _name(stage, Path(repo.root_dir)) for stage in networkx.dfs_postorder_nodes(graph)}
        return {name: [names[need] for need in graph.successors(stage)] for stage, name in names.items()}


def _name(stage: Stage, root: Path) -> str:
    """What `dvc repro` calls a stage; a file that was added by `dvc add` is one too, called by its `.dvc` file."""
    return stage.name if isinstance(stage, PipelineStage) else Path(stage.path).relative_to(root).as_posix()


def is_clean(root: Path) -> bool:
    """Whether nothing is stale."""
    with Repo(str(root)) as repo:
        return not repo.status()


def run_stage(
    stage: str, root: Path, *, environment: dict[str, str], log: Callable[[str], None], stopped: threading.Event
) -> bool:
    """Bring one stage up to date. Returns whether its command ran; its output goes to `log` line by line.

    No stage starts once `stopped` is set. A stage ends when the thread that called this ends. A `StageError` names the stage
    and quotes its last lines.
    """
    _refuse_if(stopped, stage)
    dvc = [sys.executable, "-P", lifeline.__file__, str(os.getpid())]
    process = subprocess.Popen(
        [*dvc, "--wait-for-lock", "repro", "--single-item", stage],
        cwd=root,
        env=_environment() | environment,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    record = _records(root) / str(process.pid)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(_started(process.pid), encoding="utf-8")
    ran, last = False, deque(maxlen=12)
    try:
        _refuse_if(stopped, stage)  # again: whoever set it may have looked for records before this one existed
        for line in map(str.rstrip, process.stdout):
            if line:
                log(line)
                last.append(line)
                ran = ran or line.startswith("Running stage")
        if process.wait() != 0:
            _refuse_if(stopped, stage)
            raise _failure(stage, process.returncode, list(last))
    finally:
        if process.poll() is None:
            _end_group(process.pid)
            process.wait()
        process.stdout.close()
        record.unlink(missing_ok=True)
    return ran


def _refuse_if(stopped: threading.Event, stage: str) -> None:
    if stopped.is_set():
        raise StageError(f"stage {stage}: the flow was stopped")


def _environment() -> dict[str, str]:
    """The environment of stages: this Python comes first on the PATH, as their command is `python -m tda ...`."""
    return os.environ | QUIET_LOGS | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def _failure(stage: str, code: int, last: list[str]) -> StageError:
    """The error of a failed stage. Another try can help after a kill from outside or a taken lock, but not with wrong input."""
    text = "\n".join(last)
    exits = re.findall(r"exited with (-?\d+)", text)
    status = int(exits[-1]) if exits else code
    number = -status if status < 0 else status - 128
    killed = number in {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT}
    locked = "Unable to acquire lock" in text or "it is being blocked by" in text
    words = [line for line in last if line.startswith("tda ")] or [
        line for line in last if not line.startswith(("Running ", "> "))
    ]
    reason = f"killed by {signal.Signals(number).name}" if killed else " ".join(words[-3:]) or f"exit code {code}"
    return StageError(f"stage {stage} failed: {reason}", by_chance=killed or locked)


@contextlib.contextmanager
def only_flow(root: Path) -> Iterator[None]:
    """Reserve the workspace for one flow; afterwards no process is left, and `dvc.lock` is as `dvc repro` would have left it.

    `dvc repro` appends new stages to `dvc.lock` in graph order and leaves known ones in their place, whereas stages that run in
    parallel are appended as they finish.
    """
    with only_run(_records(root).with_suffix(".lock")):
        reap(root)
        mend_record_of_use(root)
        before = list(_locked_stages(root))
        try:
            yield
        finally:
            reap(root)
            order_lock(root, before)


def mend_record_of_use(root: Path) -> None:
    """Remove DVC's record of the files in use if a kill or a crash of the machine left half of it; no stage could run."""
    with Repo(str(root)) as repo, contextlib.suppress(LockError):  # the lock is held: someone writes it just now
        try:
            with rwlock(repo.tmp_dir, repo.fs, "flow", [], [], repo.config["core"].get("hardlink_lock", False)):
                pass
        except (RWLockFileCorruptedError, RWLockFileFormatError):
            Path(repo.tmp_dir, RWLOCK_FILE).unlink()


def order_lock(root: Path, before: list[str]) -> None:
    """Sort the stages in `dvc.lock` into the order that `dvc repro` leaves; `before` are those that were there at the start."""
    stages = _locked_stages(root)
    order = locked_order(before, load_graph(root), set(stages))
    if order != list(stages):
        lock = root / "dvc.lock"
        dump_yaml(str(lock), load_yaml(str(lock)) | {"stages": {stage: stages[stage] for stage in order}})


def locked_order(before: list[str], needs: dict[str, list[str]], locked: set[str]) -> list[str]:
    """The order that the `locked` stages would have if they had run one after the other; those not there `before` are new.

    If a known stage needs a new one, the graph has grown, and the new stage is appended. Otherwise an earlier run failed before
    the new stage: run one after the other, it would have stopped there, so the new stage comes before known stages that are
    later in the graph and were finished side by side.
    """
    place = {stage: number for number, stage in enumerate(needs)}
    needed, todo = set(), [stage for stage in before if stage in needs]
    while todo:
        new = set(needs[todo.pop()]) - needed
        needed |= new
        todo += new
    order = [stage for stage in before if stage in locked]
    for stage in needs:
        if stage in locked and stage not in before:
            later = (number for number, other in enumerate(order) if place.get(other, -1) > place[stage])
            order.insert(len(order) if stage in needed else next(later, len(order)), stage)
    return order


def _locked_stages(root: Path) -> dict:
    lock = root / "dvc.lock"
    return load_yaml(str(lock)).get("stages", {}) if lock.exists() else {}


def reap(root: Path) -> list[int]:
    """End every recorded process group. Returns their numbers."""
    ended = []
    for record in sorted(_records(root).glob("[0-9]*")):
        number = int(record.name)
        if _started(number) == record.read_text(encoding="utf-8"):
            _end_group(number)
            ended.append(number)
        record.unlink(missing_ok=True)
    return ended


def _records(root: Path) -> Path:
    return root / ".dvc" / "tmp" / "flow"


def _started(number: int) -> str:
    """When process `number` started, to tell it from a later process with the same number; empty if it is gone."""
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _end_group(number: int) -> None:
    """Ask the process group to stop, and kill what has not stopped in time."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if not _alive(number):
                return
            time.sleep(0.1)
        os.killpg(number, signal.SIGKILL)


def _alive(group: int) -> bool:
    """Whether any process of the group still runs (zombies do not)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, in_group = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
            if int(in_group) == group and state not in "ZX":
                return True
    return False
