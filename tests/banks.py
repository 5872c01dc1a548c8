"""Tiny banks and their recipes for the tests."""

import json
from pathlib import Path

import numpy as np

from tda.bank import Bank
from tda.bank_data import BankData
from tda.make_bank import half_subsets
from tda.recipe import Recipe, parse_recipe

SHARED = Path(__file__).parents[2] / "shared" / "lds"
NUM_FEATURES = 3


def recipe_values(**changes) -> dict:
    """The JSON of a small classification recipe; `changes` by dotted key with `__` for the dot, None removes it."""
    values = {
        "model": {"kind": "mlp", "dims": [NUM_FEATURES, 5, 4, 3], "activation": "tanh", "init": "torch.nn.Linear default"},
        "training": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "batch": 4, "epochs": 3},
        "loss": "cross_entropy",
        "measurement": "margin",
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
        if value is None:
            del section[last]
    return values


def recipe(**changes) -> Recipe:
    return parse_recipe(json.dumps(recipe_values(**changes)), origin="test")


def data_for(made: Recipe, *, num_rows: int = 21, num_queries: int = 5, seed: int = 0) -> BankData:
    """Random rows with targets that depend on them."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(num_rows + num_queries, made.model.dims[0])).astype(np.float32)
    outputs = made.model.dims[-1]
    values = x @ random.normal(size=(x.shape[1], outputs)) + 0.3 * random.normal(size=(len(x), outputs))
    y = values.argmax(axis=1).astype(np.uint8) if made.loss == "cross_entropy" else np.squeeze(values.astype(np.float32))
    return BankData(x[:num_rows], x[num_rows:], y[:num_rows], y[num_rows:])


def fake_bank(made: Recipe | None = None, *, num_subsets: int = 8, repeats: int = 4, noise: float = 1.0, seed: int = 0) -> Bank:
    """A bank whose measurements are sums over the subset of a random effect of each row, with noise; nothing was trained."""
    made = made or recipe()
    data = data_for(made)
    random = np.random.default_rng(seed)
    masks = half_subsets(data.num_rows, num_subsets, seed=seed)
    effects = random.normal(size=(data.num_rows, data.num_queries))
    noises = noise * random.normal(size=(num_subsets, repeats, data.num_queries))
    values = ((masks @ effects)[:, None] + noises).astype(np.float32)
    return Bank(masks, values, values[0], data, made)


def write_arrays(path: Path, bank: Bank, **changes) -> Path:
    """The bank's file with some arrays changed or, where None, left out; the recipe's JSON is `changes["recipe"]`."""
    arrays = {
        "masks": np.packbits(bank.masks, axis=1),
        "measurements": bank.measurements,
        "full_runs": bank.full_runs,
        "x_train": bank.data.x_train,
        "y_train": bank.data.y_train,
        "x_query": bank.data.x_query,
        "y_query": bank.data.y_query,
        "recipe": np.array(bank.recipe.to_json()),
    }
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path
