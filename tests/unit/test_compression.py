import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.compression import (
    MOST_BITS,
    Quantiser,
    allotted_bits,
    best_step,
    distortion,
    largest_coordinates,
    largest_rectangles,
    pack_codes,
    unpack_codes,
)

MAX_1960 = {
    1: (1.596, 0.3634),
    2: (0.9957, 0.1188),
    3: (0.5860, 0.03744),
    4: (0.3352, 0.01154),
    5: (0.1881, 0.003495),
}  # table II


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# which coordinates


def test_largest_contributions_lose_the_least_of_independent_scores():
    """The error of scores is the sum of what was left out, for coordinates drawn independently."""
    u_sizes, g_sizes = made(6, seed=1).exp(), made(6, seed=2).exp()
    u, g = made(4000, 6, seed=3) * u_sizes, made(4000, 6, seed=4) * g_sizes
    errors = {}
    for kept in itertools.combinations(range(6), 3):
        left_out = [place for place in range(6) if place not in kept]
        errors[frozenset(kept)] = float((u[:, left_out] * g[:, left_out]).sum(dim=1).square().mean())
    chosen = largest_coordinates((u_sizes * g_sizes).square(), 3)
    assert min(errors, key=errors.get) == frozenset(chosen.tolist())


def test_of_equal_contributions_the_earlier():
    assert largest_coordinates(torch.tensor([1.0, 2.0, 2.0, 1.0]), 3).tolist() == [1, 2, 0]


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_the_unit_of_contributions_does_not_matter(seed, unit):
    contributions = made(9, seed=seed).square()
    assert torch.equal(largest_coordinates(contributions, 4), largest_coordinates(unit * contributions, 4))
    assert torch.equal(allotted_bits(contributions, 17), allotted_bits(unit * contributions, 17))


@pytest.mark.parametrize("num", [0, 5])
def test_as_many_coordinates_as_there_are(num):
    with pytest.raises(ValueError, match=f"{num} coordinates asked for; expected from 1 to the 4"):
        largest_coordinates(torch.ones(4), num)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_contributions_are_mean_squares(bad):
    with pytest.raises(ValueError, match="negative or not finite; expected mean squares"):
        largest_coordinates(torch.tensor([1.0, bad]), 1)
    with pytest.raises(ValueError, match="negative or not finite; expected mean squares"):
        allotted_bits(torch.tensor([1.0, bad]), 4)


# rectangles


def captured_by(contributions: dict, groups: dict, inputs: dict, outputs: dict) -> float:
    return sum(float(value[outputs[name]][:, inputs[groups[name]]].sum()) for name, value in contributions.items())


@given(st.integers(0, 10_000), st.integers(3, 70))
@settings(max_examples=30)
def test_rectangles_fit_and_share_the_input_side_of_a_group(seed, num):
    shapes, groups = {"a": (4, 5), "b": (3, 5), "c": (5, 4)}, {"a": "a", "b": "a", "c": "c"}
    contributions = {name: made(*shape, seed=seed + place).square() for place, (name, shape) in enumerate(shapes.items())}
    inputs, outputs = largest_rectangles(contributions, groups, num)
    assert inputs.keys() == {"a", "c"} and outputs.keys() == shapes.keys()
    for places in (*inputs.values(), *outputs.values()):
        assert len(set(places.tolist())) == len(places) > 0
    assert sum(len(outputs[name]) * len(inputs[groups[name]]) for name in shapes) <= num


def test_all_of_every_layer_if_there_is_room():
    contributions = {"a": made(3, 4).square(), "b": made(2, 5).square()}
    inputs, outputs = largest_rectangles(contributions, {"a": "a", "b": "b"}, 22)
    assert {name: sorted(places.tolist()) for name, places in inputs.items()} == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3, 4]}
    assert {name: sorted(places.tolist()) for name, places in outputs.items()} == {"a": [0, 1, 2], "b": [0, 1]}


def test_rectangles_of_outer_products_are_near_the_best():
    """Where contributions fall on both sides, as eigenvalues do, growing one eigenvector at a time is near the best of all."""
    sides = [2.0 ** -torch.arange(4.0, dtype=torch.float64), 3.0 ** -torch.arange(4.0, dtype=torch.float64)]
    contributions = {"a": 5 * sides[0][:, None] * sides[1], "b": sides[1][:, None] * sides[0]}
    groups = {"a": "a", "b": "b"}
    best = 0.0
    for k in itertools.product(range(1, 5), repeat=4):
        if k[0] * k[1] + k[2] * k[3] <= 12:
            inputs, outputs = (
                {"a": torch.arange(k[0]), "b": torch.arange(k[2])},
                {"a": torch.arange(k[1]), "b": torch.arange(k[3])},
            )
            best = max(best, captured_by(contributions, groups, inputs, outputs))
    assert captured_by(contributions, groups, *largest_rectangles(contributions, groups, 12)) > 0.97 * best


def test_a_value_for_every_layer():
    with pytest.raises(ValueError, match="1 values for 2 layers; expected one for each or more"):
        largest_rectangles({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, {"a": "a", "b": "b"}, 1)


# bits


def test_bits_against_an_exhaustive_search():
    contributions = torch.tensor([9.0, 2.0, 0.3, 0.01], dtype=torch.float64)
    for num_bits in (1, 4, 7, 12):
        errors = {
            bits: sum(float(c) * distortion(b) for c, b in zip(contributions, bits, strict=True))
            for bits in itertools.product(range(MOST_BITS + 1), repeat=4)
            if sum(bits) == num_bits
        }
        assert tuple(allotted_bits(contributions, num_bits).tolist()) == min(errors, key=errors.get)


@given(st.integers(0, 10_000), st.integers(1, 80))
def test_larger_contributions_get_no_fewer_bits(seed, num_bits):
    contributions = made(10, seed=seed).square()
    bits = allotted_bits(contributions, num_bits)[contributions.argsort(descending=True)]
    assert bits.sum() == num_bits and (bits.diff() <= 0).all()


def test_as_many_bits_as_coordinates_take():
    with pytest.raises(ValueError, match="3 coordinates asked for; expected from 1 to the 2"):
        allotted_bits(torch.ones(2), 2 * MOST_BITS + 1)


# quantisers


@pytest.mark.parametrize(("bits", "known"), MAX_1960.items())
def test_steps_and_distortions_are_those_of_the_table(bits, known):
    step, error = known
    assert best_step(bits) == pytest.approx(step, rel=1e-3)
    assert distortion(bits) == pytest.approx(error, rel=1e-3)


def made_quantiser(bits: list[int], *, sizes: list[float] | None = None, groups: list[int] | None = None) -> Quantiser:
    num = len(bits)
    return Quantiser(
        torch.tensor(bits), torch.tensor(sizes or [1.0] * num, dtype=torch.float64), torch.tensor(groups or [0] * num)
    )


def test_codes_against_a_slow_twin():
    quantiser = made_quantiser([1, 2, 3, 8, 4], sizes=[1.0, 0.1, 20.0, 3.0, 0.5], groups=[0, 1, 0, 1, 1])
    rows = made(7, 5) * quantiser.sizes
    restored = quantiser.decode(*quantiser.encode(rows))
    for row, again in zip(rows, restored, strict=True):
        for group in (0, 1):
            members = [place for place in range(5) if quantiser.groups[place] == group]
            mean_square = sum(float(row[place] / quantiser.sizes[place]) ** 2 for place in members) / len(members)
            scale = float(np.float16(mean_square**0.5))
            for place in members:
                bits, unit = int(quantiser.bits[place]), scale * float(quantiser.sizes[place])
                levels = [(k + 0.5) * best_step(bits) * unit for k in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
                nearest = min(levels, key=lambda level: abs(level - float(row[place])))
                assert float(again[place]) == pytest.approx(nearest, rel=1e-6)


@pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))
def test_normal_values_lose_what_is_said(bits):
    quantiser = made_quantiser([bits] * 500)
    rows = made(200, 500)
    error = (quantiser.decode(*quantiser.encode(rows)) - rows).square().mean()
    assert float(error) == pytest.approx(distortion(bits), rel=0.05)  # of 100,000 draws


@given(st.integers(0, 10_000), st.integers(-6, 6))
def test_a_longer_row_has_the_same_codes(seed, exponent):
    """By powers of two, which float16 scales take without loss."""
    quantiser = made_quantiser([1, 3, 8, 5])
    rows = made(3, 4, seed=seed)
    codes, scales = quantiser.encode(rows)
    longer, larger = quantiser.encode(rows * 2.0**exponent)
    assert torch.equal(codes, longer)
    torch.testing.assert_close(larger, scales * 2.0**exponent, rtol=1e-3, atol=0.0)


def test_a_row_of_zeros_stays_one():
    quantiser = made_quantiser([1, 8])
    assert torch.equal(
        quantiser.decode(*quantiser.encode(torch.zeros(2, 2, dtype=torch.float64))), torch.zeros(2, 2, dtype=torch.float64)
    )


@given(st.integers(0, 10_000), st.lists(st.integers(1, MOST_BITS), min_size=1, max_size=40))
def test_packed_codes_come_back_and_take_the_bytes_that_are_said(seed, bits):
    bits = np.array(bits)
    random = np.random.default_rng(seed)
    codes = (random.integers(0, 256, size=(3, len(bits))) % 2**bits).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert np.array_equal(unpack_codes(packed, bits), codes)
    assert packed.shape[1] + 2 == made_quantiser(bits.tolist()).num_bytes


def test_every_group_has_a_scale():
    quantiser = made_quantiser([8, 8, 8], groups=[0, 1, 2])
    assert quantiser.num_bytes == 3 + 2 * 3
    assert replace(quantiser, groups=torch.zeros(3, dtype=torch.long)).num_bytes == 3 + 2
