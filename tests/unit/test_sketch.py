import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tda import sketch as sketch_module
from tda.row_products import dot_scores, dot_scores_at
from tda.sketch import make_sketch, open_sketch, principal_directions
from tda.store import Rows, drop_table, open_sealed, prune, sketch_path
from tests.store_rows import documents_of, make_rows, open_for_writing

DIM = 96
IDS = [f"doc-{number}" for number in range(500)]


def decaying(ids: list[str], *, seed: int = 0, rank: int = DIM) -> Rows:
    """Rows whose principal directions have variances 1, 1/4, 1/9, ..."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(DIM, DIM, generator=draw))[0]
    spectrum = 1 / torch.arange(1.0, DIM + 1)
    spectrum[rank:] = 0
    vectors = (torch.randn(len(ids), DIM, generator=draw) * spectrum @ mixing).numpy()
    rows = make_rows(ids, dim=DIM)
    norms = np.linalg.norm(vectors, axis=1).astype(np.float32)
    return Rows(rows.doc_ids, rows.content_hashes, rows.sources, rows.tokens, rows.losses, norms, vectors)


def sealed(folder, rows: Rows, *, dtype: str = "float16"):
    table = open_for_writing(folder, dim=DIM, dtype=dtype)
    table.write([rows])
    manifest = table.seal(documents_of(rows.doc_ids))
    return open_sealed(folder, manifest), manifest


def some_query(seed: int = 1) -> np.ndarray:
    return decaying(["query"], seed=seed).vectors[0]


def test_all_directions_give_the_dot_product():
    """With as many coordinates as the rows have, lift and directions are each other's inverse."""
    rows = torch.from_numpy(decaying(IDS, rank=20).vectors)
    directions, lift = principal_directions(rows, DIM)
    assert directions.shape == lift.shape == (20, DIM)
    query = torch.from_numpy(some_query())
    torch.testing.assert_close((rows @ directions.T) @ (lift @ query), rows @ query, rtol=1e-3, atol=1e-4)


def test_coordinates_are_even():
    rows = torch.from_numpy(decaying(IDS).vectors)
    directions, _ = principal_directions(rows, 8)
    coordinates = rows @ directions.T
    torch.testing.assert_close(coordinates.T @ coordinates / len(rows), torch.eye(8), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_scores_are_nearly_the_dot_products(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(sketch_module, "SLICE", 170)
    monkeypatch.setattr(sketch_module, "BLOCK", 64)
    table, _ = sealed(tmp_path, decaying(IDS), dtype=dtype)
    asked = IDS[::-1]
    exact = dot_scores(table, asked, some_query()[None])[:, 0]
    correlations = [
        np.corrcoef(make_sketch(table, asked, size=size).scores(some_query()), exact)[0, 1] for size in (2, 8, 32, DIM)
    ]
    assert correlations[0] < correlations[1] < correlations[2]
    assert correlations[2] > 0.99
    assert correlations[3] > 0.9999  # 8 bits alone


def test_places_lead_to_the_rows(tmp_path):
    table, _ = sealed(tmp_path, decaying(IDS))
    asked = IDS[::-2]
    sketch = make_sketch(table, asked, size=4)
    queries = np.stack([some_query(1), some_query(2)])
    chosen = np.array([70, 3, 100, 4])
    documents = [asked[row] for row in chosen]
    scores = dot_scores_at(table, sketch.places.numpy()[chosen], documents, queries)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(dot_scores(table, documents, queries)), rtol=1e-4, atol=1e-5)
    norms = dict(zip(IDS, decaying(IDS).gradient_norms, strict=True))
    np.testing.assert_array_equal(sketch.norms.numpy(), [norms[doc] for doc in asked])
    with pytest.raises(ValueError, match="other documents lie at these places than expected; run `tda verify`"):
        dot_scores_at(table, sketch.places.numpy()[chosen], documents[::-1], queries)


def test_a_sketch_is_made_once_and_anew_for_other_rows(tmp_path, monkeypatch):
    table, manifest = sealed(tmp_path, decaying(IDS))
    sketch = open_sketch(table, manifest, IDS, size=8)
    assert sketch_path(tmp_path, table.name, manifest["tag"]).is_file()
    with monkeypatch.context() as patched:
        patched.setattr(sketch_module, "make_sketch", None)  # would fail
        again = open_sketch(table, manifest, IDS, size=8)
    for one, other in zip(vars(sketch).values(), vars(again).values(), strict=True):
        assert torch.equal(one, other)

    assert open_sketch(table, manifest, IDS, size=4).codes.shape == (500, 4)  # of another size
    path = sketch_path(tmp_path, table.name, manifest["tag"])
    path.write_bytes(path.read_bytes()[:-100])
    assert open_sketch(table, manifest, IDS, size=4).codes.shape == (500, 4)  # a damaged one is made again

    changed, other_manifest = sealed(tmp_path, decaying(IDS, seed=5))
    assert other_manifest["tag"] != manifest["tag"]
    renewed = open_sketch(changed, other_manifest, IDS, size=8)
    exact = dot_scores(changed, IDS, some_query()[None])[:, 0]
    assert np.corrcoef(renewed.scores(some_query()), exact)[0, 1] > 0.9
    assert np.corrcoef(sketch.scores(some_query()), exact)[0, 1] < 0.5


def test_a_sketch_left_by_other_rows_is_not_used(tmp_path):
    """Even under the name of this tag: what it was made from stands in it."""
    table, manifest = sealed(tmp_path, decaying(IDS))
    other, other_manifest = sealed(tmp_path / "other", decaying(IDS, seed=5))
    open_sketch(other, other_manifest, IDS, size=8)
    sketch_path(tmp_path / "other", other.name, other_manifest["tag"]).rename(sketch_path(tmp_path, table.name, manifest["tag"]))
    sketch = open_sketch(table, manifest, IDS, size=8)
    exact = dot_scores(table, IDS, some_query()[None])[:, 0]
    assert np.corrcoef(sketch.scores(some_query()), exact)[0, 1] > 0.9


def test_sketches_go_with_their_tags_and_tables(tmp_path):
    table, first = sealed(tmp_path, decaying(IDS))
    open_sketch(table, first, IDS, size=8)
    table, second = sealed(tmp_path, decaying(IDS, seed=5))
    open_sketch(table, second, IDS, size=8)
    paths = [sketch_path(tmp_path, table.name, manifest["tag"]) for manifest in (first, second)]
    sizes = [path.stat().st_size for path in paths]

    stale, freed = prune(tmp_path, table.name, keep_tags={second["tag"]}, dry_run=True)
    assert stale == [first["tag"]]
    assert freed >= sizes[0]
    assert all(path.exists() for path in paths)
    prune(tmp_path, table.name, keep_tags={second["tag"]}, dry_run=False)
    assert [path.exists() for path in paths] == [False, True]
    assert drop_table(tmp_path, table.name, dry_run=False) > sizes[1]
    assert [path.name for path in tmp_path.iterdir()] == ["sketch.lock"]


def test_two_questions_at_once_make_one_sketch(tmp_path, monkeypatch):
    table, manifest = sealed(tmp_path, decaying(IDS))
    made = []

    def slow(*arguments, **settings):
        made.append(make_sketch(*arguments, **settings))
        time.sleep(0.2)
        return made[-1]

    monkeypatch.setattr(sketch_module, "make_sketch", slow)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: open_sketch(table, manifest, IDS, size=4), range(2)))
    assert len(made) == 1
    for sketch in found:
        assert torch.equal(sketch.codes, made[0].codes)
