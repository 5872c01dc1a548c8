"""Claim: 256 queries are scored as fast as the disk or the matrix products allow, and 5 million pairs a second from memory.

Rows have 4,096 values. From memory: (row, query) pairs a second of `dot_scores` on one thread and on one per core, beside the
same matrix products alone, of blocks that are in the cache already. From the disk: bytes a second of `dot_scores` beside the
plain reading of the same files, one read after the other and four at once, each after the system was told to forget these files
(where the store is no larger than memory; the host of a virtual machine may still remember them). The slower of disk and matrix
products is the ceiling. "lance" is the same with rows read by Lance. In "bfloat16" arithmetic values, queries and results are
rounded to 8 bits. Answers are checked first.

Times are of the wall clock, in turns. What other processes take of the cores shows in them, so the processor's seconds are given
too, and from these the bytes a second that the cores alone allow, were they free. Prints one JSON line.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import run_facts
from benchmarks.queries_answer_at_once import forget
from tda.row_products import READS, dot_scores
from tda.store import BLOCK_BYTES, GradientTable, Rows, open_sealed, open_table, table_path

DIM, NUM_QUERIES, CHUNK = 4096, 256, 4096
WAYS = {"float32": {"arithmetic": "float32"}, "bfloat16": {"arithmetic": "bfloat16"}}


def sealed(folder: Path, num_rows: int, dtype: str) -> tuple[GradientTable, list[str]]:
    """A table whose rows repeat after `CHUNK`: what they hold costs nobody any time."""
    vectors = torch.randn(CHUNK, DIM, generator=torch.Generator().manual_seed(0)).numpy()
    ids = [f"document-{row}" for row in range(num_rows)]

    def chunks() -> Iterator[Rows]:
        for start in range(0, num_rows, CHUNK):
            part = ids[start : start + CHUNK]
            ones = np.ones(len(part), np.float32)
            yield Rows(part, part, part, ones.astype(np.int32), ones, ones, vectors[: len(part)])

    table = open_table(folder, checkpoint=0, segment=0, identity={}, dim=DIM, dtype=dtype)
    table.check_space(num_rows)
    table.write(chunks())
    return open_sealed(folder, table.seal(list(zip(ids, ids, strict=True)))), ids


def check(table: GradientTable, ids: list[str], queries: np.ndarray) -> None:
    """Scores are the dot products of the rows as they are read back."""
    some = ids[-3000:]
    stored = np.empty((len(some), DIM))
    for positions, rows in table.scan(some):
        stored[positions] = rows.vectors
    expected = stored @ queries.T.astype(np.float64)
    np.testing.assert_allclose(dot_scores(table, some, queries), expected, atol=1e-5 * DIM)
    error = dot_scores(table, some, queries, arithmetic="bfloat16") - expected
    assert np.sqrt(np.mean(error**2)) < 2**-8 * np.sqrt(np.mean(expected**2))


def read_plainly(paths: list[Path], reads: int) -> None:
    """All bytes of the files, so many reads at once, into memory that is used again."""
    held = threading.local()

    def read(place: tuple[int, int]) -> None:
        if not hasattr(held, "into"):
            held.into = bytearray(BLOCK_BYTES)
        os.preadv(place[0], [held.into], place[1])

    files = [os.open(path, os.O_RDONLY) for path in paths]
    places = [
        (file, start) for file, path in zip(files, paths, strict=True) for start in range(0, path.stat().st_size, BLOCK_BYTES)
    ]
    with ThreadPoolExecutor(reads) as readers:
        list(readers.map(read, places))
    for file in files:
        os.close(file)


def multiply_plainly(num_blocks: int, rows: int, queries: np.ndarray, arithmetic: str, threads: int) -> None:
    """Matrix products of blocks in the cache, shared out among threads of one each."""
    columns = torch.from_numpy(queries).to(getattr(torch, arithmetic)).T

    def blocks(share: int) -> None:
        torch.set_num_threads(1)
        vectors = torch.ones(rows, DIM, dtype=columns.dtype)
        out = torch.empty(rows, NUM_QUERIES, dtype=columns.dtype)
        for _ in range(share, num_blocks, threads):
            torch.mm(vectors, columns, out=out)

    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(blocks, range(threads)))


def by_lance(table: GradientTable, ids: list[str], queries: np.ndarray, **options: str) -> None:
    """`dot_scores` with every row read by Lance."""
    plain = GradientTable(table.store, table.name, table.identity, table._dataset)
    plain._extents = list
    dot_scores(plain, ids, queries, **options)


def in_turns(
    actions: dict[str, Callable[[], object]], *, rounds: int, before: Callable[[], object]
) -> tuple[dict[str, float], dict[str, float]]:
    """The medians of each action's seconds, of the clock and of the processor; `before` each of them is not counted."""
    clock: dict[str, list[float]] = {name: [] for name in actions}
    processor: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            before()
            starts = time.perf_counter(), time.process_time()
            action()
            clock[name].append(time.perf_counter() - starts[0])
            processor[name].append(time.process_time() - starts[1])
    return tuple({name: statistics.median(held) for name, held in spent.items()} for spent in (clock, processor))


def measure(folder: Path, dtype: str, chosen: argparse.Namespace) -> dict:
    queries = np.random.default_rng(1).standard_normal((NUM_QUERIES, DIM)).astype(np.float32)
    table, ids = sealed(folder, chosen.rows, dtype)
    check(table, ids, queries)
    found: dict = {"row_bytes": table.row_bytes}
    found |= {"memory": from_memory(table, ids, queries, chosen)} if "memory" in chosen.parts else {}
    found |= {"disk": from_disk(table, ids, queries, chosen)} if "disk" in chosen.parts else {}
    return found


def products_alone(table: GradientTable, ids: list[str], queries: np.ndarray, way: str, count: int) -> Callable[[], object]:
    num_blocks = -(-len(ids) // table.block_rows)
    return lambda: multiply_plainly(num_blocks, table.block_rows, queries, way, count)


def scoring(table: GradientTable, ids: list[str], queries: np.ndarray, way: str, count: int) -> Callable[[], object]:
    return lambda: dot_scores(table, ids, queries, threads=count, arithmetic=way)


def from_memory(table: GradientTable, ids: list[str], queries: np.ndarray, chosen: argparse.Namespace) -> dict:
    cases = [(way, count) for way in WAYS for count in sorted({1, len(os.sched_getaffinity(0))})]
    clock, processor = in_turns(
        {f"{way} {count}": scoring(table, ids, queries, way, count) for way, count in cases}
        | {f"products {way} {count}": products_alone(table, ids, queries, way, count) for way, count in cases},
        rounds=chosen.rounds,
        before=lambda: None,
    )
    pairs = len(ids) * NUM_QUERIES
    return {
        f"{way}, {count} thread{'s' * (count > 1)}": {
            "million_pairs_per_s": round(pairs / clock[f"{way} {count}"] / 1e6, 2),
            "million_pairs_per_cpu_s": round(pairs / processor[f"{way} {count}"] / 1e6, 2),
            "ratio_to_products_alone": round(clock[f"products {way} {count}"] / clock[f"{way} {count}"], 2),
            "ratio_in_cpu_s": round(processor[f"products {way} {count}"] / processor[f"{way} {count}"], 2),
        }
        for way, count in cases
    }


def from_disk(table: GradientTable, ids: list[str], queries: np.ndarray, chosen: argparse.Namespace) -> dict:
    cores = len(os.sched_getaffinity(0))
    folder = table_path(table.store, table.name)
    paths = sorted(folder.glob("data/*"))
    size = sum(path.stat().st_size for path in paths)
    clock, processor = in_turns(
        {"read, one at once": lambda: read_plainly(paths, 1), f"read, {READS} at once": lambda: read_plainly(paths, READS)}
        | {way: scoring(table, ids, queries, way, cores) for way in WAYS}
        | {"lance": lambda: by_lance(table, ids, queries, arithmetic="bfloat16")},
        rounds=chosen.rounds,
        before=lambda: forget(folder),
    )
    products, _ = in_turns(
        {way: products_alone(table, ids, queries, way, cores) for way in WAYS}, rounds=chosen.rounds, before=lambda: None
    )
    one, several = clock["read, one at once"], clock[f"read, {READS} at once"]
    references = {"sequential reading": one, f"{READS} reads at once": several}
    return (
        {"GiB": round(size / 2**30, 1)}
        | {f"{name}, GB/s": round(size / spent / 1e9, 2) for name, spent in clock.items()}
        | {f"{name}, GB/s of free cores": round(size * cores / spent / 1e9, 2) for name, spent in processor.items()}
        | {f"{way}, ratio to {name}": round(spent / clock[way], 2) for way in WAYS for name, spent in references.items()}
        | {f"{way}, ratio to the ceiling": round(max(min(one, several), products[way]) / clock[way], 2) for way in WAYS}
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "int8"])
    parser.add_argument("--parts", nargs="+", choices=("memory", "disk"), default=["memory", "disk"])
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files go")
    chosen = parser.parse_args(arguments)
    told = {}
    for dtype in chosen.dtypes:
        folder = Path(tempfile.mkdtemp(prefix="scores-", dir=chosen.folder))
        try:
            told[dtype] = measure(folder, dtype, chosen)
        finally:
            shutil.rmtree(folder)
    print(
        json.dumps({
            "claim": "scores_from_the_store",
            "rows": chosen.rows,
            "dim": DIM,
            "queries": NUM_QUERIES,
            "cores": len(os.sched_getaffinity(0)),
            **told,
            **run_facts(),
        })
    )
