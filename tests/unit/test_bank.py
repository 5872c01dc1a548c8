import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from tda.bank import Bank, ceiling, load_bank, save_bank
from tda.bank_data import BankData
from tests.banks import SHARED, fake_bank, recipe, write_arrays

README_CEILINGS = {"fmnist": 0.968, "fmnist_noise": 0.942, "fmnist_adamw": 0.968, "concrete": 0.949, "lm_mix": 0.984}


def test_a_bank_is_written_and_read(tmp_path):
    bank = fake_bank()
    flipped = np.arange(21) % 5 == 0
    bank = Bank(bank.masks, bank.measurements, bank.full_runs, BankData(*_arrays(bank), extras={"flipped": flipped}), bank.recipe)
    save_bank(tmp_path / "one.npz", bank)
    again = load_bank(tmp_path / "one.npz")
    assert np.array_equal(again.masks, bank.masks)  # 21 rows: the last byte of bits is not full
    assert np.array_equal(again.measurements, bank.measurements)
    assert np.array_equal(again.data.flipped, flipped)
    assert again.recipe == bank.recipe
    save_bank(tmp_path / "two.npz", again)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def _arrays(bank: Bank) -> list[np.ndarray]:
    return [bank.data.x_train, bank.data.x_query, bank.data.y_train, bank.data.y_query]


def test_what_is_optional(tmp_path):
    bank = load_bank(write_arrays(tmp_path / "bank.npz", fake_bank(), full_runs=None))
    assert bank.full_runs.shape == (0, 5)
    assert bank.data.flipped is None


def test_wrong_labels_as_row_numbers(tmp_path):
    bank = load_bank(write_arrays(tmp_path / "bank.npz", fake_bank(), flipped=np.array([3, 20])))
    assert np.flatnonzero(bank.data.flipped).tolist() == [3, 20]


def test_costs_are_lower_when_better():
    bank = fake_bank(repeats=2)
    margin = (bank.measurements[:, 0].astype(float) + bank.measurements[:, 1]) / 2
    assert np.allclose(bank.costs, -margin, rtol=1e-12)
    loss = fake_bank(recipe(measurement="loss"), repeats=2)
    assert np.allclose(loss.costs, margin, rtol=1e-12)


def test_ceiling_against_a_slow_twin():
    bank = fake_bank(num_subsets=12, repeats=6, noise=3.0)
    values = bank.measurements.astype(float)
    r = np.mean([spearmanr(values[:, :3, query].mean(axis=1), values[:, 3:, query].mean(axis=1)).statistic for query in range(5)])
    assert ceiling(bank) == pytest.approx(math.sqrt(2 * r / (1 + r)), rel=1e-12)


def test_ceiling_is_the_correlation_with_the_truth():
    """With noise as large as the effects; 40 subsets and 20 queries' worth of draws leave about .01 of chance."""
    found, truth = [], []
    for seed in range(20):
        bank = fake_bank(num_subsets=40, repeats=5, noise=3.0, seed=seed)
        exact = fake_bank(num_subsets=40, repeats=5, noise=0.0, seed=seed)
        found.append(ceiling(bank))
        truth.append(np.mean([spearmanr(bank.costs[:, query], exact.costs[:, query]).statistic for query in range(5)]))
    assert np.mean(found) == pytest.approx(np.mean(truth), abs=0.02)  # measured .005; without stepping up it is .1 lower


def test_ceiling_of_a_bank_without_repeats_is_not_known():
    assert ceiling(fake_bank(repeats=1)) is None
    assert ceiling(fake_bank(noise=0.0)) == pytest.approx(1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared banks are not beside the repository")
@pytest.mark.parametrize("name", README_CEILINGS)
def test_the_ceilings_of_the_shared_banks(name):
    assert ceiling(load_bank(SHARED / f"{name}.npz")) == pytest.approx(README_CEILINGS[name], abs=0.0005001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": None, "x_query": None}, "masks, x_query missing; expected the arrays masks, measurements"),
        ({"recipe": None}, "recipe missing"),
        ({"y_train": None}, "expected a target for each of the 21 rows of x_train; got none"),
        ({"y_query": np.zeros(4, np.uint8)}, "y_query: expected a target for each of the 5 rows of x_query; got 4"),
        ({"y_train": np.full(21, 3, np.uint8)}, r"y_train: expected one class number from 0 to 2 per row .*, 3 to 3"),
        ({"y_train": np.zeros(21, np.float32)}, r"y_train: expected one class number from 0 to 2 per row .*float32"),
        ({"x_train": np.zeros((21, 4)), "x_query": np.zeros((5, 4))}, "x_train has 4 features; expected 3"),
        ({"x_query": np.zeros((5, 4))}, r"x_train is of shape \(21, 3\) and x_query of \(5, 4\)"),
        ({"x_train": np.full((21, 3), np.nan)}, "x_train: expected finite numbers; got 63 that are not"),
        ({"masks": np.zeros((8, 2), np.uint8)}, r"masks is uint8 of shape \(8, 2\); expected uint8 \(subset, 3\)"),
        ({"masks": np.zeros((8, 3), np.uint8)}, "masks: 8 subsets, 8 of them empty; expected 3 or more"),
        ({"measurements": np.zeros((8, 5), np.float32)}, r"measurements is of shape \(8, 5\); expected \(8, any, 5\)"),
        ({"measurements": np.zeros((7, 2, 5), np.float32)}, r"measurements is of shape \(7, 2, 5\); expected \(8, any, 5\)"),
        ({"measurements": np.zeros((8, 0, 5), np.float32)}, r"measurements is of shape \(8, 0, 5\)"),
        ({"measurements": np.full((8, 1, 5), np.inf)}, "measurements: expected finite numbers; got 40 that are not"),
        ({"measurements": np.ones((8, 1, 5), np.int64)}, "measurements: expected floating-point numbers; got int64"),
        ({"full_runs": np.zeros((2, 4), np.float32)}, r"full_runs is of shape \(2, 4\); expected \(any, 5\)"),
        ({"recipe": np.array("{}")}, "missing in the recipe: model.kind"),
        ({"flipped": np.array([3, 99])}, r"flipped: .* or row numbers from 0 to 20; got int64 of shape \(2,\): 99$"),
        ({"flipped": np.array([-1])}, r"flipped: .* or row numbers from 0 to 20; got int64 of shape \(1,\): -1$"),
        ({"flipped": np.array([0.5])}, r"flipped: .* or row numbers from 0 to 20; got float64 of shape \(1,\): 0.5$"),
        ({"flipped": np.array(["a"])}, r"flipped: .* or row numbers from 0 to 20; got <U1 of shape \(1,\): a$"),
        ({"flipped": np.ones(3, bool)}, r"flipped: expected a boolean for each of 21 rows, .*; got bool of shape \(3,\)$"),
    ],
)
def test_a_bank_that_does_not_fit_together_is_refused(tmp_path, changes, message):
    path = write_arrays(tmp_path / "bank.npz", fake_bank(), **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_bank(path)
    assert str(error.value).startswith(str(path))


def test_preprocessing_of_another_width_is_refused(tmp_path):
    made = recipe(preprocessing={"mean": [0.0, 1.0]})
    path = write_arrays(tmp_path / "bank.npz", fake_bank(), recipe=np.array(made.to_json()))
    with pytest.raises(ValueError, match=r"recipe\.preprocessing: expected one number, or 3, one per feature; got 2"):
        load_bank(path)


def test_targets_of_another_width_are_refused(tmp_path):
    made = recipe(loss="squared_error", measurement="absolute_error", model__dims=[3, 2])
    bank = fake_bank(made)
    with pytest.raises(ValueError, match=r"y_train: expected 2 finite numbers per row, the last of recipe\.model\.dims"):
        load_bank(write_arrays(tmp_path / "bank.npz", bank, y_train=np.zeros(21, np.float32)))


def test_no_bank_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such bank"):
        load_bank(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("masks")
    with pytest.raises(ValueError, match=r"not a bank: .*; expected an .npz file of plain arrays"):
        load_bank(tmp_path / "text.npz")


def test_a_language_model_needs_tokens(tmp_path):
    (tmp_path / "model").mkdir()
    made = recipe(model={"kind": "causal_lm", "path": "model"}, loss="causal_lm", measurement="loss")
    path = write_arrays(tmp_path / "bank.npz", fake_bank(), recipe=np.array(made.to_json()))
    with pytest.raises(ValueError, match=r"expected whole numbers \(row, token\)"):
        load_bank(path)


def test_preprocessing(tmp_path):
    made = recipe(preprocessing={"scale": 0.5, "mean": [0.0, 1.0, 2.0], "std": 4.0})
    bank = load_bank(write_arrays(tmp_path / "bank.npz", fake_bank(), recipe=np.array(made.to_json())))
    x = bank.data.x_train.astype(float)
    assert np.allclose(bank.data.train(bank.recipe).x.numpy(), (x * 0.5 - [0, 1, 2]) / 4, atol=1e-6)
