"""The rows and queries of a bank: as they are stored, checked against the recipe, and as a model takes them."""

import dataclasses
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float

from tda.data import Data, Documents, Examples
from tda.recipe import CausalLMModel, MLPModel, Preprocessing, Recipe

ARRAYS = ("x_train", "y_train", "x_query", "y_query")


@dataclass(frozen=True)
class BankData:
    """Training rows and queries, as they are stored: pixels, features, or token ids without `y`."""

    x_train: np.ndarray  # (row, ...)
    x_query: np.ndarray  # (query, ...)
    y_train: np.ndarray | None = None  # (row) classes, or (row) or (row, output) values
    y_query: np.ndarray | None = None
    extras: dict[str, np.ndarray] = field(default_factory=dict)  # flipped, domains, original row numbers

    @property
    def num_rows(self) -> int:
        """Training rows."""
        return len(self.x_train)

    @property
    def num_queries(self) -> int:
        """Queries."""
        return len(self.x_query)

    @property
    def flipped(self) -> Bool[np.ndarray, " row"] | None:
        """Which training rows have a wrong label; None if the bank does not say."""
        if "flipped" not in self.extras:
            return None
        flipped = self.extras["flipped"]
        if flipped.shape == (self.num_rows,) and (flipped.dtype == bool or set(np.unique(flipped)) <= {0, 1}):
            return flipped.astype(bool)
        return np.isin(np.arange(self.num_rows), flipped)  # row numbers

    def train(self, recipe: Recipe) -> Data:
        """The training rows as a model takes them."""
        return _as_data(self.x_train, self.y_train, recipe, self.extras.get("train_domain"), "row")

    def queries(self, recipe: Recipe) -> Data:
        """The queries as a model takes them."""
        return _as_data(self.x_query, self.y_query, recipe, self.extras.get("query_domain"), "query")

    def digest(self, recipe: Recipe) -> str:
        """A digest of all that a training depends on: rows, queries and recipe, of a language model its files."""
        digest = xxhash.xxh3_128()
        for name in ARRAYS:
            values = getattr(self, name)
            digest.update(
                b"" if values is None else f"{values.dtype}{values.shape}".encode() + np.ascontiguousarray(values).tobytes()
            )
        if isinstance(recipe.model, CausalLMModel):
            for path in sorted(Path(recipe.model.path).glob("*.*")):
                digest.update(path.name.encode() + path.read_bytes())
            recipe = dataclasses.replace(recipe, model=CausalLMModel(""))
        digest.update(recipe.to_json().encode())
        return digest.hexdigest()


def read_arrays(path: Path, *, wrong: str, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file.

    Raises:
        ValueError: it is not one of plain arrays; the message is `wrong`, the reason, and `remedy`.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("not an .npz file")
        with np.load(path, allow_pickle=False) as file:
            return {name: _plain(file, name) for name in file.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{wrong}: {error}; {remedy}") from error


def _plain(file: Any, name: str) -> np.ndarray:
    try:
        array = file[name]
    except ValueError:  # numpy would have to trust it
        array = None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is not an array of numbers or text")
    return array


def check_data(data: BankData, recipe: Recipe, *, origin: str) -> None:
    """Refuse rows and queries that do not go with each other or with the recipe.

    Raises:
        ValueError: they do not; the message says what was expected.
    """
    if not data.num_rows or not data.num_queries or data.x_train.shape[1:] != data.x_query.shape[1:]:
        raise ValueError(
            f"{origin}: x_train is of shape {data.x_train.shape} and x_query of {data.x_query.shape}; expected at least one row "
            "each, all of the same shape"
        )
    _check_flipped(data, origin=origin)
    if isinstance(recipe.model, CausalLMModel):
        for name in ("x_train", "x_query"):
            _check_tokens(getattr(data, name), name, recipe.model, origin=origin)
        return
    for name in ("train", "query"):
        x, y = getattr(data, f"x_{name}"), getattr(data, f"y_{name}")
        if y is None or len(y) != len(x):
            got = "none" if y is None else f"{len(y)}"
            raise ValueError(f"{origin}: y_{name}: expected a target for each of the {len(x)} rows of x_{name}; got {got}")
        _check_features(x, f"x_{name}", recipe, origin=origin)
        _check_targets(y, f"y_{name}", recipe.model, loss=recipe.loss, origin=origin)


def _check_flipped(data: BankData, *, origin: str) -> None:
    flipped = data.extras.get("flipped", np.zeros(data.num_rows, bool))
    no_rows = flipped[~np.isin(flipped, np.arange(data.num_rows))]
    fits = flipped.shape == (data.num_rows,) if flipped.dtype == bool else flipped.ndim == 1 and not no_rows.size
    if not fits:
        found = f": {', '.join(str(value) for value in no_rows[:3])}" if no_rows.size else ""
        raise ValueError(
            f"{origin}: flipped: expected a boolean for each of {data.num_rows} rows, or row numbers from 0 to "
            f"{data.num_rows - 1}; got {flipped.dtype} of shape {flipped.shape}{found}"
        )


def _check_tokens(x: np.ndarray, name: str, model: CausalLMModel, *, origin: str) -> None:
    from transformers import AutoConfig

    if x.dtype.kind not in "ui" or x.ndim != 2 or x.shape[1] < 2:
        raise ValueError(
            f"{origin}: {name} is {x.dtype} of shape {x.shape}; expected whole numbers (row, token), two tokens or more, for a "
            "causal_lm"
        )
    config = AutoConfig.from_pretrained(model.path).get_text_config()
    room = getattr(config, "max_position_embeddings", None) or x.shape[1]
    if x.min() < 0 or x.max() >= config.vocab_size or x.shape[1] > room:
        raise ValueError(
            f"{origin}: {name} has rows of {x.shape[1]} tokens from {x.min()} to {x.max()}; expected at most {room}, from 0 to "
            f"{config.vocab_size - 1}, as the model in recipe.model.path knows them; tokenise or cut the rows for it"
        )


def _check_features(x: np.ndarray, name: str, recipe: Recipe, *, origin: str) -> None:
    inputs = recipe.model.dims[0]
    if x.reshape(len(x), -1).shape[1] != inputs:
        raise ValueError(f"{origin}: {name} has {x[0].size} features; expected {inputs}, the first of recipe.model.dims")
    if x.dtype.kind not in "uif" or not np.isfinite(x).all():
        raise ValueError(f"{origin}: {name}: expected finite numbers; got {not_finite(x)}")
    for part in dataclasses.astuple(recipe.preprocessing):
        if not isinstance(part, float) and len(part) != inputs:
            raise ValueError(
                f"{origin}: recipe.preprocessing: expected one number, or {inputs}, one per feature; got {len(part)}"
            )


def _check_targets(y: np.ndarray, name: str, model: MLPModel, *, loss: str, origin: str) -> None:
    outputs = model.dims[-1]
    if loss == "cross_entropy":
        if outputs < 2 or y.ndim != 1 or y.dtype.kind not in "ui" or y.min() < 0 or y.max() >= outputs:
            raise ValueError(
                f"{origin}: {name}: expected one class number from 0 to {outputs - 1} per row (dims ends in {outputs};"
                f" cross_entropy needs 2 or more); got {y.dtype} of shape {y.shape}, {y.min()} to {y.max()}"
            )
    elif y.reshape(len(y), -1).shape[1] != outputs or y.dtype.kind not in "uif" or not np.isfinite(y).all():
        raise ValueError(
            f"{origin}: {name}: expected {outputs} finite numbers per row, the last of recipe.model.dims; got {y.dtype} of shape "
            f"{y.shape}{'' if y.dtype.kind in 'uif' and np.isfinite(y).all() else ', ' + not_finite(y)}"
        )


def _as_data(x: np.ndarray, y: np.ndarray | None, recipe: Recipe, domains: np.ndarray | None, word: str) -> Data:
    if isinstance(recipe.model, CausalLMModel):
        names = [f"{word}-{number}" for number in range(len(x))]
        tokens = [row.astype(np.int32) for row in x]
        return Documents(
            ids=names,
            sources=["rows"] * len(x) if domains is None else [str(domain) for domain in domains],
            parts=["all"] * len(x),
            content_hashes=[xxhash.xxh3_128_hexdigest(row.tobytes()) for row in tokens],
            tokens=tokens,
            loss_starts=np.ones(len(x), dtype=np.int64),
        )
    classes = recipe.loss == "cross_entropy"
    targets = torch.from_numpy(y.astype(np.int64 if classes else np.float32))
    return Examples(torch.from_numpy(preprocessed(x, recipe.preprocessing)), targets)


def preprocessed(x: np.ndarray, preprocessing: Preprocessing) -> Float[np.ndarray, "row feature"]:
    """`(x * scale - mean) / std` in float32, every row flat."""
    scale, mean, std = (np.asarray(part, dtype=np.float64) for part in dataclasses.astuple(preprocessing))
    return ((x.reshape(len(x), -1).astype(np.float64) * scale - mean) / std).astype(np.float32)


def not_finite(values: np.ndarray) -> str:
    """What keeps `values` from being finite numbers, in words."""
    if values.dtype.kind not in "fui":
        return f"{values.dtype} values"
    return f"{int((~np.isfinite(values)).sum())} that are not"
