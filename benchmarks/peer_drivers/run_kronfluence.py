"""Kronfluence (PyPI `kronfluence`): EK-FAC influence at the last checkpoint, in its defaults but for the damping heuristic."""

import logging
from typing import Any

import numpy as np
import torch
from handover import Handover, drive, token_losses
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

BATCH = 256  # examples at once
LM_BATCH = 32  # rows of tokens at once


class PlainTask(Task):
    """A model of plain tensors; a batch is inputs, targets and, in training, the labels to use as sampled ones."""

    def __init__(self, handed: Handover):
        self.handed = handed

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Summed over examples."""
        outputs = model(batch[0])
        y = batch[1]
        if sample:
            y = batch[2] if len(batch) > 2 else self.handed.sample(outputs.detach())
        return self.handed.loss(outputs, y).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The summed cost."""
        return self.handed.cost(model(batch[0]), batch[1]).sum()

    def get_influence_tracked_modules(self) -> list[str]:
        """Those that ours tracks."""
        return self.handed.about["layers"]


class TokenTask(Task):
    """A causal language model; a batch is tokens."""

    def __init__(self, handed: Handover):
        self.handed = handed

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Summed over tokens."""
        logits = model(input_ids=batch[0], use_cache=False).logits
        if not sample:
            return token_losses(logits, batch[0]).sum()
        with torch.no_grad():
            drawn = torch.multinomial(logits[:, :-1].softmax(dim=-1).flatten(0, 1), 1).reshape(len(logits), -1)
        labels = torch.cat([batch[0][:, :1], drawn], dim=1)
        return token_losses(logits, labels).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The mean loss of a row's tokens, summed over rows."""
        return token_losses(model(input_ids=batch[0], use_cache=False).logits, batch[0]).mean(dim=1).sum()

    def get_influence_tracked_modules(self) -> list[str]:
        """Those that ours tracks."""
        return self.handed.about["layers"]


def ekfac(handed: Handover) -> np.ndarray:
    logging.disable(logging.INFO)
    arrays = handed.arrays
    if handed.is_lm:
        task, size = TokenTask(handed), LM_BATCH
        train, queries = (TensorDataset(arrays[f"x_{part}"].long()) for part in ("train", "query"))
    else:
        task, size = PlainTask(handed), BATCH
        extra = [arrays["sampled_train"]] if "sampled_train" in arrays else []
        train = TensorDataset(arrays["x_train"], arrays["y_train"], *extra)
        queries = TensorDataset(arrays["x_query"], arrays["y_query"])
    analyzer = Analyzer(
        analysis_name="scores",
        model=prepare_model(handed.model(), task),
        task=task,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(handed.folder / "kronfluence"),
    )
    dtype = handed.dtype
    analyzer.fit_all_factors(
        factors_name="ekfac",
        dataset=train,
        per_device_batch_size=size,
        factor_args=FactorArguments(
            strategy="ekfac",
            activation_covariance_dtype=dtype,
            gradient_covariance_dtype=dtype,
            per_sample_gradient_dtype=dtype,
            lambda_dtype=dtype,
        ),
        overwrite_output_dir=True,
    )
    analyzer.compute_pairwise_scores(
        scores_name="pairwise",
        factors_name="ekfac",
        query_dataset=queries,
        train_dataset=train,
        per_device_query_batch_size=len(queries) if not handed.is_lm else LM_BATCH,
        per_device_train_batch_size=size,
        score_args=ScoreArguments(
            damping_factor=None,  # a tenth of each layer's mean eigenvalue
            score_dtype=dtype,
            per_sample_gradient_dtype=dtype,
            precondition_dtype=dtype,
        ),
        overwrite_output_dir=True,
    )
    return analyzer.load_pairwise_scores("pairwise")["all_modules"].double().numpy()


if __name__ == "__main__":
    drive({"ekfac": ekfac})
