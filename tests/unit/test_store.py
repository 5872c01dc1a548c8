import json
import shutil
import subprocess
import sys

import lance
import lancedb
import numpy as np
import pytest
import torch

from tda import store as store_module
from tda.store import GradientTable, open_sealed, open_table, table_path
from tda.stored_rows import documents_digest
from tests.store_rows import DIM, IDENTITY, documents_of, gathered, make_rows, open_for_writing

IDS = [f"doc-{number}" for number in range(50)]


DTYPES = ["float16", "bfloat16", "int8", "float32"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back_at_the_positions_asked_for(tmp_path, dtype):
    table = open_for_writing(tmp_path, dtype=dtype)
    table.write([make_rows(IDS)])
    asked = IDS[::-3]
    expected = make_rows(asked)

    rows = gathered(table, asked, block_rows=7)

    assert (rows.doc_ids, rows.content_hashes, rows.sources) == (expected.doc_ids, expected.content_hashes, expected.sources)
    for name in ("tokens", "losses", "gradient_norms"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name))
    if dtype == "int8":  # all of a row is one group
        error, largest = np.abs(rows.vectors - expected.vectors), np.abs(expected.vectors).max(axis=1, keepdims=True)
        assert (error <= largest / 127.5).all()
    else:
        rounding = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 0}[dtype]
        torch.testing.assert_close(torch.tensor(rows.vectors), torch.tensor(expected.vectors), rtol=rounding, atol=0)


def test_columns_without_vectors(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    rows = gathered(table, IDS, with_vectors=False)
    assert rows.vectors.shape == (len(IDS), 0)
    np.testing.assert_array_equal(rows.losses, make_rows(IDS).losses)


def test_nothing_asked_nothing_scanned(tmp_path):
    table = open_for_writing(tmp_path)
    assert list(table.scan([])) == []
    table.write([make_rows(IDS)])
    assert list(table.scan([])) == []


def test_the_table_is_one_of_lancedb_and_can_be_searched(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    opened = lancedb.connect(tmp_path).open_table(table.name)
    query = make_rows(["doc-17"]).vectors[0]
    query /= np.linalg.norm(query)
    hit = opened.search(query).distance_type("cosine").limit(1).to_list()[0]
    assert (hit["doc_id"], hit["checkpoint"], hit["segment"]) == ("doc-17", 3, 1)
    assert hit["_distance"] == pytest.approx(0, abs=1e-5)


def test_upsert_replaces_what_changed_and_leaves_the_rest(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    files = {file.name for file in table_path(tmp_path, table.name).glob("data/*")}

    table.write([make_rows([*IDS[:2], "new"], version=1)])

    assert len(table) == len(IDS) + 1
    assert table.present() == dict(documents_of(IDS[2:])) | dict(documents_of([*IDS[:2], "new"], version=1))
    np.testing.assert_allclose(gathered(table, [IDS[0]]).vectors, make_rows([IDS[0]], version=1).vectors, rtol=2**-11)
    assert files < {file.name for file in table_path(tmp_path, table.name).glob("data/*")}  # old files untouched


def test_new_documents_are_appended_beside_a_sealed_version(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    first = table.seal(documents_of(IDS))

    again = open_for_writing(tmp_path)
    assert again.present().keys() == set(IDS)
    again.write([make_rows(["new"])])
    second = again.seal(documents_of([*IDS, "new"]))

    assert len(open_sealed(tmp_path, first)) == len(IDS)
    assert len(open_sealed(tmp_path, second)) == len(IDS) + 1
    assert open_sealed(tmp_path, first).digest(IDS) == open_sealed(tmp_path, second).digest(IDS) == first["digest"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_manifest_is_a_function_of_the_rows(tmp_path, dtype):
    plain = open_for_writing(tmp_path / "plain", dtype=dtype)
    plain.write([make_rows(IDS)])
    expected = plain.seal(documents_of(IDS), layers=["a"])

    table = open_for_writing(tmp_path / "other", dtype=dtype)
    table.write([make_rows([*IDS[30:], "removed since"])])
    table.write([make_rows(IDS[:10], version=1)])
    table = open_for_writing(tmp_path / "other", dtype=dtype)
    table.write((make_rows([doc]) for doc in IDS[:30]), chunk_bytes=200)

    assert table.seal(documents_of(IDS), layers=["a"]) == expected
    assert table.seal(documents_of(IDS), layers=["a"]) == expected
    assert json.loads(json.dumps(expected)) == expected
    assert expected["rows"] == len(IDS)
    assert expected["layers"] == ["a"]
    assert expected["documents"] == documents_digest(documents_of(IDS))
    assert expected["identity"].items() >= IDENTITY.items()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", ["content_hashes", "tokens", "losses", "gradient_norms", "vectors"])
def test_digest_notices_a_change_in_any_column(tmp_path, column, dtype):
    digests = []
    for name in ("plain", "changed"):
        rows = make_rows(IDS)
        if name == "changed":
            values = getattr(rows, column)
            values[7] = values[8]
        table = open_for_writing(tmp_path / name, dtype=dtype)
        table.write([rows])
        digests.append(table.digest(IDS))
    assert digests[0] != digests[1]


def test_many_small_files_become_few(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_FRAGMENTS", 8)
    table = open_for_writing(tmp_path)
    table.write((make_rows([doc]) for doc in IDS), chunk_bytes=1)
    before = table.digest(IDS)
    folder = table_path(tmp_path, table.name) / "data"
    assert len(list(folder.iterdir())) == len(IDS)

    manifest = table.seal(documents_of(IDS))

    assert len(list(folder.iterdir())) == 1
    assert manifest["digest"] == before
    assert open_sealed(tmp_path, manifest).identity["weights"] == "w0"


def test_importing_the_store_starts_nothing(tmp_path):
    code = "import sys, tda.store, tda.verify; assert not {'lance', 'lancedb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# what is refused


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", ["vectors", "losses", "gradient_norms"])
def test_numbers_that_are_not_finite_are_refused_by_document(tmp_path, bad, column, dtype):
    rows = make_rows(IDS)
    getattr(rows, column)[[4, 9]] = bad
    table = open_for_writing(tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match=r"checkpoint 3: .* of 2 documents is not finite: doc-4, doc-9; expected"):
        table.write([rows])
    assert len(table) == 0


def test_a_document_twice_is_refused(tmp_path):
    table = open_for_writing(tmp_path)
    with pytest.raises(ValueError, match="document doc-1 comes twice"):
        table.write([make_rows(["doc-0", "doc-1", "doc-1"])])
    with pytest.raises(ValueError, match="document doc-1 comes twice"):
        table.write([make_rows(["doc-1"]), make_rows(["doc-0", "doc-1"])])


def test_rows_of_another_width_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vectors of 25 numbers; expected one row of 24 numbers"):
        open_for_writing(tmp_path).write([make_rows(IDS, dim=25)])


def test_a_store_of_other_weights_is_refused(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    manifest = table.seal(documents_of(IDS))
    open_sealed(tmp_path, manifest, identity=IDENTITY)
    with pytest.raises(
        ValueError, match=r"made with other projection, weights \(projection: expected \"p1\", got \"p0\"; weights"
    ):
        open_sealed(tmp_path, manifest, identity=IDENTITY | {"weights": "w1", "projection": "p1"})
    with pytest.raises(ValueError, match=r"made with other weights .* run `dvc repro gradients@3`"):
        open_sealed(tmp_path, manifest | {"identity": manifest["identity"] | {"weights": "w1"}})
    with pytest.raises(ValueError, match="made with other dtype"):
        open_sealed(tmp_path, manifest | {"dtype": "float32"})


def test_a_table_under_a_wrong_name_is_refused_for_writing(tmp_path):
    other = open_for_writing(tmp_path, weights="w1")
    table = open_for_writing(tmp_path)
    shutil.rmtree(table_path(tmp_path, table.name))
    shutil.copytree(table_path(tmp_path, other.name), table_path(tmp_path, table.name))
    with pytest.raises(ValueError, match=r"made with other weights \(weights: expected \"w0\", got \"w1\"\)"):
        open_for_writing(tmp_path)


def test_another_segment_is_another_table(tmp_path):
    names = {
        open_table(tmp_path, checkpoint=3, segment=segment, identity=IDENTITY, dim=DIM, dtype="float16").name
        for segment in (0, 1)
    }
    assert len(names) == 2


def test_missing_table_tag_and_rows_name_the_stage(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    manifest = table.seal(documents_of(IDS))
    remedy = "run `dvc repro --single-item --force gradients@3`"
    with pytest.raises(FileNotFoundError, match=f"has no version run-0, .*{remedy}"):
        open_sealed(tmp_path, manifest | {"tag": "run-0"})
    with pytest.raises(FileNotFoundError, match=f"has 50 rows at run-.*, the manifest 51; .*{remedy}"):
        open_sealed(tmp_path, manifest | {"rows": 51})
    with pytest.raises(FileNotFoundError, match=f"is missing; .*{remedy}"):
        open_sealed(tmp_path, manifest | {"table": "gradients_3_gone"})
    with pytest.raises(FileNotFoundError, match=r"is missing; .*run `dvc repro --single-item --force gradients`"):
        open_sealed(tmp_path / "clone", manifest)


def test_sealing_needs_every_document(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    with pytest.raises(ValueError, match=r"2 of 51 documents have no row of their present content, doc-0 first"):
        table.seal([("doc-0", "other"), *documents_of(IDS[1:]), ("new", "hash")])


def test_scanning_needs_every_document_once(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    with pytest.raises(ValueError, match=r"1 of 2 documents do not have one row, new first \(0 rows\); run"):
        list(table.scan(["doc-1", "new"]))
    with pytest.raises(ValueError, match="asked for 3 rows of 2 documents"):
        list(table.scan(["doc-1", "doc-2", "doc-1"]))


def test_rows_that_two_writers_doubled_are_seen_and_made_again(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows([*IDS, "it's"])])
    doubled = table._dataset.to_table().filter(np.array([doc in ("doc-1", "it's") for doc in table.present()]))
    lance.write_dataset(doubled, table_path(tmp_path, table.name), mode="append")
    with pytest.raises(RuntimeError, match="another process writes to it"):
        table.write([make_rows(["new"])])
    reader = GradientTable(tmp_path, table.name, table.identity, lance.dataset(table_path(tmp_path, table.name)))
    with pytest.raises(ValueError, match=r"1 of 1 documents do not have one row, doc-1 first \(2 rows\)"):
        list(reader.scan(["doc-1"]))
    assert open_for_writing(tmp_path).present().keys() == set(IDS) - {"doc-1"}


def test_too_little_space_is_said_before_writing(tmp_path, monkeypatch):
    table = open_for_writing(tmp_path)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8))
    table.check_space(10)
    with pytest.raises(
        OSError, match=r"1000000 more gradient rows of checkpoint 3 need 0.12 GB, 0.10 GB are free; free some space"
    ) as raised:
        table.check_space(10**6)
    assert raised.value.errno == 28
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    table.check_space(0)  # all rows are there
