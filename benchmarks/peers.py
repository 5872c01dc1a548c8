"""Claim: our scores predict what retraining does better than the peers' scores of the same runs do.

Every run that `tda evaluate lds` records of a bank is handed over as files to a driver (`peer_drivers/`) under the interpreter of
the peer's own environment, which is no dependency of ours; the driver writes scores (query, row), and their LDS is printed beside
ours, with processor seconds a run. `--install` makes the environments; a peer that is absent or fails is reported and left out.
Prints a table, then one JSON line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from benchmarks.common import ROOT
from tda.artifacts import whole, write_json
from tda.bank import ceiling, load_bank
from tda.bank_scores import RunStore, Scored
from tda.data import Data, Documents
from tda.evaluate_lds import BEST, REFERENCES, default_methods
from tda.fitted import Fitted, Settings
from tda.lds import MethodLDS, mean_over_queries, method_lds
from tda.recipe import Recipe
from tda.run_files import save_run
from tda.text_table import text_table
from tda.trajectory import Run
from tda.usage import Usage
from tda.variants import parse_variant

DRIVERS = Path(__file__).parent / "peer_drivers"
ENVIRONMENTS = ROOT / "build" / "peers"
OURSELVES = "ours"
TORCH = "torch==2.13.0"
NOT_NEEDED = ("torchvision", "torchaudio")  # no peer imports them; of another build than torch, they break transformers


@dataclass(frozen=True)
class Peer:
    """A package on PyPI, what its driver needs beside it, and the methods that the driver knows."""

    packages: tuple[str, ...]
    methods: tuple[str, ...]
    lm_methods: tuple[str, ...] = ()  # of these, those for language models


PEERS = {
    "kronfluence": Peer(("kronfluence==1.0.1", "transformers>=5.20,<6"), ("ekfac",), ("ekfac",)),
    "dattri": Peer(("dattri==0.3.0", "safetensors"), ("ekfac", "cg", "trak")),
    "dattri_llm": Peer(("dattri-llm[transformers]==0.1.0", "transformers>=5.20,<6", "safetensors"), ()),
    "traker": Peer(("traker==0.3.2", "safetensors"), ("trak",)),
    "bergson": Peer(("bergson==2.5.1",), (), ("ekfac", "source", "source_adam")),
}


class PeerError(RuntimeError):
    """A peer that is not there, or whose driver failed."""


def interpreter(peer: str) -> Path:
    """The Python of the peer's environment: `TDA_PEER_NAME` of the environment, or `build/peers/NAME`.

    Raises:
        PeerError: there is none.
    """
    path = Path(os.environ.get(f"TDA_PEER_{peer.upper()}", ENVIRONMENTS / peer / "bin" / "python"))
    if not path.is_file():
        raise PeerError(f"{peer}: no interpreter {path}; make it with `python -m benchmarks peers --install --peers {peer}`")
    return path


def install(peer: str) -> None:
    """Make the peer's environment: torch first, so that no package brings a build of its own. A failure of pip ends it."""
    folder = ENVIRONMENTS / peer
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", TORCH], check=True)
    subprocess.run([*pip, "install", TORCH, *PEERS[peer].packages], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *NOT_NEEDED], check=True)


def hand_over(
    folder: Path, run: Run, recipe: Recipe, train: Data, queries: Data, *, seed: int, sampled: torch.Tensor | None = None, **more
) -> None:
    """Write what a driver reads (`peer_drivers/handover.py`); `sampled` are labels to use where a method samples them.

    `more` are further facts for `about.json`.
    """
    layers = Fitted(run, recipe.task, train, queries, Settings()).layers
    last = run.checkpoints[-1].weights
    folder.mkdir(parents=True, exist_ok=True)
    save_run(folder / "run", run)
    arrays = _arrays("train", train) | _arrays("query", queries)
    if sampled is not None:
        arrays["sampled_train"] = sampled.numpy()
    np.savez(folder / "data.npz", **arrays)
    about = {
        "model": asdict(recipe.model),
        "loss": recipe.loss,
        "measurement": recipe.measurement,
        "layers": [layer.name for layer in layers],
        "dtype": str(next(iter(last.values())).dtype).removeprefix("torch."),
        "optimizer": asdict(run.optimizer),
        "checkpoints": [checkpoint.step for checkpoint in run.checkpoints],
        "segments": Settings().num_segments,
        "seed": seed,
    }
    write_json(folder / "about.json", about | more)


def _arrays(part: str, data: Data) -> dict[str, np.ndarray]:
    if isinstance(data, Documents):
        return {f"x_{part}": np.stack(data.tokens)}
    return {f"x_{part}": data.x.numpy(), f"y_{part}": data.y.numpy()}


def drive(peer: str, method: str, folder: Path) -> Scored:
    """Run the peer's driver on what was handed over in `folder`; PeerError as in `run_driver`."""
    run_driver(peer, DRIVERS / f"run_{peer}.py", method, folder)
    usage = json.loads((folder / "usage.json").read_text(encoding="utf-8"))
    return Scored(np.load(folder / "scores.npy"), Usage(**usage))


def run_driver(peer: str, driver: Path, *arguments: str | Path, threads: int = 1, on_gpu: bool = False) -> None:
    """Run a driver under the peer's interpreter; "ours" is this one. It sees no GPU but where it is to run on one.

    Raises:
        PeerError: the peer is not there, or the driver failed.
    """
    command = [Path(sys.executable) if peer == OURSELVES else interpreter(peer), driver, *arguments]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | quiet | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    if peer == OURSELVES:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        what = " ".join([peer, *(argument for argument in arguments if isinstance(argument, str))])
        raise PeerError(f"{what}: the driver failed with {done.returncode}: {said[-1].strip()}")


def peer_scores(peer: str, method: str, run: Run, recipe: Recipe, train: Data, queries: Data, *, seed: int, work: Path) -> Scored:
    """The peer's scores of `run`, kept in `work` under the digest of all that was handed over and of the driver."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        hand_over(folder, run, recipe, train, queries, seed=seed)
        kept = work / f"{peer}-{method}-{_digest(peer, folder)}"
        if not kept.exists():
            scored = drive(peer, method, folder)
            with whole(kept) as part:
                part.mkdir()
                np.save(part / "scores.npy", scored.values)
                shutil.copy(folder / "usage.json", part)
    usage = json.loads((kept / "usage.json").read_text(encoding="utf-8"))
    return Scored(np.load(kept / "scores.npy"), Usage(**usage))


def _digest(peer: str, folder: Path) -> str:
    digest = xxhash.xxh3_64()
    for path in [*sorted(folder.rglob("*.*")), DRIVERS / "handover.py", DRIVERS / f"run_{peer}.py"]:
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def main(arguments: Sequence[str]) -> None:
    chosen = _options(arguments)
    torch.set_num_threads(1)
    peers = [peer.strip().partition(":")[::2] for peer in chosen.peers.split(",")]
    unknown = [peer for peer, _method in peers if peer not in PEERS]
    if unknown:
        raise SystemExit(f"peers: unknown {', '.join(unknown)}; expected some of {', '.join(PEERS)}")
    if chosen.install:
        for peer in dict.fromkeys(peer for peer, _method in peers):
            install(peer)
    if chosen.bank is None:
        return
    bank = load_bank(chosen.bank)
    store = RunStore(bank.data, bank.recipe, chosen.work, workers=1)
    seeds = range(chosen.seeds)
    ours = chosen.methods.split(",") if chosen.methods else default_methods(bank, (*REFERENCES, *BEST))
    variants = [parse_variant(label) for label in ours]
    scored = {f"ours {label}": runs for label, runs in store.scores(variants, seeds).items()}
    train, queries = bank.data.train(bank.recipe), bank.data.queries(bank.recipe)
    left_out = {}
    for peer, only in peers:
        known = PEERS[peer].lm_methods if bank.recipe.loss == "causal_lm" else PEERS[peer].methods
        wanted = [method for method in known if only in ("", method)]
        if not wanted:
            left_out[f"{peer} {only}".strip()] = f"no such method for a model of kind {bank.recipe.model.kind}"
        for method in wanted:
            try:
                scored[f"{peer} {method}"] = [
                    peer_scores(peer, method, store.run(seed), bank.recipe, train, queries, seed=seed, work=chosen.work / "peers")
                    for seed in seeds
                ]
            except PeerError as error:
                left_out[f"{peer} {method}"] = str(error)
    found = {label: method_lds([one.values for one in runs], bank.masks, bank.costs) for label, runs in scored.items()}
    result = {
        "claim": "peers",
        "bank": chosen.bank.stem,
        "ceiling": ceiling(bank),
        "seeds": list(seeds),
        "methods": {label: _summary(found[label], scored[label]) for label in found},
        "left_out": left_out,
    }
    print(_table(result, found, scored))
    print(json.dumps(result))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--bank", type=Path, help="ground truth, as `tda evaluate lds` reads it")
    parser.add_argument("--work", type=Path, default=Path("data/evaluate"), help="keeps runs and scores")
    parser.add_argument("--peers", default=",".join(PEERS), help="separated by commas; PEER:METHOD is one method of it")
    parser.add_argument("--methods", help="ours, separated by commas; if none are named, the references and the best")
    parser.add_argument("--seeds", type=int, default=3, help="runs")
    parser.add_argument("--install", action="store_true", help="make the peers' environments first, below build/peers")
    return parser.parse_args(arguments)


def _summary(found: MethodLDS, runs: Sequence[Scored]) -> dict:
    return {
        "single": asdict(mean_over_queries(found.of_single)),
        "by_seed": [round(float(value), 4) for value in found.by_run.mean(axis=1)],
        "ensemble": asdict(mean_over_queries(found.of_ensemble)),
        "cpu_seconds": float(np.mean([one.usage.cpu_seconds for one in runs])),
        "peak_mib": max(one.usage.peak_mib for one in runs),
    }


def _table(result: dict, found: dict[str, MethodLDS], scored: dict[str, list[Scored]]) -> str:
    ranked = sorted(found, key=lambda label: -found[label].of_single.mean())
    rows = []
    for label in ranked:
        summary = result["methods"][label]
        cells = [str(mean_over_queries(found[label].of_single)), str(mean_over_queries(found[label].of_ensemble))]
        rows.append([label, *cells, f"{summary['cpu_seconds']:.1f}", f"{summary['peak_mib']:.0f}"])
    header = [f"LDS, {result['bank']}", "single run", f"mean of {len(result['seeds'])} runs", "CPU s a run", "peak MiB"]
    lines = [text_table(header, rows), *(f"left out: {what}: {why}" for what, why in result["left_out"].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
