"""The deployments on a real Prefect server with a process worker, both on loopback, over a toy pipeline of quick stages."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.shell import STOP_SECONDS
from tests.processes import ENOUGH, processes_with, wait_until

pytestmark = pytest.mark.server

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_SECONDS = 300

DVC_FILE = """
stages:
  prepare:
    cmd: mkdir -p data/prepare data/parts && echo ${prepare.seed} > data/prepare/documents
    params: [prepare.seed]
    outs: [data/prepare/documents]
  gradients:
    foreach: ${train.checkpoints}
    do:
      cmd: sh part.sh ${item}
      deps: [data/prepare/documents]
      outs: ["data/parts/${item}"]
  evaluation:
    cmd: python evaluation.py
    deps: [data/parts, evaluation.py]
    params: [curation.drop]
    outs: [data/evaluation, data/report]
"""

PART = """
test ! -e "break-$1" || { echo 'tda gradients: no such checkpoint' >&2; exit 1; }
test ! -e "kill-$1" || { rm "kill-$1"; kill -KILL $$; }
while test -e hold; do sleep 0.2; done
echo "$1" "$TDA_WORKERS" >> placed
cp data/prepare/documents "data/parts/$1"
"""

EVALUATION = """
import json, pathlib
for folder in ("data/evaluation", "data/report"):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
write = lambda path, value: pathlib.Path("data", path).write_text(json.dumps(value))
write("evaluation/verdict.json", {"accepted": True, "rule": "toy rule", "summary": "toy summary"})
write("evaluation/metrics.json", {"recall": {"source": 0.75}, "auc": 0.5})
write("report/index.html", "")
"""


@dataclass(frozen=True)
class Server:
    """A Prefect server and what a client needs to talk to it."""

    url: str
    environment: dict[str, str]

    def post(self, path: str, body: dict) -> list[dict]:
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(body).encode(), headers={"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=ENOUGH) as answer:
            return json.load(answer)

    def run(self, root: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=500,
        )
        assert not check or done.returncode == 0, done.stdout
        return done

    def artifacts(self, key: str) -> list[dict]:
        return self.post("artifacts/filter", {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"})


def started(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    """In a process group of its own, so that all of it can be ended."""
    log = (folder / f"{command[1]}.log").open("w")
    process = subprocess.Popen(
        [str(BIN / command[0]), *command[1:]],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    log.close()
    return process


def ended(process: subprocess.Popen) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that were started with this folder as Prefect's home."""
    return list(processes_with(f"PREFECT_HOME={folder}").values())


def free_port() -> int:
    """Below those that systems give to connections, one of which could take it before the server does."""
    for port in random.sample(range(10_000, 32_000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("prefect")
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = started(["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)], home, environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < deadline, (home / "server.log").read_text()
                time.sleep(0.5)
        yield Server(url, environment)
    finally:
        ended(process)
    wait_until(lambda: not processes_of(home))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    shutil.copytree(PROJECT / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "prefect.yaml", "prefect.toml"):
        shutil.copy(PROJECT / name, root)
    for name, text in {"dvc.yaml": DVC_FILE, "part.sh": PART, "evaluation.py": EVALUATION}.items():
        (root / name).write_text(text)
    for command in (["init", "--no-scm", "--quiet"], ["config", "core.analytics", "false"]):
        subprocess.run([str(BIN / "dvc"), *command], cwd=root, check=True)
    return root


@pytest.fixture(scope="module")
def deployed(server, toy) -> Iterator[Server]:
    """The deployments of prefect.yaml, and a worker that serves them."""
    server.run(toy, "prefect", "work-pool", "create", "--type", "process", "local-process")
    server.run(toy, "prefect", "--no-prompt", "deploy", "--all")
    worker = started(["prefect", "worker", "start", "--pool", "local-process", "--type", "process"], toy, server.environment)
    try:
        yield server
    finally:
        ended(worker)


def last_run(server: Server, flow: str = "curate") -> dict:
    """The run of a flow that was started last; not one that is scheduled."""
    wanted = {
        "flows": {"name": {"any_": [flow]}},
        "flow_runs": {"start_time": {"is_null_": False}},
        "sort": "START_TIME_DESC",
        "limit": 1,
    }
    return server.post("flow_runs/filter", wanted)[0]


def locked(root: Path, tmp_path: Path) -> bytes:
    """The `dvc.lock` that `dvc repro` alone would leave."""
    twin = tmp_path / "twin"
    shutil.copytree(root, twin, ignore=shutil.ignore_patterns("data", "dvc.lock", "tmp", "cache"))
    subprocess.run(
        [str(BIN / "dvc"), "repro", "--quiet"], cwd=twin, check=True, env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    )
    return (twin / "dvc.lock").read_bytes()


def test_a_failed_stage_is_named_and_the_rest_goes_on(deployed, toy):
    (toy / "break-1").touch()
    result = deployed.run(toy, "prefect", "deployment", "run", "curate/llm", "--watch", check=False)
    assert result.returncode == 1
    run = last_run(deployed)
    message = run["state"]["message"]
    assert "stage gradients@1 failed: tda gradients: no such checkpoint" in message
    assert "Not started: evaluation." in message
    assert sorted(path.name for path in (toy / "data" / "parts").iterdir()) == ["0", "2", "3", "4", "5"]
    tasks = deployed.post("task_runs/filter", {"task_runs": {"name": {"any_": ["gradients@1"]}}})
    assert [task["run_count"] for task in tasks] == [1], "wrong input is not tried again"
    (toy / "break-1").unlink()


def test_the_deployment_runs_to_the_end_and_leaves_artifacts(deployed, toy, tmp_path):
    (toy / "kill-1").touch()
    deployed.run(
        toy, "prefect", "deployment", "run", "curate/llm", "--watch", "--params", json.dumps({"params": {"curation.drop": 0.05}})
    )
    assert "drop: 0.05" in (toy / "params.yaml").read_text()
    assert (toy / "dvc.lock").read_bytes() == locked(toy, tmp_path)
    assert "up to date" in deployed.run(toy, "dvc", "status").stdout
    assert "toy summary" in deployed.artifacts("verdict")[0]["data"]
    assert json.loads(deployed.artifacts("metrics")[0]["data"]) == [
        {"metric": "recall.source", "value": 0.75},
        {"metric": "auc", "value": 0.5},
    ]
    assert (toy / "data" / "report" / "index.html").as_uri() in deployed.artifacts("report")[0]["data"]
    tasks = deployed.post(
        "task_runs/filter", {"task_runs": {"name": {"any_": ["gradients@1"]}}, "sort": "EXPECTED_START_TIME_DESC"}
    )
    assert tasks[0]["run_count"] == 2, "a killed stage is tried once more"
    cores = len(os.sched_getaffinity(0))
    workers = str(cores // min(cores, 6))
    assert sorted((toy / "placed").read_text().split()) == sorted([*"012345", *[workers] * 6])


def test_nothing_runs_when_nothing_has_changed(deployed, toy):
    deployed.run(toy, "dvc", "repro")
    before = len(deployed.post("task_runs/filter", {}))
    deployed.run(toy, "prefect", "deployment", "run", "curate/llm", "--watch")
    assert len(deployed.post("task_runs/filter", {})) == before


def test_a_wrong_parameter_fails_the_run_and_changes_nothing(deployed, toy):
    before = (toy / "params.yaml").read_bytes()
    result = deployed.run(
        toy, "prefect", "deployment", "run", "curate/llm", "--watch", "--params", '{"params": {"curation.drip": 1}}', check=False
    )
    assert result.returncode == 1
    run = last_run(deployed)
    assert "unknown key curation.drip" in run["state"]["message"]
    assert (toy / "params.yaml").read_bytes() == before


def test_a_cancelled_run_leaves_no_process_and_no_half_stage(deployed, toy):
    deployed.run(toy, "dvc", "repro")
    (toy / "hold").touch()
    before = (toy / "dvc.lock").read_bytes()
    deployed.run(toy, "prefect", "deployment", "run", "curate/llm", "--params", '{"params": {"prepare.seed": 7}}')
    records = toy / ".dvc" / "tmp" / "flow"
    wait_until(lambda: len(list(records.glob("[0-9]*"))) and "7" in (toy / "params.yaml").read_text())
    run = last_run(deployed)
    wait_until(lambda: any(b"part.sh" in Path(path, "cmdline").read_bytes() for path in children(records)))
    deployed.run(toy, "prefect", "flow-run", "cancel", run["id"])
    wait_until(lambda: not children(records))
    wait_until(lambda: last_run(deployed)["state"]["type"] == "CANCELLED")
    lock = (toy / "dvc.lock").read_bytes()
    assert lock.count(b"gradients@") == before.count(b"gradients@")
    (toy / "hold").unlink()
    deployed.run(toy, "prefect", "deployment", "run", "curate/llm", "--watch")
    assert "up to date" in deployed.run(toy, "dvc", "status").stdout


def children(records: Path) -> list[str]:
    """Processes of the groups on record."""
    found = []
    groups = {path.name for path in records.glob("[0-9]*")}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if group in groups and state not in "ZX":
            found.append(str(entry))
    return found


FOUND = "import json, sys; print(json.dumps({'passed': sys.argv[1] == '0', 'summary': 'toy audit', 'report': 'data/a.html'}))"
AUDIT = """
import sys
from flows import audit
audit.COMMAND = [sys.executable, "found.py", sys.argv[1]]
audit.audit()
"""
SERVED = """
from pathlib import Path
from flows.serve import deployments
for deployment in deployments(Path("prefect.yaml")):
    print(deployment.full_name, deployment.schedules)
"""


@pytest.mark.parametrize(("code", "passed"), [(0, True), (3, False)])
def test_the_audit_fails_when_a_limit_is_passed(server, toy, code, passed):
    (toy / "found.py").write_text(f"{FOUND}; sys.exit(int(sys.argv[1]))")
    result = server.run(toy, "python", "-c", AUDIT, str(code), check=False)
    assert (result.returncode == 0) == passed, result.stdout
    assert ("a limit was passed: toy audit" in result.stdout) != passed
    assert ("# Passed" if passed else "# Limit passed") in server.artifacts("audit")[0]["data"]
    assert (toy / "data" / "a.html").as_uri() in server.artifacts("audit-report")[0]["data"]


def test_the_nightly_audit_is_scheduled_and_says_why_it_could_not_be_made(deployed, toy):
    (nightly,) = deployed.post("deployments/filter", {"deployments": {"name": {"any_": ["nightly"]}}})
    assert [schedule["schedule"]["cron"] for schedule in nightly["schedules"]] == ["0 3 * * *"]
    result = deployed.run(toy, "prefect", "deployment", "run", "audit/nightly", "--watch", check=False)
    assert result.returncode == 1
    assert "the audit was not made: " in last_run(deployed, "audit")["state"]["message"]


def test_the_deployments_can_be_served_without_a_worker(server, toy):
    served = server.run(toy, "python", "-c", SERVED).stdout
    assert "curate/llm" in served
    assert "audit/nightly" in served
    assert "0 3 * * *" in served


def embedded(server: Server, home: Path) -> Server:
    """None that runs: a flow starts one of its own."""
    own = {key: value for key, value in server.environment.items() if key != "PREFECT_API_URL"}
    return Server("", own | {"PREFECT_HOME": str(home)})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_flow_leaves_no_process_and_starts_no_further_stage(server, toy, tmp_path, number):
    home = tmp_path / "prefect"
    alone = embedded(server, home)
    (toy / "hold").touch()
    (toy / "placed").unlink(missing_ok=True)
    flow = subprocess.Popen(
        [sys.executable, "-m", "flows.curate", json.dumps({"prepare.seed": 100 + number})],
        cwd=toy,
        env=alone.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: flow.poll() is not None or any("part.sh" in command for command in processes_of(home)))
        assert flow.returncode is None, flow.communicate()
        (flow.send_signal if number == signal.SIGKILL else lambda number: os.killpg(flow.pid, number))(number)
        flow.wait(2 * STOP_SECONDS)  # seconds by itself; a machine that is busy may take until it is killed
        wait_until(lambda: not processes_of(home))
    finally:
        for left in processes_with(f"PREFECT_HOME={home}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        output, messages = flow.communicate()
        (toy / "hold").unlink()
    assert not (toy / "placed").exists()
    assert "Traceback" not in output + messages
    if number != signal.SIGKILL:
        assert flow.returncode == 130
        assert messages.splitlines()[-1] == "flows.curate: interrupted; run the same command again to go on"
        assert "ERROR" not in output + messages


def test_the_flow_runs_on_the_embedded_server_too(server, toy, tmp_path):
    home = tmp_path / "prefect"
    alone = embedded(server, home)
    assert "Finished in state Completed" in alone.run(toy, "python", "-m", "flows.curate").stdout
    assert "up to date" in alone.run(toy, "dvc", "status").stdout
    wait_until(lambda: not processes_of(home))


def test_a_flow_in_a_shell_that_fails_says_why_in_one_line(server, toy, tmp_path):
    alone = embedded(server, tmp_path / "prefect")
    wrong = alone.run(toy, "python", "-m", "flows.curate", '{"curation.drip": 1}', check=False)
    assert wrong.returncode == 1
    assert "\nflows.curate: params.yaml with curation.drip: unknown key curation.drip; known here: " in wrong.stdout
    assert "runpy" not in wrong.stdout
    wrong = alone.run(toy, "python", "-m", "flows.curate", "curation.drop=0.1", check=False)
    assert wrong.returncode == 2
    assert 'expected keys and values such as {"curation.drop": 0.1}; got curation.drop=0.1' in wrong.stdout
