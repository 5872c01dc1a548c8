import errno
import mmap
import os
from pathlib import Path

import lance
import numpy as np
import pytest
import torch

from tda import row_files, row_products
from tda import store as store_module
from tda.row_files import Extent, RowFiles
from tda.row_products import dot_scores
from tda.store import GradientTable, Rows, table_path
from tda.stored_rows import stored_bytes
from tests.store_rows import DIM, gathered, make_rows, open_for_writing

IDS = [f"doc-{number}" for number in range(50)]
DTYPES = ["float16", "bfloat16", "int8", "float32"]


def some_queries(num: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((num, dim)).astype(np.float32)


def plain_scores(table: GradientTable, ids: list[str], queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dot products of the rows as they are read back, in float64, and the product of the norms of each."""
    stored = gathered(table, ids).vectors.astype(np.float64)
    return stored @ queries.T.astype(np.float64), np.linalg.norm(stored, axis=1)[:, None] * np.linalg.norm(queries, axis=1)


def small_blocks(monkeypatch, *, dtype: str, rows: int = 16, dim: int = DIM) -> None:
    monkeypatch.setattr(store_module, "BLOCK_BYTES", rows * stored_bytes(dim, dtype))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_scores_are_the_dot_products(tmp_path, monkeypatch, dtype, threads):
    small_blocks(monkeypatch, dtype=dtype)
    table = open_for_writing(tmp_path, dtype=dtype)
    table.write([make_rows(IDS)])
    queries, asked = some_queries(2000), IDS[::-1]
    expected, scale = plain_scores(table, asked, queries)
    scores = dot_scores(table, asked, queries, threads=threads)
    assert scores.shape == (len(IDS), 2000)
    assert (np.abs(scores - expected) <= DIM * 2**-24 * scale).all()  # float32 sums of DIM products


@pytest.mark.parametrize("dtype", DTYPES)
def test_short_arithmetic_rounds_as_it_says(tmp_path, dtype):
    table = open_for_writing(tmp_path, dtype=dtype)
    table.write([make_rows(IDS)])
    queries = some_queries(30)
    expected, _ = plain_scores(table, IDS, queries)
    stored = np.abs(gathered(table, IDS).vectors.astype(np.float64))
    bound = 2.1 * 2**-8 * stored @ np.abs(queries.T) + 2**-8 * np.abs(expected)  # of both factors; of the product
    error = np.abs(dot_scores(table, IDS, queries, arithmetic="bfloat16") - expected)
    assert (error <= bound).all()
    assert (error > 2**-14 * np.abs(expected)).any()  # float32's would be smaller


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_dot_scores_depend_neither_on_the_order_of_the_table_nor_on_threads(tmp_path, dtype):
    dim, ids = 7168, [f"doc-{number}" for number in range(700)]
    queries = some_queries(10, dim)
    rows = make_rows(ids, dim=dim)
    scores = []
    for name, order in (("plain", np.arange(700)), ("shuffled", np.random.default_rng(1).permutation(700))):
        table = open_for_writing(tmp_path / name, dim=dim, dtype=dtype)
        shuffled = Rows(
            *([getattr(rows, field)[row] for row in order.tolist()] for field in ("doc_ids", "content_hashes", "sources")),
            *(getattr(rows, field)[order] for field in ("tokens", "losses", "gradient_norms", "vectors")),
        )
        table.write([shuffled])
        scores += [dot_scores(table, ids, queries, threads=threads) for threads in (1, 2)]
    for other in scores[1:]:
        np.testing.assert_array_equal(scores[0], other)


def test_queries_that_do_not_fit_are_refused(tmp_path):
    table = open_for_writing(tmp_path)
    with pytest.raises(ValueError, match=r"queries of shape \(1, 3\); expected rows of 24 finite numbers"):
        dot_scores(table, [], np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="finite numbers"):
        dot_scores(table, [], np.full((1, DIM), np.nan, np.float32))


def test_no_documents_no_scores(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    assert dot_scores(table, [], some_queries(3)).shape == (0, 3)


def test_threads_of_torch_are_as_before(tmp_path):
    before = torch.get_num_threads()
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    dot_scores(table, IDS, some_queries(3), threads=2)
    assert torch.get_num_threads() == before


# where the bytes come from


@pytest.mark.parametrize("memory", ["roomy", "small"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_come_from_the_files_in_whole_blocks(tmp_path, monkeypatch, dtype, memory):
    """Of a table of several files, also past the system's cache; Lance's take gives the same and is not asked for it."""
    if memory == "small":
        monkeypatch.setattr(row_files, "free_memory", lambda: 0)
    dim = 500  # shorter rows are packed in another way, which `_extents` refuses
    small_blocks(monkeypatch, dtype=dtype, dim=dim)
    table = open_for_writing(tmp_path, dim=dim, dtype=dtype)
    for start in range(0, 50, 20):
        table.write([make_rows(IDS[start : start + 20], dim=dim)])
    queries = some_queries(5, dim)
    with monkeypatch.context() as patched:
        patched.setattr(table, "_extents", list)
        by_lance = dot_scores(table, IDS, queries)
    extents = table._extents()
    assert sum(extent.num_rows for extent in extents) == 50
    assert len(extents) == 3
    monkeypatch.setattr(table, "_extents", lambda: extents)
    monkeypatch.setattr(table, "_dataset", _WithoutVectors(table._dataset))
    opened = opened_files(monkeypatch)
    np.testing.assert_array_equal(dot_scores(table, IDS, queries), by_lance)
    assert [flags & os.O_DIRECT for flags in opened] == [os.O_DIRECT if memory == "small" else 0] * 3


def opened_files(monkeypatch, *, refused: int = 0) -> list[int]:
    """Flags with which files will be opened; those that have one of `refused` are refused, as a file system would."""
    opened: list[int] = []

    def opening(path: Path, flags: int) -> int:
        opened.append(flags)
        if flags & refused:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return plain(path, flags)

    plain = os.open
    monkeypatch.setattr(row_files.os, "open", opening)
    return opened


def test_past_the_cache_whole_blocks_of_the_disk_are_read_to_where_they_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "free_memory", lambda: 0)
    rows = np.random.default_rng(0).integers(0, 256, (12, 2048), np.uint8)
    (tmp_path / "rows").write_bytes(rows.tobytes())
    out = np.frombuffer(mmap.mmap(-1, 4 * 2048), np.uint8).reshape(4, 2048)
    with RowFiles([Extent(tmp_path / "rows", 2 * 2048, 0, 10)], row_bytes=2048) as files:
        files.read(1, out)  # begins inside a block
        np.testing.assert_array_equal(out, rows[3:7])
        monkeypatch.setattr(files, "_blocks", None)
        files.read(4, out)
    np.testing.assert_array_equal(out, rows[6:10])


def test_a_file_system_that_has_only_cached_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "free_memory", lambda: 0)
    table = open_for_writing(tmp_path, dim=500)
    table.write([make_rows(IDS, dim=500)])
    queries = some_queries(5, 500)
    expected = dot_scores(table, IDS, queries)
    opened = opened_files(monkeypatch, refused=os.O_DIRECT)
    np.testing.assert_array_equal(dot_scores(table, IDS, queries), expected)
    assert {flags & os.O_DIRECT for flags in opened} == {0, os.O_DIRECT}


class _WithoutVectors:
    """A dataset whose vectors cannot be taken."""

    def __init__(self, dataset: lance.LanceDataset):
        self.to_table = dataset.to_table
        self.count_rows = dataset.count_rows


def test_after_rows_were_replaced_lance_reads(tmp_path):
    table = open_for_writing(tmp_path, dim=500)
    table.write([make_rows(IDS, dim=500)])
    assert table._extents()
    table.write([make_rows(IDS[:2], dim=500, version=1)])
    assert table._extents() == []
    queries = some_queries(3, 500)
    expected, scale = plain_scores(table, IDS, queries)
    assert (np.abs(dot_scores(table, IDS, queries) - expected) <= 500 * 2**-24 * scale).all()


def test_a_layout_that_only_looks_right_is_noticed(tmp_path):
    table = open_for_writing(tmp_path, dim=500)
    table.write([make_rows(IDS, dim=500)])
    extents = table._extents()
    assert table._are_plain(extents)
    shifted = [Extent(extent.path, extent.offset + 2, extent.first, extent.num_rows) for extent in extents]
    assert not table._are_plain(shifted)


@pytest.mark.parametrize("memory", [0, 2**40])
def test_a_file_that_ends_early_is_said(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(row_files, "free_memory", lambda: memory)
    table = open_for_writing(tmp_path, dim=500)
    table.write([make_rows(IDS, dim=500)])
    (extent,) = table._extents()
    size = extent.path.stat().st_size
    far = Extent(extent.path, size - 1000, 0, 50)
    with (
        RowFiles([far], row_bytes=1000) as files,
        pytest.raises(OSError, match=rf"ends at byte {size}, inside a row; run `tda verify`"),
    ):
        files.read(0, np.empty((2, 1000), np.uint8))


# a device beside the processor


class CountedCopies:
    """Stands in for the copies to and from a device, and counts them."""

    def __init__(self, monkeypatch):
        self.there: list[int] = []  # bytes of each
        self.back: list[int] = []
        monkeypatch.setattr(row_products, "to_device", self._copy(self.there))
        monkeypatch.setattr(row_products, "to_host", self._copy(self.back))

    def _copy(self, counted: list[int]):
        def copy(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            counted.append(source.nbytes)
            return out.copy_(source)

        return copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [1, 16, 17, 50])
def test_a_device_gets_each_block_once_as_it_is_stored(tmp_path, monkeypatch, dtype, num):
    """The path of a GPU, run on the CPU: the same scores, a copy there and one back for each block, and nothing else moves."""
    small_blocks(monkeypatch, dtype=dtype)
    table = open_for_writing(tmp_path, dtype=dtype)
    table.write([make_rows(IDS)])
    queries, asked = some_queries(7), IDS[:num]
    expected = dot_scores(table, asked, queries)
    copies = CountedCopies(monkeypatch)
    monkeypatch.setattr(row_products, "_on_cpu", row_products._on_device)

    np.testing.assert_array_equal(dot_scores(table, asked, queries), expected)

    num_blocks = -(-num // 16)
    assert copies.there == [16 * stored_bytes(DIM, dtype)] * num_blocks
    assert copies.back == [16 * 7 * 4] * num_blocks


def test_a_gpu_gives_the_scores_of_the_processor(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for dtype in DTYPES:
        small_blocks(monkeypatch, dtype=dtype)
        table = open_for_writing(tmp_path / dtype, dtype=dtype)
        table.write([make_rows(IDS)])
        queries = some_queries(7)
        expected, scale = plain_scores(table, IDS, queries)
        assert (np.abs(dot_scores(table, IDS, queries, device="cuda") - expected) <= DIM * 2**-22 * scale).all()


def test_the_tables_file_is_where_the_extents_say(tmp_path):
    table = open_for_writing(tmp_path, dim=500)
    table.write([make_rows(IDS, dim=500)])
    assert {extent.path.parent for extent in table._extents()} == {table_path(tmp_path, table.name) / "data"}
