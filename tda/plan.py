"""What a run will take, before it runs: time, disk and memory of every stage, and warnings of what will not fit."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tda import costs
from tda.adopt import find_checkpoints, too_few_checkpoints, without_optimizer
from tda.artifacts import Workspace
from tda.calibration import Machine, calibrate, given
from tda.config import Config
from tda.estimates import Estimate, Number, estimates, expected_run
from tda.expected_corpus import expected_corpus
from tda.model_sample import sample_of
from tda.parallel import device_of, num_workers
from tda.text_table import text_table


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
    model = costs.tracking(sample.whole, config.curvature.layers)
    facts = {
        "parameters": model.parameters,
        "tracked_layers": len(model.tracked),
        "row_values": costs.row_values(model, rank=config.gradients.rank),
        "blocks_calibrated": len(sample.shapes.attention),
        "blocks": len(model.attention),
        "documents": len(corpus.documents),
        "tokens": int(corpus.documents.lengths.sum()),
        "steps": len(run.steps),
    }
    *stages, verification = stages
    said = warnings(config, stages, machine)
    if flops is None and device_of(config.compute).type == "cuda":
        said.append("the run would use the GPU, the rates are those of the processor: give --flops, and --memory of the GPU")
    return Plan(machine, corpus.origin, facts, stages, verification, said)


def warnings(config: Config, stages: list[Estimate], machine: Machine) -> list[str]:
    """What will not fit or be refused, and what to change, a line each."""
    found = _refused_run(config)
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


def _refused_run(config: Config) -> list[str]:
    """What stages `train` and `curvature` will refuse of a run that is given; one that is not there is refused here."""
    recipe = config.train
    if not recipe.run:
        return []
    found = find_checkpoints(Path(recipe.run))
    few = too_few_checkpoints(recipe, len(found))
    blind = without_optimizer(recipe, found) if config.curvature.adam != "none" else ""
    return [*([f"{few}, else stage train refuses it"] if few else []), *([blind] if blind else [])]


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
    whole = round(seconds)
    if whole < 5400:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{seconds / 86400:.1f} days"


def size(num_bytes: Number) -> str:
    """Bytes in words: 12 kB, 3.4 MB, 1.2 GB."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if num_bytes >= 10**power:
            value = num_bytes / 10**power
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{num_bytes:.0f} B"
