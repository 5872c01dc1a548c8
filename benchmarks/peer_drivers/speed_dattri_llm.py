"""dattri-LLM: LoGra capture into its store on disk, covariances as a callback of the capture, and EK-FAC's second sweep.

Its curvature is of the true labels, whatever is asked for, which saves it the sampling; its covariances leave out positions
without a gradient, as the first one of queries and keys, which moves them by some 1e-4. The model is frozen and differentiated
from the embeddings' output on, as its documentation advises for a probe.
"""

import math
import shutil
from itertools import count

import torch
from dattri_llm import (
    AttributionArguments,
    AttributionTask,
    EKFACAttributor,
    GradientStorageManager,
    HookManager,
    HookManagerConfig,
    KroneckerCovarianceCallback,
    OffloadCallback,
)
from dattri_llm.gradient import ops
from dattri_llm.gradient.streaming import GradientStreamer
from handover import token_losses
from speed_handover import TRUE, Action, Handover, drive
from torch import Tensor, nn


def projector(_rows: Tensor, _num_rows: int, *, proj_dim: int, proj_seed: int, device: torch.device):
    """A Gaussian projection of each width, as the package asks for it."""

    def project(rows: Tensor) -> Tensor:
        return rows @ matrix(rows.shape[1], proj_dim, proj_seed).to(device)

    return project


def matrix(size: int, rank: int, seed: int) -> Tensor:
    return torch.randn(size, rank, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)


def actions(handed: Handover) -> dict[str, Action]:
    rank, folder, numbers = handed.about["rank"], handed.folder / "dattri_llm", count()
    model = handed.model().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    hooks = dict.fromkeys(handed.layers, "linear_io")

    def run(manager: HookManager) -> None:
        with manager.collect(deregister_on_exit=True):
            for tokens in handed.batches():
                loss(model, {"input_ids": tokens}).backward()

    def rows(labels: str) -> dict[str, Tensor]:
        store = folder / str(next(numbers))
        config = HookManagerConfig(
            hook_types=hooks,
            include_frozen=True,
            capture_style="materialized",
            projection_kwargs={"__default__": {"style": "logra", "proj_dim": rank, "proj_seed": 0}},
            projector=projector,
        )
        kept = GradientStorageManager(str(store))
        run(HookManager(model, config=config, callbacks=[OffloadCallback(offload_interval=1, file_manager=kept)]))
        answers = {} if labels != TRUE else first_rows(kept)
        kept.close()
        shutil.rmtree(store)
        return answers

    def first_rows(kept: GradientStorageManager) -> dict[str, Tensor]:
        record = kept.load_records(sorted({entry["file"] for held in kept.index.values() for entry in held})[0])[0]
        held = [record.gradient.data[name][: handed.about["num_checked_rows"]].flatten(1) for name in handed.layers]
        return {"rows": torch.cat(held, dim=1)} | {
            f"{side}.{layer['name']}": matrix(layer[size], rank, seed)
            for side, size, seed in (("P_o", "d_out", 0), ("P_i", "d_in", 1))
            for layer in handed.about["layers"]
        }

    def covariances(_labels: str) -> dict[str, Tensor]:
        fitted = KroneckerCovarianceCallback()
        run(HookManager(model, config=HookManagerConfig(hook_types=hooks, include_frozen=True), callbacks=[fitted]))
        found = fitted.result()
        return {f"{letter}.{name}": found[name][place] for place, letter in enumerate("AS") for name in handed.about["checked"]}

    arguments = AttributionArguments(output_dir=str(folder / "scores"), use_cpu=handed.device.type == "cpu")
    fitter = EKFACAttributor(arguments, task=AttributionTask(loss, model))
    ops.kfac_eigh = lambda Q_A, Q_S: (None, Q_A, None, Q_S)  # what is handed in as covariances are the bases themselves
    inputs, outputs = handed.bases()

    def eigenvalues(_labels: str) -> dict[str, Tensor]:
        fitter._capture_covariances = {name: (inputs[name], outputs[name]) for name in handed.layers}
        stream = GradientStreamer(
            model,
            [{"input_ids": row} for row in handed.tokens],
            arguments,
            batch_size=handed.about["batch_rows"],
            loss_fn=loss,
            config=HookManagerConfig(hook_types=hooks, include_frozen=True),
        )
        with stream:
            found = fitter.fit_factors(stream, ops.FisherAccumulator())
        return {f"Lambda.{name}": found[name][2].reshape(len(outputs[name]), -1) for name in handed.about["checked"]}

    return {"rows": rows, "covariances": covariances, "eigenvalues": eigenvalues}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Summed over tokens."""
    return token_losses(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["input_ids"]).sum()


if __name__ == "__main__":
    drive(actions)
