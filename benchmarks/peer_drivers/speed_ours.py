"""Ours: rows of random two-sided projections, written to the store; the passes for EK-FAC; the floor with compiled layers.

Everything as the stages do it: on a GPU documents are packed, rows come from compiled layers, and are written while the next are
computed.
"""

import contextlib
import shutil
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from speed_handover import TRUE, Action, Handover, drive
from torch import Tensor

from benchmarks.common import ROOT, differentiated_from_embeddings
from tda.config import load_config
from tda.data import Documents
from tda.ekfac import basis_like, corrected_eigenvalues, covariances
from tda.gradient_log import row_engine, write_rows
from tda.losses import document_losses
from tda.model import tracked_layers
from tda.packing import pack, within_documents
from tda.parallel import products_in_tf32
from tda.projection import Projection, random_projections
from tda.row_layers import decoder_layers
from tda.store import open_table
from tda.task import CausalLM

OPEN = contextlib.ExitStack()  # as long as the process lives


class TrueLabels(CausalLM):
    """Takes the true labels where labels are sampled."""

    def losses(self, model, batch, *, weights=None, labels="true", generator=None):
        """As `CausalLM`."""
        return super().losses(model, batch)


def actions(handed: Handover) -> dict[str, Action]:
    tokens = handed.tokens.numpy().astype(np.int32)
    names = [str(row) for row in range(len(tokens))]
    documents = Documents(names, names, names, names, list(tokens), np.ones(len(names), np.int64))
    return {"compiled floor": compiled_floor(handed, documents), "rows": rows(handed, documents)} | curvature(handed, documents)


def compiled_floor(handed: Handover, documents: Documents) -> Action:
    """The floor through compiled decoder layers and losses of blocks of logits: what a logger that costs nothing would take."""
    model = handed.model().requires_grad_(False)
    differentiated_from_embeddings(model)
    for layer in decoder_layers(model):
        layer.compile(fullgraph=True)

    def work(_labels: str) -> dict[str, Tensor]:
        with within_documents(model):
            for batch in handed.batch_plan():
                document_losses(model, pack(documents, batch).to(handed.device), backend="inductor")[0].backward()
        return {}

    return work


def rows(handed: Handover, documents: Documents) -> Action:
    model, about = handed.model(), handed.about
    layers = [layer for layer in tracked_layers(model) if layer.name in set(handed.layers)]
    projections = random_projections(layers, rank=about["rank"], seed=about["seed"])
    config, batch_tokens = load_config(ROOT / "params.yaml"), about["batch_rows"] * handed.tokens.shape[1]
    changed = {
        "gradients": config.gradients.model_copy(update={"batch_tokens": batch_tokens}),
        "compute": config.compute.model_copy(update={"compile": about["compile"]}),
    }
    config = config.model_copy(update=changed)
    engine = OPEN.enter_context(row_engine(config, model, layers, projections, device=handed.device))
    dim, numbers, folder = sum(held.size for held in projections.values()), count(), handed.folder / "store"
    plan = handed.batch_plan()

    def work(labels: str) -> dict[str, Tensor]:
        path = folder / str(next(numbers))
        table = open_table(path, checkpoint=0, segment=0, identity={}, dim=dim, dtype=about["store_dtype"])
        write_rows(table, documents, plan, (engine.numbers(documents, batch) for batch in plan), device=handed.device)
        shutil.rmtree(path)
        return {} if labels != TRUE else checked_rows(projections)

    def checked_rows(projections: dict[str, Projection]) -> dict[str, Tensor]:
        first = engine.numbers(documents, list(range(about["num_checked_rows"])))[:, :-1]
        return {"rows": first.cpu()} | {
            f"{side}.{name}": matrix.contiguous()
            for name, held in projections.items()
            for side, matrix in (("P_i", held.P_i), ("P_o", held.P_o))
        }

    return work


def curvature(handed: Handover, documents: Documents) -> dict[str, Action]:
    model, about = handed.model().requires_grad_(False), handed.about
    packed = handed.device.type != "cpu"
    layers = [layer for layer in tracked_layers(model) if layer.name in set(handed.layers)]
    group = {layer.name: layer.group for layer in layers}
    batches = [(pack(documents, rows) if packed else documents.batch(rows)).to(handed.device) for rows in handed.batch_plan()]

    @contextlib.contextmanager
    def passing(labels: str) -> Iterator[dict]:
        task = TrueLabels() if labels == TRUE else CausalLM()
        with within_documents(model) if packed else contextlib.nullcontext(), products_in_tf32(model):
            yield {"task": task, "generator": torch.Generator(handed.device).manual_seed(0)}

    def covariance_pass(labels: str) -> dict[str, Tensor]:
        with passing(labels) as given:
            found = covariances(model, layers, batches, **given)
        checked = about["checked"]
        return {f"A.{name}": found.A[group[name]] for name in checked} | {f"S.{name}": found.S[name] for name in checked}

    def eigenvalue_pass(labels: str) -> dict[str, Tensor]:
        with passing(labels) as given:
            found, _count = corrected_eigenvalues(model, layers, batches, basis=basis, **given)
        return {f"Lambda.{name}": found[name] for name in about["checked"]}

    passes: dict[str, Action] = {"covariances": covariance_pass}
    if "eigenvalues" in about["passes"]:
        inputs, outputs = handed.bases()
        basis = basis_like(
            next(model.parameters()), {name: (inputs[name], outputs[name]) for name in inputs}
        )  # as stages do: once
        passes["eigenvalues"] = eigenvalue_pass
    return passes


if __name__ == "__main__":
    drive(actions)
