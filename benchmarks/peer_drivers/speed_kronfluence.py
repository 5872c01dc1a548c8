"""Kronfluence: the loops of `fit_covariance_matrices` and `fit_lambda_matrices`, without what these write to files."""

import logging
from typing import Any

import torch
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import fit_lambda_matrices_with_loader
from kronfluence.utils.constants import (
    ACTIVATION_COVARIANCE_MATRIX_NAME,
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    GRADIENT_COVARIANCE_MATRIX_NAME,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_MATRIX_NAME,
)
from kronfluence.utils.state import State
from run_kronfluence import TokenTask
from speed_handover import TRUE, Action, Handover, drive
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class MaskedTask(TokenTask):
    """Leaves a row's last position, on which no loss depends, out of the covariances."""

    def get_attention_mask(self, batch: Any) -> Tensor:
        """One where a position counts."""
        mask = torch.ones_like(batch[0])
        mask[:, -1] = 0
        return mask


def actions(handed: Handover) -> dict[str, Action]:
    logging.disable(logging.INFO)
    task = MaskedTask(handed)
    task.get_influence_tracked_modules = lambda: handed.layers
    model, state = prepare_model(handed.model(), task), State(cpu=handed.device.type == "cpu")
    loader = DataLoader(TensorDataset(handed.tokens), batch_size=handed.about["batch_rows"])
    inputs, outputs = handed.bases()
    eigen = {ACTIVATION_EIGENVECTORS_NAME: inputs, GRADIENT_EIGENVECTORS_NAME: outputs}
    for kind, bases in ((ACTIVATION_EIGENVALUES_NAME, inputs), (GRADIENT_EIGENVALUES_NAME, outputs)):
        eigen[kind] = {name: torch.ones(len(Q)) for name, Q in bases.items()}  # have to be there; the pass does not read them

    def arguments(labels: str) -> FactorArguments:
        return FactorArguments(strategy="ekfac", use_empirical_fisher=labels == TRUE)

    def covariances(labels: str) -> dict[str, Tensor]:
        _count, found = fit_covariance_matrices_with_loader(model, state, task, loader, arguments(labels), disable_tqdm=True)
        kinds = {"A": ACTIVATION_COVARIANCE_MATRIX_NAME, "S": GRADIENT_COVARIANCE_MATRIX_NAME}
        return {f"{letter}.{name}": found[kind][name] for letter, kind in kinds.items() for name in handed.about["checked"]}

    def eigenvalues(labels: str) -> dict[str, Tensor]:
        _count, found = fit_lambda_matrices_with_loader(model, state, task, loader, arguments(labels), eigen, disable_tqdm=True)
        return {f"Lambda.{name}": found[LAMBDA_MATRIX_NAME][name] for name in handed.about["checked"]}

    return {"covariances": covariances, "eigenvalues": eigenvalues}


if __name__ == "__main__":
    drive(actions)
