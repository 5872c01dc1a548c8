"""What must be refused with nothing lost: a full disk at every stage, damaged files, empty inputs."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tda.artifacts import Workspace, whole, write_table
from tda.config import Config
from tda.data import load_documents
from tests.toy import run_stages, toy_config, toy_values, write_corpus, write_params

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning")

# Runs one stage with files limited to some bytes: to the process, a disk that is full after as many.
WITH_SMALL_DISK = """
import resource, sys
from tda.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Config, Workspace]:
    folder = tmp_path_factory.mktemp("toy")
    write_corpus(folder)
    config, workspace = toy_config(folder), Workspace(folder)
    write_params(folder, toy_values(folder))
    names = ["prepare", "train", "segments", "curvature", "gradients", "scores", "curation", "retraining", "evaluation"]
    run_stages(config, workspace, *names)
    return config, workspace


@pytest.fixture
def toy(done, tmp_path) -> tuple[Config, Workspace]:
    config, workspace = done
    shutil.copytree(workspace.root, tmp_path, dirs_exist_ok=True)
    return config, Workspace(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stage_on_a_small_disk(workspace: Workspace, num_bytes: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITH_SMALL_DISK, str(num_bytes), *arguments, "--params", str(workspace.root / "params.yaml")]
    command += ["--root", str(workspace.root)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("num_bytes", "arguments"),
    [
        (1500, ["prepare"]),
        (200, ["segments"]),
        (1500, ["curvature", "--index", "0"]),
        (1500, ["scores"]),
        (1500, ["curation"]),
        (200, ["evaluation"]),
        (1500, ["report"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_full_disk_is_said_and_what_was_there_stays(toy, num_bytes, arguments):
    _config, workspace = toy
    before = contents(workspace.root)
    result = stage_on_a_small_disk(workspace, num_bytes, *arguments)
    assert result.returncode == 1
    assert "no space left while writing" in result.stderr
    assert "nothing was lost: free some space and run the same command again" in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(workspace.root) == before


@pytest.mark.parametrize("num_bytes", [20_000, 60_000], ids=["the weights do not fit", "the optimizer state does not fit"])
def test_training_whose_disk_is_full_goes_on_when_there_is_space(toy, num_bytes):
    config, workspace = toy
    expected = contents(workspace.checkpoints)
    shutil.rmtree(workspace.checkpoints.parent)
    result = stage_on_a_small_disk(workspace, num_bytes, "train")
    assert result.returncode == 1
    assert "no space left while writing" in result.stderr
    assert not workspace.training.exists()
    assert not list(workspace.root.rglob("*.part"))
    run_stages(config, workspace, "train")
    assert contents(workspace.checkpoints) == expected


def test_a_store_that_cannot_be_made_on_a_full_disk(toy):
    config, workspace = toy
    expected = workspace.gradients(0).read_bytes()
    shutil.rmtree(workspace.store)
    result = stage_on_a_small_disk(workspace, 1500, "gradients", "--index", "0")
    assert result.returncode == 1
    assert "no space left while writing" in result.stderr
    run_stages(config, workspace, "gradients")
    assert workspace.gradients(0).read_bytes() == expected


def test_a_library_that_loses_the_number_of_the_error_is_understood(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match="no space left while writing"), whole(tmp_path / "file") as part:
        part.write_bytes(bytes(1000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        raise ValueError("transport error")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(ValueError, match="transport error"), whole(tmp_path / "file") as part:
        part.write_bytes(bytes(1000))
        raise ValueError("transport error")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("documents", "segments"),
        ("training", "segments"),
        ("exposure", "scores"),
        ("segments", "scores"),
        ("curvature", "scores"),
        ("optimizer", "curvature"),
        ("mean", "scores"),
        ("gradients", "scores"),
    ],
)
def test_a_truncated_file_is_named_with_the_stage_that_makes_it(toy, file, stage):
    config, workspace = toy
    paths = {
        "curvature": workspace.curvature(1),
        "gradients": workspace.gradients(1),
        "optimizer": workspace.checkpoint(3) / "optimizer.safetensors",
        "mean": workspace.checkpoint(1) / "mean.safetensors",
    }
    path = paths.get(file) or getattr(workspace, file)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    maker = {"documents": "prepare", "exposure": "segments", "segments": "segments", "curvature": "curvature"}.get(file, "train")
    maker = "gradients@1" if file == "gradients" else maker
    message = rf"{path.name} cannot be read: .*; expected the whole file that stage {maker} wrote; run `dvc checkout"
    with pytest.raises(ValueError, match=message):
        run_stages(config, workspace, stage)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"curation__drop": 1.5},
            "toy: curation.drop: expected a share below 1 or a whole number of documents; got 1.5",
        ),
        (
            {"curation__min_weight": 1.5},
            "toy: curation: weights have mean 1, so expected min_weight <= 1 <= max_weight; got 1.5 and 2.0",
        ),
        (
            {"segments__indices": [0, 1, 2, 3, 4]},
            "toy: segments.indices: 4 checkpoints (train.checkpoints) cannot be divided into 5 segments, each needs one; "
            "set segments.indices to [0, 1, 2, 3] or fewer, or train.checkpoints to more",
        ),
    ],
)
def test_settings_that_a_late_stage_refuses_are_refused_when_they_are_read(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        toy_config(tmp_path, **changes)


def test_checkpoints_of_a_run_that_is_given_are_not_counted_when_settings_are_read(tmp_path):
    config = toy_config(tmp_path, segments__indices=[0, 1, 2, 3, 4], train__run="some/run", train__model="some/model")
    assert len(config.segments.indices) == 5


def test_an_empty_table_of_documents_or_half_of_targets_is_refused(toy):
    config, workspace = toy
    targets = pl.read_parquet(workspace.targets)
    write_table(workspace.targets, targets.filter(half="verdict"))
    with pytest.raises(ValueError, match="no documents in half score; expected at least one"):
        run_stages(config, workspace, "scores")
    write_table(workspace.documents, pl.read_parquet(workspace.documents).head(0))
    with pytest.raises(ValueError, match="no documents; expected at least one"):
        load_documents(workspace.documents)


def test_a_context_longer_than_the_model_has_room_for_is_refused(toy):
    from transformers import LlamaConfig, LlamaForCausalLM

    config, workspace = toy
    folder = workspace.root / "base"
    small = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    LlamaForCausalLM(small).save_pretrained(folder)
    config = config.model_copy(update={"train": config.train.model_copy(update={"model": str(folder)})})
    with pytest.raises(
        ValueError, match=r"the model has room for 8 tokens, the longest document has \d+; set prepare\.context to 8"
    ):
        run_stages(config, workspace, "train")


def test_a_question_to_a_store_without_the_version_of_the_manifest_is_refused(toy):
    from tda.query import answer

    config, workspace = toy
    manifest = json.loads(workspace.gradients(0).read_text())
    workspace.gradients(0).write_text(json.dumps(manifest | {"tag": "run-none"}))
    with pytest.raises(FileNotFoundError, match=r"has no version run-none, .*dvc repro --force gradients@0"):
        answer("The boat meets the tide.", config=config, workspace=workspace)


def test_a_question_to_a_checkpoint_that_is_overwritten_is_refused(toy):
    from tda.query import answer

    config, workspace = toy
    (workspace.checkpoint(1) / "mean.safetensors").write_bytes(b"garbage" * 1000)
    with pytest.raises(
        ValueError, match=r"checkpoints/1/mean\.safetensors cannot be read: .* stage train wrote; run `dvc checkout"
    ):
        answer("The boat meets the tide.", config=config, workspace=workspace)


def test_a_long_question_is_answered_from_all_its_parts(toy):
    from tda.query import answer

    config, workspace = toy
    one = "The boat meets the tide. " * 3
    found = answer(one * 4, config=config, workspace=workspace)
    assert found["num_tokens"] > 3 * config.prepare.context
    with pytest.raises(ValueError, match="too few tokens"):
        answer_without_start(workspace, config)


def answer_without_start(workspace: Workspace, config: Config) -> dict:
    """A question of one token, where the tokenizer puts none in front."""
    from tda.query import answer

    for name, keys in {"tokenizer_config.json": ["bos_token", "eos_token"], "special_tokens_map.json": ["bos_token"]}.items():
        path = workspace.tokenizer / name
        if path.exists():
            held = json.loads(path.read_text())
            path.write_text(json.dumps({key: value for key, value in held.items() if key not in keys}))
    return answer("a", config=config, workspace=workspace)
