"""What a run will take, before it runs: time, disk and memory of every stage, from counted work and a machine's rates."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tda import costs
from tda.adopt import find_checkpoints, too_few_checkpoints
from tda.artifacts import Workspace
from tda.calibration import Machine, Sample, calibrate, given, sample_of
from tda.config import Config, Train
from tda.costs import FLOAT, Load, load_of
from tda.data import Documents, batch_plan
from tda.expected_corpus import Corpus, expected_corpus
from tda.fitted import VALUES_AT_ONCE
from tda.ggn import queries_at_once
from tda.gradients import QUERY_VALUES
from tda.parallel import device_of, num_workers
from tda.retrain import ARMS
from tda.scoring import ROW_QUERY_VALUES
from tda.segments import segment_ends
from tda.store import BLOCK_BYTES, CHUNK_BYTES
from tda.target_influence import ROUNDS, SOLVER_BATCH_TOKENS, SOLVER_TOKENS, groups_for
from tda.text_table import text_table
from tda.train import Step, checkpoint_steps, schedule, stage_ends, stage_lengths

SOLVER_VECTORS = 7  # of an iteration, for every group of queries
QUERY_COPIES = 4  # of a block of queries' gradients that scoring has in memory: themselves, and what became of them
LOGIT_TANGENTS = 12  # of the logits' size, in a Gauss-Newton product: of softmax, loss and slopes, forward and back
FIRST_USE = 48 << 20  # bytes that libraries take when they are first used, beside what loading them takes: measured
SCAN_BLOCKS = 8  # of stored rows that a scan has in memory, with what Lance reads ahead
Number = int | float

SMALL = 1 << 20  # bytes that the small files of a stage take


@dataclass(frozen=True)
class Estimate:
    """One stage, all its parts together; memory is that of the largest."""

    stage: str
    parts: int
    seconds: float  # by the clock, one part after the other
    cpu_seconds: float
    disk_bytes: int  # that it leaves
    memory_bytes: int  # of its processes together, what they share counted once
    cached: bool  # whether DVC keeps a copy of its outputs
    work: dict[str, float]  # processor seconds by what they are spent on


@dataclass(frozen=True)
class Plan:
    """A run before it runs."""

    machine: Machine
    corpus: str
    model: dict[str, Any]
    stages: list[Estimate]
    verification: Estimate  # `tda verify`, when it is asked for
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "machine": asdict(self.machine),
            "corpus": self.corpus,
            "model": self.model,
            "stages": [asdict(stage) for stage in self.stages],
            "verification": asdict(self.verification),
            "total": {
                "seconds": sum(stage.seconds for stage in self.stages),
                "cpu_seconds": sum(stage.cpu_seconds for stage in self.stages),
                "disk_bytes": sum(stage.disk_bytes for stage in self.stages),
                "cache_bytes": cache_bytes(self.stages),
                "memory_bytes": max(stage.memory_bytes for stage in self.stages),
            },
            "warnings": self.warnings,
        }


def cache_bytes(stages: list[Estimate]) -> int:
    """What DVC's copies of outputs take, where its cache cannot link to them; the gradient store is none."""
    return sum(stage.disk_bytes for stage in stages if stage.cached)


def make_plan(
    config: Config,
    workspace: Workspace,
    *,
    flops: float | None = None,
    disk: float | None = None,
    memory: float | None = None,
) -> Plan:
    """The plan of a run on this machine, or on one with the given operations and bytes a second, and bytes of memory."""
    workers = num_workers(config.compute)
    corpus = expected_corpus(config.prepare, workspace, model=config.train.model)
    run = expected_run(config, corpus.documents)
    sample = sample_of(config, corpus.documents, vocabulary=corpus.vocabulary)
    machine = calibrate(config, sample, run.steps, workers=workers, folder=workspace.root, flops=flops)
    machine = given(machine, disk=disk, memory=memory)
    stages = estimates(config, corpus, run, sample, machine)
    whole = sample.whole
    facts = {
        "parameters": whole.parameters,
        "tracked_layers": len(costs.tracking(whole, config.curvature.layers).tracked),
        "row_values": costs.row_values(costs.tracking(whole, config.curvature.layers), rank=config.gradients.rank),
        "blocks_calibrated": len(sample.shapes.attention),
        "blocks": len(whole.attention),
        "documents": len(corpus.documents),
        "tokens": int(corpus.documents.lengths.sum()),
        "steps": len(run.steps),
    }
    *stages, verification = stages
    said = warnings(config, stages, machine)
    if flops is None and device_of(config.compute).type == "cuda":
        said.append("the run would use the GPU, the rates are those of the processor: give --flops, and --memory of the GPU")
    return Plan(machine, corpus.origin, facts, stages, verification, said)


@dataclass(frozen=True)
class ExpectedRun:
    """A training run before it runs: its steps, and of each segment the number of checkpoints and the documents it sees."""

    steps: list[Step]
    checkpoints: list[int]
    seen: list[np.ndarray]


def expected_run(config: Config, documents: Documents) -> ExpectedRun:
    """The steps that training will take, and the segments that they will be divided into."""
    recipe = config.train
    lengths = stage_lengths(documents, recipe)
    steps = schedule(documents, recipe, seed=recipe.seed, lengths=lengths)
    at = checkpoint_steps(len(steps), len(recipe.checkpoints), stage_ends(lengths))
    rates = np.array([step.learning_rate for step in steps])
    ends = segment_ends(at, len(config.segments.indices), by=config.segments.by, rates=rates, stage_ends=stage_ends(lengths))
    begins = [0, *ends[:-1]]
    seen = []
    for begin, end in zip(begins, ends, strict=True):
        first = at[begin - 1] if begin else 0
        seen.append(np.unique(np.concatenate([step.rows for step in steps[first : at[end - 1]]])))
    return ExpectedRun(steps, [end - begin for begin, end in zip(begins, ends, strict=True)], seen)


def estimates(config: Config, corpus: Corpus, run: ExpectedRun, sample: Sample, machine: Machine) -> list[Estimate]:
    """Every stage in the order of `dvc.yaml`, and `tda verify` last."""
    model = costs.tracking(sample.whole, config.curvature.layers)
    rank, dtype = config.gradients.rank, config.gradients.dtype
    projected = rank if config.curvature.space != "full" else 0
    adam = config.curvature.adam if config.train.optimizer == "adamw" else "none"
    documents, num = corpus.documents, len(corpus.documents)
    weights, trained = FLOAT * model.parameters, FLOAT * model.trained_parameters
    num_checkpoints = len(config.train.checkpoints)
    batch_tokens = max(config.gradients.batch_tokens, int(documents.lengths.max()))

    def load(held: Documents, tokens: int = config.gradients.batch_tokens) -> Load:
        return load_of(batch_plan(held.lengths, batch_tokens=tokens), held.lengths, held.num_loss_tokens)

    def rate(kind: str, operations: Number) -> float:
        return operations / machine.rates[kind]

    read = machine.load + max(0, weights - machine.load_bytes) / machine.disk
    write = machine.save
    frozen_worker = _worker_bytes(sample, machine) + weights + sample.kept["frozen"] * batch_tokens
    made = []

    def add(
        stage: str,
        startup: str,
        *,
        work: dict[str, float],
        spread: dict[str, float] | None = None,
        waiting: Number = 0,
        parts: int = 1,
        pools: int = 0,
        disk: Number = SMALL,
        memory: Number = 0,
        cached: bool = True,
    ) -> None:
        begin = machine.startups[startup]
        work = {"start": parts * begin.seconds, **work}
        spread = {name: seconds * (machine.slowdown if machine.workers > 1 else 1) for name, seconds in (spread or {}).items()}
        if pools and machine.workers > 1:
            spread["workers"] = parts * pools * machine.workers * machine.fork
        clock = sum(work.values()) * machine.alone + sum(spread.values()) / machine.cores + waiting
        cpu = sum(work.values()) + sum(spread.values())
        made.append(
            Estimate(
                stage, parts, clock, cpu, round(disk), round(begin.num_bytes + FIRST_USE + memory), cached, {**work, **spread}
            )
        )

    characters = sum(len(row) for row in documents.tokens) * 8
    add(
        "prepare",
        "model",
        work={"clean, tokenise": corpus.seconds},
        spread={"read": corpus.spread_seconds},
        pools=1 if corpus.spread_seconds else 0,
        disk=corpus.num_bytes,
        memory=characters + machine.workers * _worker_bytes(sample, machine) / 4,
    )

    step_load = sum((load_of([step.rows], documents.lengths, documents.num_loss_tokens) for step in run.steps), Load())
    largest = max(len(step.rows) for step in run.steps) * int(documents.lengths.max())
    copies = {"adamw": 3, "sgd": 2 if config.train.momentum else 1}[config.train.optimizer]
    mean = config.train.attribute_at == "mean" and not config.train.run
    checkpoint = costs.checkpoint_bytes(model, copies=copies + mean)
    training = rate("training", costs.training_step(model, step_load))
    add(
        "train",
        "model",
        work={"steps": 0.0 if config.train.run else training, "checkpoints": num_checkpoints * write},
        waiting=num_checkpoints * checkpoint / machine.disk,
        disk=num_checkpoints * checkpoint + SMALL,
        memory=weights + trained * (copies + mean) + sample.kept["training"] * largest,
    )
    add("segments", "torch", work={}, disk=24.0 * num)

    factors = costs.factor_bytes(model, adam=adam, rank=projected, fitted=config.curvature.space != "rows")
    parts = _curvature(config, corpus, run, model, rate, read, projected, adam)
    add(
        "curvature",
        "model",
        parts=len(run.seen),
        work={name: sum(part[0][name] for part in parts) for name in parts[0][0]},
        spread={name: sum(part[1][name] for part in parts) for name in parts[0][1]},
        pools=len(parts[0][1]),
        waiting=len(run.seen) * factors / machine.disk,
        disk=len(run.seen) * factors,
        memory=weights + 2 * factors + machine.workers * (frozen_worker + factors),
    )

    row, values = costs.row_bytes(model, rank=rank, dtype=dtype), costs.row_values(model, rank=rank)
    stored = num * row
    per_batch = batch_tokens / documents.lengths.mean() * values * FLOAT
    rows = rate("rows", costs.row_pass(model, load(documents), rank=rank))
    add(
        "gradients",
        "store",
        parts=num_checkpoints,
        work={"store": num_checkpoints * stored / machine.stored, "read": num_checkpoints * read},
        spread={"rows": num_checkpoints * rows},
        pools=1,
        waiting=num_checkpoints * stored / machine.disk,
        disk=num_checkpoints * stored,
        memory=weights + factors + machine.workers * (frozen_worker + per_batch) + 2 * min(stored, CHUNK_BYTES) + per_batch,
        cached=False,
    )

    work, memory = _scores(config, corpus, run, model, machine, rate, read, stored, values, projected, adam)
    add(
        "scores",
        "store",
        work=work,
        disk=num * (len(corpus.scored) * FLOAT + 120),
        memory=memory
        + (weights - trained)
        + trained * (copies + 1) * num_checkpoints / 2
        + len(run.seen) * factors
        + sample.kept["frozen"] * batch_tokens
        + SCAN_BLOCKS * BLOCK_BYTES,
    )
    add("curation", "statistics", work={}, disk=corpus.num_bytes * 1.6)

    number = len(ARMS) * len(config.retraining.seeds)
    evaluation = costs.forward(model, load(corpus.unseen)) + costs.forward(model, load(corpus.heldout))
    add(
        "retraining",
        "model",
        work={},
        spread={"steps": number * training, "losses": number * rate("forward", evaluation)},
        pools=1,
        disk=SMALL / 100,
        memory=machine.workers
        * (_worker_bytes(sample, machine) + weights + trained * copies + sample.kept["training"] * largest),
    )
    add("evaluation", "statistics", work={})
    add("report", "tables", work={})
    add(
        "verify",
        "rows",
        work={"digest": num_checkpoints * stored / machine.stored},
        disk=0,
        memory=2 * BLOCK_BYTES,
        cached=False,
    )
    return made


def _worker_bytes(sample: Sample, machine: Machine) -> Number:
    """What a forked worker takes beside its model and its activations: the interpreter's pages that it writes to, and buffers."""
    share = (sample.shapes.body + sample.shapes.head[0]) / (sample.whole.body + sample.whole.head[0])
    return max(0.0, machine.worker_bytes - sample.kept["frozen"] * share * sample.batch_tokens)


def _curvature(
    config: Config,
    corpus: Corpus,
    run: ExpectedRun,
    model: costs.Decoder,
    rate: Callable[[str, Number], float],
    read: float,
    projected: int,
    adam: str,
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Of every segment, processor seconds of the one process, and of what is spread over workers."""
    parts = []
    for num_checkpoints, seen in zip(run.checkpoints, run.seen, strict=True):
        chosen = seen
        if 0 < config.curvature.num_documents < len(seen):
            chosen = np.random.default_rng(0).choice(seen, config.curvature.num_documents, replace=False)
        held = corpus.documents.select(chosen)
        load = load_of(batch_plan(held.lengths, batch_tokens=config.gradients.batch_tokens), held.lengths, held.num_loss_tokens)
        passes = {
            "covariances": num_checkpoints * rate("covariances", costs.covariance_pass(model, load, rank=projected)),
            "eigenvalues": num_checkpoints * rate("eigenvalues", costs.eigenvalue_pass(model, load, rank=projected)),
        }
        if config.curvature.space == "rows":  # from the stored rows, when documents are scored
            passes = {}
        if adam == "symmetric":  # each document's gradient in full, twice
            passes["scaled"] = num_checkpoints * 2 * rate("eigenvalues", costs.eigenvalue_pass(model, load))
        alone = {
            "eigenvectors": rate("eigh", costs.eigenbases(model, rank=projected)) * (2 if adam == "symmetric" else bool(passes)),
            "read": (num_checkpoints + 2) * read,
        }
        parts.append((alone, passes))
    return parts


def _scores(
    config: Config,
    corpus: Corpus,
    run: ExpectedRun,
    model: costs.Decoder,
    machine: Machine,
    rate: Callable[[str, Number], float],
    read: float,
    stored: Number,
    values: int,
    projected: int,
    adam: str,
) -> tuple[dict[str, float], Number]:
    """Processor seconds of scoring by kind, and bytes of what it has in memory beside the run."""
    documents, queries = corpus.documents, corpus.scored
    num, num_queries, num_checkpoints = len(documents), len(queries), len(config.train.checkpoints)
    rank = config.gradients.rank

    def load(held: Documents, tokens: int = config.gradients.batch_tokens) -> Load:
        return load_of(batch_plan(held.lengths, batch_tokens=tokens), held.lengths, held.num_loss_tokens)

    at_once = min(num_queries, max(1, QUERY_VALUES // model.gradient))
    walks = math.ceil(num_queries * values / ROW_QUERY_VALUES)
    products = num_checkpoints + 2  # of rows: at the final checkpoint three
    small = 0 if not projected else values * num_queries * 4 * 2 * rank  # in projected space
    algebra = small or len(run.seen) * 2 * costs.applications(model, queries=num_queries)
    algebra += 0 if projected else costs.applications(model, queries=num_queries)
    algebra += (len(run.seen) + 2) * costs.projections(model, queries=num_queries, rank=rank)

    work = {
        "queries": rate("queries", costs.query_pass(model, load(queries))),
        "responses": rate("algebra", algebra),
        "rows": walks * num_checkpoints * stored / machine.scanned + rate("algebra", 2 * products * num * values * num_queries),
        "read": (2 * num_checkpoints + 2) * read,
        "words": machine.words * num,
    }
    if config.curvature.space == "rows":
        seen = sum(
            number * min(len(rows), config.curvature.num_documents or len(rows))
            for number, rows in zip(run.checkpoints, run.seen, strict=True)
        )
        work["curvature of rows"] = 2 * seen / num * stored / machine.scanned + rate("algebra", 4 * seen * values * rank)
        work["curvature of rows"] += len(run.seen) * rate("eigh", costs.eigenbases(model, rank=rank))
    tables = 4 * num * num_queries * (8 + FLOAT / 4)
    asked = (len(run.seen) + 2) * min(num_queries * values, ROW_QUERY_VALUES) * FLOAT
    memory = (QUERY_COPIES + 1) * at_once * model.gradient * FLOAT + asked + tables
    if config.scores.averaged_influence:
        more, held = _averaged_influence(config, documents, num_queries, model, load, rate)
        work |= more | {"queries": 2 * work["queries"]}
        memory += held
    return work, memory


def _averaged_influence(
    config: Config,
    documents: Documents,
    num_queries: int,
    model: costs.Decoder,
    load: Callable[[Documents, int], Load],
    rate: Callable[[str, Number], float],
) -> tuple[dict[str, float], Number]:
    """What solving the whole matrix adds to scoring, beside a second pass over the queries."""
    num = len(documents)
    solver_tokens = min(config.gradients.batch_tokens, SOLVER_BATCH_TOKENS)
    examples = min(num, config.curvature.num_documents or num)
    random = np.random.default_rng(0)
    fitted = load(documents.select(random.choice(num, examples, replace=False)), solver_tokens)
    solver_rows = min(num, math.ceil(SOLVER_TOKENS / documents.num_loss_tokens.mean()))
    solved = load(documents.select(random.choice(num, solver_rows, replace=False)), solver_tokens)
    groups = groups_for(num_queries, gradient=model.gradient)
    positions = max(solver_tokens, int(documents.lengths.max()))
    vectors = min(groups, queries_at_once(list(model.tracked), positions=positions, values=VALUES_AT_ONCE))
    solving = ROUNDS * math.ceil(groups / vectors) * costs.product_pass(model, solved, vectors=vectors)
    krylov = sum(2 * model.gradient * (groups * (k + 1)) * groups * (k + 4) for k in range(ROUNDS))
    krylov += ROUNDS * costs.applications(model, queries=groups)
    work = {
        "curvature": rate("covariances", costs.covariance_pass(model, fitted))
        + rate("eigenvalues", costs.eigenvalue_pass(model, fitted))
        + rate("eigh", costs.eigenbases(model)),
        "solve": rate("product", solving) + rate("algebra", krylov),
        "all documents": rate("dots", costs.dot_pass(model, load(documents, solver_tokens), queries=1)),
    }
    directions = 2 * ROUNDS if groups > 1 else 0  # and products with them
    searched = (directions + SOLVER_VECTORS) * groups * model.gradient
    widest = max(LOGIT_TANGENTS * model.head[1], 4 * max(max(layer.d_in, layer.d_out) for layer in model.tracked))
    return work, (searched + vectors * solver_tokens * widest) * FLOAT


def warnings(config: Config, stages: list[Estimate], machine: Machine) -> list[str]:
    """What will not fit or be refused, and what to change, a line each."""
    found = _refused_run(config.train)
    disk = sum(stage.disk_bytes for stage in stages)
    cache = cache_bytes(stages)
    if disk + cache > machine.free_disk:
        store = next(stage for stage in stages if stage.stage == "gradients").disk_bytes
        found.append(
            f"disk: {size(disk)} and up to {size(cache)} of DVC's copies are needed, {size(machine.free_disk)} are free; lower "
            f"gradients.rank ({config.gradients.rank}; the store takes {size(store)}), train.checkpoints "
            f"({len(config.train.checkpoints)}) or prepare.max_documents, or free some space"
        )
    found += [
        f"memory: {stage.stage} needs {size(stage.memory_bytes)}, {size(machine.free_memory)} are free; "
        f"{_REMEDIES.get(stage.stage, 'free some memory')}"
        for stage in stages
        if stage.memory_bytes > machine.free_memory
    ]
    return found


def _refused_run(recipe: Train) -> list[str]:
    """What stage `train` will refuse of a run that is given; one that is not there is refused here."""
    said = too_few_checkpoints(recipe, len(find_checkpoints(Path(recipe.run)))) if recipe.run else ""
    return [f"{said}, else stage train refuses it"] if said else []


_REMEDIES = {
    "prepare": "lower compute.workers, or give fewer documents at a time",
    "train": "lower train.batch_size or prepare.context, or take a smaller model",
    "curvature": "lower compute.workers or gradients.batch_tokens, or set curvature.space to projected",
    "gradients": "lower compute.workers, gradients.batch_tokens or gradients.rank",
    "scores": "lower prepare.num_targets, track fewer layers (curvature.layers), or set scores.averaged_influence to false",
    "retraining": "lower compute.workers or train.batch_size",
}


# text


def render(plan: Plan) -> str:
    """The plan as a table for a terminal."""
    rows = [_row(stage) for stage in plan.stages]
    total = plan.as_json()["total"]
    rows.append([
        "total",
        clock(total["seconds"]),
        clock(total["cpu_seconds"]),
        size(total["disk_bytes"]),
        size(total["memory_bytes"]),
        "",
    ])
    rows.append(_row(replace(plan.verification, stage="(verify, on request)")))
    model, machine = plan.model, plan.machine
    calibrated = "" if model["blocks_calibrated"] == model["blocks"] else f", calibrated on {model['blocks_calibrated']} of them"
    lines = [
        f"model    {model['parameters']:,} parameters in {model['blocks']} blocks{calibrated}; "
        f"rows of {model['row_values']:,} values",
        f"corpus   {model['documents']:,} documents, {model['tokens']:,} tokens, {model['steps']:,} training steps; "
        f"{plan.corpus}",
        f"machine  {machine.name}: {_rate_range(machine)} operations a second, {machine.workers} workers that get "
        f"{machine.cores:.1f} cores, disk {size(machine.disk)}/s, {size(machine.free_memory)} of memory and "
        f"{size(machine.free_disk)} of disk free",
        "",
        text_table(["stage", "time", "processor", "disk", "memory", "mostly"], rows),
        "",
        f"DVC keeps a copy of every output but the store: up to {size(total['cache_bytes'])} more where it cannot link.",
    ]
    lines += [f"warning: {line}" for line in plan.warnings]
    return "\n".join(lines)


def _rate_range(machine: Machine) -> str:
    rates = [rate for kind, rate in machine.rates.items() if kind not in ("eigh", "algebra")]
    low, high = min(rates), max(rates)
    return f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"


def _row(stage: Estimate) -> list[str]:
    name = stage.stage if stage.parts == 1 else f"{stage.stage} ×{stage.parts}"
    most = max(stage.work, key=lambda kind: stage.work[kind])
    share = stage.work[most] / max(stage.cpu_seconds, 1e-9)
    return [
        name,
        clock(stage.seconds),
        clock(stage.cpu_seconds),
        size(stage.disk_bytes),
        size(stage.memory_bytes),
        f"{most} {share:.0%}",
    ]


def clock(seconds: Number) -> str:
    """Seconds in words: 8.1 s, 3 min 20 s, 5 h 12 min, 3.4 days."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 86400:.1f} days"


def size(num_bytes: Number) -> str:
    """Bytes in words: 12 kB, 3.4 MB, 1.2 GB."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if num_bytes >= 10**power:
            value = num_bytes / 10**power
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{num_bytes:.0f} B"
