"""What a driver gets and gives back, read and written with torch, numpy and safetensors alone: it runs in a peer's environment.

The folder, as `benchmarks/peers.py` writes it: `about.json` (model, loss, measurement, tracked layers, optimizer, steps),
`data.npz` (rows and queries as the model takes them; `sampled_train`, if there, are labels to use wherever a method samples
them), and `run/`, a recorded run with its checkpoints as safetensors. A driver writes `scores.npy`, (query, row), positive where
the query's cost is predicted to rise when the row is left out, and `usage.json`.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

MEMORY = 8 * 2**30  # bytes that a driver may take before it fails: it is not to take the machine with it
ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


@dataclass(frozen=True)
class Handover:
    """The rows, queries, checkpoints and facts of one run."""

    folder: Path

    @cached_property
    def about(self) -> dict:
        """The facts."""
        return json.loads((self.folder / "about.json").read_text(encoding="utf-8"))

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        """x_train, x_query, and where they are not tokens y_train and y_query."""
        with np.load(self.folder / "data.npz") as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and inputs."""
        return getattr(torch, self.about["dtype"])

    @property
    def is_lm(self) -> bool:
        """Whether rows are tokens."""
        return self.about["loss"] == "causal_lm"

    def weights(self, checkpoint: int, kind: str = "weights") -> dict[str, Tensor]:
        """Weights, or `second_moments`, of a checkpoint, by name; -1 is the last one."""
        number = range(len(self.about["checkpoints"]))[checkpoint]
        held = load_file(self.folder / "run" / f"{number}.safetensors")
        return {name.partition("/")[2]: value for name, value in held.items() if name.startswith(f"{kind}/")}

    def model(self, checkpoint: int = -1) -> nn.Module:
        """The model at a checkpoint, in eval mode."""
        model = self._empty_model().to(self.dtype)
        model.load_state_dict(self.weights(checkpoint), strict=not self.is_lm)  # a tied weight has one name only
        return model.eval()

    def _empty_model(self) -> nn.Module:
        shape = self.about["model"]
        if shape["kind"] == "causal_lm":
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(shape["path"], dtype=torch.float32)
        layers: list[nn.Module] = []
        for d_in, d_out in zip(shape["dims"], shape["dims"][1:], strict=False):
            layers += [nn.Linear(d_in, d_out), ACTIVATIONS[shape["activation"]]()]
        return nn.Sequential(*layers[:-1])

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Learning rates, and the number of rows, of every step."""
        with np.load(self.folder / "run" / "steps.npz") as file:
            return file["learning_rates"], file["batch_sizes"]

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """(example,) losses of the outputs of a model that takes plain tensors."""
        if self.about["loss"] == "cross_entropy":
            return F.cross_entropy(outputs, y, reduction="none")
        return (outputs.flatten(1) - y.reshape(len(y), -1)).square().sum(dim=1)

    def cost(self, outputs: Tensor, y: Tensor) -> Tensor:
        """(example,) measurements, signed so that lower is better."""
        measurement = self.about["measurement"]
        if measurement == "margin":
            return -margins(outputs, y)
        if measurement == "absolute_error":
            return (outputs.flatten(1) - y.reshape(len(y), -1)).abs().sum(dim=1)
        return self.loss(outputs, y)

    def sample(self, outputs: Tensor) -> Tensor:
        """Labels drawn from the model: squared error is minus the log-likelihood of a Gaussian of variance 1/2."""
        if self.about["loss"] == "cross_entropy":
            return torch.multinomial(outputs.softmax(dim=1), 1).squeeze(1)
        return outputs + 0.5**0.5 * torch.randn_like(outputs)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """Log p/(1-p) of the true class."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return true - others.logsumexp(dim=1)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """(row, token - 1) losses of next-token prediction."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").reshape(len(tokens), -1)


def peak_mib() -> float:
    """The largest memory of this process. Its `ru_maxrss` would be no less than that of the process which started it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def drive(methods: dict[str, Callable[[Handover], np.ndarray]]) -> None:
    """`DRIVER METHOD FOLDER`: run a method, write what it says; processor seconds are those of the method, without imports."""
    method, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    handed = Handover(folder)
    torch.manual_seed(handed.about["seed"])
    before = sum(os.times()[:4])  # of this process and the children it waited for
    scores = methods[method](handed)
    spent = sum(os.times()[:4]) - before
    np.save(folder / "scores.npy", np.asarray(scores, dtype=np.float64))
    (folder / "usage.json").write_text(json.dumps({"cpu_seconds": spent, "peak_mib": peak_mib()}), encoding="utf-8")
