"""A ground-truth bank: measurements of fixed queries after models were retrained on random subsets of the rows."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from tda.artifacts import whole
from tda.bank_data import ARRAYS, BankData, check_data, not_finite, read_arrays
from tda.rank_correlation import spearman
from tda.recipe import CausalLMModel, Recipe, parse_recipe, resolve

TABLES = ("masks", "measurements", "x_train", "x_query", "recipe")  # every bank has these


@dataclass(frozen=True)
class Bank:
    """Rows, queries, and the outcomes of retraining that an attribution method has to predict."""

    masks: Bool[np.ndarray, "subset row"]  # True: kept
    measurements: Float[np.ndarray, "subset repeat query"]
    full_runs: Float[np.ndarray, "run query"]  # measurements after training on all rows; there may be none
    data: BankData
    recipe: Recipe

    @property
    def costs(self) -> Float[np.ndarray, "subset query"]:
        """The mean over repeats of every query's measurement, signed so that lower is better."""
        return self.recipe.cost_sign * self.measurements.astype(np.float64).mean(axis=1)


def ceiling(bank: Bank) -> float | None:
    """The noise ceiling: the highest LDS that a method can be expected to reach. None if nothing was repeated.

    It is Spearman's correlation over subsets between the means of the two halves of the repeats, averaged over queries, and
    stepped up to all repeats by the Spearman-Brown formula. Its square root is the correlation with infinitely many repeats.
    """
    repeats = bank.measurements.shape[1]
    half = repeats // 2
    if not half:
        return None
    values = bank.measurements.astype(np.float64)
    r = spearman(values[:, :half].mean(axis=1), values[:, half : 2 * half].mean(axis=1)).mean()
    k = repeats / half
    return float(np.sqrt(max(0.0, k * r / (1 + (k - 1) * r)))) if r > 0 else 0.0


def load_bank(path: str | Path) -> Bank:
    """The bank in `path`, checked: every array is there, their shapes agree, and the recipe is valid.

    Raises:
        FileNotFoundError: there is no such file, or the language model that it names is not where it says.
        ValueError: it is no bank, or what it holds does not fit together; the message says what.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such bank; give the .npz file of one, or leave --bank out to have one made")
    remedy = "expected an .npz file of plain arrays; copy or make it again"
    arrays = read_arrays(path, wrong=f"{path}: not a bank", remedy=remedy)
    missing = [name for name in TABLES if name not in arrays]
    if missing:
        raise ValueError(
            f"{path}: {', '.join(missing)} missing; expected the arrays {', '.join(TABLES)}, and y_train and y_query unless "
            f"the rows are tokens; got {', '.join(arrays) or 'none'}; make the bank again"
        )
    recipe = resolve(parse_recipe(str(arrays["recipe"]), origin=str(path)), path.parent, origin=str(path))
    extras = {name: value for name, value in arrays.items() if name not in (*TABLES, *ARRAYS, "full_runs")}
    data = BankData(**{name: arrays.get(name) for name in ARRAYS}, extras=extras)
    check_data(data, recipe, origin=str(path))
    masks = _unpacked(arrays["masks"], data.num_rows, origin=str(path))
    full_runs = arrays.get("full_runs", np.zeros((0, data.num_queries), np.float32))
    measurements = arrays["measurements"]
    for name, values, expected in (
        ("measurements", measurements, (len(masks), None, data.num_queries)),
        ("full_runs", full_runs, (None, data.num_queries)),
    ):
        if not _fits(values.shape, expected) or (name == "measurements" and not values.size):
            raise ValueError(
                f"{path}: {name} is of shape {values.shape}; expected {_words(expected)} for {len(masks)} subsets and "
                f"{data.num_queries} queries; make the bank again"
            )
        if values.dtype.kind != "f":
            raise ValueError(f"{path}: {name}: expected floating-point numbers; got {values.dtype}; make the bank again")
        if not np.isfinite(values).all():
            raise ValueError(
                f"{path}: {name}: expected finite numbers; got {not_finite(values)}; leave those subsets or queries out"
            )
    return Bank(masks, measurements, full_runs, data, recipe)


def save_bank(path: Path, bank: Bank) -> None:
    """Write `bank` to `path`; equal banks are equal bytes. The path of a language model is written relative to the file."""
    recipe = bank.recipe
    if isinstance(recipe.model, CausalLMModel):
        recipe = dataclasses.replace(recipe, model=CausalLMModel(os.path.relpath(recipe.model.path, path.parent.resolve())))
    data = {name: value for name in ARRAYS if (value := getattr(bank.data, name)) is not None}
    with whole(path) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            masks=np.packbits(bank.masks, axis=1),
            measurements=bank.measurements.astype(np.float32),
            full_runs=bank.full_runs.astype(np.float32),
            **bank.data.extras,
            **data,
            recipe=np.array(recipe.to_json()),
        )


def _unpacked(masks: np.ndarray, num_rows: int, *, origin: str) -> Bool[np.ndarray, "subset row"]:
    """Subsets as booleans, from packed bits or as they are."""
    if masks.dtype == bool and masks.ndim == 2 and masks.shape[1] == num_rows:
        unpacked = masks
    elif masks.dtype == np.uint8 and masks.ndim == 2 and masks.shape[1] == -(-num_rows // 8):
        unpacked = np.unpackbits(masks, axis=1, count=num_rows).astype(bool)
    else:
        raise ValueError(
            f"{origin}: masks is {masks.dtype} of shape {masks.shape}; expected uint8 (subset, {-(-num_rows // 8)}), the bits of "
            f"{num_rows} rows as np.packbits(masks, axis=1) gives them; make the bank again"
        )
    if len(unpacked) < 3 or not unpacked.any(axis=1).all():
        raise ValueError(
            f"{origin}: masks: {len(unpacked)} subsets, {int((~unpacked.any(axis=1)).sum())} of them empty; expected 3 or more, "
            "a row kept in each"
        )
    return unpacked


def _fits(shape: tuple[int, ...], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(want in (None, got) for got, want in zip(shape, expected, strict=True))


def _words(expected: Sequence[int | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in expected)})"
