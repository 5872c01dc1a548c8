"""Ours: rows of random two-sided projections, written to the store; the passes for EK-FAC."""

import shutil
from itertools import count

import numpy as np
import torch
from speed_handover import TRUE, Action, Handover, drive
from torch import Tensor

from tda.data import Batch, Documents
from tda.ekfac import corrected_eigenvalues, covariances
from tda.gradients import gradient_rows
from tda.model import tracked_layers
from tda.projection import random_projections
from tda.store import open_table
from tda.stored_rows import Rows
from tda.task import CausalLM


class TrueLabels(CausalLM):
    """Takes the true labels where labels are sampled."""

    def losses(self, model, batch, *, weights=None, labels="true", generator=None):
        """As `CausalLM`."""
        return super().losses(model, batch)


def actions(handed: Handover) -> dict[str, Action]:
    model, tokens = handed.model().requires_grad_(False), handed.tokens
    layers = [layer for layer in tracked_layers(model) if layer.name in set(handed.layers)]
    group = {layer.name: layer.group for layer in layers}
    names = [str(row) for row in range(len(tokens))]
    documents = Documents(names, names, names, names, list(tokens.numpy().astype(np.int32)), np.ones(len(names), np.int64))
    batches: list[Batch] = [documents.batch(rows) for rows in handed.batch_plan()]
    projections = random_projections(layers, rank=handed.about["rank"], seed=handed.about["seed"])
    dim, numbers, folder = sum(held.size for held in projections.values()), count(), handed.folder / "store"

    def rows_of(batch: Batch) -> Rows:
        found, losses = gradient_rows(model, layers, batch, task=CausalLM(), projections=projections)
        vectors = found.float().numpy()
        ids = [documents.ids[row] for row in batch.rows]
        predicted = documents.num_loss_tokens[batch.rows].astype(np.int32)
        return Rows(ids, ids, ids, predicted, losses.numpy(), np.linalg.norm(vectors, axis=1), vectors)

    def rows(labels: str) -> dict[str, Tensor]:
        path = folder / str(next(numbers))
        table = open_table(path, checkpoint=0, segment=0, identity={}, dim=dim, dtype=handed.about["store_dtype"])
        table.write(rows_of(batch) for batch in batches)
        shutil.rmtree(path)
        if labels != TRUE:
            return {}
        first = torch.from_numpy(rows_of(documents.batch(range(handed.about["num_checked_rows"]))).vectors)
        return {"rows": first} | {
            f"{side}.{name}": matrix.contiguous()
            for name, held in projections.items()
            for side, matrix in (("P_i", held.P_i), ("P_o", held.P_o))
        }

    def task(labels: str) -> CausalLM:
        return TrueLabels() if labels == TRUE else CausalLM()

    def covariance_pass(labels: str) -> dict[str, Tensor]:
        found = covariances(model, layers, batches, task=task(labels), generator=torch.Generator().manual_seed(0))
        checked = handed.about["checked"]
        return {f"A.{name}": found.A[group[name]] for name in checked} | {f"S.{name}": found.S[name] for name in checked}

    inputs, outputs = handed.bases()
    basis = {name: (inputs[name], outputs[name]) for name in inputs}

    def eigenvalue_pass(labels: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        found, _count = corrected_eigenvalues(model, layers, batches, task=task(labels), basis=basis, generator=generator)
        return {f"Lambda.{name}": found[name] for name in handed.about["checked"]}

    return {"rows": rows, "covariances": covariance_pass, "eigenvalues": eigenvalue_pass}


if __name__ == "__main__":
    drive(actions)
