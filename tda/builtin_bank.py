"""A small bank from data that are always there: classifying docstrings of `builtin:python` by the package that they come from.

A row is the word counts of a docstring's body, its class the package. A tenth of the training rows get the label of another
class (`flipped`). Making it takes a few minutes on two cores.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from tda.artifacts import whole
from tda.bank import Bank, load_bank
from tda.bank_data import BankData
from tda.corpus import python_texts
from tda.make_bank import make_bank, num_processes
from tda.recipe import MLPModel, Preprocessing, Recipe, Training

SOURCES = ("matplotlib", "networkx", "numpy", "scipy", "stdlib", "torch")
NUM_ROWS, NUM_QUERIES, NUM_WORDS = 720, 60, 128
NUM_SUBSETS, REPEATS = 60, 12
FLIPPED = 0.1  # of the training rows
RECIPE = Recipe(
    model=MLPModel((NUM_WORDS, 64, len(SOURCES)), "relu"),
    training=Training("sgd", lr=0.05, batch=32, epochs=15, momentum=0.9, weight_decay=1e-3),
    loss="cross_entropy",
    measurement="margin",
    preprocessing=Preprocessing(std=2.0),
)


def builtin_bank(path: Path) -> Bank:
    """The bank in `path`, made first where it is not there; a run that was killed goes on."""
    if not path.exists():
        make_bank(_builtin_data(path), RECIPE, num_subsets=NUM_SUBSETS, repeats=REPEATS, seed=0, out=path)
    return load_bank(path)


def _builtin_data(path: Path) -> BankData:
    """The rows and queries; kept beside the bank until it is made, for what is installed may change."""
    rows = path.with_name(path.name + ".runs") / "rows.npz"
    if not rows.exists():
        texts = [(text.source, text.text) for text in python_texts(workers=num_processes()) if text.source in SOURCES]
        with whole(rows) as part, part.open("wb") as file:
            np.savez(file, **_tabulated(texts, np.random.default_rng(0)))
    with np.load(rows) as held:
        arrays = dict(held)
    return BankData(**{name: arrays.pop(name) for name in ("x_train", "x_query", "y_train", "y_query")}, extras=arrays)


def _tabulated(texts: list[tuple[str, str]], random: np.random.Generator) -> dict[str, np.ndarray]:
    """Equally many documents of every source as counts of the most frequent words (uint8), some labels replaced."""
    of_each = (NUM_ROWS + NUM_QUERIES) // len(SOURCES)
    places = np.concatenate([
        random.permutation([place for place, (source, _text) in enumerate(texts) if source == name])[:of_each] for name in SOURCES
    ])
    places = random.permutation(places)
    words = [Counter(re.findall(r"[a-z]+", texts[place][1].partition("\n\n")[2].lower())) for place in places]
    frequent = [word for word, _count in sum(words[:NUM_ROWS], Counter()).most_common(NUM_WORDS)]
    x = np.array([[min(counted[word], 255) for word in frequent] for counted in words], dtype=np.uint8)
    y = np.array([SOURCES.index(texts[place][0]) for place in places], dtype=np.uint8)
    flipped = np.zeros(NUM_ROWS, dtype=bool)
    flipped[random.permutation(NUM_ROWS)[: round(FLIPPED * NUM_ROWS)]] = True
    other = (y[:NUM_ROWS] + random.integers(1, len(SOURCES), NUM_ROWS)) % len(SOURCES)
    y_train = np.where(flipped, other, y[:NUM_ROWS]).astype(np.uint8)
    return {"x_train": x[:NUM_ROWS], "y_train": y_train, "x_query": x[NUM_ROWS:], "y_query": y[NUM_ROWS:], "flipped": flipped}
