"""Claim: our gradient rows and curvature passes cost less processor time than those of bergson, dattri-LLM and Kronfluence.

The same model folder and token batches are handed to one driver each (`peer_drivers/speed_NAME.py`), ours under this interpreter,
the peers' under those of their own environments (`python -m benchmarks peers --install`). A driver alternates its passes with the
floor (the frozen model's forward, loss and backward to the input embeddings), so that a ratio to the floor is of one process
and one time; start-up is not counted. Beforehand, on true labels, the answers are compared: rows with projections of autograd's
gradients, covariances (up to scale) and corrected eigenvalues in given bases with ours. An absent peer is reported and left out.

`rows`: projected gradients written to the peer's kind of store; `covariances`, `eigenvalues`: the two passes of EK-FAC, with
sampled labels, nothing written. Prints a table, then one JSON line.
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
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import ROOT, commit
from benchmarks.peers import DRIVERS, PeerError, run_driver
from tda.artifacts import write_json
from tda.config import load_config
from tda.model import Layer, build_model, linear_modules, load_model, tracked_layers
from tda.text_table import text_table

SOURCES = ("ours", "bergson", "dattri_llm", "kronfluence")
PASSES = ("rows", "covariances", "eigenvalues")
CHECKED_ROWS = 2
TOLERANCE = 1e-3  # of the largest value; float32 sums in another order differ by 1e-6 to 1e-5, another quantity by much more


def main(arguments: Sequence[str]) -> None:
    chosen = _options(arguments)
    torch.set_num_threads(1)
    model, context = _model(chosen.model)
    context = chosen.context or context
    sources = [source.strip() for source in chosen.sources.split(",")]
    unknown = [source for source in sources if source not in SOURCES]
    if unknown:
        raise SystemExit(f"peers_speed: unknown {', '.join(unknown)}; expected some of {', '.join(SOURCES)}")
    measured, left_out, answers = {}, {}, {}
    folder = Path(tempfile.mkdtemp(prefix="peers-speed-"))
    try:
        layers = hand_over(folder, model, chosen, context=context)
        expected = Expected(model, layers, torch.from_numpy(np.load(folder / "tokens.npy"))[:CHECKED_ROWS])
        for source in sources:
            try:
                run_driver(source, DRIVERS / f"speed_{source}.py", folder, threads=chosen.threads)
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
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": chosen.rows,
        "context": context,
        "batch_rows": chosen.batch_rows,
        "rank": chosen.rank,
        "threads": chosen.threads,
        "rounds": chosen.rounds,
        "commit": commit(),
        "sources": {source: _summary(held, num_tokens) for source, held in measured.items()},
        "largest_differences": answers,
        "left_out": left_out,
    }
    print(_table(result))
    print(json.dumps(result))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="default",
        help="default (of params.yaml), smollm2 (random weights of SmolLM2-135M's shape), or a folder",
    )
    parser.add_argument("--rows", type=int, default=128, help="rows of tokens in a round")
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=0, help="tokens in a row; 0: the model's, for smollm2 256")
    parser.add_argument("--rank", type=int, default=load_config(ROOT / "params.yaml").gradients.rank)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sources", default=",".join(SOURCES), help="separated by commas")
    return parser.parse_args(arguments)


def _model(name: str) -> tuple[nn.Module, int]:
    """The model in eval mode, and how many tokens a row has."""
    if name == "default":
        config = load_config(ROOT / "params.yaml")
        prepare = config.prepare
        model = build_model(config.train.architecture, vocabulary=prepare.vocabulary, context=prepare.context, seed=0)
        return model.eval(), prepare.context
    if name == "smollm2":
        shape = LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(shape).eval(), 256
    model = load_model(name).eval()
    return model, min(256, model.config.max_position_embeddings)


def hand_over(folder: Path, model: nn.Module, chosen: argparse.Namespace, *, context: int) -> list[Layer]:
    """Write what a driver reads (`peer_drivers/speed_handover.py`); the layers of the model's body."""
    layers = [layer for layer in tracked_layers(model) if linear_modules(model)[layer.name] is not model.get_output_embeddings()]
    model.save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    np.save(folder / "tokens.npy", random.integers(0, model.config.vocab_size, size=(chosen.rows, context)))
    generator = torch.Generator().manual_seed(0)
    sizes = sorted({size for layer in layers for size in (layer.d_in, layer.d_out)})
    bases = {str(size): torch.linalg.qr(torch.randn(size, size, generator=generator))[0].contiguous() for size in sizes}
    save_file(bases, folder / "bases.safetensors")
    about = {
        "layers": [{"name": layer.name, "d_in": layer.d_in, "d_out": layer.d_out} for layer in layers],
        "checked": [layers[0].name, layers[-1].name],
        "num_checked_rows": CHECKED_ROWS,
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
        for row in tokens:
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, row[1:], reduction="sum")
            self.gradients.append(torch.autograd.grad(loss, weights))

    def check(self, source: str, found: dict[str, Tensor]) -> dict[str, float]:
        """The largest difference by kind of answer, as a share of the largest value; none may be above `TOLERANCE`."""
        differences: dict[str, float] = {}
        if "rows" in found:
            differences["rows"] = _difference(found["rows"], self._projected(found))
        for name in [name for name in found if name.startswith(("A.", "S.", "Lambda."))]:
            value = found[name] / found[name].mean() if name.startswith("Lambda") else found[name] / found[name].trace()
            kind = name.partition(".")[0]
            differences[kind] = max(differences.get(kind, 0.0), _difference(value, self.first.setdefault(name, value)))
        for kind, difference in differences.items():
            assert difference < TOLERANCE, f"{source}: {kind} differ by {difference} of the largest value"
        return differences

    def _projected(self, found: dict[str, Tensor]) -> Tensor:
        rows = [
            torch.cat([
                (found[f"P_o.{layer.name}"].T @ G @ found[f"P_i.{layer.name}"]).flatten()
                for layer, G in zip(self.layers, gradients, strict=True)
            ])
            for gradients in self.gradients
        ]
        return torch.stack(rows)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _summary(held: dict, num_tokens: int) -> dict:
    """Of every pass: tokens per processor second and per second of the clock, and the ratio to the floor of the same process."""
    floor = held["seconds"]["floor"]
    summary: dict = {"peak_mib": round(held["peak_mib"])}
    for name, spent in held["seconds"].items():
        ratios = [reference / own for reference, own in zip(floor["cpu"], spent["cpu"], strict=True)]
        summary[name] = {
            "tokens_per_cpu_s": round(num_tokens / statistics.median(spent["cpu"]), 1),
            "tokens_per_s": round(num_tokens / statistics.median(spent["wall"]), 1),
            "ratio_to_floor": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return summary


def _table(result: dict) -> str:
    """Tokens per processor second and ratio to the floor; `ours is` compares the ratios to the floor."""
    rows = []
    ours = result["sources"].get("ours", {})
    for source, summary in result["sources"].items():
        for name in ("floor", *PASSES):
            if name in summary:
                held = summary[name]
                times = (
                    f"{ours[name]['ratio_to_floor'] / held['ratio_to_floor']:.2f} x" if name in ours and source != "ours" else ""
                )
                low, high = held["ratio_range"]
                ratio = f"{held['ratio_to_floor']:.3f} [{low:.3f}, {high:.3f}]"
                rows.append([source, name, f"{held['tokens_per_cpu_s']:.0f}", ratio, times])
    size = f"{result['model']}, {result['rows']} x {result['context']} tokens, rank {result['rank']}"
    header = [size, "pass", "tokens / CPU s", "of the floor [range]", "ours is"]
    return "\n".join([text_table(header, rows), *(f"left out: {what}: {why}" for what, why in result["left_out"].items())])


if __name__ == "__main__":
    main(sys.argv[1:])
