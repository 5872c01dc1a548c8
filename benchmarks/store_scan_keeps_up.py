"""Claim: scanning the gradient store keeps up with a memory map of the same bytes, and so does scoring.

The reference of a scan is a memory map of one file, made float32 in blocks as large as the store's; of the scores, the same
matrix products on those blocks. Writing is given beside them: of float32 rows into the store, against float16 rows into one file.
All in the page cache. The answers are checked first. Prints one JSON line; the argument is the size in MB.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import run_facts
from tda.row_products import dot_scores
from tda.store import Rows, open_table
from tda.stored_rows import row_scales

DIM, NUM_QUERIES, REPEATS = 7168, 64, 5
DEFAULT_MEGABYTES = 256


def made_rows(num_rows: int) -> Rows:
    vectors = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(0)).numpy()
    ids = [f"doc-{row}" for row in range(num_rows)]
    return Rows(
        ids,
        ids,
        ids,
        np.ones(num_rows, np.int32),
        np.ones(num_rows, np.float32),
        np.linalg.norm(vectors, axis=1).astype(np.float32),
        vectors,
    )


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main(arguments: Sequence[str]) -> None:
    megabytes = int(arguments[0]) if arguments else DEFAULT_MEGABYTES
    num_rows = megabytes * 2**20 // (2 * DIM)
    rows = made_rows(num_rows)
    folder = Path(tempfile.mkdtemp(prefix="store-scan-"))
    try:
        print(json.dumps(measure(rows, folder)))
    finally:
        shutil.rmtree(folder)


def measure(rows: Rows, folder: Path) -> dict:
    scales = row_scales(rows.vectors)
    stored = (rows.vectors / scales[:, None]).astype(np.float16)
    queries = torch.randn(NUM_QUERIES, DIM, generator=torch.Generator().manual_seed(1)).numpy()
    raw = folder / "rows"
    tables = iter(
        open_table(folder / f"store-{number}", checkpoint=0, segment=0, identity={}, dim=DIM, dtype="float16")
        for number in range(REPEATS + 1)
    )

    def write_raw() -> None:
        with raw.open("wb") as file:
            file.write(stored)

    def write_store() -> None:
        nonlocal table
        table = next(tables)
        table.write([rows])

    def plain_blocks() -> Iterator[tuple[slice, torch.Tensor]]:
        mapped = np.memmap(raw, np.float16, "r+", shape=stored.shape)
        for start in range(0, len(rows), table.block_rows):
            block = slice(start, start + table.block_rows)
            yield block, torch.from_numpy(mapped[block]).float().mul_(torch.from_numpy(scales[block])[:, None])

    def plain_scores() -> np.ndarray:
        columns = torch.from_numpy(queries).T.contiguous()
        return np.concatenate([(vectors @ columns).numpy() for _, vectors in plain_blocks()])

    table = None
    write_raw()
    write_store()
    for (positions, part), (block, expected) in zip(table.scan(rows.doc_ids), plain_blocks(), strict=True):
        np.testing.assert_array_equal(positions, np.arange(len(rows))[block])
        np.testing.assert_array_equal(part.vectors, expected.numpy())
    np.testing.assert_allclose(
        dot_scores(table, rows.doc_ids, queries), plain_scores(), rtol=1e-4, atol=1e-2
    )  # of values near 85

    times = {"write": ([], []), "scan": ([], []), "scores": ([], [])}
    for _ in range(REPEATS):  # in turns, so that what else the machine does falls on both
        for kind, actions in {
            "write": (write_store, write_raw),
            "scan": (
                lambda: sum(len(part) for _, part in table.scan(rows.doc_ids)),
                lambda: sum(len(part) for _, part in plain_blocks()),
            ),
            "scores": (lambda: dot_scores(table, rows.doc_ids, queries), plain_scores),
        }.items():
            for action, spent in zip(actions, times[kind], strict=True):
                spent.append(seconds(action))

    size = stored.nbytes / 1e9
    figures = {
        kind: {
            "store_gb_per_s": round(size / statistics.median(ours), 2),
            "plain_gb_per_s": round(size / statistics.median(theirs), 2),
            "ratio": round(statistics.median(theirs) / statistics.median(ours), 2),
            "ratio_range": [
                round(bound(their / our for our, their in zip(ours, theirs, strict=True)), 2) for bound in (min, max)
            ],
        }
        for kind, (ours, theirs) in times.items()
    }
    return {
        "claim": "store_scan_keeps_up",
        "rows": len(rows),
        "dim": DIM,
        "queries": NUM_QUERIES,
        "dtype": "float16",
        "device": f"cpu, {torch.get_num_threads()} threads",
        **run_facts(),
        **figures,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
