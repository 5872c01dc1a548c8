"""What a driver of the speed benchmark gets and gives back, and how it takes time; as `handover.py`, in a peer's environment.

The folder, as `benchmarks/peers_speed.py` writes it: `about.json` (layers, sizes, rounds), `model/` as transformers saves it,
`tokens.npy` (row, position) and `bases.safetensors`, by its size an orthogonal matrix that stands for the eigenvectors of every
covariance of that size: what a pass costs does not depend on them, and with them its results can be compared. A driver hands in
actions; the answers go to `answers.safetensors`, the seconds to `speed.json`.
"""

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
        """`layers` (name, d_in, d_out), `checked` layers, `batch_rows`, `rank`, `rounds`, `num_checked_rows`, `seed`."""
        return json.loads((self.folder / "about.json").read_text(encoding="utf-8"))

    @cached_property
    def tokens(self) -> Tensor:
        """(row, position)."""
        return torch.from_numpy(np.load(self.folder / "tokens.npy"))

    @property
    def layers(self) -> list[str]:
        """Names of those that are tracked."""
        return [layer["name"] for layer in self.about["layers"]]

    def batches(self) -> Iterator[Tensor]:
        """The rows in their order."""
        yield from self.tokens.split(self.about["batch_rows"])

    def batch_plan(self) -> list[list[int]]:
        """The same as row numbers."""
        return [rows.tolist() for rows in torch.arange(len(self.tokens)).split(self.about["batch_rows"])]

    def model(self) -> nn.Module:
        """The model, in eval mode."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32).eval()

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


def drive(actions: Callable[[Handover], dict[str, Action]]) -> None:
    """`DRIVER FOLDER`: get the answers with true labels, which is the warm-up too; then every round all actions in turns."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    handed = Handover(Path(sys.argv[1]))
    torch.manual_seed(handed.about["seed"])
    held = {"floor": floor(handed)} | actions(handed)
    answers: dict[str, Tensor] = {}
    for action in held.values():
        answers |= {name: value.float().contiguous() for name, value in action(TRUE).items()}
    save_file(answers, handed.folder / "answers.safetensors")
    answers.clear()
    spent: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in held}
    for _ in range(handed.about["rounds"]):
        for name, action in held.items():
            before, start = time.process_time(), time.perf_counter()
            action(SAMPLED)
            spent[name]["wall"].append(time.perf_counter() - start)
            spent[name]["cpu"].append(time.process_time() - before)
    (handed.folder / "speed.json").write_text(json.dumps({"seconds": spent, "peak_mib": peak_mib()}), encoding="utf-8")
