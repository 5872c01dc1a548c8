"""What every stage of a run takes: counted work (`costs.py`) at a machine's rates (`calibration.py`).

`estimates` calls one function per stage, which adds up what the stage does; `_Case` has the quantities that several of them need.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tda import costs
from tda.calibration import Machine
from tda.config import Config
from tda.costs import FLOAT, Decoder, Load, load_of
from tda.data import Documents, batch_plan
from tda.expected_corpus import Corpus
from tda.gradients import QUERY_VALUES
from tda.model_sample import Sample
from tda.retrain import ARMS
from tda.scoring import ROW_QUERY_VALUES
from tda.segments import segment_ends
from tda.store import BLOCK_BYTES, CHUNK_BYTES
from tda.target_influence import BATCH_TOKENS, DECISION
from tda.train import Step, checkpoint_steps, schedule, stage_ends, stage_lengths

SOLVER_VECTORS = 7  # like a gradient, that the solver holds
QUERY_COPIES = 4  # that scoring holds of a block of query gradients: the gradients, and what is computed from them
LOGIT_TANGENTS = 12  # of the logits' size, in a Gauss-Newton product: of softmax, loss and slopes, forward and back
FIRST_USE = 48 << 20  # bytes that libraries take when they are first used, beside what loading them takes: measured
SCAN_BLOCKS = 8  # of stored rows that a scan holds, including what Lance reads ahead
SMALL = 1 << 20  # bytes that the small files of a stage take
Number = int | float


@dataclass(frozen=True)
class Estimate:
    """One stage, all its parts together; memory is that of the largest part."""

    stage: str
    parts: int
    seconds: float  # of wall-clock time, one part after the other
    cpu_seconds: float
    disk_bytes: int  # that it leaves
    memory_bytes: int  # of its processes together; what they share counts once
    cached: bool  # whether DVC keeps a copy of its outputs
    work: dict[str, float]  # processor seconds by what they are spent on


@dataclass(frozen=True)
class ExpectedRun:
    """A training run before it runs: its steps, and for each segment its number of checkpoints and the documents it sees."""

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
    case = _Case(config, corpus, run, sample, machine)
    stages = (
        _prepare,
        _train,
        _segments,
        _curvature,
        _gradients,
        _scores,
        _curation,
        _retraining,
        _evaluation,
        _report,
        _verify,
    )
    return [stage(case) for stage in stages]


@dataclass(frozen=True)
class _Case:
    """A run on a machine, and the quantities that several stages' estimates need. Sizes are in bytes."""

    config: Config
    corpus: Corpus
    run: ExpectedRun
    sample: Sample
    machine: Machine

    @cached_property
    def model(self) -> Decoder:
        """The whole model, with the layers tracked that `curvature.layers` names."""
        return costs.tracking(self.sample.whole, self.config.curvature.layers)

    @property
    def documents(self) -> Documents:
        """The training documents."""
        return self.corpus.documents

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints of the run."""
        return len(self.config.train.checkpoints)

    @property
    def rank(self) -> int:
        """The rank of rows."""
        return self.config.gradients.rank

    @property
    def projected(self) -> int:
        """The rank of the space that factors are fitted in; 0 is full space."""
        return self.rank if self.config.curvature.space != "full" else 0

    @property
    def adam(self) -> str:
        """How AdamW enters the curvature; none for SGD."""
        return self.config.curvature.adam if self.config.train.optimizer == "adamw" else "none"

    @property
    def batch_tokens(self) -> int:
        """The most tokens of a batch in the passes of a frozen model."""
        return max(self.config.gradients.batch_tokens, int(self.documents.lengths.max()))

    @property
    def weights(self) -> int:
        """The model."""
        return FLOAT * self.model.parameters

    @property
    def trained(self) -> int:
        """The weights that training changes."""
        return FLOAT * self.model.trained_parameters

    @property
    def copies(self) -> int:
        """Tensors that training holds of a weight: itself, and the optimizer's state."""
        return {"adamw": 3, "sgd": 2 if self.config.train.momentum else 1}[self.config.train.optimizer]

    @cached_property
    def factors(self) -> int:
        """The factors of a segment."""
        fitted = self.config.curvature.space != "rows"
        return costs.factor_bytes(self.model, adam=self.adam, rank=self.projected, fitted=fitted)

    @property
    def row_values(self) -> int:
        """Values of a row."""
        return costs.row_values(self.model, rank=self.rank)

    @property
    def stored(self) -> int:
        """The rows of a checkpoint in the store."""
        return len(self.documents) * costs.row_bytes(self.model, rank=self.rank, dtype=self.config.gradients.dtype)

    @property
    def worker(self) -> Number:
        """A forked worker beside its model and activations: the interpreter's pages that it writes to, and buffers."""
        sample = self.sample
        share = (sample.shapes.body + sample.shapes.head[0]) / (sample.whole.body + sample.whole.head[0])
        return max(0.0, self.machine.worker_bytes - sample.kept["frozen"] * share * sample.batch_tokens)

    @property
    def frozen_worker(self) -> Number:
        """A worker that runs passes of a frozen model."""
        return self.worker + self.weights + self.sample.kept["frozen"] * self.batch_tokens

    @property
    def training_activations(self) -> Number:
        """Activations of the largest training step."""
        largest = max(len(step.rows) for step in self.run.steps) * int(self.documents.lengths.max())
        return self.sample.kept["training"] * largest

    @cached_property
    def training_seconds(self) -> float:
        """Processor seconds of one training run's steps."""
        documents = self.documents
        load = sum((load_of([step.rows], documents.lengths, documents.num_loss_tokens) for step in self.run.steps), Load())
        return self.seconds("training", costs.training_step(self.model, load))

    @property
    def reading(self) -> float:
        """Seconds to read a checkpoint."""
        return self.machine.load + max(0, self.weights - self.machine.load_bytes) / self.machine.disk

    def load(self, documents: Documents, tokens: int | None = None) -> Load:
        """The load of documents in batches of `tokens` (default: `gradients.batch_tokens`)."""
        plan = batch_plan(documents.lengths, batch_tokens=tokens or self.config.gradients.batch_tokens)
        return load_of(plan, documents.lengths, documents.num_loss_tokens)

    def seconds(self, kind: str, operations: Number) -> float:
        """Processor seconds of a kind of pass."""
        return operations / self.machine.rates[kind]

    def estimate(
        self,
        stage: str,
        startup: str,
        *,
        work: dict[str, float] | None = None,
        spread: dict[str, float] | None = None,
        waiting: Number = 0,
        parts: int = 1,
        pools: int = 0,
        disk: Number = SMALL,
        memory: Number = 0,
        cached: bool = True,
    ) -> Estimate:
        """A stage's estimate.

        Args:
            stage: its name.
            startup: what its processes load (`calibration.IMPORTS`).
            work: processor seconds of the main process.
            spread: processor seconds that are spread over workers.
            waiting: seconds of waiting for the disk.
            parts: how many parts it has, each a process of its own.
            pools: how often a part starts workers.
            disk: bytes that it leaves.
            memory: bytes beside what the libraries take.
            cached: whether DVC keeps a copy of its outputs.
        """
        machine, begin = self.machine, self.machine.startups[startup]
        work = {"start": parts * begin.seconds, **(work or {})}
        spread = {name: seconds * (machine.slowdown if machine.workers > 1 else 1) for name, seconds in (spread or {}).items()}
        if pools and machine.workers > 1:
            spread["workers"] = parts * pools * machine.workers * machine.fork
        return Estimate(
            stage,
            parts,
            seconds=sum(work.values()) * machine.alone + sum(spread.values()) / machine.cores + waiting,
            cpu_seconds=sum(work.values()) + sum(spread.values()),
            disk_bytes=round(disk),
            memory_bytes=round(begin.num_bytes + FIRST_USE + memory),
            cached=cached,
            work={**work, **spread},
        )


def _prepare(case: _Case) -> Estimate:
    corpus = case.corpus
    characters = sum(len(row) for row in case.documents.tokens) * 8
    return case.estimate(
        "prepare",
        "model",
        work={"clean, tokenise": corpus.seconds},
        spread={"read": corpus.spread_seconds},
        pools=1 if corpus.spread_seconds else 0,
        disk=corpus.num_bytes,
        memory=characters + case.machine.workers * case.worker / 4,
    )


def _train(case: _Case) -> Estimate:
    recipe = case.config.train
    copies = case.copies + (recipe.attribute_at == "mean" and not recipe.run)
    checkpoints = case.num_checkpoints * costs.checkpoint_bytes(case.model, copies=copies)
    return case.estimate(
        "train",
        "model",
        work={"steps": 0.0 if recipe.run else case.training_seconds, "checkpoints": case.num_checkpoints * case.machine.save},
        waiting=checkpoints / case.machine.disk,
        disk=checkpoints + SMALL,
        memory=case.weights + case.trained * copies + case.training_activations,
    )


def _segments(case: _Case) -> Estimate:
    return case.estimate("segments", "torch", disk=24.0 * len(case.documents))


def _curvature(case: _Case) -> Estimate:
    num_segments, factors = len(case.run.seen), case.factors
    parts = [_curvature_part(case, number, seen) for number, seen in zip(case.run.checkpoints, case.run.seen, strict=True)]
    return case.estimate(
        "curvature",
        "model",
        parts=num_segments,
        work={name: sum(alone[name] for alone, _passes in parts) for name in parts[0][0]},
        spread={name: sum(passes[name] for _alone, passes in parts) for name in parts[0][1]},
        pools=len(parts[0][1]),
        waiting=num_segments * factors / case.machine.disk,
        disk=num_segments * factors,
        memory=case.weights + 2 * factors + case.machine.workers * (case.frozen_worker + factors),
    )


def _curvature_part(case: _Case, num_checkpoints: int, seen: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Processor seconds for one segment: of the main process, and of passes that are spread over workers."""
    settings, model, rank = case.config.curvature, case.model, case.projected
    chosen = seen
    if 0 < settings.num_documents < len(seen):
        chosen = np.random.default_rng(0).choice(seen, settings.num_documents, replace=False)
    load = case.load(case.documents.select(chosen))
    passes: dict[str, float] = {}
    if settings.space != "rows":  # else curvature is fitted from stored rows, by stage `scores`
        passes = {
            "covariances": num_checkpoints * case.seconds("covariances", costs.covariance_pass(model, load, rank=rank)),
            "eigenvalues": num_checkpoints * case.seconds("eigenvalues", costs.eigenvalue_pass(model, load, rank=rank)),
        }
    bases = int(bool(passes))
    if case.adam == "symmetric":  # forms each document's gradient in full, twice, and has eigenvectors of its own
        passes["scaled"] = num_checkpoints * 2 * case.seconds("eigenvalues", costs.eigenvalue_pass(model, load))
        bases = 2
    alone = {
        "eigenvectors": case.seconds("eigh", costs.eigenbases(model, rank=rank)) * bases,
        "read": (num_checkpoints + 2) * case.reading,
    }
    return alone, passes


def _gradients(case: _Case) -> Estimate:
    num_checkpoints, stored, machine = case.num_checkpoints, case.stored, case.machine
    per_batch = case.batch_tokens / case.documents.lengths.mean() * case.row_values * FLOAT
    rows = case.seconds("rows", costs.row_pass(case.model, case.load(case.documents), rank=case.rank))
    return case.estimate(
        "gradients",
        "store",
        parts=num_checkpoints,
        work={"store": num_checkpoints * stored / machine.stored, "read": num_checkpoints * case.reading},
        spread={"rows": num_checkpoints * rows},
        pools=1,
        waiting=num_checkpoints * stored / machine.disk,
        disk=num_checkpoints * stored,
        memory=case.weights
        + case.factors
        + machine.workers * (case.frozen_worker + per_batch)
        + 2 * min(stored, CHUNK_BYTES)
        + per_batch,
        cached=False,
    )


def _scores(case: _Case) -> Estimate:
    num, num_queries = len(case.documents), len(case.corpus.scored)
    work, memory = _row_scores(case)
    if case.config.scores.averaged_influence:
        more, held = _averaged_influence(case)
        work |= more | {"queries": 2 * work["queries"]}
        memory += held
    return case.estimate(
        "scores",
        "store",
        work=work,
        disk=num * (num_queries * FLOAT + 120),
        memory=memory
        + (case.weights - case.trained)
        + case.trained * (case.copies + 1) * case.num_checkpoints / 2
        + len(case.run.seen) * case.factors
        + case.sample.kept["frozen"] * case.batch_tokens
        + SCAN_BLOCKS * BLOCK_BYTES,
    )


def _row_scores(case: _Case) -> tuple[dict[str, float], Number]:
    """Processor seconds, by kind, of the scores from stored rows; and bytes of queries and scores."""
    model, machine, values, rank = case.model, case.machine, case.row_values, case.rank
    num, num_queries, num_segments = len(case.documents), len(case.corpus.scored), len(case.run.seen)
    scans = math.ceil(num_queries * values / ROW_QUERY_VALUES)
    products = case.num_checkpoints + 2  # rows times queries, at the final checkpoint for three methods
    in_projected_space = 0 if not case.projected else values * num_queries * 4 * 2 * rank
    algebra = in_projected_space or num_segments * 2 * costs.applications(model, queries=num_queries)
    algebra += 0 if case.projected else costs.applications(model, queries=num_queries)
    algebra += (num_segments + 2) * costs.projections(model, queries=num_queries, rank=rank)
    work = {
        "queries": case.seconds("queries", costs.query_pass(model, case.load(case.corpus.scored))),
        "responses": case.seconds("algebra", algebra),
        "rows": scans * case.num_checkpoints * case.stored / machine.scanned
        + case.seconds("algebra", 2 * products * num * values * num_queries),
        "read": (2 * case.num_checkpoints + 2) * case.reading,
        "words": machine.words * num,
    }
    if case.config.curvature.space == "rows":
        most = case.config.curvature.num_documents
        seen = sum(
            number * min(len(rows), most or len(rows)) for number, rows in zip(case.run.checkpoints, case.run.seen, strict=True)
        )
        fitting = 2 * seen / num * case.stored / machine.scanned + case.seconds("algebra", 4 * seen * values * rank)
        work["curvature of rows"] = fitting + num_segments * case.seconds("eigh", costs.eigenbases(model, rank=rank))
    at_once = min(num_queries, max(1, QUERY_VALUES // model.gradient))
    tables = 4 * num * num_queries * (8 + FLOAT / 4)
    row_queries = (num_segments + 2) * min(num_queries * values, ROW_QUERY_VALUES) * FLOAT
    return work, (QUERY_COPIES + 1) * at_once * model.gradient * FLOAT + row_queries + tables


def _averaged_influence(case: _Case) -> tuple[dict[str, float], Number]:
    """What averaged influence adds to scoring, beside a second pass over the queries: processor seconds by kind, and bytes."""
    model, documents, num = case.model, case.documents, len(case.documents)
    whole = costs.with_embedding(model, case.config.curvature.layers)
    solver_tokens = min(case.config.gradients.batch_tokens, BATCH_TOKENS)
    random = np.random.default_rng(0)
    solver_rows = min(num, math.ceil(DECISION.tokens / documents.num_loss_tokens.mean()))
    solved = case.load(documents.select(random.choice(num, solver_rows, replace=False)), solver_tokens)
    work = {
        "curvature": case.seconds("eigenvalues", costs.embedding_pass(whole, solved)),
        "solve": case.seconds("product", DECISION.rounds * costs.product_pass(whole, solved, vectors=1))
        + case.seconds("algebra", DECISION.rounds * costs.applications(model, queries=1)),
        "all documents": case.seconds("dots", costs.dot_pass(whole, case.load(documents, solver_tokens), queries=1)),
    }
    if case.projected:  # there are no factors in full space to start from
        examples = min(num, case.config.curvature.num_documents or num)
        fitted = case.load(documents.select(random.choice(num, examples, replace=False)), solver_tokens)
        work["curvature"] += (
            case.seconds("covariances", costs.covariance_pass(model, fitted))
            + case.seconds("eigenvalues", costs.eigenvalue_pass(model, fitted))
            + case.seconds("eigh", costs.eigenbases(model))
        )
    widest = max(LOGIT_TANGENTS * model.head[1], 4 * max(max(layer.d_in, layer.d_out) for layer in model.tracked))
    return work, (SOLVER_VECTORS * whole.gradient + solver_tokens * widest) * FLOAT


def _curation(case: _Case) -> Estimate:
    return case.estimate("curation", "statistics", disk=case.corpus.num_bytes * 1.6)


def _retraining(case: _Case) -> Estimate:
    number = len(ARMS) * len(case.config.retraining.seeds)
    losses = costs.forward(case.model, case.load(case.corpus.unseen)) + costs.forward(case.model, case.load(case.corpus.heldout))
    return case.estimate(
        "retraining",
        "model",
        spread={"steps": number * case.training_seconds, "losses": number * case.seconds("forward", losses)},
        pools=1,
        disk=SMALL / 100,
        memory=case.machine.workers * (case.worker + case.weights + case.trained * case.copies + case.training_activations),
    )


def _evaluation(case: _Case) -> Estimate:
    return case.estimate("evaluation", "statistics")


def _report(case: _Case) -> Estimate:
    return case.estimate("report", "tables")


def _verify(case: _Case) -> Estimate:
    digest = case.num_checkpoints * case.stored / case.machine.stored
    return case.estimate("verify", "rows", work={"digest": digest}, disk=0, memory=2 * BLOCK_BYTES, cached=False)
