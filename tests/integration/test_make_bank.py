"""Banks made here: the same whether killed or not and by however many processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tda import bank_training, make_bank
from tda.bank import load_bank
from tda.bank_data import BankData, check_data
from tda.lds import lds_by_query
from tda.make_bank import half_subsets
from tests.banks import data_for, recipe
from tests.helpers import CONTEXT, VOCABULARY, tiny_llama
from tests.processes import wait_until

# Makes a bank, a model at a time; the fourth takes so long that there is time to kill it.
MAKE_SLOWLY = """
import sys, time
from pathlib import Path
from tda import bank_training, make_bank
from tests.banks import data_for, recipe
bank_training.STACK_PARAMETERS = 100
outcomes, made = make_bank.outcomes, []
def slowly(*arguments, **named):
    made.append(1)
    time.sleep(600 if len(made) == 4 else 0)
    return outcomes(*arguments, **named)
make_bank.outcomes = slowly
make_bank.make_bank(data_for(recipe()), recipe(), num_subsets=4, repeats=2, seed=3, out=Path(sys.argv[1]), workers=1)
"""


def made(path: Path, **changes) -> bytes:
    chosen = recipe(**changes)
    make_bank.make_bank(data_for(chosen), chosen, num_subsets=4, repeats=2, seed=3, out=path, workers=1)
    return path.read_bytes()


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    out = tmp_path / "bank.npz"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", MAKE_SLOWLY, str(out)], env=environment)
    try:
        wait_until(lambda: len(list((tmp_path / "bank.npz.runs").glob("*/*.npy"))) >= 2)
    finally:
        process.kill()
        process.wait()
    done = len(list((tmp_path / "bank.npz.runs").glob("*/*.npy")))
    assert 2 <= done < 18  # some of the models, not all
    assert not out.exists()
    trained = []
    outcomes = make_bank.outcomes
    monkeypatch.setattr(make_bank, "outcomes", lambda jobs, *rest, **named: trained.append(1) or outcomes(jobs, *rest, **named))
    monkeypatch.setattr(bank_training, "STACK_PARAMETERS", 100)
    resumed = made(out)
    assert len(trained) == 18 - done
    assert not (tmp_path / "bank.npz.runs").exists()
    assert made(tmp_path / "other.npz") == resumed
    assert len(trained) == 18 - done + 18


def test_the_number_of_processes_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(bank_training, "LARGEST_STACK", 4)
    chosen = recipe()
    for workers in (1, 2):
        out = tmp_path / f"{workers}.npz"
        make_bank.make_bank(data_for(chosen), chosen, num_subsets=4, repeats=2, seed=3, out=out, workers=workers)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


def test_another_recipe_in_the_same_place_is_another_bank(tmp_path):
    """Chunks that were left behind by another recipe are not used."""
    first = made(tmp_path / "a.npz")
    work = tmp_path / "b.npz.runs"
    work.mkdir()
    other = recipe(training__lr=0.2)
    jobs = [bank_training.Job(np.arange(21), (2, 3, 0))]
    make_bank.retrain(jobs, data_for(other), other, folder=work, description="", workers=1)
    assert made(tmp_path / "b.npz") == first
    assert made(tmp_path / "c.npz", training__lr=0.2) != first


def test_subsets_are_halves_and_models_see_nothing_else(tmp_path):
    made(tmp_path / "bank.npz")
    bank = load_bank(tmp_path / "bank.npz")
    assert bank.masks.sum(axis=1).tolist() == [10] * 4
    assert bank.measurements.shape == (4, 2, 5)
    assert bank.full_runs.shape == (10, 5)
    assert np.unique(bank.measurements[:, :, 0]).size == 8  # every repeat has its own start
    job = bank_training.Job(np.flatnonzero(bank.masks[2]), (bank_training.SUBSET, 3, 2 * 2 + 1))
    data = data_for(bank.recipe)
    values, _ = bank_training.outcomes([job], bank.recipe, train=data.train(bank.recipe), queries=data.queries(bank.recipe))
    assert np.allclose(values[0], bank.measurements[2, 1], atol=1e-4)
    poisoned = BankData(np.where(bank.masks[2][:, None], data.x_train, 1e3), data.x_query, data.y_train, data.y_query)
    same, _ = bank_training.outcomes([job], bank.recipe, train=poisoned.train(bank.recipe), queries=data.queries(bank.recipe))
    assert np.array_equal(same, values)


def test_a_linear_model_has_a_known_datamodel(tmp_path):
    """Least squares trained to its optimum: leaving a row out moves a prediction by leverage times residual (Cook 1977)."""
    random = np.random.default_rng(0)
    x = random.normal(size=(70, 2)).astype(np.float32)
    y = (x @ [1.0, -2.0] + random.normal(size=70)).astype(np.float32)
    chosen = recipe(
        model={"kind": "mlp", "dims": [2, 1]},
        loss="squared_error",
        measurement="squared_error",
        training={"optimizer": "sgd", "lr": 0.1, "batch": 64, "epochs": 150},
    )
    data = BankData(x[:60], x[60:], y[:60], y[60:])
    bank = make_bank.make_bank(data, chosen, num_subsets=40, repeats=1, seed=0, out=tmp_path / "bank.npz", workers=1)
    X, Q = (np.hstack([part.astype(float), np.ones((len(part), 1))]) for part in (x[:60], x[60:]))
    theta = np.linalg.lstsq(X, y[:60].astype(float), rcond=None)[0]
    # A row left out moves theta by -(X^T X)^-1 x residual, and the query's squared error along its gradient.
    moved = -np.linalg.solve(X.T @ X, X.T) * (y[:60] - X @ theta)
    scores = (2 * (Q @ theta - y[60:]))[:, None] * (Q @ moved)
    assert np.median(lds_by_query(scores, bank.masks, bank.costs)) > 0.9
    chance = [lds_by_query(random.normal(size=scores.shape), bank.masks, bank.costs).mean() for _ in range(20)]
    assert abs(np.mean(chance)) < 0.1


def test_a_language_model_bank(tmp_path):
    """In worker processes, a model each; the path is relative to the bank wherever it lies."""
    tiny_llama().float().save_pretrained(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, size=(11, CONTEXT)).astype(np.uint16)
    chosen = recipe(
        model={"kind": "causal_lm", "path": str(tmp_path / "model")},
        loss="causal_lm",
        measurement="loss",
        training={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "batch": 2, "epochs": 2},
    )
    out = tmp_path / "banks" / "lm.npz"
    data = BankData(tokens[:8], tokens[8:])
    made_bank = make_bank.make_bank(data, chosen, num_subsets=3, repeats=1, seed=0, out=out, workers=2)
    bank = load_bank(out)
    assert bank.recipe == made_bank.recipe
    assert '"path": "../model"' in str(np.load(out)["recipe"])
    assert np.allclose(bank.measurements, made_bank.measurements)
    rows = np.flatnonzero(bank.masks[0])
    run = bank_training.train_run(data.train(chosen), chosen, rows=rows, seed=(bank_training.SUBSET, 0, 0), num_checkpoints=2)
    model = run.at(1)
    log_p = model(input_ids=bank_training.torch.from_numpy(tokens[8:].astype(np.int64))).logits.log_softmax(dim=2)
    losses = [-np.mean([log_p[query, at, tokens[8 + query, at + 1]].item() for at in range(CONTEXT - 1)]) for query in range(3)]
    assert np.allclose(bank.measurements[0, 0], losses, atol=1e-5)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (np.full((3, CONTEXT), VOCABULARY), f"from {VOCABULARY} to {VOCABULARY}; expected .* from 0 to {VOCABULARY - 1}, as the"),
        (np.full((3, CONTEXT), -1), "x_query has rows of .* tokens from -1 to -1"),
        (np.zeros((3, CONTEXT)), "x_query is float64"),
        (np.zeros((3, CONTEXT + 1), int), f"x_train has rows of {CONTEXT + 1} tokens .*; expected at most {CONTEXT}, from 0"),
    ],
)
def test_tokens_that_the_language_model_does_not_know_are_refused(tmp_path, query, message):
    tiny_llama().save_pretrained(tmp_path / "model")
    chosen = recipe(model={"kind": "causal_lm", "path": str(tmp_path / "model")}, loss="causal_lm", measurement="loss")
    with pytest.raises(ValueError, match=message):
        check_data(BankData(np.zeros((8, query.shape[1]), int), query), chosen, origin="a bank")


@pytest.mark.parametrize(("num_subsets", "repeats"), [(2, 1), (3, 0)])
def test_too_little_is_refused(tmp_path, num_subsets, repeats):
    chosen = recipe()
    with pytest.raises(ValueError, match=f"{num_subsets} subsets, {repeats} repeats and 21 rows asked for; expected at least 3"):
        make_bank.make_bank(
            data_for(chosen), chosen, num_subsets=num_subsets, repeats=repeats, seed=0, out=tmp_path / "b.npz", workers=1
        )


def test_halves():
    masks = half_subsets(7, 50, seed=1)
    assert set(masks.sum(axis=1)) == {3}
    assert (masks.mean(axis=0) > 0).all()
    assert len({mask.tobytes() for mask in masks}) > 20
