"""Claim: our gradient rows and curvature passes cost less processor time than those of bergson, dattri-LLM and Kronfluence.

The same model folder and token batches are handed to one driver each (`peer_drivers/speed_NAME.py`), ours under this interpreter,
the peers' under those of their own environments (`python -m benchmarks peers --install`). A driver alternates its passes with the
floor (the frozen model's forward, loss and backward to the input embeddings), so that a ratio to the floor is of one process
and one time; start-up is not counted. Beforehand, on true labels, the answers are compared: rows with projections of autograd's
gradients, covariances (up to scale) and corrected eigenvalues in given bases with ours. An absent peer is reported and left out.

`rows`: projected gradients written to the peer's kind of store; `covariances`, `eigenvalues`: the two passes of EK-FAC, with
sampled labels, nothing written; `compiled floor`, ours alone: the floor through compiled decoder layers. On a GPU seconds are the
clock's, and what a pass takes there is given beside them, the weights once:

    python -m benchmarks peers_speed --device cuda --model Llama-3-8B --passes "compiled floor,rows" --rows 128 --batch-rows 16
    python -m benchmarks peers_speed --device cuda --model Llama-3.2-1B --rows 256 --batch-rows 32

Prints a table, then one JSON line.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import ROOT, SHAPES, commit
from benchmarks.peers import DRIVERS, PeerError, run_driver
from tda.artifacts import write_json
from tda.config import load_config
from tda.model import Layer, build_model, cast_weights, linear_modules, load_model, tracked_layers
from tda.text_table import text_table

SOURCES = ("ours", "bergson", "dattri_llm", "kronfluence")
PASSES = ("rows", "covariances", "eigenvalues")
COMPILED_FLOOR = "compiled floor"
DEFAULT = "default"
LARGE_CONTEXT, LARGE_RANK = 512, 64  # of models that are not the default one
CHECKED_ROWS = 2
TOLERANCE = {  # of the largest value; another quantity differs by much more
    "float32": 1e-3,  # sums in another order: 1e-6 to 1e-5
    "bfloat16": 5e-2,  # whose last bit is 2^-8: .003 to .01
}


def main(arguments: Sequence[str]) -> None:
    chosen = _options(arguments)
    torch.set_num_threads(chosen.threads)
    sources, passes = _some_of(SOURCES, chosen.sources), _some_of((COMPILED_FLOOR, *PASSES), chosen.passes)
    measured, left_out, answers = {}, {}, {}
    folder = Path(tempfile.mkdtemp(prefix="peers-speed-"))
    try:
        model, context = _model(chosen)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        layers = hand_over(folder, model, chosen, context=context, passes=passes)
        expected = Expected(model, layers, torch.from_numpy(np.load(folder / "tokens.npy"))[:CHECKED_ROWS])
        del model  # its memory is the drivers'
        for source in sources:
            try:
                driver = DRIVERS / f"speed_{source}.py"
                run_driver(source, driver, folder, threads=chosen.threads, on_gpu=chosen.device != "cpu")
            except PeerError as error:
                left_out[source] = str(error)
                continue
            answers[source] = expected.check(source, load_file(folder / "answers.safetensors"))
            measured[source] = json.loads((folder / "speed.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(folder)
    num_tokens = chosen.rows * context
    result = {
        "claim": "peers_speed",
        "model": chosen.model,
        "parameters": num_parameters,
        "device": chosen.device if chosen.device == "cpu" else torch.cuda.get_device_name(chosen.device),
        "dtype": chosen.dtype,
        "rows": chosen.rows,
        "context": context,
        "batch_rows": chosen.batch_rows,
        "rank": chosen.rank,
        "threads": chosen.threads,
        "rounds": chosen.rounds,
        "commit": commit(),
        "sources": {source: _summary(held, num_tokens, device=chosen.device) for source, held in measured.items()},
        "largest_differences": answers,
        "left_out": left_out,
    }
    print(_table(result))
    print(json.dumps(result))


def _some_of(known: Sequence[str], asked: str) -> list[str]:
    names = [name.strip() for name in asked.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"peers_speed: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    return names


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=DEFAULT,
        help=f"{DEFAULT} (of params.yaml), one of {', '.join(SHAPES)} (random weights of that shape), or a folder",
    )
    parser.add_argument("--rows", type=int, default=128, help="rows of tokens in a round")
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=0, help="tokens in a row; 0: those of the default model, else 512")
    parser.add_argument("--rank", type=int, default=0, help="0: that of params.yaml for the default model, else 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=TOLERANCE, default="", help="of the weights; bfloat16 on a GPU, else float32")
    parser.add_argument("--compile", choices=("auto", "always", "never"), default="auto", help="decoder layers, for our rows")
    parser.add_argument("--passes", default=",".join(PASSES), help=f"separated by commas; {COMPILED_FLOOR} too")
    parser.add_argument("--sources", default=",".join(SOURCES), help="separated by commas")
    chosen = parser.parse_args(arguments)
    chosen.dtype = chosen.dtype or ("float32" if chosen.device == "cpu" else "bfloat16")
    chosen.rank = chosen.rank or (load_config(ROOT / "params.yaml").gradients.rank if chosen.model == DEFAULT else LARGE_RANK)
    return chosen


def _model(chosen: argparse.Namespace) -> tuple[nn.Module, int]:
    """The model in eval mode on the device, and how many tokens a row has."""
    config, dtype = load_config(ROOT / "params.yaml"), getattr(torch, chosen.dtype)
    if chosen.model == DEFAULT:
        context = config.prepare.context
        model = build_model(config.train.architecture, vocabulary=config.prepare.vocabulary, context=context, seed=0)
    elif chosen.model in SHAPES:
        context = LARGE_CONTEXT
        torch.manual_seed(0)
        with torch.device(chosen.device):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[chosen.model]), dtype=dtype)
    else:
        model = load_model(chosen.model, dtype=dtype)
        context = min(LARGE_CONTEXT, model.config.max_position_embeddings)
    return cast_weights(model, dtype).to(chosen.device).eval(), chosen.context or context


def hand_over(
    folder: Path, model: nn.Module, chosen: argparse.Namespace, *, context: int, passes: Sequence[str] = PASSES
) -> list[Layer]:
    """Write what a driver reads (`peer_drivers/speed_handover.py`); the layers of the model's body."""
    layers = [layer for layer in tracked_layers(model) if linear_modules(model)[layer.name] is not model.get_output_embeddings()]
    model.save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    np.save(folder / "tokens.npy", random.integers(0, model.config.vocab_size, size=(chosen.rows, context)))
    if "eigenvalues" in passes:
        generator = torch.Generator().manual_seed(0)
        sizes = sorted({size for layer in layers for size in (layer.d_in, layer.d_out)})
        bases = {str(size): torch.linalg.qr(torch.randn(size, size, generator=generator))[0].contiguous() for size in sizes}
        save_file(bases, folder / "bases.safetensors")
    about = {
        "layers": [{"name": layer.name, "d_in": layer.d_in, "d_out": layer.d_out} for layer in layers],
        "checked": [layers[0].name, layers[-1].name],
        "num_checked_rows": CHECKED_ROWS,
        "passes": list(passes),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "compile": getattr(chosen, "compile", "never"),
        "batch_rows": chosen.batch_rows,
        "rank": chosen.rank,
        "rounds": chosen.rounds,
        "store_dtype": load_config(ROOT / "params.yaml").gradients.dtype,
        "seed": 0,
    }
    write_json(folder / "about.json", about)
    return layers


class Expected:
    """What answers are compared with: autograd's gradients, and the first answers that came, which are ours."""

    def __init__(self, model: nn.Module, layers: list[Layer], tokens: Tensor):
        modules = linear_modules(model)
        self.layers = layers
        self.first: dict[str, Tensor] = {}
        weights = [modules[layer.name].weight.requires_grad_() for layer in layers]
        self.gradients = []
        self.tolerance = TOLERANCE[str(weights[0].dtype).removeprefix("torch.")]
        for row in tokens.to(weights[0].device):
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, row[1:], reduction="sum")
            self.gradients.append([gradient.cpu() for gradient in torch.autograd.grad(loss, weights)])

    def check(self, source: str, found: dict[str, Tensor]) -> dict[str, float]:
        """The largest difference by kind of answer, as a share of the largest value; none may be above the tolerance."""
        differences: dict[str, float] = {}
        if "rows" in found:
            differences["rows"] = _difference(found["rows"], self._projected(found))
        for name in [name for name in found if name.startswith(("A.", "S.", "Lambda."))]:
            value = found[name] / found[name].mean() if name.startswith("Lambda") else found[name] / found[name].trace()
            kind = name.partition(".")[0]
            differences[kind] = max(differences.get(kind, 0.0), _difference(value, self.first.setdefault(name, value)))
        for kind, difference in differences.items():
            assert difference < self.tolerance, f"{source}: {kind} differ by {difference} of the largest value"
        return differences

    def _projected(self, found: dict[str, Tensor]) -> Tensor:
        rows = [
            torch.cat([
                (found[f"P_o.{layer.name}"].T @ G.float() @ found[f"P_i.{layer.name}"]).flatten()
                for layer, G in zip(self.layers, gradients, strict=True)
            ])
            for gradients in self.gradients
        ]
        return torch.stack(rows)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _summary(held: dict, num_tokens: int, *, device: str) -> dict:
    """Of every pass: tokens per second of the processor and of the clock, and the ratio to the floor of the same process."""
    clock = "cpu" if device == "cpu" else "wall"
    rounds: dict[str, list[dict]] = {}
    for one in held["measured"]:
        rounds.setdefault(one["pass"], []).append(one)
    summary: dict = {"peak_mib": round(held["peak_mib"])}
    for name, spent in rounds.items():
        ratios = [reference[clock] / own[clock] for reference, own in zip(rounds["floor"], spent, strict=True)]
        summary[name] = {
            "tokens_per_cpu_s": round(num_tokens / statistics.median(one["cpu"] for one in spent), 1),
            "tokens_per_s": round(num_tokens / statistics.median(one["wall"] for one in spent), 1),
            "ratio_to_floor": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
        if device != "cpu":
            summary[name]["gpu_gib"] = round(max(one["gpu_gib"] for one in spent), 1)
    return summary


def _table(result: dict) -> str:
    """Tokens per second, of the processor or on a GPU of the clock, and ratio to the floor; `ours is` compares these ratios."""
    rows, on_gpu = [], result["device"] != "cpu"
    ours = result["sources"].get("ours", {})
    for source, summary in result["sources"].items():
        for name in ("floor", COMPILED_FLOOR, *PASSES):
            if name in summary:
                held = summary[name]
                times = (
                    f"{ours[name]['ratio_to_floor'] / held['ratio_to_floor']:.2f} x" if name in ours and source != "ours" else ""
                )
                low, high = held["ratio_range"]
                ratio = f"{held['ratio_to_floor']:.3f} [{low:.3f}, {high:.3f}]"
                spent = held["tokens_per_s" if on_gpu else "tokens_per_cpu_s"]
                rows.append([source, name, f"{spent:.0f}", ratio, times, *([f"{held['gpu_gib']:.1f}"] if on_gpu else [])])
    size = f"{result['model']}, {result['rows']} x {result['context']} tokens, rank {result['rank']}, {result['dtype']}"
    header = [size, "pass", f"tokens / {'s' if on_gpu else 'CPU s'}", "of the floor [range]", "ours is"]
    header += ["GiB"] if on_gpu else []
    return "\n".join([text_table(header, rows), *(f"left out: {what}: {why}" for what, why in result["left_out"].items())])


if __name__ == "__main__":
    main(sys.argv[1:])
