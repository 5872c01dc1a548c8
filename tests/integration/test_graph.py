"""The graph: what dvc.yaml says against the code, and a toy pipeline walked stage by stage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows import deps, graph
from flows.settings import override, read_yaml
from flows.slots import Slots, environments, parse_gpus
from tda.artifacts import Workspace
from tda.config import SECTIONS_OF_NO_RESULT, Compute, Config, load_config
from tda.pipeline import STAGES
from tests.processes import wait_until

# DVC builds its graph with a call that its own dependency has since deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon raise:DeprecationWarning")

PROJECT = Path(__file__).parents[2]
PIPELINE = read_yaml(PROJECT / "dvc.yaml")["stages"]
HAS_STAGES = (PROJECT / "tda" / "stages.py").exists()


def declared(name: str) -> dict:
    return PIPELINE[name].get("do", PIPELINE[name])


def outputs(name: str) -> set[str]:
    return {path for key in ("outs", "metrics", "plots") for path in declared(name).get(key, [])}


def inputs(name: str) -> set[str]:
    return {path for path in declared(name)["deps"] if path.startswith("data/")}


def within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def test_stages_have_one_name_everywhere():
    assert list(PIPELINE) == list(STAGES)
    assert set(STAGES) <= set(Config.model_fields)
    for name, stage in STAGES.items():
        assert PIPELINE[name].get("foreach") == (f"${{{stage.indices}}}" if stage.indices else None)
        assert declared(name)["cmd"] == f"python -m tda {name}" + (" --index ${item}" if stage.indices else "")


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_of_a_stage_exists_and_its_own_section_is_one(name):
    params = declared(name)["params"]
    assert any(key.split(".")[0] == name for key in params)
    values = load_config(PROJECT / "params.yaml")
    for key in params:
        found = values
        for part in key.split("."):
            found = getattr(found, part)
    assert not any(key.split(".")[0] in SECTIONS_OF_NO_RESULT for key in params)


def test_every_input_is_made_by_an_earlier_stage():
    made = set()
    for name in STAGES:
        assert all(any(within(path, need) or within(need, path) for path in made) for need in inputs(name)), name
        made |= outputs(name)


def test_every_output_is_a_file_of_the_workspace():
    properties = {key for key, value in vars(Workspace).items() if isinstance(value, property)} - deps.UNVERSIONED
    known = {getattr(Workspace(), key).as_posix() for key in properties}
    known |= {deps.part_file(Workspace().curvature), deps.part_file(Workspace().gradients)}
    assert set().union(*map(outputs, STAGES)) == known


def test_the_truth_is_read_by_the_evaluation_alone():
    truth = Workspace().damage.as_posix()
    assert [name for name in STAGES if truth in inputs(name)] == ["evaluation"]


def test_unversioned_folders_are_neither_read_nor_made():
    unversioned = [getattr(Workspace(), key).as_posix() for key in deps.UNVERSIONED - {"root"}]
    paths = set().union(*(inputs(name) | outputs(name) for name in STAGES))
    assert not [path for path in paths if any(within(path, folder) for folder in unversioned)]


@pytest.mark.skipif(not HAS_STAGES, reason="no tda/stages.py")
def test_modules_and_parameters_are_those_that_the_code_uses():
    assert deps.update(PROJECT / "dvc.yaml", PROJECT / "tda", write=False) == [], "run `make deps`"


@pytest.mark.skipif(not HAS_STAGES, reason="no tda/stages.py")
@pytest.mark.parametrize("name", STAGES)
def test_files_are_those_that_the_code_uses(name):
    used, listed = deps.reach(name, PROJECT / "tda").files, inputs(name) | outputs(name)
    assert [path for path in used if not any(within(path, known) for known in listed)] == []
    assert [path for path in listed if not any(within(path, known) or within(known, path) for known in used)] == []


def test_reach_follows_calls_and_imports_and_leaves_out_what_others_use(tmp_path):
    package = tmp_path / "tda"
    (package / "templates").mkdir(parents=True)
    for name, text in {
        "stages": """
            from tda.config import Config
            from tda.artifacts import Workspace, read_table
            from tda.data import load_documents
            def scores(config: Config, workspace: Workspace):
                from tda.source import score as run
                helper(config, workspace.documents)
                run(config.scores.damping, config.compute.workers, held=workspace)
                return workspace.curvature(3), workspace.store
            def helper(config: Config, path):
                return read_table(path), config.train.optimizer.upper()
            def gradients(config: Config, workspace: Workspace, index: int):
                return load_documents(workspace.checkpoint(index)), workspace.gradients(index), config.train, config.train.seed
            def report(config: Config, workspace: Workspace):
                return config.model_dump(exclude={"compute"}), config.report.title
            """,
        "artifacts": "class Workspace: pass\ndef read_table(): pass",
        "config": "import tda.nowhere\nclass Config: pass",
        "data": "import torch\nfrom .artifacts import read_table\ndef load_documents(): pass",
        "source": """
            from tda.artifacts import Workspace
            from tda import spectral
            def score(damping, workers, *, held: Workspace):
                return held.scoring
            def other(held: Workspace):
                return held.report
            """,
        "spectral": "",
        "unused": "",
    }.items():
        (package / f"{name}.py").write_text("\n".join(line.removeprefix(" " * 12) for line in text.splitlines()))
    scores = deps.reach("scores", package)
    assert scores.modules == ["tda/artifacts.py", "tda/source.py", "tda/spectral.py", "tda/stages.py"]
    assert scores.params == ["scores.damping", "train.optimizer"]
    assert scores.files == ["data/curvature", "data/prepare/documents.parquet", "data/scores/scores.json"]
    gradients = deps.reach("gradients", package)
    assert gradients.modules == ["tda/artifacts.py", "tda/data.py", "tda/stages.py"]
    assert gradients.params == ["train"]
    assert deps.reach("report", package).params == sorted(set(Config.model_fields) - {"audit", "compute"})
    assert gradients.files == ["data/gradients/${item}.json", "data/train/checkpoints/${item}"]


def test_override_changes_the_values_and_nothing_else(tmp_path):
    path = tmp_path / "params.yaml"
    shutil.copy(PROJECT / "params.yaml", path)
    before = path.read_text()
    assert not override(path, {})
    assert path.read_text() == before
    assert override(path, {"curation.drop": 0.05, "retraining.seeds": [0, 1], "train.architecture.num_layers": 2})
    config = load_config(path)
    assert (config.curation.drop, config.retraining.seeds, config.train.architecture.num_layers) == (0.05, [0, 1], 2)
    changed = [pair for pair in zip(before.splitlines(), path.read_text().splitlines(), strict=True) if pair[0] != pair[1]]
    assert changed == [
        ("    num_layers: 4", "    num_layers: 2"),
        ("  drop: 0.2", "  drop: 0.05"),
        ("  seeds: [0, 1, 2, 3, 4]", "  seeds: [0, 1]"),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"curation.drip": 0.05}, "unknown key curation.drip; known here: action, drop"),
        ({"curation.drop": "much"}, "curation.drop: Input should be a valid number"),
        ({"cleaning.drop": 0.05}, "cleaning.drop: no such setting"),
        ({"drop": 0.05}, "drop: no such setting"),
    ],
)
def test_override_refuses_a_wrong_setting_and_writes_nothing(tmp_path, values, message):
    path = tmp_path / "params.yaml"
    shutil.copy(PROJECT / "params.yaml", path)
    with pytest.raises(ValueError, match=message):
        override(path, {"curation.threshold": -1.0} | values)
    assert path.read_bytes() == (PROJECT / "params.yaml").read_bytes()


TOY = """
stages:
  first:
    cmd: mkdir -p data/parts && echo 1 > data/first
    params: [size]
    outs: [data/first]
  part:
    foreach: [0, 1, 2, 3]
    do:
      cmd: sleep 0.${item} && cp data/first "data/parts/${item}"
      deps: [data/first]
      outs: ["data/parts/${item}"]
  last:
    cmd: cat data/parts/* > data/last
    deps: [data/parts]
    outs: [data/last]
"""


def dvc(root: Path, *arguments: str) -> str:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def toy(tmp_path) -> Path:
    (tmp_path / "dvc.yaml").write_text(TOY)
    (tmp_path / "params.yaml").write_text("size: 1\n")
    dvc(tmp_path, "init", "--no-scm", "--quiet")
    return tmp_path


def run(root: Path, *stages: str, stopped: threading.Event | None = None) -> list[bool]:
    """Each in a thread of its own, as the flow does."""

    def one(stage: str) -> bool:
        return graph.run_stage(
            stage, root, environment={}, log=lambda line: None, stopped=threading.Event() if stopped is None else stopped
        )

    with ThreadPoolExecutor(len(stages)) as threads:
        return list(threads.map(one, stages))


def test_graph_is_in_running_order(toy):
    needs = graph.load_graph(toy)
    assert list(needs) == ["first", "part@0", "part@1", "part@2", "part@3", "last"]
    assert needs["last"] == ["part@0", "part@1", "part@2", "part@3"]


def test_a_file_that_dvc_tracks_is_a_stage_too(toy):
    (toy / "own").mkdir()
    (toy / "own" / "rows.csv").write_text("1")
    dvc(toy, "add", "own/rows.csv")
    assert graph.load_graph(toy)["own/rows.csv.dvc"] == []
    (toy / "own" / "rows.csv").write_text("2")
    for stage in graph.load_graph(toy):
        run(toy, stage)
    assert graph.is_clean(toy)


def test_own_data_are_versioned_by_dvc_and_ignored_by_git(tmp_path):
    for file in (".gitignore", ".dvcignore", "inputs/.gitignore", "inputs/README.md"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / file, tmp_path / file)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=first"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    dvc(tmp_path, "init", "--quiet")
    for file in (
        "inputs/rows.jsonl",
        "inputs/other.jsonl",
        "inputs/model/config.json",
        "inputs/more/rows.csv",
        "inputs/more/other.csv",
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    added = ["inputs/rows.jsonl", "inputs/model", "inputs/more/rows.csv"]
    dvc(tmp_path, "add", *added)
    new = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    files = {f"{path}.dvc" for path in added}
    assert {file for file in new.stdout.split() if not file.startswith(".dvc")} == files
    assert set(graph.load_graph(tmp_path)) == files


def test_walking_the_graph_leaves_the_same_lock_as_dvc_repro(toy, tmp_path_factory):
    twin = tmp_path_factory.mktemp("twin") / "toy"
    shutil.copytree(toy, twin)
    dvc(twin, "repro")
    with graph.only_flow(toy):
        assert not graph.is_clean(toy)
        assert run(toy, "first") == [True]
        assert run(toy, "part@3") == [True]
        assert run(toy, "part@2", "part@1", "part@0") == [True] * 3
        assert list(graph._locked_stages(toy)) != list(graph.load_graph(toy))
        assert run(toy, "last") == [True]
        assert run(toy, "last") == [False]
    assert (toy / "dvc.lock").read_bytes() == (twin / "dvc.lock").read_bytes()
    assert graph.is_clean(toy)
    assert "up to date" in dvc(toy, "repro")


NEEDS = {"first": [], "part@0": ["first"], "part@1": ["first"], "part@2": ["first"], "last": ["part@0", "part@1", "part@2"]}


@pytest.mark.parametrize(
    ("before", "order"),
    [
        ([], ["first", "part@0", "part@1", "part@2", "last"]),
        (["first", "part@0", "part@2"], ["first", "part@0", "part@1", "part@2", "last"]),  # part@1 failed, then was mended
        (["first", "part@0", "last"], ["first", "part@0", "last", "part@1", "part@2"]),  # the graph has grown
        (["gone", "first", "part@1", "part@0", "part@2"], ["gone", "first", "part@1", "part@0", "part@2", "last"]),
    ],
)
def test_the_lock_is_ordered_as_if_stages_had_run_one_after_the_other(before, order):
    assert graph.locked_order(before, NEEDS, set(order)) == order


def test_a_failed_stage_names_itself_and_leaves_its_siblings(toy):
    (toy / "part.sh").write_text("test $1 != 2 || { echo 'tda part: no space left' >&2; exit 1; }")
    (toy / "dvc.yaml").write_text(TOY.replace("sleep 0.${item}", "sh part.sh ${item}"))
    run(toy, "first")
    with pytest.raises(graph.StageError, match=r"stage part@2 failed: tda part: no space left$") as caught:
        run(toy, "part@2", "part@1")
    assert not caught.value.by_chance
    assert (toy / "data" / "parts" / "1").exists()
    assert "part@1" in graph._locked_stages(toy)


@pytest.mark.parametrize(("name", "by_chance"), [("KILL", True), ("TERM", False)])
def test_a_killed_stage_may_be_tried_again_and_a_stopped_one_not(toy, name, by_chance):
    (toy / "dvc.yaml").write_text(TOY.replace("mkdir -p data/parts", f"kill -{name} $$"))
    with pytest.raises(graph.StageError, match="stage first failed") as caught:
        run(toy, "first")
    assert caught.value.by_chance is by_chance


# The shell's own words go nowhere: a pipe whose reader was killed would end it before its trap.
HELD = """
exec 2>/dev/null
trap 'touch asked; exit' TERM
touch begun
while true; do sleep 0.1; done
"""


@pytest.fixture
def held(toy) -> Path:
    """The first stage does not end, and notes that it was asked to."""
    (toy / "held.sh").write_text(HELD)
    (toy / "dvc.yaml").write_text(TOY.replace("mkdir -p data/parts", "sh held.sh"))
    return toy


def test_a_stage_ends_with_its_flow(held):
    starter = """
import threading
from pathlib import Path
from flows import graph
graph.run_stage("first", Path(), environment={}, log=print, stopped=threading.Event())
"""
    flow = subprocess.Popen([sys.executable, "-c", starter], cwd=held, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: (held / "begun").exists() and list(graph._records(held).iterdir()))
        (stage,) = [int(path.name) for path in graph._records(held).iterdir()]
        assert graph._alive(stage)
    finally:
        flow.send_signal(signal.SIGKILL)
        flow.wait()
    wait_until(lambda: not graph._alive(stage))
    assert (held / "asked").exists()
    with graph.only_flow(held):
        assert not list(graph._records(held).iterdir())
    assert not (held / "dvc.lock").exists()


def test_a_stopped_flow_ends_its_stage_and_starts_no_other(held):
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        with graph.only_flow(held):
            first = threads.submit(run, held, "first", stopped=stopped)
            wait_until((held / "begun").exists)
            stopped.set()
        with pytest.raises(graph.StageError, match="stage first: the flow was stopped") as caught:
            first.result()
    assert not caught.value.by_chance
    assert (held / "asked").exists()
    with pytest.raises(graph.StageError, match="stage part@1: the flow was stopped"):
        run(held, "part@1", stopped=stopped)
    assert not list(graph._records(held).iterdir())


# DVC writes this file in place many times; the first write is not done before DVC was asked to stop, and then takes a moment.
SLOW_WRITER = """
import json, pathlib, signal, threading
def dump(value, file, dump=json.dump):
    if str(file.name).endswith("rwlock") and not pathlib.Path("writing").exists():
        file.write("{")
        file.flush()
        pathlib.Path("writing").touch()
        while signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
            threading.Event().wait(0.1)
        threading.Event().wait(0.5)
        file.seek(0)
    dump(value, file)
json.dump = dump
"""


def test_a_stopped_stage_leaves_the_files_of_dvc_whole(held, monkeypatch):
    (held / "sitecustomize.py").write_text(SLOW_WRITER)
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        with monkeypatch.context() as slow, graph.only_flow(held):
            slow.setenv("PYTHONPATH", str(held))
            first = threads.submit(run, held, "first", stopped=stopped)
            wait_until((held / "writing").exists)
            stopped.set()
        with pytest.raises(graph.StageError, match="stage first: the flow was stopped"):
            first.result()
    assert not (held / "begun").exists()
    assert json.loads((held / ".dvc" / "tmp" / "rwlock").read_text()) == {}


@pytest.mark.parametrize("left", ["", '{"write": {', '{"write": {"data/first": 1}}'])
def test_a_crash_in_the_middle_of_a_write_of_dvc_fails_no_later_flow(toy, left):
    (toy / ".dvc" / "tmp" / "rwlock").write_text(left)
    with graph.only_flow(toy):
        assert run(toy, "first") == [True]


def test_a_stage_that_starts_while_the_flow_is_stopped_ends_itself(held):
    class Late(threading.Event):
        """Set between the start of the process and its record."""

        def is_set(self) -> bool:
            was = super().is_set()
            self.set()
            return was

    with pytest.raises(graph.StageError, match="stage first: the flow was stopped"):
        run(held, "first", stopped=Late())
    assert not list(graph._records(held).iterdir())
    assert not (held / "dvc.lock").exists()


def test_what_a_killed_flow_left_running_is_ended(toy):
    left = subprocess.Popen(["sh", "-c", "sleep 600; true"], start_new_session=True)
    try:
        record = graph._records(toy) / str(left.pid)
        record.parent.mkdir(parents=True)
        record.write_text(graph._started(left.pid))
        with graph.only_flow(toy):
            assert not graph._alive(left.pid)
        assert left.wait() == -signal.SIGTERM
        assert not record.exists()
    finally:
        left.kill()
        left.wait()


def test_a_process_number_used_again_is_left_alone(toy):
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        record = graph._records(toy) / str(other.pid)
        record.parent.mkdir(parents=True)
        record.write_text("started long ago")
        assert graph.reap(toy) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_two_flows_in_one_workspace_are_refused(toy):
    with (
        graph.only_flow(toy),
        pytest.raises(RuntimeError, match=f"process {os.getpid()} is doing this already"),
        graph.only_flow(toy),
    ):
        pass


def test_slots_are_gpus_or_shares_of_the_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    compute = Compute(device="auto", workers=0, factor_gib=0.0, compile="auto")
    assert environments(6, compute) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-abc"}]
    assert environments(1, compute.model_copy(update={"device": "cpu"})) == [{"TDA_WORKERS": str(cores)}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environments(10 * cores, compute) == [{"TDA_WORKERS": "1"}] * cores
    assert environments(6, compute.model_copy(update={"workers": 5})) == [{"TDA_WORKERS": "1"}] * 5
    assert environments(2, compute.model_copy(update={"workers": 5})) == [{"TDA_WORKERS": "2"}] * 2


def test_gpus_are_read_from_the_driver_s_list():
    assert parse_gpus("GPU 0: A (UUID: GPU-1)\nGPU 1: A (UUID: GPU-2)\n") == ["GPU-1", "GPU-2"]
    assert parse_gpus("GPU 0: A (UUID: GPU-1)\n  MIG 1g Device 0: (UUID: MIG-7)\n  MIG 1g Device 1: (UUID: MIG-8)\n") == [
        "MIG-7",
        "MIG-8",
    ]


def test_a_slot_is_held_by_one_at_a_time():
    slots = Slots([{"place": "a"}, {"place": "b"}])
    with slots.one() as one, slots.one() as two:
        assert {one["place"], two["place"]} == {"a", "b"}
        assert slots._free.empty()
    assert slots._free.qsize() == 2
