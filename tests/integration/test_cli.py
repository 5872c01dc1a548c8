"""The command line: help, messages, exit codes, and what it must not import."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tda import cli
from tda.artifacts import Workspace, write_json
from tda.pipeline import STAGES
from tests.processes import ENOUGH, wait_until

PROJECT = Path(__file__).parents[2]
COMMANDS = [*STAGES, "query", "plan", "verdict", "audit", "verify", "gc"]
HEAVY = ["torch", "prefect", "dvc", "lancedb", "polars", "transformers", "pydantic", "numpy", "yaml"]

FAKE_STAGES = """
import pathlib, time
def prepare(config, workspace):
    workspace.preparation.parent.mkdir(parents=True, exist_ok=True)
    workspace.preparation.write_text("{}")
def train(config, workspace):
    raise ValueError("train: no documents; expected at least one")
def segments(config, workspace):
    raise RuntimeError("3 checkpoints do not divide into 4 segments")
def curvature(config, workspace, index):
    print("segment", index, sorted(p.name for p in workspace.curvature(0).parent.glob("*")))
def gradients(config, workspace, index):
    part = pathlib.Path("part")
    part.touch()
    try:
        time.sleep(600)
    finally:
        part.unlink()
def scores(config, workspace):
    raise KeyError("a mistake of ours")
def curation(config, workspace):
    with (workspace.root / "missing").open():
        pass
def retraining(config, workspace):
    raise KeyboardInterrupt
def evaluation(config, workspace):
    import nowhere
def report(config, workspace):
    from tda.artifacts import whole
    from tda.parallel import parallel_map
    def piece(number):
        with whole(pathlib.Path(f"piece-{number}")) as part:
            part.touch()
            time.sleep(600)
    list(parallel_map(piece, range(6), workers=2, description="pieces"))
"""

# Runs `tda` with other stages in place of tda/stages.py.
WITH_FAKE_STAGES = """
import importlib.util, sys
import tda
spec = importlib.util.spec_from_file_location("tda.stages", "fake_stages.py")
tda.stages = sys.modules["tda.stages"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tda.stages)
from tda.cli import main
sys.exit(main())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    (tmp_path / "fake_stages.py").write_text(FAKE_STAGES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITH_FAKE_STAGES, *arguments], capture_output=True, text=True, timeout=ENOUGH, check=False
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == cli.OK
    text = capsys.readouterr().out
    assert f"example:\n  tda {command}" in text
    assert "exit codes:" in text


def test_help_imports_nothing_heavy_and_is_quick():
    program = f"""
import sys
from tda.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    begun = time.process_time()
    children = os.times().children_user + os.times().children_system
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    spent = os.times().children_user + os.times().children_system - children + time.process_time() - begun
    assert result.stderr == "[]\n"
    assert all(command in result.stdout for command in COMMANDS)
    assert spent < 0.5


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["curvature"], ["curvature", "--index", "x"], ["query"], ["audit", "--date", "soon"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == cli.USAGE
    assert "usage: tda" in capsys.readouterr().err


def test_a_stage_runs(folder):
    result = run("prepare")
    assert (result.returncode, result.stderr) == (cli.OK, "")
    assert (folder / "data" / "prepare" / "prepare.json").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("drop: 0.2", "drop: 0.3"), "curation in params.yaml changed while the stage ran, .* run `dvc commit --force curation`"),
        (("curation:", "decision:"), "curation in params.yaml changed while the stage ran"),
        (("rank: 32", "rank: 16"), ""),  # nothing that the stage depends on
    ],
)
def test_settings_of_a_stage_stay_while_it_runs(folder, edit, message):
    """DVC reads them when the stage has ended, and would record the new ones with what the old ones made."""
    shutil.copy(PROJECT / "dvc.yaml", folder)
    with (folder / "fake_stages.py").open("a") as stages:
        stages.write(f"""
def curation(config, workspace):
    path = pathlib.Path("params.yaml")
    path.write_text(path.read_text().replace{edit})
""")
    result = run("curation")
    assert result.returncode == (cli.FAILED if message else cli.OK), result.stderr
    assert re.match(f"tda curation: {message}" if message else "$", result.stderr), result.stderr


def test_a_profile_of_a_stage_lies_beside_its_output(folder):
    (folder / "data" / "curvature").mkdir(parents=True)
    result = run("curvature", "--index", "0", "--profile")
    assert result.returncode == cli.OK, result.stderr
    made = folder / "data" / "profile" / "curvature-0"
    assert sorted(path.name for path in made.iterdir()) == ["table.txt", "trace.json.gz"]
    assert str(Path("data", "profile", "curvature-0", "table.txt")) in result.stdout


def test_root_and_params_are_given(folder):
    (folder / "params.yaml").rename(folder / "other.yaml")
    assert run("prepare", "--params", "other.yaml", "--root", "elsewhere").returncode == cli.OK
    assert (folder / "elsewhere" / "data" / "prepare" / "prepare.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "tda train: train: no documents; expected at least one\n"),
        (["segments"], "tda segments: 3 checkpoints do not divide into 4 segments\n"),
        (["curation"], "tda curation: missing: No such file or directory\n"),
        (["evaluation"], "lacks the package nowhere"),
        (["curvature", "--index", "9"], "tda curvature: no part 9: segments.indices in params.yaml is [0, 1, 2]"),
        (["prepare", "--params", "none.yaml"], "tda prepare: none.yaml: no such file"),
        (["query", " "], "tda query: the text is empty"),
        (["query", "--file", "none.txt"], "tda query: none.txt: No such file or directory\n"),
        (["verdict"], "tda verdict: data/evaluation/verdict.json is missing; stage evaluation makes it"),
    ],
)
def test_an_error_is_one_message_without_a_traceback(folder, arguments, message):
    result = run(*arguments)
    assert result.returncode == cli.FAILED
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run(*arguments, "--traceback").stderr


@pytest.mark.parametrize(
    ("arguments", "origin"),
    [(["--file", "latin.txt"], "latin.txt"), (["-"], "standard input"), (["caf\udce9"], "TEXT")],
)
def test_a_question_that_is_not_utf_8_is_refused_in_one_line(folder, monkeypatch, capsys, arguments, origin):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    monkeypatch.setattr(sys, "stdin", io.StringIO("caf\udce9"))
    assert cli.main(["query", *arguments]) == cli.FAILED
    shown = capsys.readouterr().err
    assert shown.startswith(f"tda query: {origin}: not UTF-8 text: ")
    assert shown.count("\n") == 1


def test_a_question_of_a_file_is_without_a_mark_of_its_encoding(folder):
    (folder / "marked.txt").write_text("a question", encoding="utf-8-sig")
    options = cli._parser().parse_args(["query", "--file", "marked.txt"])
    assert cli._text(options) == "a question"


def test_an_unknown_key_is_refused(folder):
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("curation:\n", "curation:\n  drip: 1\n"))
    result = run("prepare")
    assert result.returncode == cli.FAILED
    assert "unknown key curation.drip; known here: action, drop" in result.stderr


def test_a_mistake_of_ours_keeps_its_traceback(folder):
    result = run("scores")
    assert result.returncode == cli.FAILED
    assert "Traceback" in result.stderr


def test_interrupted(folder):
    result = run("retraining")
    assert result.returncode == cli.INTERRUPTED
    assert "run the same command again" in result.stderr


def test_a_second_run_at_once_is_refused_and_a_stopped_one_cleans_up(folder):
    first = subprocess.Popen([sys.executable, "-c", WITH_FAKE_STAGES, "gradients", "--index", "1"])
    try:
        wait_until((folder / "part").exists)
        second = run("gradients", "--index", "1")
        assert second.returncode == cli.FAILED
        assert f"process {first.pid} is doing this already" in second.stderr
    finally:
        first.send_signal(signal.SIGTERM)
    assert first.wait(ENOUGH) == cli.TERMINATED
    assert not (folder / "part").exists()


@pytest.mark.parametrize(("to", "number"), [(os.killpg, signal.SIGINT), (os.killpg, signal.SIGTERM), (os.kill, signal.SIGTERM)])
def test_a_stopped_stage_waits_for_no_piece_of_its_workers(folder, to, number):
    """Neither for those that they are at, whose half-written files go, nor for those that they would begin."""
    program = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler){WITH_FAKE_STAGES}"
    stage = subprocess.Popen([sys.executable, "-c", program, "report"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_until(lambda: len(list(folder.glob("piece-*.part"))) == 2)
        to(stage.pid, number)
        said = stage.communicate(timeout=ENOUGH)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(stage.pid, signal.SIGKILL)
        stage.communicate()
    assert (stage.returncode, said.count("\n")) == ((cli.INTERRUPTED, 1) if number == signal.SIGINT else (cli.TERMINATED, 0)), (
        said
    )
    assert not list(folder.glob("piece-*"))


def test_parts_that_the_settings_no_longer_have_are_removed(folder):
    for name in ("curvature/0.safetensors", "curvature/7.safetensors", "gradients/5.json", "gradients/6.json"):
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert "segment 2 ['0.safetensors']" in run("curvature", "--index", "2").stdout
    assert [path.name for path in (folder / "data" / "gradients").iterdir()] == ["5.json"]


def test_the_verdict_says_what_to_do_next(folder, capsys):
    write_json(Workspace().verdict, {"accepted": False, "rule": "the rule", "summary": "the summary"})
    assert cli.main(["verdict"]) == cli.OK
    text = capsys.readouterr().out
    for words in ("REJECTED", "the rule", "the summary", "data/report/index.html", "tda query", "make run"):
        assert words in text
    assert cli.main(["verdict", "--json"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["accepted"] is False


def test_a_verdict_of_another_form_is_refused_in_one_line(folder, capsys):
    write_json(Workspace().verdict, {})
    assert cli.main(["verdict"]) == cli.FAILED
    shown = capsys.readouterr().err
    assert shown.startswith("tda verdict: data/evaluation/verdict.json cannot be read: it has no accepted; expected ")
    assert shown.count("\n") == 1


def test_a_reader_that_leaves_is_no_error(folder):
    write_json(Workspace().verdict, {"accepted": True, "rule": "r" * 200_000, "summary": ""})
    command = f"{sys.executable} -m tda verdict --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (cli.OK, "")
