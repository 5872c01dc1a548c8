"""Made-up gradient rows, for the tests of the store."""

from pathlib import Path

import numpy as np

from tda.store import GradientTable, Rows, open_table

DIM = 24
IDENTITY = {"weights": "w0", "projection": "p0", "loss": "nll", "layers": [["layer", 24]]}


def make_rows(ids: list[str], *, dim: int = DIM, version: int = 0) -> Rows:
    """Rows that are a function of each id alone."""
    draws = [np.random.default_rng(list(f"{doc}/{version}".encode())) for doc in ids]
    scales = [10.0 ** draw.integers(-9, 9) for draw in draws]
    return Rows(
        doc_ids=list(ids),
        content_hashes=[f"hash-{doc}-{version}" for doc in ids],
        sources=[f"source-{len(doc)}" for doc in ids],
        tokens=np.array([draw.integers(1, 100) for draw in draws], np.int32),
        losses=np.array([draw.random() for draw in draws], np.float32),
        gradient_norms=np.array([draw.random() for draw in draws], np.float32),
        vectors=np.array(
            [scale * draw.standard_normal(dim) for scale, draw in zip(scales, draws, strict=True)], np.float32
        ).reshape(len(ids), dim),
    )


def documents_of(ids: list[str], version: int = 0) -> list[tuple[str, str]]:
    """Id and content hash of the documents, as `make_rows` has them."""
    return [(doc, f"hash-{doc}-{version}") for doc in ids]


def open_for_writing(folder: Path, *, checkpoint: int = 3, dtype: str = "float16", dim: int = DIM, **changes) -> GradientTable:
    """A table for such rows; `changes` of the identity."""
    return open_table(folder, checkpoint=checkpoint, segment=1, identity=IDENTITY | changes, dim=dim, dtype=dtype)


def gathered(table: GradientTable, ids: list[str], **options) -> Rows:
    """All rows of `ids` in their order."""
    parts = list(table.scan(ids, **options))
    back = np.argsort(np.concatenate([positions for positions, _ in parts]), kind="stable").tolist()

    def ordered(name: str) -> list:
        values = [value for _, rows in parts for value in getattr(rows, name)]
        return [values[place] for place in back]

    return Rows(
        ordered("doc_ids"),
        ordered("content_hashes"),
        ordered("sources"),
        *(np.array(ordered(name)) for name in ("tokens", "losses", "gradient_norms", "vectors")),
    )
