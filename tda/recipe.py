"""What the models of a bank are and how they are trained and measured: its recipe, read strictly from JSON."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tda.task import CausalLM, Classification, Regression, Task

ACTIVATIONS = ("relu", "tanh", "gelu", "sigmoid", "silu", "identity")
INIT = "torch.nn.Linear default"
MEASUREMENTS = {  # of each loss
    "cross_entropy": ("margin", "loss", "log_probability"),
    "squared_error": ("absolute_error", "squared_error"),
    "causal_lm": ("loss", "margin", "log_probability"),
}
OPTIMIZERS = ("sgd", "adamw")
KINDS = ("mlp", "causal_lm")
DIMS = "two or more whole numbers from 1: inputs, widths, outputs"
ABOVE_ZERO, COUNT, PATH = "a number above 0", "a whole number from 1", "a path"
NOTES = ("name", "description", "source", "notes")  # words for people, which change nothing


@dataclass(frozen=True)
class MLPModel:
    """Linear layers with biases and an activation between them, freshly initialised in every run."""

    dims: tuple[int, ...]  # inputs, widths, outputs
    activation: str = "relu"
    init: str = INIT
    kind: str = "mlp"


@dataclass(frozen=True)
class CausalLMModel:
    """A pretrained causal language model, from whose weights every run starts."""

    path: str  # of its folder; in the file, relative to it
    kind: str = "causal_lm"


@dataclass(frozen=True)
class Training:
    """Constant learning rate; every epoch reshuffles, its last batch may be short."""

    optimizer: str  # sgd (coupled weight decay) or adamw (decoupled), as in torch.optim
    lr: float
    batch: int
    epochs: int
    momentum: float = 0.0  # sgd
    betas: tuple[float, float] = (0.9, 0.999)  # adamw
    eps: float = 1e-8  # adamw
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Preprocessing:
    """Inputs to the model are `(x * scale - mean) / std`, of single numbers or one per feature."""

    scale: float | tuple[float, ...] = 1.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0


@dataclass(frozen=True)
class Recipe:
    """Model, training, loss and measurement of a bank."""

    model: MLPModel | CausalLMModel
    training: Training
    loss: str
    measurement: str
    preprocessing: Preprocessing = Preprocessing()

    @property
    def cost_sign(self) -> int:
        """The factor that makes a cost, of which lower is better, of the measurement."""
        return -1 if self.measurement in ("margin", "log_probability") else 1

    @property
    def task(self) -> Task:
        """The loss and the measurement as the methods read them."""
        return {"cross_entropy": Classification, "squared_error": Regression, "causal_lm": CausalLM}[self.loss](self.measurement)

    def to_json(self) -> str:
        """The recipe as it stands in a file."""
        return json.dumps(asdict(self))


def parse_recipe(text: str, *, origin: str) -> Recipe:
    """The recipe in the JSON string `text`; `origin` names it in messages.

    Raises:
        ValueError: it is not JSON, or a key is missing, unknown, or has a wrong value.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{origin}: the recipe is not JSON: {error}; expected a JSON object as a string") from error
    reader = _Reader(origin)
    values = reader.section(values, "recipe", known=[field.name for field in fields(Recipe)] + list(NOTES))
    _refuse_missing(values, origin=origin)
    loss = reader.one_of(values, "recipe", "loss", tuple(MEASUREMENTS))
    measurement = reader.one_of(values, "recipe", "measurement", MEASUREMENTS[loss])
    model = _model(reader, values["model"])
    if (model.kind == "causal_lm") != (loss == "causal_lm"):
        raise ValueError(
            f"{origin}: recipe.loss: {loss} does not go with recipe.model.kind {model.kind}; causal_lm needs causal_lm"
        )
    training = _training(reader, values["training"])
    preprocessing = _preprocessing(reader, values.get("preprocessing") or {})
    return Recipe(model, training, loss, measurement, preprocessing)


def _refuse_missing(values: dict, *, origin: str) -> None:
    """Tell all keys at once that have no default and are not there."""
    of_loss = MEASUREMENTS.get(str(values.get("loss")), dict.fromkeys(word for words in MEASUREMENTS.values() for word in words))
    model = values.get("model", {})
    of_model = {"path": PATH} if isinstance(model, dict) and model.get("kind") == "causal_lm" else {"dims": DIMS}
    needed = {
        "model": {"kind": _one_of(KINDS), **of_model},
        "training": {"optimizer": _one_of(OPTIMIZERS), "lr": ABOVE_ZERO, "batch": COUNT, "epochs": COUNT},
    }
    missing = [
        f"{name}.{key} ({expected})"
        for name, keys in needed.items()
        if isinstance(section := values.get(name, {}), dict)
        for key, expected in keys.items()
        if section.get(key) is None
    ]
    if "loss" not in values:
        missing.append(f"loss ({_one_of(MEASUREMENTS)})")
    if "measurement" not in values:
        missing.append(f"measurement ({_one_of(of_loss)}{'' if 'loss' in values else ', by the loss'})")
    if missing:
        raise ValueError(
            f"{origin}: missing in the recipe: {', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}, "
            "`tda evaluate bank --help` has an example"
        )


def _one_of(words: Iterable[str]) -> str:
    return f"one of {', '.join(words)}"


def _model(reader: "_Reader", values: Any) -> MLPModel | CausalLMModel:
    at = "recipe.model"
    kind = reader.one_of(reader.section(values, at), at, "kind", KINDS)
    if kind == "causal_lm":
        values = reader.section(values, at, known=["kind", "path"])
        return CausalLMModel(reader.checked(values, at, "path", lambda path: isinstance(path, str) and path != "", PATH))
    values = reader.section(values, at, known=["kind", "dims", "activation", "init"])
    dims = reader.checked(values, at, "dims", _is_dims, DIMS)
    usual = "identity" if len(dims) == 2 else MLPModel.activation  # of one layer there is nothing between
    activation = reader.one_of({"activation": usual} | values, at, "activation", ACTIVATIONS)
    init = reader.one_of({"init": INIT} | values, at, "init", (INIT,))
    return MLPModel(tuple(dims), activation, init)


def _training(reader: "_Reader", values: Any) -> Training:
    at = "recipe.training"
    values = reader.section(values, at, known=[field.name for field in fields(Training)] + ["schedule"])
    reader.one_of({"schedule": "constant"} | values, at, "schedule", ("constant",))
    optimizer = reader.one_of(values, at, "optimizer", OPTIMIZERS)
    values = {field.name: field.default for field in fields(Training) if field.name in _OPTIONAL} | values
    numbers = {
        name: reader.checked(values, at, name, check, expected)
        for name, (check, expected) in {
            "lr": (_is_number(lambda value: value > 0), ABOVE_ZERO),
            "batch": (_is_count, COUNT),
            "epochs": (_is_count, COUNT),
            "momentum": (_is_number(lambda value: 0 <= value < 1), "a number from 0 to below 1"),
            "betas": (_is_betas, "two numbers from 0 to below 1"),
            "eps": (_is_number(lambda value: value >= 0), "a number from 0"),
            "weight_decay": (_is_number(lambda value: value >= 0), "a number from 0"),
        }.items()
    }
    if optimizer == "adamw" and numbers["momentum"]:
        raise ValueError(f"{reader.origin}: {at}.momentum: {numbers['momentum']} with adamw; expected 0, or betas; leave it out")
    as_type = {"batch": int, "epochs": int, "betas": lambda betas: tuple(map(float, betas))}
    return Training(optimizer=optimizer, **{name: as_type.get(name, float)(value) for name, value in numbers.items()})


_OPTIONAL = ("momentum", "betas", "eps", "weight_decay")


def _preprocessing(reader: "_Reader", values: Any) -> Preprocessing:
    at = "recipe.preprocessing"
    values = reader.section(values, at, known=[field.name for field in fields(Preprocessing)])
    values = asdict(Preprocessing()) | values
    read = {}
    for name in values:
        above_zero = name == "std"
        expected = "a number or one per feature" + (", above 0" if above_zero else "")
        value = reader.checked(values, at, name, _is_numbers(above_zero), expected)
        read[name] = tuple(map(float, value)) if isinstance(value, Sequence) else float(value)
    return Preprocessing(**read)


@dataclass(frozen=True)
class _Reader:
    """Values of a JSON object, checked; `origin` names the file."""

    origin: str

    def section(self, values: Any, at: str, known: Sequence[str] | None = None) -> dict:
        if not isinstance(values, dict):
            raise ValueError(f"{self.origin}: {at}: expected an object; got {values!r}")
        unknown = [key for key in values if known is not None and key not in known]
        if unknown:
            raise ValueError(f"{self.origin}: {at}: unknown key {', '.join(unknown)}; known here: {', '.join(known or ())}")
        return {key: value for key, value in values.items() if value is not None}

    def one_of(self, values: dict, at: str, key: str, known: Sequence[str]) -> str:
        if (value := values[key]) not in known:
            raise ValueError(f"{self.origin}: {at}.{key}: expected {_one_of(known)}; got {value!r}")
        return value

    def checked(self, values: dict, at: str, key: str, check: Callable[[Any], bool], expected: str) -> Any:
        if not check(value := values[key]):
            raise ValueError(f"{self.origin}: {at}.{key}: expected {expected}; got {value!r}")
        return value


def _is_number(check: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and check(value)


def _is_numbers(above_zero: bool) -> Callable[[Any], bool]:
    one = _is_number(lambda value: value > 0 or not above_zero)
    return lambda value: one(value) or (isinstance(value, (list, tuple)) and len(value) > 0 and all(map(one, value)))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_dims(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) >= 2 and all(map(_is_count, value))


def _is_betas(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number(lambda beta: 0 <= beta < 1), value))


def resolve(recipe: Recipe, folder: Path, *, origin: str) -> Recipe:
    """`recipe` with the model's path, if it has one, as seen from here instead of from `folder`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not isinstance(recipe.model, CausalLMModel):
        return recipe
    path = (folder / recipe.model.path).resolve()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{origin}: recipe.model.path: no folder {recipe.model.path} beside the file ({path}); expected a causal language "
            "model as `save_pretrained` leaves it; move the bank back to its place, or copy the model there"
        )
    return Recipe(CausalLMModel(str(path)), recipe.training, recipe.loss, recipe.measurement, recipe.preprocessing)
