"""Our scores beside those of the peers' packages, in environments of their own (`python -m benchmarks peers --install`)."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from benchmarks import peers_speed
from benchmarks.peers import PeerError, drive, hand_over, interpreter, main
from tda.attribute import attribute
from tda.bank_training import train_run
from tda.data import Documents, Examples
from tests import banks
from tests.helpers import CONTEXT, VOCABULARY, tiny_llama


def needed(peer: str) -> None:
    try:
        interpreter(peer)
    except PeerError as error:
        pytest.skip(str(error))


class FixedLabels:
    """A task that takes, where labels are sampled, those it was given for each row, or the true ones: so two programs agree."""

    def __init__(self, task, sampled=None):
        self._task, self._sampled = task, sampled

    def losses(self, model, batch, *, weights=None, labels="true", generator=None):
        if labels == "sampled" and self._sampled is not None:
            batch = dataclasses.replace(batch, y=self._sampled[batch.rows])
        return self._task.losses(model, batch, weights=weights)

    def __getattr__(self, name):
        return getattr(self._task, name)


REGRESSION = {"loss": "squared_error", "measurement": "absolute_error", "model__dims": [3, 5, 4, 2]}


@pytest.mark.parametrize("changes", [{}, REGRESSION], ids=["classification", "regression"])
def test_ekfac_influence_equals_kronfluences(tmp_path, changes):
    needed("kronfluence")
    recipe = banks.recipe(**changes)
    data = banks.data_for(recipe)
    train, queries = (double(part) for part in (data.train(recipe), data.queries(recipe)))
    run = doubled(train_run(data.train(recipe), recipe, rows=np.arange(len(train)), seed=(1, 0, 0), num_checkpoints=3))
    generator = torch.Generator().manual_seed(0)
    outputs = run.at(-1)(train.x).detach()
    if recipe.loss == "cross_entropy":
        sampled = torch.multinomial(outputs.softmax(dim=1), 1, generator=generator).squeeze(1)
    else:
        sampled = outputs + 0.5**0.5 * torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)

    hand_over(tmp_path, run, recipe, train, queries, seed=0, sampled=sampled)
    theirs = drive("kronfluence", "ekfac", tmp_path).values
    ours = attribute("ekfac_influence", run, FixedLabels(recipe.task, sampled), train, queries).values

    # Their score leaves out the 1/N of the mean loss. Measured: 1e-15 of the largest score, float64 rounding and no more.
    np.testing.assert_allclose(ours * len(train), theirs, rtol=0.0, atol=1e-9 * np.abs(theirs).max())


def documents(num: int, seed: int) -> Documents:
    """Of one length: their mean over tokens and ours, over all tokens of a batch, are then the same."""
    names = [f"{seed}-{row}" for row in range(num)]
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, size=(num, CONTEXT)).astype(np.int32)
    return Documents(names, names, names, names, list(tokens), np.ones(num, np.int64))


@pytest.mark.parametrize(("method", "bergsons"), [("source", "source"), ("ekfac_influence", "ekfac")])
def test_plain_source_and_ekfac_influence_equal_bergsons(tmp_path, method, bergsons):
    needed("bergson")
    tiny_llama().float().save_pretrained(tmp_path / "model")
    recipe = banks.recipe(
        model={"kind": "causal_lm", "path": str(tmp_path / "model")},
        training={"optimizer": "sgd", "lr": 0.05, "momentum": 0.5, "weight_decay": 0.0, "batch": 4, "epochs": 6},
        loss="causal_lm",
        measurement="loss",
    )
    train, queries = documents(12, 1), documents(3, 2)
    run = doubled(train_run(train, recipe, rows=np.arange(len(train)), seed=(1, 0, 0), num_checkpoints=6))

    hand_over(tmp_path / "handed", run, recipe, train, queries, seed=0, labels="true")
    theirs = drive("bergson", bergsons, tmp_path / "handed").values
    ours = attribute(method, run, FixedLabels(recipe.task), train, queries).values

    # Up to scale: their score leaves out the 1/N. The sign of their SOURCE is turned in the driver. Measured of EK-FAC: 1e-7.
    scale = (ours * theirs).sum() / (theirs * theirs).sum()
    assert scale == pytest.approx(1 / len(train), rel=1e-3)
    np.testing.assert_allclose(ours, scale * theirs, rtol=0.0, atol=1e-5 * np.abs(ours).max())


def double(examples: Examples) -> Examples:
    return Examples(examples.x.double(), examples.y.double() if examples.y.is_floating_point() else examples.y)


def doubled(run):
    """The run in float64, so that nothing but rounding is left between two programs."""
    checkpoints = [
        dataclasses.replace(
            checkpoint,
            weights={name: value.double() for name, value in checkpoint.weights.items()},
            mean_weights={name: value.double() for name, value in checkpoint.mean_weights.items()},
        )
        for checkpoint in run.checkpoints
    ]
    return dataclasses.replace(run, model=run.model.double(), checkpoints=checkpoints)


def test_a_peer_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TDA_PEER_KRONFLUENCE", str(tmp_path / "python"))
    with pytest.raises(PeerError, match=r"kronfluence: no interpreter .*python; make it with `python -m benchmarks peers"):
        drive("kronfluence", "ekfac", tmp_path)


def test_what_a_driver_dies_of_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TDA_PEER_KRONFLUENCE", sys.executable)  # where the package is not installed
    with pytest.raises(PeerError, match=r"kronfluence ekfac: the driver failed with 1: ModuleNotFoundError: .*kronfluence"):
        drive("kronfluence", "ekfac", tmp_path)


def test_an_unknown_peer_is_refused():
    with pytest.raises(SystemExit, match="peers: unknown captum; expected some of kronfluence"):
        main(["--peers", "captum"])


def test_speed_is_of_right_answers_and_names_a_peer_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDA_PEER_BERGSON", str(tmp_path / "python"))
    sizes = ["--rows", "3", "--batch-rows", "2", "--context", "8", "--rank", "2", "--rounds", "1"]
    peers_speed.main([*sizes, "--sources", "ours,bergson"])
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert result["largest_differences"]["ours"]["rows"] < 1e-5  # autograd's, projected: float32 rounding
    assert result["sources"]["ours"].keys() == {"peak_mib", "floor", *peers_speed.PASSES}
    assert "bergson: no interpreter" in result["left_out"]["bergson"]
    assert "left out: bergson" in said


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler, which inductor needs")
def test_speed_is_measured_as_on_a_gpu(capsys):
    sizes = ["--rows", "3", "--batch-rows", "2", "--context", "8", "--rank", "2", "--rounds", "1", "--sources", "ours"]
    peers_speed.main([*sizes, "--passes", "compiled floor,rows", "--compile", "always", "--dtype", "bfloat16"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["left_out"] == {}
    assert result["sources"]["ours"].keys() == {"peak_mib", "floor", "compiled floor", "rows"}
    assert 0 < result["largest_differences"]["ours"]["rows"] < 0.05  # bfloat16 has 8 bits


def test_speed_of_a_wrong_answer_is_refused():
    expected = peers_speed.Expected.__new__(peers_speed.Expected)
    expected.first, expected.tolerance = {}, peers_speed.TOLERANCE["float32"]
    right = {"A.layer": torch.eye(3), "Lambda.layer": torch.tensor([[1.0, 2.0]])}
    assert expected.check("ours", right) == {"A": 0.0, "Lambda": 0.0}
    assert expected.check("theirs", {"A.layer": 7 * torch.eye(3)}) == {"A": 0.0}  # a mean in place of a sum
    with pytest.raises(AssertionError, match=r"theirs: Lambda differ by .* of the largest value"):
        expected.check("theirs", {"Lambda.layer": torch.tensor([[2.0, 1.0]])})


def test_speed_of_an_unknown_source_is_refused():
    with pytest.raises(SystemExit, match="peers_speed: unknown captum; expected some of ours"):
        peers_speed.main(["--sources", "captum"])
    with pytest.raises(SystemExit, match="peers_speed: unknown eigenvectors; expected some of compiled floor, rows"):
        peers_speed.main(["--passes", "eigenvectors"])
