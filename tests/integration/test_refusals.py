"""What must be refused with nothing lost: a full disk at every stage, damaged files, empty inputs."""

import json
import math
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from tda import stages
from tda.artifacts import Workspace, whole, write_table
from tda.config import MAX_SEED, Config, load_config
from tda.data import load_documents
from tda.dynamics import load_segments
from tests.toy import PARAMS, run_stages, toy_config, toy_values, write_corpus, write_params

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
    message = rf"{path.name} cannot be read: .*; expected .* that stage {maker} wrote; run `dvc checkout --force"
    with pytest.raises(ValueError, match=message):
        run_stages(config, workspace, stage)


@pytest.mark.parametrize(
    ("file", "stage", "lacks"),
    [
        ("training", "segments", "checkpoint_steps"),
        ("segments", "curvature", "segments"),
        ("gradients", "scores", "table"),
        ("verdict", "report", "comparisons"),
    ],
)
def test_a_file_of_another_form_is_named_with_the_stage_that_makes_it(toy, file, stage, lacks):
    config, workspace = toy
    path = workspace.gradients(0) if file == "gradients" else getattr(workspace, file)
    maker = {"training": "train", "gradients": "gradients@0", "verdict": "evaluation"}.get(file, file)
    for content, wrong in (("{}", f"it has no {lacks}"), ("[1]", "it is no object but list")):
        path.write_text(content)
        message = rf"^[^']*{path.name} cannot be read: {wrong}; expected .* that stage {maker} wrote; run `dvc checkout --force"
        with pytest.raises(ValueError, match=message):
            run_stages(config, workspace, stage)


def test_a_segment_without_its_fields_is_named(tmp_path):
    path = Workspace(tmp_path).segments
    path.parent.mkdir(parents=True)
    path.write_text('{"segments": [{"index": 0}]}')
    with pytest.raises(ValueError, match=r"segments\.json cannot be read: it has no checkpoints; .* stage segments"):
        load_segments(Workspace(tmp_path))


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
        (
            {"curation__method": "taste"},
            "toy: curation.method: unknown method 'taste'; known are averaged_influence, source, ekfac_influence, gradient_dot, "
            "gradient_cosine, bm25, random",
        ),
        (
            {"scores__averaged_influence": False},
            "toy: curation.method: averaged_influence decides, and scores.averaged_influence is false; expected true, or another "
            "method such as source",
        ),
        (
            {"curvature__space": "rows"},
            "toy: curvature.space: rows fits the factors of gradients projected at random; expected gradients.projection: random "
            "and curvature.adam: scalar or none, got eigenbasis and scalar",
        ),
        (
            {"curvature__space": "projected", "curvature__adam": "symmetric", "gradients__projection": "random"},
            "toy: curvature.space: projected fits the factors of gradients projected at random; expected gradients.projection: "
            "random and curvature.adam: scalar or none, got random and symmetric",
        ),
        ({"train__learning_rate": math.inf}, "toy: train.learning_rate: Input should be a finite number; got inf"),
        ({"curation__threshold": math.nan}, "toy: curation.threshold: Input should be a finite number; got nan"),
        ({"prepare__seed": -1}, "toy: prepare.seed: Input should be greater than or equal to 0; got -1"),
        ({"gradients__seed": 2**40}, f"toy: gradients.seed: Input should be less than or equal to 1000000000; got {2**40}"),
        ({"retraining__seeds": [0, -3]}, "toy: retraining.seeds.1: Input should be greater than or equal to 0; got -3"),
        (
            {"retraining__seeds": [4, 1, 4]},
            "toy: retraining.seeds: 4 is given twice, and would be the same run again; expected different seeds; got [4, 1, 4]",
        ),
    ],
)
def test_settings_that_a_late_stage_refuses_are_refused_when_they_are_read(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        toy_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"hidden_size": 18, "num_heads": 4},
            "hidden_size is divided among num_heads, an even number for each, whose halves are rotated together; expected a "
            "multiple of 8, twice num_heads; got 18",
        ),
        (
            {"hidden_size": 20, "num_heads": 4},
            "hidden_size is divided among num_heads, an even number for each, whose halves are rotated together; expected a "
            "multiple of 8, twice num_heads; got 20",
        ),
        (
            {"hidden_size": 16, "num_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads are shared by equally many of num_heads; expected a number that divides 4; got 3",
        ),
    ],
)
def test_a_model_whose_heads_do_not_divide_it_is_refused(tmp_path, shape, message):
    shape = toy_values(tmp_path)["train"]["architecture"] | shape
    with pytest.raises(ValueError, match=f"^{re.escape(f'toy: train.architecture: {message}')}$"):
        toy_config(tmp_path, train__architecture=shape)


def test_seeds_are_small_enough_for_all_that_is_made_of_them():
    number_of_a_generator = ((MAX_SEED * 1000 + 1000) * 8 + 8) * 2**20  # as curvature numbers them
    assert number_of_a_generator < 2**63
    torch.Generator().manual_seed(number_of_a_generator)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "report:",
            "segments:\n  by: steps\nreport:",
            r"not valid YAML: segments is given twice, in lines \d+ and \d+; remove one",
        ),
        ("drop: 0.2", "drop: 0.2\n  drop: 0.3", r"not valid YAML: drop is given twice, in lines (\d+) and \d+; remove one"),
        ("epochs: 2}", "epochs: 2, epochs: 3}", r"not valid YAML: epochs is given twice, in lines (\d+) and \1; remove one"),
        ("title: Data", "title: 2026-99-99  # Data", "not valid YAML: month must be in 1..12"),
        ("damping: 0.1", "damping: .inf", "scores.damping: Input should be a finite number; got inf"),
    ],
)
def test_settings_that_are_not_what_they_seem_are_refused(tmp_path, old, new, message):
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
        load_config(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prepare: {}".encode("utf-16"), "not UTF-8 text: .*; expected YAML in UTF-8; save it as that$"),
        (b"prepare: \0\1\2", "not valid YAML: "),
    ],
)
def test_settings_that_are_no_text_are_refused_by_the_name_of_their_file(tmp_path, content, message):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
        load_config(path)


def test_checkpoints_of_a_run_that_is_given_are_not_counted_when_settings_are_read(tmp_path):
    config = toy_config(tmp_path, segments__indices=[0, 1, 2, 3, 4], train__run="some/run", train__model="some/model")
    assert len(config.segments.indices) == 5


def test_parts_that_the_stages_before_have_not_made_yet_are_refused(toy):
    _config, workspace = toy
    config = toy_config(workspace.root, segments__indices=[0, 1, 2], train__checkpoints=[0, 1, 2, 3, 4])
    with pytest.raises(
        ValueError, match=r"segments.json has no segment 2, it has 2: segments.indices was .* `dvc repro segments`"
    ):
        stages.curvature(config, workspace, 2)
    with pytest.raises(ValueError, match=r"segments.json has no checkpoint 4, it has 4: .*; run `dvc repro segments`"):
        stages.gradients(config, workspace, 4)


@pytest.mark.parametrize("stage", ["train", "retraining"])
def test_a_tokenizer_that_is_missing_or_damaged_is_named_with_its_stage(toy, stage):
    config, workspace = toy
    path = workspace.tokenizer / "tokenizer.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=r"prepare/tokenizer cannot be read: .* that stage prepare wrote; run `dvc checkout --force"
    ):
        run_stages(config, workspace, stage)
    shutil.rmtree(workspace.tokenizer)
    with pytest.raises(FileNotFoundError, match=r"prepare/tokenizer/tokenizer.json is missing; stage prepare makes it"):
        run_stages(config, workspace, stage)


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
    with pytest.raises(FileNotFoundError, match=r"has no version run-none, .*dvc repro --single-item --force gradients@0"):
        answer("The boat meets the tide.", config=config, workspace=workspace)


def test_a_question_to_a_checkpoint_that_is_overwritten_is_refused(toy):
    from tda.query import answer

    config, workspace = toy
    (workspace.checkpoint(1) / "mean.safetensors").write_bytes(b"garbage" * 1000)
    with pytest.raises(
        ValueError, match=r"checkpoints/1/mean\.safetensors cannot be read: .* stage train wrote; run `dvc checkout --force"
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
