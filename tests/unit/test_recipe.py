import json
import re
from dataclasses import fields

import pytest

from tda.bank_data import ARRAYS
from tda.bank_help import DESCRIPTION, EXAMPLE
from tda.recipe import (
    ACTIVATIONS,
    MEASUREMENTS,
    CausalLMModel,
    MLPModel,
    Preprocessing,
    Recipe,
    Training,
    parse_recipe,
    resolve,
)
from tda.task import CausalLM, Classification, Regression
from tests.banks import recipe, recipe_values


def test_a_recipe_is_read_and_written():
    made = recipe(preprocessing={"scale": 0.5, "mean": [0, 1, 2], "std": 2})
    assert made.model == MLPModel((3, 5, 4, 3), "tanh")
    assert (made.training.optimizer, made.training.momentum, made.training.betas) == ("sgd", 0.9, (0.9, 0.999))
    assert made.preprocessing.mean == (0, 1, 2)
    assert parse_recipe(made.to_json(), origin="again") == made


@pytest.mark.parametrize(
    ("loss", "measurement", "sign", "task"),
    [
        ("cross_entropy", "margin", -1, Classification("margin")),
        ("cross_entropy", "log_probability", -1, Classification("log_probability")),
        ("cross_entropy", "loss", 1, Classification("loss")),
        ("squared_error", "absolute_error", 1, Regression("absolute_error")),
        ("squared_error", "squared_error", 1, Regression("squared_error")),
    ],
)
def test_the_task_and_the_sign_of_its_cost(loss, measurement, sign, task):
    made = recipe(loss=loss, measurement=measurement)
    assert (made.cost_sign, made.task) == (sign, task)


def test_a_language_model(tmp_path):
    made = recipe(model={"kind": "causal_lm", "path": "model"}, loss="causal_lm", measurement="loss")
    assert made.task == CausalLM("loss")
    with pytest.raises(FileNotFoundError, match="no folder model beside the file"):
        resolve(made, tmp_path, origin="bank.npz")
    (tmp_path / "model").mkdir()
    assert resolve(made, tmp_path, origin="bank.npz").model.path == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "recipe.loss: expected one of cross_entropy, squared_error, causal_lm; got 'hinge'"),
        ({"measurement": "absolute_error"}, "recipe.measurement: expected one of margin, loss, log_probability; got 'absolute_"),
        ({"measurement": None}, "missing in the recipe: measurement (one of margin, loss, log_probability"),
        ({"losses": 1}, "recipe: unknown key losses; known here: model, training, loss"),
        ({"loss": "causal_lm", "measurement": "loss"}, "causal_lm does not go with recipe.model.kind mlp"),
        ({"model": 3}, "recipe.model: expected an object; got 3"),
        ({"model__kind": "resnet"}, "recipe.model.kind: expected one of mlp, causal_lm; got 'resnet'"),
        ({"model__dims": [3]}, "recipe.model.dims: expected two or more whole numbers"),
        ({"model__dims": [3, 0]}, "recipe.model.dims: expected two or more whole numbers"),
        ({"model__activation": "sine"}, "recipe.model.activation: expected one of relu, tanh, gelu"),
        ({"model__init": "zeros"}, "recipe.model.init: expected one of torch.nn.Linear default; got 'zeros'"),
        ({"model__width": 3}, "recipe.model: unknown key width; known here: kind, dims"),
        ({"training__optimizer": "lion"}, "recipe.training.optimizer: expected one of sgd, adamw; got 'lion'"),
        ({"training__optimizer": "adamw"}, "recipe.training.momentum: 0.9 with adamw; expected 0"),
        ({"training__lr": 0}, "recipe.training.lr: expected a number above 0; got 0"),
        ({"training__batch": 1.5}, "recipe.training.batch: expected a whole number from 1; got 1.5"),
        ({"training__epochs": True}, "recipe.training.epochs: expected a whole number from 1; got True"),
        ({"training__momentum": 1}, "recipe.training.momentum: expected a number from 0 to below 1; got 1"),
        ({"training__betas": [0.9]}, "recipe.training.betas: expected two numbers"),
        ({"training__schedule": "cosine"}, "recipe.training.schedule: expected one of constant; got 'cosine'"),
        ({"training__warmup": 3}, "recipe.training: unknown key warmup"),
        ({"preprocessing__std": 0}, "recipe.preprocessing.std: expected a number or one per feature, above 0; got 0"),
        ({"preprocessing__mean": []}, "recipe.preprocessing.mean: expected a number or one per feature"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        parse_recipe(json.dumps(recipe_values(**changes)), origin="some.npz")
    assert str(error.value).startswith("some.npz: ")


def test_all_that_is_missing_is_told_at_once():
    words = (
        "some.npz: missing in the recipe: model.dims (two or more whole numbers from 1: inputs, widths, outputs), "
        "training.optimizer (one of sgd, adamw), training.lr (a number above 0), training.batch (a whole number from 1), "
        "training.epochs (a whole number from 1), loss (one of cross_entropy, squared_error, causal_lm), measurement (one of "
        "margin, loss, log_probability, absolute_error, squared_error, by the loss); add them, `tda evaluate bank --help` has an "
        "example"
    )
    with pytest.raises(ValueError) as error:
        parse_recipe('{"model": {"kind": "mlp"}, "training": null}', origin="some.npz")
    assert str(error.value) == words
    with pytest.raises(ValueError, match=r"model.kind \(one of mlp, causal_lm\), model.dims \(.*add them"):
        parse_recipe("{}", origin="some.npz")
    with pytest.raises(ValueError, match=r"recipe: model.path \(a path\); add it"):
        parse_recipe(json.dumps(recipe_values(model={"kind": "causal_lm"})), origin="some.npz")


def test_the_example_of_the_help_is_a_recipe_and_names_all_that_is_known():
    made = parse_recipe(EXAMPLE, origin="help")
    assert made.task == Classification("margin")
    assert EXAMPLE in DESCRIPTION
    known = [*ACTIVATIONS, *MEASUREMENTS, *(word for words in MEASUREMENTS.values() for word in words), *ARRAYS]
    known += [one.name for section in (Recipe, MLPModel, CausalLMModel, Training, Preprocessing) for one in fields(section)]
    assert [word for word in known if not re.search(rf"\b{word}\b", DESCRIPTION)] == ["init"]


def test_not_json():
    with pytest.raises(ValueError, match="the recipe is not JSON"):
        parse_recipe("{", origin="some.npz")


def test_what_may_be_left_out_or_null():
    made = recipe(model={"kind": "mlp", "dims": [3, 2]}, training__momentum=None, training__weight_decay=None, name="mine")
    assert (made.model.activation, made.training.momentum, made.training.weight_decay) == ("identity", 0, 0)
    assert recipe(model__activation=None).model.activation == "relu"
    values = recipe_values(training__betas=[0.9, 0.99])
    values["training"]["eps"] = None
    assert parse_recipe(json.dumps(values), origin="").training.eps == 1e-8
