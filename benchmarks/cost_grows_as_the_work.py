"""Claim: cost grows as the work: time in a straight line, memory by no more than the names of documents take.

Over documents (small rows of the store: written, sealed, read whole, scored against a query), over checkpoints and over the
width of the model (logging and curvature; the work is the counted operations). Each size is measured in a process of its own,
by the processor's time; the line is fitted on logarithms, where its slope, the exponent, is 1 if cost grows as the work. Memory
is how far the process's peak lies above what it had before. Prints a table and one JSON line, and draws a plot.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import ROOT
from tda import costs
from tda.config import Architecture
from tda.data import Documents, batch_plan
from tda.evaluation_plots import COLOURS, INK, MUTED, figure
from tda.fit_factors import fit_factors
from tda.gradients import gradient_rows
from tda.model import build_model, tracked_layers
from tda.projection import random_projections
from tda.row_products import dot_scores
from tda.store import open_sealed, open_table
from tda.stored_rows import Rows
from tda.task import CausalLM
from tda.text_table import text_table
from tda.usage import measured

DIM = 32  # values of a row: so few that what a row costs beside its vector shows
BLOCK = 4096  # rows that are made at once
SMALLEST = 1000  # documents
CHECKPOINTS = (1, 2, 4, 8)
WIDTHS = (64, 128, 256, 512)
TOKENS, VOCABULARY, RANK, BATCH_TOKENS = 64, 512, 16, 2048
NUM_DOCUMENTS = 64  # of which rows are logged and curvature is fitted
EXPONENTS = (0.8, 1.1)  # of what counts as a straight line: fixed costs make it less than 1 at small sizes
OVER = ("documents", "checkpoints", "width")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=1_000_000, help="documents (default: %(default)s)")
    parser.add_argument("--over", choices=OVER, action="append", help="one of these alone; may be given again")
    parser.add_argument(
        "--plot", type=Path, default=ROOT / "build" / "cost_grows_as_the_work.svg", help="where (default: %(default)s)"
    )
    parser.add_argument("--one", nargs=2, metavar=("OVER", "SIZE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        over, size = chosen.one
        print(json.dumps(SINGLE[over](int(size))))
        return
    sizes = {"documents": _documents_up_to(chosen.largest), "checkpoints": CHECKPOINTS, "width": WIDTHS}
    found = {over: [one(over, size) for size in sizes[over]] for over in chosen.over or OVER}
    lines = [line for over, each in found.items() for line in fitted(over, each)]
    print(table(lines))
    plot(found, chosen.plot)
    print(f"\nplot   {chosen.plot}")
    print(json.dumps({"claim": "cost_grows_as_the_work", "dim": DIM, "lines": lines, "measured": found}))


def _documents_up_to(largest: int) -> list[int]:
    sizes = [SMALLEST]
    while sizes[-1] * 10 < largest:
        sizes.append(sizes[-1] * 10)
    return sorted({*sizes, largest})


def one(over: str, size: int) -> dict:
    """What one size takes, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "cost_grows_as_the_work", "--one", over, str(size)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{over} {size}: {done.stderr.strip()[-2000:]}")
    print(f"{over} {size:,}: done", file=sys.stderr, flush=True)
    return {"size": size} | json.loads(done.stdout.splitlines()[-1])


# one size


def _taken(action: Callable[[], object]) -> tuple[dict, object]:
    start = time.process_time()
    with measured() as usage:
        result = action()
    return {"seconds": time.process_time() - start, "peak_rise_mib": round(usage.peak_rise_mib, 1)}, result


def over_documents(size: int) -> dict:
    """Rows of as many documents through the store."""
    ids = [f"document {number:07d}" for number in range(size)]

    def stream(count: int) -> Iterator[Rows]:
        random = np.random.default_rng(0)
        for start in range(0, count, BLOCK):
            names = ids[start : min(start + BLOCK, count)]
            ones = np.ones(len(names), np.float32)
            vectors = random.standard_normal((len(names), DIM), dtype=np.float32)
            yield Rows(names, names, names, np.ones(len(names), np.int32), ones, ones, vectors)

    def opened(folder: Path) -> object:
        return open_table(folder, checkpoint=0, segment=0, identity={}, dim=DIM, dtype="float16")

    query = np.random.default_rng(1).standard_normal((1, DIM)).astype(np.float32)
    found = {}
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        warm = opened(Path(name, "warm"))
        warm.write(stream(8))
        sealed = open_sealed(Path(name, "warm"), warm.seal([(one, one) for one in ids[:8]]))
        dot_scores(sealed, ids[:8], query)
        table = opened(Path(name, "rows"))
        found["write"], _ = _taken(lambda: table.write(stream(size)))
        found["seal"], manifest = _taken(lambda: table.seal(list(zip(ids, ids, strict=True))))
        sealed = open_sealed(Path(name, "rows"), manifest)
        found["scan"], _ = _taken(lambda: sum(len(rows) for _places, rows in sealed.scan(ids)))
        found["score"], scores = _taken(lambda: dot_scores(sealed, ids, query))
    check(scores, stream(size), query)
    return {"work": size, "kinds": found}


def check(scores: np.ndarray, stream: Iterator[Rows], query: np.ndarray) -> None:
    """Scores are the products of the rows that were written, as float16 holds them."""
    vectors = next(stream).vectors
    np.testing.assert_allclose(scores[: len(vectors)], vectors @ query.T, rtol=0, atol=2e-2)


def _made(size: int, width: int) -> tuple[torch.nn.Module, Documents]:
    shape = Architecture(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        tie_embeddings=True,
    )
    random = np.random.default_rng(0)
    names = [str(number) for number in range(size)]
    tokens = [random.integers(0, VOCABULARY, size=TOKENS).astype(np.int32) for _ in names]
    documents = Documents(names, names, names, names, tokens, np.ones(size, np.int64))
    return build_model(shape, vocabulary=VOCABULARY, context=TOKENS, seed=0), documents


def _logged_and_fitted(num_checkpoints: int, width: int) -> dict:
    """Rows of all documents at as many checkpoints, and the curvature of a segment of as many."""
    torch.set_num_threads(1)
    model, documents = _made(NUM_DOCUMENTS, width)
    layers = tracked_layers(model)
    projections = random_projections(layers, rank=RANK, seed=0)
    plan = batch_plan(documents.lengths, batch_tokens=BATCH_TOKENS)
    batches = [documents.batch(rows) for rows in plan]

    def log() -> None:
        for _checkpoint in range(num_checkpoints):
            for batch in batches:
                gradient_rows(model, layers, batch, task=CausalLM(), projections=projections)

    def fit() -> None:
        fit_factors(
            list(range(num_checkpoints)),
            lambda _checkpoint: model,
            documents,
            task=CausalLM(),
            pattern=".*",
            weight=1.0,
            P={},
            adam="none",
            projections=None,
            batch_tokens=BATCH_TOKENS // 4,  # so that every shard has a batch
            seed=0,
            workers=1,
            device=torch.device("cpu"),
        )

    gradient_rows(model, layers, batches[0], task=CausalLM(), projections=projections)
    shapes, load = costs.shapes_of(model), costs.load_of(plan, documents.lengths, documents.num_loss_tokens)
    flops = {
        "logging": num_checkpoints * costs.row_pass(shapes, load, rank=RANK),
        "curvature": num_checkpoints * (costs.covariance_pass(shapes, load) + costs.eigenvalue_pass(shapes, load))
        + costs.eigenbases(shapes),
    }
    kinds = {name: min((_taken(act)[0] for _ in range(3)), key=lambda one: one["seconds"]) for name, act in
             {"logging": log, "curvature": fit}.items()}  # fmt: skip
    return {"flops": flops, "kinds": kinds}


def over_checkpoints(size: int) -> dict:
    """Logging and curvature over as many checkpoints."""
    return {"work": size} | _logged_and_fitted(size, WIDTHS[0])


def over_width(size: int) -> dict:
    """Logging and curvature of a model as wide."""
    found = _logged_and_fitted(1, size)
    return {"work": found["flops"]} | found


SINGLE = {"documents": over_documents, "checkpoints": over_checkpoints, "width": over_width}


# lines


def fitted(over: str, each: Sequence[dict]) -> list[dict]:
    """The line of every kind of work: exponent, cost of a unit at the smallest and largest size, memory."""
    lines = []
    for kind in each[0]["kinds"]:
        work = np.array([one["work"][kind] if isinstance(one["work"], dict) else one["work"] for one in each], float)
        seconds = np.array([one["kinds"][kind]["seconds"] for one in each])
        mib = [one["kinds"][kind]["peak_rise_mib"] for one in each]
        slope = statistics.linear_regression(np.log(work).tolist(), np.log(seconds).tolist()).slope
        last = float(np.log(seconds[-1] / seconds[-2]) / np.log(work[-1] / work[-2]))  # where fixed costs are least
        lines.append({
            "over": over,
            "kind": kind,
            "exponent": round(slope, 3),
            "last_exponent": round(last, 3),
            "straight": bool(last <= EXPONENTS[1]),
            "unit_seconds": [float(seconds[0] / work[0]), float(seconds[-1] / work[-1])],
            "sizes": [one["size"] for one in each],
            "peak_rise_mib": mib,
            "bytes_per_unit": round((mib[-1] - mib[0]) * 2**20 / (each[-1]["size"] - each[0]["size"])),
        })
    return lines


def table(lines: Sequence[dict]) -> str:
    """The lines, for a terminal."""
    rows = [
        [
            f"{line['kind']} over {line['over']}",
            f"{line['sizes'][0]:,} to {line['sizes'][-1]:,}",
            f"{line['exponent']:.2f}",
            f"{line['last_exponent']:.2f}",
            " to ".join(f"{1e6 * seconds:.3g}" for seconds in line["unit_seconds"])
            if line["over"] != "width"
            else " to ".join(f"{1e12 * seconds:.3g}e-6" for seconds in line["unit_seconds"]),
            " to ".join(f"{line['peak_rise_mib'][place]:.0f}" for place in (0, -1)),
            "yes" if line["straight"] else "NO",
        ]
        for line in lines
    ]
    return text_table(["work", "sizes", "exponent", "at the end", "µs a unit", "peak rise, MiB", "straight"], rows)


def plot(found: dict[str, Sequence[dict]], path: Path) -> None:
    """Cost of a unit of work against the amount of work, in that of the largest: level lines are straight ones."""
    with figure(
        path,
        width=7.0,
        height=4.2,
        title="Cost grows as the work",
        subtitle="processor time per unit of work, in that at the largest size; level: cost grows as the work",
    ) as axes:
        number = 0
        for over, each in found.items():
            for kind in each[0]["kinds"]:
                work = np.array([one["work"][kind] if isinstance(one["work"], dict) else one["work"] for one in each], float)
                unit = np.array([one["kinds"][kind]["seconds"] for one in each]) / work
                label = f"{kind} over {over}"
                axes.plot(work / work[0], unit / unit[-1], color=COLOURS[number % len(COLOURS)], marker="o", markersize=4,
                          linestyle="-" if number < len(COLOURS) else "--", linewidth=2, label=label)  # fmt: skip
                number += 1
        axes.axhline(1, color=MUTED, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("work, in that of the smallest size", color=INK)
        axes.set_ylabel("cost of a unit")
        axes.tick_params(length=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, borderaxespad=0)


if __name__ == "__main__":
    main(sys.argv[1:])
