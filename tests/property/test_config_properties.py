"""Whatever is written for a key of `params.yaml` is taken as what it says, or refused in one line that names the key."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tda.config import parse_config
from tests.toy import PARAMS

SHIPPED = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
ODD = [
    None,
    True,
    [],
    {},
    "",
    "5",
    "\0",
    -1,
    1.5,
    10**30,
    -(10**30),
    1e308,
    math.nan,
    math.inf,
    "1e400",
    Path(),
    [1],
    [0, 0],
    [1, 0],
    [0.0],
    ["0"],
    [True],
    [None],
    [[]],
    {"a": 1},
    {1: 2},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda held: st.lists(held, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), held, max_size=2),
    max_leaves=4,
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The place of every section, key, and item of a list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, held in inner:
        yield (*path, name)
        yield from places(held, (*path, name))


PLACES = list(places(SHIPPED))


def placed(path: tuple, value: Any) -> dict:
    """The shipped settings with `value` at `path`."""
    values = copy.deepcopy(SHIPPED)
    section = values
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return values


def check(path: tuple, value: Any) -> None:
    try:
        config = parse_config(placed(path, value), origin="settings")
    except ValueError as error:
        names = [name for name in path if isinstance(name, str)]
        for line in str(error).splitlines():
            assert line.startswith("settings: ")
            assert names[0] in line
            assert names[-1] in line
    else:
        taken: Any = config.model_dump()
        for name in path:
            taken = taken[name]
        if isinstance(taken, float | int) and not isinstance(taken, bool):
            assert not isinstance(value, bool)
            assert taken == type(taken)(value)
        elif not isinstance(taken, bool | dict):
            assert taken == value


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_an_odd_value_is_taken_as_it_is_or_refused_by_its_key(path):
    for value in ODD:
        check(path, value)


@settings(max_examples=300)
@given(st.sampled_from(PLACES), JSON)
def test_any_value_is_taken_as_it_is_or_refused_by_its_key(path, value):
    check(path, value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("segments",), [1], "segments: expected the keys by, indices; got list"),
        (("segments", "indices"), [1], r"segments.indices: expected 0, 1, 2, ... in order; got \[1\]"),
        (("train", "checkpoints"), [0, 0], r"train.checkpoints: expected 0, 1, 2, ... in order; got \[0, 0\]"),
        (("train", "checkpoints"), 4, "train.checkpoints: Input should be a valid list; got 4"),
        (("curation", "drop"), True, "curation.drop: expected no true or false, as YAML also reads yes, .*; got True"),
        (("segments", "in\ndices"), [0], r"unknown key segments.'in\\ndices'; known here: by, indices"),
        (("prepare", "vocabulary"), 10**12, "prepare.vocabulary: Input should be less than or equal to 1000000; got 10+"),
    ],
)
def test_messages(path, value, message):
    with pytest.raises(ValueError, match=f"^settings: {message}$"):
        parse_config(placed(path, value), origin="settings")


def test_settings_without_sections_are_refused():
    with pytest.raises(ValueError, match=r"^settings: expected the keys audit, compute, .* train; got NoneType$"):
        parse_config(None, origin="settings")
