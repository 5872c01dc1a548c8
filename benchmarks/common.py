"""What the benchmarks share: the default model and its documents, timing in turns, the facts of a run."""

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop
from torch.utils.hooks import RemovableHandle

from tda.artifacts import Workspace
from tda.config import Architecture, Config, load_config
from tda.data import Batch, Documents, batch_plan, load_documents
from tda.losses import document_losses
from tda.model import build_model

ROOT = Path(__file__).parents[1]
SHAPES = {  # of models of that name, as transformers' Llama takes them
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}


def options(arguments: Sequence[str], description: str) -> argparse.Namespace:
    """Sizes of the model and the batches; the default is what `params.yaml` says."""
    config = load_config(ROOT / "params.yaml")
    shape = config.train.architecture
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=shape.hidden_size)
    parser.add_argument("--intermediate-size", type=int, default=shape.intermediate_size)
    parser.add_argument("--num-layers", type=int, default=shape.num_layers)
    parser.add_argument("--num-heads", type=int, default=shape.num_heads)
    parser.add_argument("--num-key-value-heads", type=int, default=shape.num_key_value_heads)
    parser.add_argument("--vocabulary", type=int, default=config.prepare.vocabulary)
    parser.add_argument("--context", type=int, default=config.prepare.context)
    parser.add_argument("--batch-tokens", type=int, default=config.gradients.batch_tokens)
    parser.add_argument("--rank", type=int, default=config.gradients.rank)
    parser.add_argument("--documents", type=int, default=512, help="documents per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="", help="folder that holds data/prepare; lengths are made up without")
    return parser.parse_args(arguments)


def made_model(chosen: argparse.Namespace, *, config: Config) -> nn.Module:
    shape = Architecture(
        hidden_size=chosen.hidden_size,
        intermediate_size=chosen.intermediate_size,
        num_layers=chosen.num_layers,
        num_heads=chosen.num_heads,
        num_key_value_heads=chosen.num_key_value_heads,
        tie_embeddings=config.train.architecture.tie_embeddings,
    )
    return build_model(shape, vocabulary=chosen.vocabulary, context=chosen.context, seed=0).to(chosen.device)


def made_documents(chosen: argparse.Namespace) -> Documents:
    """Real documents where there are any; else random tokens, in the lengths of the built-in corpus: 0.7 of the context."""
    random = np.random.default_rng(0)
    if chosen.data:
        documents = load_documents(Workspace(Path(chosen.data)).documents)
        return documents.select(np.sort(random.choice(len(documents), min(chosen.documents, len(documents)), replace=False)))
    lengths = np.clip(np.round(chosen.context * random.beta(2.2, 0.9, size=chosen.documents)), 4, chosen.context).astype(int)
    names = [str(number) for number in range(chosen.documents)]
    return Documents(
        ids=names,
        sources=names,
        parts=names,
        content_hashes=names,
        tokens=[random.integers(0, chosen.vocabulary, size=length).astype(np.int32) for length in lengths],
        loss_starts=np.ones(chosen.documents, np.int64),
    )


def made_batches(documents: Documents, chosen: argparse.Namespace) -> list[Batch]:
    plan = batch_plan(documents.lengths, batch_tokens=chosen.batch_tokens)
    return [documents.batch(rows).to(chosen.device) for rows in plan]


def frozen_pass(model: nn.Module, batch: Batch) -> None:
    """The reference: forward, loss and backward to the input embeddings as transformers and autograd do it, nothing else."""
    embedded = model.get_input_embeddings()(batch.tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    (losses * batch.loss_mask.flatten()).sum().backward()


def lean_pass(model: nn.Module, batch: Batch) -> None:
    """The reference with our own loss, on the predictions that count."""
    handle = differentiated_from_embeddings(model)
    document_losses(model, batch)[0].backward()
    handle.remove()


def differentiated_from_embeddings(model: nn.Module) -> RemovableHandle:
    """Have the backward pass of a frozen model go down to what its input embeddings give, until the handle is removed."""
    return model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())


def count_flops(action: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and of attention in `action`.

    torch's counter knows neither products added in place nor the fused attention of a CPU: the first are told to it, and
    attention is taken apart into its products while they are counted.
    """
    in_place = {torch.ops.aten.addmm_: lambda _self, a, b, *_, out_shape=None, **__: addmm_flop(_self, a, b)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        action()
    return counter.get_total_flops()


def in_turns(actions: dict[str, Callable[[], object]], *, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every action in every round, one after the other, so that what else the machine does falls on all.

    On a CPU the process's own time, which other processes lengthen less than they do the clock's.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter

    def seconds(action: Callable[[], object]) -> float:
        start = clock()
        action()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    for action in actions.values():
        seconds(action)
    spent: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            spent[name].append(seconds(action))
    return spent


def speed(ours: list[float], reference: list[float], *, num_tokens: int) -> dict:
    """Tokens per second, and the ratio to the reference: of medians, and the range of single rounds."""
    ratios = [their / our for our, their in zip(ours, reference, strict=True)]
    return {
        "tokens_per_s": round(num_tokens / statistics.median(ours)),
        "ratio": round(statistics.median(reference) / statistics.median(ours), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def commit() -> str:
    """The short name of the commit that is checked out; empty without git's folder."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def run_facts() -> dict:
    """What ran: versions of the packages and the commit."""
    return {
        "versions": {name: version(name) for name in ("torch", "lancedb", "pylance", "numpy")}
        | {"python": platform.python_version()},
        "commit": commit(),
    }


def facts(chosen: argparse.Namespace, documents: Documents) -> dict:
    """What was measured on what."""
    device = f"cpu, {torch.get_num_threads()} thread" if chosen.device == "cpu" else torch.cuda.get_device_name()
    held = {name: value for name, value in vars(chosen).items() if name not in ("device", "data")}
    return {
        "shapes": held | {"tokens": int(documents.lengths.sum()), "real_documents": bool(chosen.data)},
        "dtype": "float32",
        "device": device,
        "versions": {name: version(name) for name in ("torch", "transformers", "lancedb")}
        | {"python": platform.python_version()},
        "commit": commit(),
    }
