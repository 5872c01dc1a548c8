import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tda.store import Rows
from tda.stored_rows import ARROW, GROUP, MOST_EXPONENT, TOO_LARGE, decode, encode, row_scales, to_stored, unscaled
from tests.store_rows import documents_of, make_rows, open_for_writing

ROUNDING = 2**-11  # of float16's 11 bits, relative to the element
FLOOR = 2**-28  # of the row's largest element; what is smaller may go subnormal in float16
TINY = 2**-126  # smallest normal float32: below, float32 itself rounds

matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 9)),
    elements=st.floats(-TOO_LARGE, TOO_LARGE, width=32, exclude_min=True, exclude_max=True, allow_subnormal=True),
)


def round_trip(vectors: np.ndarray, dtype: str) -> np.ndarray:
    n = len(vectors)
    ids = [str(row) for row in range(n)]
    numbers = np.zeros(n, np.float32)
    identity = {"checkpoint": 0, "segment": 0, "dim": vectors.shape[1], "dtype": dtype}
    batch = encode(Rows(ids, ids, ids, numbers.astype(np.int32), numbers, numbers, vectors), identity)
    return decode(pa.Table.from_batches([batch]), ids, dim=vectors.shape[1]).vectors


@given(matrices)
@example(np.array([[1.0, 65519.0, 3e-8]], np.float32))
@example(np.array([[np.nextafter(np.float32(TOO_LARGE), np.float32(0)), 1.0]], np.float32))
@example(np.array([[np.finfo(np.float32).tiny, 0.0], [0.0, -0.0]], np.float32))
@example(np.array([[1.9999999]], np.float32))
def test_float16_rows_come_back_within_its_rounding(vectors):
    exact = vectors.astype(np.float64)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    error = np.abs(round_trip(vectors, "float16").astype(np.float64) - exact)
    assert (error <= ROUNDING * np.maximum(np.abs(exact), FLOOR * largest) + TINY).all()


@given(matrices)
@example(np.array([[1.0, 1.9999999, 3e-8]], np.float32))
@example(np.array([[np.nextafter(np.float32(TOO_LARGE), np.float32(0)), 1.0]], np.float32))
def test_bfloat16_rows_come_back_within_its_rounding(vectors):
    exact = vectors.astype(np.float64)
    error = np.abs(round_trip(vectors, "bfloat16").astype(np.float64) - exact)
    floor = 2.0**-140 * np.abs(exact).max(axis=1, keepdims=True)  # what is smaller may go subnormal
    assert (error <= 2**-8 * np.maximum(np.abs(exact), floor) + TINY).all()


wide = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP])),
    elements=st.floats(-TOO_LARGE, TOO_LARGE, width=32, exclude_min=True, exclude_max=True, allow_subnormal=True),
    fill=st.just(np.float32(0)),
)


@given(wide)
@example(np.array([[127.5, 1.0]], np.float32))  # what would round to 128
@example(np.array([[127.49, 1.0], [128.0, 63.5]], np.float32))
@example(np.array([[1.0, *[0.0] * (GROUP - 1), 2.0**-130]], np.float32))  # a group too small for any exponent
def test_int8_rows_come_back_within_half_a_step_of_their_group(vectors):
    """A step is at most the group's largest element over 63.75; half of it is what rounding can cost."""
    exact = vectors.astype(np.float64)
    error = np.abs(round_trip(vectors, "int8").astype(np.float64) - exact)
    of_row = np.abs(exact).max(axis=1)
    for start in range(0, vectors.shape[1], GROUP):
        group = slice(start, start + GROUP)
        of_group = np.abs(exact[:, group]).max(axis=1)
        bound = np.maximum(of_group / 127.5, of_row * 2.0 ** -(MOST_EXPONENT + 6)) + TINY
        assert (error[:, group] <= bound[:, None]).all()


@given(wide)
def test_int8_rows_are_what_their_definition_says(vectors):
    """Decoded one value at a time, in Python's own numbers; and bfloat16 holds them over their scale."""
    scales, stored = to_stored(vectors, "int8")
    decoded = round_trip(vectors, "int8")
    short = unscaled(stored, torch.empty(vectors.shape, dtype=torch.bfloat16))
    dim = vectors.shape[1]
    for row, codes in enumerate(stored.tolist()):
        for place in range(dim):
            code, exponent = codes[place], codes[dim + place // GROUP]
            assert -127 <= code <= 127
            assert 0 <= exponent <= MOST_EXPONENT
            assert decoded[row, place] == np.float32(float(scales[row]) * 2.0**-exponent * code)
            assert float(short[row, place]) == 2.0**-exponent * code


@given(matrices)
def test_float32_rows_come_back_as_they_were(vectors):
    np.testing.assert_array_equal(round_trip(vectors, "float32"), vectors)


@given(matrices, st.integers(-20, 20))
def test_scale_follows_a_power_of_two(vectors, exponent):
    vectors = np.where(np.abs(vectors) < 2.0**-90, np.float32(0), vectors)  # far from float32's limits
    vectors = np.where(np.abs(vectors) > 2.0**100, np.float32(1), vectors)
    factor = np.float32(2.0**exponent)
    zero = (vectors == 0).all(axis=1)
    np.testing.assert_array_equal(row_scales(vectors * factor), np.where(zero, 1, row_scales(vectors) * factor))
    np.testing.assert_array_equal(round_trip(vectors * factor, "float16"), round_trip(vectors, "float16") * factor)


@given(data=st.data())
@settings(max_examples=12)  # each opens two tables
def test_the_manifest_does_not_depend_on_order_or_chunks(data):
    ids = [f"doc-{number}" for number in range(12)]
    order = data.draw(st.permutations([*ids, "of another corpus"]))
    sizes = data.draw(st.lists(st.integers(1, 6), max_size=8))
    repeated = data.draw(st.lists(st.sampled_from(ids), unique=True))
    dtype = data.draw(st.sampled_from(sorted(ARROW)))
    with tempfile.TemporaryDirectory() as folder:
        plain = open_for_writing(Path(folder, "plain"), dtype=dtype)
        plain.write([make_rows(ids)])
        table = open_for_writing(Path(folder, "chunks"), dtype=dtype)
        table.write([make_rows(repeated, version=1)])  # rows of older content, to be replaced
        ends = np.minimum(np.cumsum([*sizes, len(order)]), len(order))
        stream = (make_rows(order[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True) if end > start)
        table.write(stream, chunk_bytes=data.draw(st.integers(1, 500)))
        assert table.seal(documents_of(ids)) == plain.seal(documents_of(ids))
