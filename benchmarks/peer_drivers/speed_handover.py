"""What a driver of the speed benchmark gets and gives back, and how it takes time; as `handover.py`, in a peer's environment.

The folder, as `benchmarks/peers_speed.py` writes it: `about.json` (layers, sizes, rounds), `model/` as transformers saves it,
`tokens.npy` (row, position) and `bases.safetensors`, by its size an orthogonal matrix that stands for the eigenvectors of every
covariance of that size: what a pass costs does not depend on them, and with them its results can be compared. A driver hands in
actions; the answers go to `answers.safetensors`, the seconds to `speed.json`.
"""

import contextlib
import copy
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from handover import peak_mib
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

MEMORY = 12 * 2**30  # bytes that a driver may take before it fails: it is not to take the machine with it
TRUE, SAMPLED = "true", "sampled"

Action = Callable[[str], dict[str, Tensor]]
"""Works through all batches with true or sampled labels. Its answers, each if it has it, of the layers in `checked`: "A.LAYER"
and "S.LAYER" (sums or means of the products of inputs and of pseudo-gradients), "Lambda.LAYER" (d_out, d_in); "rows" of the
first rows of tokens, with "P_i.LAYER" (d_in, k) and "P_o.LAYER" (d_out, k) of all layers."""


@dataclass(frozen=True)
class Handover:
    """A model, its tokens and the sizes."""

    folder: Path

    @cached_property
    def about(self) -> dict:
        """`layers` (name, d_in, d_out), `checked` ones, `passes`, sizes, `device`, `dtype`: as `hand_over` writes it."""
        return json.loads((self.folder / "about.json").read_text(encoding="utf-8"))

    @cached_property
    def tokens(self) -> Tensor:
        """(row, position)."""
        return torch.from_numpy(np.load(self.folder / "tokens.npy"))

    @property
    def device(self) -> torch.device:
        """Where the model and all passes are."""
        return torch.device(self.about["device"])

    @property
    def layers(self) -> list[str]:
        """Names of those that are tracked."""
        return [layer["name"] for layer in self.about["layers"]]

    def batches(self) -> Iterator[Tensor]:
        """The rows in their order, on the device."""
        for tokens in self.tokens.split(self.about["batch_rows"]):
            yield tokens.to(self.device)

    def batch_plan(self) -> list[list[int]]:
        """The same as row numbers."""
        return [rows.tolist() for rows in torch.arange(len(self.tokens)).split(self.about["batch_rows"])]

    def model(self) -> nn.Module:
        """The model on the device, in eval mode. Every call gives modules of its own, whose weights are in memory once."""
        held = {id(tensor): tensor for tensor in (*self._loaded.parameters(), *self._loaded.buffers())}
        return copy.deepcopy(self._loaded, memo=held)

    @cached_property
    def _loaded(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, self.about["dtype"])
        return AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=dtype).to(self.device).eval()

    def bases(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of every layer the matrix of its inputs and that of its outputs."""
        held = load_file(self.folder / "bases.safetensors")
        inputs = {layer["name"]: held[str(layer["d_in"])] for layer in self.about["layers"]}
        return inputs, {layer["name"]: held[str(layer["d_out"])] for layer in self.about["layers"]}


def floor(handed: Handover) -> Action:
    """The frozen model's forward, loss and backward to the input embeddings, as transformers and autograd do it."""
    model = handed.model().requires_grad_(False)

    def work(_labels: str) -> dict[str, Tensor]:
        for tokens in handed.batches():
            embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
        return {}

    return work


def passes(handed: Handover, actions: Callable[[Handover], dict[str, Action]]) -> dict[str, Action]:
    """The floor, and those of the driver's actions that are asked for."""
    known = actions(handed)
    return {"floor": floor(handed)} | {name: known[name] for name in handed.about["passes"] if name in known}


def drive(actions: Callable[[Handover], dict[str, Action]]) -> None:
    """`DRIVER FOLDER`: get the answers with true labels, which is the warm-up too; then every round all actions in turns."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    handed = Handover(Path(sys.argv[1]))
    if handed.device.type == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.manual_seed(handed.about["seed"])
    held = passes(handed, actions)
    answers: dict[str, Tensor] = {}
    for action in held.values():
        answers |= {name: value.float().contiguous() for name, value in action(TRUE).items()}
    save_file(answers, handed.folder / "answers.safetensors")
    answers.clear()
    measured: list[dict] = []
    for _ in range(handed.about["rounds"]):
        for name, action in held.items():
            with memory_on_gpu(handed) as memory:
                before, start = time.process_time(), time.perf_counter()
                action(SAMPLED)
                synchronise(handed.device)
                wall, cpu = time.perf_counter() - start, time.process_time() - before
            measured.append({"pass": name, "wall": wall, "cpu": cpu, **memory})
    (handed.folder / "speed.json").write_text(json.dumps({"measured": measured, "peak_mib": peak_mib()}), encoding="utf-8")


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def memory_on_gpu(handed: Handover) -> Iterator[dict[str, float]]:
    """`gpu_gib`: the most that the block takes on a GPU beyond what is there already, and the weights, once."""
    found: dict[str, float] = {}
    if handed.device.type != "cuda":
        yield found
        return
    synchronise(handed.device)
    before = torch.cuda.memory_allocated(handed.device)
    torch.cuda.reset_peak_memory_stats(handed.device)
    yield found
    weights = sum(parameter.nbytes for parameter in handed.model().parameters())
    found["gpu_gib"] = (torch.cuda.max_memory_allocated(handed.device) - before + weights) / 2**30
