"""Every stage and every method where tensors of two devices meet in no operation: a GPU's refusals, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tda.artifacts import Workspace, read_json
from tda.fit_factors import NUM_SHARDS
from tests.toy import run_stages, toy_config, write_corpus

ROOT = Path(__file__).parent.parent.parent


def on_stand_in(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_on_stand_in", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_method_gives_the_same_scores_wherever_the_model_is():
    differences = on_stand_in("methods")
    assert len(differences) == 4 * 17
    assert {name: one for name, one in differences.items() if one > 1e-4} == {}


def test_curvature_in_either_precision_is_that_of_the_cpu():
    """In bfloat16 the same products are summed in float32, of weights that were rounded alike."""
    assert {dtype: difference < 1e-5 for dtype, difference in on_stand_in("curvature").items()} == {
        "torch.float32": True,
        "torch.bfloat16": True,
    }


def test_a_run_is_resumed_where_the_model_is(tmp_path):
    """Training multiplies in TF32, and nothing that comes after does."""
    assert on_stand_in("resumed", str(tmp_path)) == {"adamw": True, "sgd": True, "precisions": ["high", "highest"]}


def test_the_stand_in_refuses_what_a_gpu_refuses():
    script = (
        "import torch; from tests.stand_in_device import DEVICE, install, seen; install()\n"
        "there, here = torch.ones(3, device=DEVICE), torch.ones(3)\n"
        "refused = []\n"
        "for attempt in (lambda: there + here, lambda: here.add_(there), there.numpy, "
        "lambda: torch.rand(3, device=DEVICE, generator=torch.Generator())):\n"
        "    try: attempt()\n"
        "    except (RuntimeError, TypeError): refused.append(True)\n"
        "assert len(refused) == 4, refused\n"
        "assert (there + there.sum()).cpu().tolist() == [4.0] * 3 and there[0].item() == 1\n"
        "assert torch.rand(2, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).device == DEVICE\n"
        "print({kind: count for (kind, _where), count in seen.items()})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "{'to host': 1, 'wait': 1}"


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Workspace, Workspace, dict]:
    """The toy pipeline on the CPU up to the scores, on the stand-in up to the verdict, and what was counted there."""
    folders = [tmp_path_factory.mktemp(name) for name in ("cpu", "there")]
    for folder in folders:
        write_corpus(folder)
    found = on_stand_in("pipeline", str(folders[1]))
    config, workspace = toy_config(folders[0]), Workspace(folders[0])
    run_stages(config, workspace, "prepare", "train", "segments", "curvature", "gradients", "scores")
    return workspace, Workspace(folders[1]), found


def test_the_pipeline_gives_the_same_scores_on_another_device(both):
    """But for the labels that curvature draws: packed documents stand in another order."""
    here, there, found = both
    tables = [pl.read_parquet(workspace.scores) for workspace in (here, there)]
    for name in tables[0].columns:
        if name.startswith("score_"):
            assert np.corrcoef(tables[0][name], tables[1][name])[0, 1] > 0.999, name
    assert len(found["helped"]) == 3
    assert read_json(there.verdict, stage="evaluation")["answer"]


def test_rows_and_curvature_take_one_copy_a_batch_and_wait_for_none(both):
    """Waits are those of loading a model, of a covariance's check and of a pass's token count; none is a batch's."""
    _here, _there, found = both
    curvature, rows = found["counted"]["curvature"], found["counted"]["gradients"]
    probes = {"wait, model.py:_probe_head", "wait, packing.py:_hidden", "wait, packing.py:_probe"}
    assert {where for where in rows if where.startswith("wait")} <= probes
    waits = {where: count for where, count in curvature.items() if where.startswith("wait") and where not in probes}
    assert waits.pop("wait, ekfac.py:covariances") == 2 * (
        NUM_SHARDS + 1
    )  # two segments of one checkpoint; a batch tells the room
    assert waits.pop("wait, ekfac.py:_eigenvectors") > 0
    assert waits == {"wait, losses.py:document_losses": 2, "wait, data.py:predictions": 2}  # what finds the layers of a segment
    assert rows["to device, streaming.py:start_copy"] - rows["to host, streaming.py:start_copy"] == 4  # checkpoints: a probe each
