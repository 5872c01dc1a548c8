"""How fast this machine is at what the stages do: operations per second of each kind of pass, at the model's own shapes.

Every pass is the pipeline's own function, run on a few batches of the corpus, and of a large model on a few of its blocks.
Seconds are processor time, so that what else the machine does counts little; how much longer the wall clock took is measured
beside them.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tda import costs
from tda.baselines import bm25_scores
from tda.config import Config
from tda.costs import Decoder, load_of
from tda.data import batch_plan
from tda.ekfac import corrected_eigenvalues, covariances, eigenbasis
from tda.ggn import gauss_newton_product
from tda.gradients import gradient_dots, gradient_rows, query_gradients
from tda.model import EVERY_LAYER, load_model
from tda.model_sample import SECONDS, Sample, matrix_rate, processor_seconds
from tda.parallel import parallel_map
from tda.projection import random_projections
from tda.target_influence import BATCH_TOKENS
from tda.task import CausalLM
from tda.train import Step, make_optimizer, mean_loss, save_checkpoint, train
from tda.usage import free_memory, measured

PASSES = ("training", "forward", "covariances", "eigenvalues", "rows", "queries", "dots", "product")
MOST_STEPS = 6  # of training that are timed
STORED_BYTES = 16 * 2**20  # of rows that are written to a store, sealed and read
WRITTEN_BYTES = 64 * 2**20  # of the file that times the disk
IMPORTS = (  # what stages load, by kind; within a chain, each entry loads all that comes before it
    {
        "torch": "import tda.cli, tda.pipeline, tda.stages, tda.data, tda.parallel",
        "model": "import tda.run; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM; "
        "import torch; torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)",
        "store": "import lancedb, lance, tda.store",
    },
    {"tables": "import tda.cli, tda.pipeline, tda.stages, polars", "statistics": "import scipy.stats, scipy.optimize"},
    {"rows": "import tda.cli, tda.verify, lance"},
)


@dataclass(frozen=True)
class Startup:
    """What a process takes before its work: processor time in seconds, memory in bytes."""

    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class Machine:
    """What a machine can do. Rates are those of one process, per second of processor time."""

    name: str
    workers: int
    rates: dict[str, float]  # operations a second: by kind of pass, `eigh`, `algebra`
    slowdown: float  # processor seconds of a process when all workers are at work, in those of one alone
    alone: float  # clock seconds per processor second of a process alone
    cores: float  # processor seconds that all workers together get in a second of the clock
    disk: float  # bytes written a second
    stored: float  # bytes of rows written and sealed a second
    scanned: float  # bytes of stored rows multiplied with a query a second
    load: float  # seconds to read a checkpoint of the model that was calibrated with, `load_bytes` large
    save: float
    load_bytes: int
    words: float  # seconds per document of word-based scores
    startups: dict[str, Startup]
    fork: float  # processor seconds to start a worker, to warm it up, and to end it
    worker_bytes: int  # a worker's own memory in a pass, of the model that was calibrated with
    free_memory: int
    free_disk: int


def calibrate(
    config: Config, sample: Sample, steps: Sequence[Step], *, workers: int, folder: Path, flops: float | None = None
) -> Machine:
    """The machine at hand, measured with the model's own passes on some of the corpus; `folder` is on the run's disk.

    With `flops` no pass is timed: these are the operations per second of another machine.
    """
    documents = sample.documents
    if flops is None:
        passes = _passes(config, sample, steps, workers=workers)
    else:  # another machine: no pass is run
        rates = dict.fromkeys((*PASSES, "eigh", "algebra"), flops)
        passes = _Passes(rates, slowdown=1.0, alone=1.0, cores=float(workers), fork=0.0, worker_bytes=0)
    load, save, load_bytes = _checkpoint_seconds(config, sample)
    texts = [" ".join(map(str, row.tolist())) for row in documents.tokens[:512]]
    words = processor_seconds(lambda: bm25_scores(texts, texts[:64])) / len(texts)
    folder = _existing(folder)
    startups = start_ups()  # before Lance is here, so that this process can still fork
    disk = disk_rate(folder)
    stored, scanned = _store_rates(
        folder, dim=costs.row_values(sample.shapes, rank=config.gradients.rank), dtype=config.gradients.dtype
    )
    return Machine(
        name="this machine, measured now" if flops is None else f"a machine of {flops:.3g} operations a second",
        workers=workers,
        disk=disk,
        stored=stored,
        scanned=scanned,
        load=load,
        save=save,
        load_bytes=load_bytes,
        words=words,
        startups=startups,
        free_memory=free_memory(),
        free_disk=shutil.disk_usage(folder).free,
        **vars(passes),
    )


def given(machine: Machine, *, disk: float | None, memory: float | None) -> Machine:
    """The machine with the disk (bytes written per second) and the memory (bytes) of another, where they are given."""
    told: dict[str, Any] = {}
    if disk is not None:
        told |= {"disk": disk, "stored": min(disk, machine.stored)}
    if memory is not None:
        told["free_memory"] = int(memory)
    return replace(machine, **told)


@dataclass(frozen=True)
class _Passes:
    """What timing the passes shows of this machine: those fields of `Machine`."""

    rates: dict[str, float]
    slowdown: float
    alone: float
    cores: float
    fork: float
    worker_bytes: int


def _passes(config: Config, sample: Sample, steps: Sequence[Step], *, workers: int) -> _Passes:
    """Time every kind of pass: the rows in all workers at once, then each kind in this process alone."""
    actions = _actions(config, sample, steps)
    rows = actions["rows"][0]
    parent = os.getpid()

    def in_worker(_number: int) -> tuple[float, int, float, int]:
        """Processor seconds, repeats, wall-clock seconds, and a worker's own bytes."""
        with measured() as usage:
            rows()  # warm
            began, start = time.perf_counter(), time.process_time()
            repeats = 0
            while time.process_time() - start < SECONDS or not repeats:
                rows()
                repeats += 1
            spent, clock = time.process_time() - start, time.perf_counter() - began
        return spent, repeats, clock, int(usage.peak_rise_mib * 2**20) + (_own_bytes() if os.getpid() != parent else 0)

    before = _children()
    outcome = list(parallel_map(in_worker, range(workers), workers=workers, description="calibrating", unit="worker"))
    forked = _children() - before
    spent = {}
    began, start = time.perf_counter(), time.process_time()
    for name, (action, _flops) in actions.items():
        spent[name] = processor_seconds(action)
        if spent[name] < 2 * SECONDS:
            spent[name] = min(processor_seconds(action) for _ in range(2))  # the first is slower: it asks the system for memory
    alone = max(1.0, (time.perf_counter() - began) / (time.process_time() - start))
    working = sum(seconds + seconds / repeats for seconds, repeats, _clock, _bytes in outcome)
    each = sum(seconds / repeats for seconds, repeats, _clock, _bytes in outcome) / len(outcome)
    rates = {name: flops / spent[name] for name, (_action, flops) in actions.items()}
    return _Passes(
        rates=rates | {"eigh": _eigh_rate(sample.whole), "algebra": matrix_rate(sample.whole)},
        slowdown=max(1.0, each / spent["rows"]),
        alone=alone,
        cores=sum(seconds / clock for seconds, _repeats, clock, _bytes in outcome),
        fork=max(0.0, (forked - working) / workers),
        worker_bytes=max(own for *_rest, own in outcome),
    )


def _actions(config: Config, sample: Sample, steps: Sequence[Step]) -> dict[str, tuple[Callable[[], object], int]]:
    """Every kind of pass on a few batches, and the operations that it takes."""
    model, shapes = sample.model, costs.tracking(sample.shapes, _pattern(config, sample.shapes))
    documents, rank = sample.documents, config.gradients.rank
    layers = list(shapes.tracked)
    whole = costs.with_embedding(shapes, config.curvature.layers)  # what averaged influence follows
    followed = [*layers, whole.embedding] if whole.embedding and whole.follows_embedding else layers
    lengths, predictions = documents.lengths, documents.num_loss_tokens
    plan = batch_plan(lengths, batch_tokens=sample.batch_tokens)
    plan = [plan[place] for place in sorted({len(plan) // 4, 3 * len(plan) // 4})]  # long documents, and short ones
    solver = batch_plan(lengths, batch_tokens=min(sample.batch_tokens, BATCH_TOKENS))
    solver = [solver[len(solver) // 3]]
    size = max(1, min(config.train.batch_size, sample.batch_tokens // int(lengths.max()) or 1))
    taken = [replace(step, rows=step.rows[:size]) for step in steps[:: max(1, len(steps) // MOST_STEPS)]]
    one = costs.training_step(shapes, load_of([taken[0].rows], lengths, predictions)) / matrix_rate(shapes)
    taken = taken[: min(MOST_STEPS, max(1, int(SECONDS / one)))]
    task, generator = CausalLM(), torch.Generator().manual_seed(0)
    projections = random_projections(layers, rank=rank, seed=0)
    optimizer = make_optimizer(model, config.train)
    batches = [documents.batch(rows) for rows in plan]
    basis = eigenbasis(covariances(model, layers, batches[:1], task=task, generator=generator), layers)
    query = {name: G[:1] for name, G in query_gradients(model, followed, batches[-1:], task=task)[0].items()}
    product = gauss_newton_product(model, followed, [documents.batch(rows) for rows in solver], task=task, weight=1.0)
    v = torch.randn(1, whole.gradient)
    few = documents.select(np.concatenate(plan))

    def load(rows: Sequence[Sequence[int]]) -> costs.Load:
        return load_of(rows, lengths, predictions)

    return {
        "covariances": (
            lambda: covariances(model, layers, batches, task=task, generator=generator),
            costs.covariance_pass(shapes, load(plan)),
        ),
        "eigenvalues": (
            lambda: corrected_eigenvalues(model, layers, batches, task=task, basis=basis, generator=generator),
            costs.eigenvalue_pass(shapes, load(plan)),
        ),
        "rows": (
            lambda: [
                gradient_rows(model, layers, batch, task=task, projections=projections)[0].numpy().tobytes() for batch in batches
            ],
            costs.row_pass(shapes, load(plan), rank=rank),
        ),
        "queries": (lambda: query_gradients(model, layers, batches[-1:], task=task), costs.query_pass(shapes, load(plan[-1:]))),
        "dots": (
            lambda: [gradient_dots(model, followed, batch, task=task, queries=query) for batch in batches],
            costs.dot_pass(whole, load(plan), queries=1),
        ),
        "product": (lambda: product(v), costs.product_pass(whole, load(solver), vectors=1)),
        "forward": (
            lambda: mean_loss(model, few, batch_tokens=sample.batch_tokens),
            costs.forward(shapes, load(plan)),
        ),
        "training": (
            lambda: train(model, documents, taken, config.train, optimizer=optimizer),
            costs.training_step(shapes, load([step.rows for step in taken])),
        ),
    }


def _pattern(config: Config, shapes: Decoder) -> str:
    """`curvature.layers`, or all layers where the blocks at hand have none of those."""
    try:
        costs.tracking(shapes, config.curvature.layers)
    except ValueError:
        return EVERY_LAYER
    return config.curvature.layers


def _own_bytes() -> int:
    """Memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines() if Path("/proc/self/smaps_rollup").exists() else []
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def _eigh_rate(shapes: Decoder) -> float:
    """Operations a second of an eigendecomposition, counted as `costs.eigenbases` counts, at the model's size or the like."""
    size = min(1024, max(max(layer.d_in, layer.d_out) for layer in shapes.tracked))
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = matrix @ matrix.T
    repeats = max(1, 256**3 // size**3)
    return repeats * costs.EIGH * size**3 / processor_seconds(lambda: [torch.linalg.eigh(matrix) for _ in range(repeats)])


def _checkpoint_seconds(config: Config, sample: Sample) -> tuple[float, float, int]:
    """Seconds to read and to write a checkpoint of the sample, and its model's bytes."""
    with tempfile.TemporaryDirectory(prefix="tda-plan-") as name:
        folder = Path(name, "checkpoint")
        optimizer = make_optimizer(sample.model, config.train)
        save = processor_seconds(lambda: save_checkpoint(folder, sample.model, optimizer, step=0))
        whole = folder / "model"
        if sample.shapes.frozen:  # the base takes the time, of which an adapter's checkpoint has nothing
            whole = folder / "base"
            type(sample.model)(sample.model.config).save_pretrained(whole)
        load_model(whole)
        load = processor_seconds(lambda: load_model(whole))
        return load, save, sum(path.stat().st_size for path in whole.glob("*.safetensors"))


def _store_rates(folder: Path, *, dim: int, dtype: str) -> tuple[float, float]:
    """Bytes of rows a second: written and sealed; multiplied with a query."""
    from tda.row_products import dot_scores
    from tda.store import open_sealed, open_table
    from tda.stored_rows import Rows, stored_bytes

    num_rows = max(16, STORED_BYTES // stored_bytes(dim, dtype))
    ids = [f"document {number}" for number in range(num_rows)]
    vectors = np.random.default_rng(0).standard_normal((num_rows, dim), dtype=np.float32)
    ones = np.ones(num_rows, np.float32)
    rows = Rows(ids, ids, ids, np.ones(num_rows, np.int32), ones, ones, vectors)
    with tempfile.TemporaryDirectory(prefix="tda-plan-", dir=folder) as name:
        store = Path(name)
        table = open_table(store, checkpoint=0, segment=0, identity={}, dim=dim, dtype=dtype)
        table.write([rows.slice(0, 8)])  # warm
        start = time.process_time()
        table.write([rows.slice(8, num_rows)])
        manifest = table.seal([(one, one) for one in ids])
        seconds = time.process_time() - start
        sealed = open_sealed(store, manifest)
        dot_scores(sealed, ids[:8], vectors[:1])
        scan = processor_seconds(lambda: dot_scores(sealed, ids, vectors[:1]))
    num_bytes = num_rows * stored_bytes(dim, dtype)
    return num_bytes / seconds, num_bytes / scan


def disk_rate(folder: Path) -> float:
    """Bytes a second that a new file in `folder` takes, until they are on the disk."""
    block = os.urandom(WRITTEN_BYTES // 8)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(8):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN_BYTES / (time.perf_counter() - start)


def start_ups() -> dict[str, Startup]:
    """What a process takes to load what stages load, and to end, of each kind; measured in processes of their own."""
    found = {}
    for chain in IMPORTS:
        lines = ["import json, resource, sys, time", "found = {}"]
        for name, statement in chain.items():
            lines += [statement, f"found[{name!r}] = (time.process_time(), {RESIDENT})"]
        lines.append("print(json.dumps(found))")
        before = _children()
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
        marks = json.loads(done.stdout)
        last = max(seconds for seconds, _bytes in marks.values())
        ending = (_children() - before) / last  # to end a process takes time too, the more it holds
        found |= {name: Startup(ending * seconds, num_bytes) for name, (seconds, num_bytes) in marks.items()}
    return found


RESIDENT = (
    "next((1024 * int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS')), 0) "
    "if sys.platform == 'linux' else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
)


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.resolve()
    return next(place for place in (folder, *folder.parents) if place.is_dir())
