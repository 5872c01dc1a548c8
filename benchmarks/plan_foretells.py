"""Claim: `tda plan` tells time, disk and memory of every stage within 25% of what is then measured.

Makes the plan, runs every stage of the pipeline in a folder of its own, one after the other, and prints both side by side, with
their ratio: the processor's time (and the clock's, which depends on what else the machine does), bytes left on the disk, and the
peak of the memory of a stage's processes together, what they share counted once. `pace` is how long a fixed piece of work took
beside the stage, in what it took beside the plan: on a shared machine the processor's own time depends on the neighbours. The
default is a small run on the built-in corpus; `--params FILE` takes any other, `--set KEY=VALUE` changes single settings. Ends
with one JSON line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from benchmarks.common import ROOT
from tda.config import Config, parse_config
from tda.pipeline import STAGES, part_numbers
from tda.plan import clock, size
from tda.text_table import text_table

WITHIN = 0.25
SMALL = {  # of what the shipped params.yaml has: a run of a few minutes
    "prepare.num_targets": 60,
    "prepare.num_heldout": 100,
    "prepare.max_documents": 600,
    "curvature.num_documents": 256,
    "train.checkpoints": [0, 1, 2],
    "retraining.seeds": [0, 1],
}
EVERY = 0.2  # seconds between looks at the memory
QUANTITIES = ("cpu_seconds", "seconds", "disk_bytes", "memory_bytes")
NEGLIGIBLE = {"cpu_seconds": 0.0, "seconds": 0.0, "disk_bytes": 5e6, "memory_bytes": 0.0}  # smaller ones are not judged


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, help="settings of the run (default: params.yaml, made small)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, as gradients.rank=8")
    parser.add_argument("--folder", type=Path, help="where to run (default: a temporary folder)")
    parser.add_argument("--knows-corpus", action="store_true", help="plan after prepare has run, and not before")
    options = parser.parse_args(arguments)
    values = yaml.safe_load((options.params or ROOT / "params.yaml").read_text(encoding="utf-8"))
    changes = ({} if options.params else SMALL) | {
        key: yaml.safe_load(value) for key, value in (change.split("=", 1) for change in options.set)
    }
    for key, value in changes.items():
        put(values, key.split("."), value)
    config = parse_config(values, origin="settings")
    torch.set_num_threads(1)
    pace()  # warm
    with _folder(options.folder) as folder:
        (folder / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        done = measure(folder, ["prepare"]) if options.knows_corpus else []
        foretold = planned(folder)
        done += measure(folder, _commands(config, without=[one["stage"] for one in done]))
    found = compare(foretold, done)
    print(render(found))
    outside = [f"{one['stage']} {quantity}" for one in found for quantity in QUANTITIES if one["judged"][quantity] is False]
    facts = {"claim": "plan_foretells", "changes": changes, "stages": found, "outside": outside, "plan_model": foretold["model"]}
    print(json.dumps(facts))


def put(values: dict, path: Sequence[str], value: object) -> None:
    """Set the value at `path` of nested settings."""
    for key in path[:-1]:
        values = values[key]
    if path[-1] not in values:
        raise ValueError(f"--set {'.'.join(path)}: no such setting; expected one of {', '.join(values)}")
    values[path[-1]] = value


@contextmanager
def _folder(named: Path | None) -> Iterator[Path]:
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        yield named.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="plan-foretells-") as folder:
        yield Path(folder)


def _commands(config: Config, *, without: Sequence[str]) -> list[str]:
    named = []
    for stage in STAGES.values():
        parts = part_numbers(stage, config) if stage.indices else [None]
        named += [stage.name if part is None else f"{stage.name}@{part}" for part in parts if stage.name not in without]
    return [*named, "verify"]


def planned(folder: Path) -> dict:
    """The plan, made by the command, in a process of its own."""
    path = folder / "plan.json"
    start = time.perf_counter()
    run = [sys.executable, "-m", "tda", "plan", "--json", str(path)]
    slow = pace()
    done = subprocess.run(run, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"tda plan: {done.stderr.strip()}")
    print(done.stdout, f"\nThe plan took {clock(time.perf_counter() - start)}.\n", sep="", flush=True)
    return json.loads(path.read_text(encoding="utf-8")) | {"pace": (slow + pace()) / 2}


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}


def measure(folder: Path, commands: Sequence[str]) -> list[dict]:
    """What each command took, of `STAGE` or `STAGE@PART`; one that fails is a RuntimeError."""
    done = []
    for command in commands:
        done.append(_measured(folder, command))
        words = [command, *(f"{quantity} {done[-1][quantity]:.4g}" for quantity in QUANTITIES)]
        print("  ".join(words), file=sys.stderr, flush=True)
    return done


def _measured(folder: Path, command: str) -> dict:
    name, _, part = command.partition("@")
    slow = pace()
    before, spent, start = _disk(folder), _children(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "tda", name, *(["--index", part] if part else [])],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(process.stderr.read()))
    reader.start()
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(EVERY)
    seconds = time.perf_counter() - start
    reader.join()
    if process.returncode:
        raise RuntimeError(f"tda {command}: exit code {process.returncode}: {said[0].strip()[-2000:]}")
    return {
        "stage": name,
        "seconds": seconds,
        "cpu_seconds": _children() - spent,
        "disk_bytes": _disk(folder) - before,
        "memory_bytes": peak,
        "pace": (slow + pace()) / 2,
    }


def pace() -> float:
    """Processor seconds of a fixed piece of work."""
    a = torch.ones(64, 256)
    W = torch.ones(256, 64)
    start = time.process_time()
    for _ in range(8000):
        a @ W
    return time.process_time() - start


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "data").rglob("*") if path.is_file())


def memory(pid: int) -> int:
    """Resident bytes of a process, and what its descendants have of their own."""
    found = _rollup(pid, ("Rss",))
    for child in _descendants(pid):
        found += _rollup(child, ("Private_Clean", "Private_Dirty"))
    return found


def _descendants(pid: int) -> Iterator[int]:
    try:
        children = [
            int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except OSError:
        return
    for child in children:
        yield child
        yield from _descendants(child)


def _rollup(pid: int, names: Sequence[str]) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.split(":")[0] in names)


def compare(foretold: dict, done: Sequence[dict]) -> list[dict]:
    """Stage by stage, parts together: what was foretold and what was measured, and whether that is within the claim."""
    found = []
    for stage in [*foretold["stages"], foretold["verification"]]:
        parts = [one for one in done if one["stage"] == stage["stage"]]
        real = {quantity: sum(part[quantity] for part in parts) for quantity in QUANTITIES}
        real["memory_bytes"] = max(part["memory_bytes"] for part in parts)
        told = {quantity: stage[quantity] for quantity in QUANTITIES}
        judged = {
            quantity: abs(told[quantity] / real[quantity] - 1) <= WITHIN
            if max(real[quantity], told[quantity]) > NEGLIGIBLE[quantity] and real[quantity]
            else None
            for quantity in QUANTITIES
        }
        slow = sum(part["pace"] * part["cpu_seconds"] for part in parts) / real["cpu_seconds"] / foretold["pace"]
        found.append({
            "stage": stage["stage"],
            "parts": len(parts),
            "foretold": told,
            "measured": real,
            "judged": judged,
            "pace": round(slow, 3),
            "at_that_pace": round(slow * told["cpu_seconds"] / real["cpu_seconds"], 3),
        })
    total = {
        kind: {quantity: sum(one[kind][quantity] for one in found[:-1]) for quantity in QUANTITIES}
        for kind in ("foretold", "measured")
    }
    for kind in total:
        total[kind]["memory_bytes"] = max(one[kind]["memory_bytes"] for one in found[:-1])
    judged = {quantity: abs(total["foretold"][quantity] / total["measured"][quantity] - 1) <= WITHIN for quantity in QUANTITIES}
    even = sum(one["foretold"]["cpu_seconds"] * one["pace"] for one in found[:-1]) / total["measured"]["cpu_seconds"]
    slow = round(even * total["measured"]["cpu_seconds"] / total["foretold"]["cpu_seconds"], 3)
    return [*found, {"stage": "total", "parts": 1, **total, "judged": judged, "pace": slow, "at_that_pace": round(even, 3)}]


def render(found: Sequence[dict]) -> str:
    """The comparison as a table; a ratio beyond the claim is marked."""
    rows = []
    for one in found:
        row = [one["stage"] if one["parts"] == 1 else f"{one['stage']} ×{one['parts']}"]
        for quantity in QUANTITIES:
            words = clock if quantity.endswith("seconds") else size
            told, real = one["foretold"][quantity], one["measured"][quantity]
            mark = " !" if one["judged"][quantity] is False else ""
            row += [words(told), words(real), f"{told / real:.2f}{mark}" if one["judged"][quantity] is not None else "small"]
        rows.append([*row, f"{one['pace']:.2f}", f"{one['at_that_pace']:.2f}"])
    header = ["stage"]
    for title in ("processor", "clock", "disk", "memory"):
        header += [title, "measured", "ratio"]
    return text_table([*header, "pace", "processor at that pace"], rows)


if __name__ == "__main__":
    main(sys.argv[1:])
