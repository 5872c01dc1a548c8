"""dattri (PyPI `dattri`): EK-FAC and conjugate-gradient influence at the last checkpoint, and TRAK of one run.

Queries enter influence by their loss: the gradient of a margin, of a log-probability or of one absolute error is a positive
multiple of it, which changes no order of rows.
"""

import numpy as np
import torch
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from handover import Handover, drive, margins
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

BATCH = 256
CG_QUERIES = 4  # whose Hessian products are taken together; of 103, the products with 896 rows' Hessian took 12 GB and more
SIZE = 512  # numbers that a gradient is projected to
DAMPING = 0.1  # of the mean eigenvalue


def ekfac(handed: Handover) -> np.ndarray:
    """Of the empirical Fisher matrix, which is what the package fits."""
    attributor = IFAttributorEKFAC(task=loss_task(handed), device="cpu")
    attributor.cache(loader(handed, "train"))
    eigenvalues = torch.cat([values.flatten() for values in attributor.cached_lambdas.values()])
    attributor.damping = DAMPING * eigenvalues.mean().item()
    return influence(attributor, handed)


def cg(handed: Handover) -> np.ndarray:
    """Of the Hessian of all rows, damped by the 1/(eta_bar K) of the last segment, in the package's ten iterations."""
    rates, _sizes = handed.steps()
    first = handed.about["checkpoints"][-1 - len(handed.about["checkpoints"]) // handed.about["segments"]]
    time = rates[first:].sum() / (1 - handed.about["optimizer"]["momentum"])
    attributor = IFAttributorCG(task=loss_task(handed), device="cpu", regularization=float(1 / time))
    attributor.cache(loader(handed, "train", at_once=len(handed.arrays["x_train"])))
    return influence(attributor, handed, queries_at_once=CG_QUERIES)


def influence(attributor: IFAttributorEKFAC | IFAttributorCG, handed: Handover, *, queries_at_once: int = BATCH) -> np.ndarray:
    """(query, row) scores."""
    scores = attributor.attribute(loader(handed, "train"), loader(handed, "query", at_once=queries_at_once))
    return scores.detach().double().numpy().T


def loss_task(handed: Handover) -> AttributionTask:
    model = handed.model()

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return handed.loss(functional_call(model, params, (batch[0],)), batch[1]).mean()

    return AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())


def trak(handed: Handover) -> np.ndarray:
    classes = handed.about["loss"] == "cross_entropy"
    if not classes and handed.about["model"]["dims"][-1] != 1:
        raise ValueError("TRAK here knows regression of one number only")
    model = handed.model()

    def outputs(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x[None],))

    def output(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        found = outputs(params, batch[0])
        return margins(found, batch[1][None]).sum() if classes else found.sum()

    def target(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return -handed.cost(outputs(params, batch[0]), batch[1][None]).sum()

    def probability(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """1 minus this weighs a row: by minus the derivative of its loss by its output, of classes 1 - p."""
        found = outputs(params, batch[0])
        return torch.sigmoid(margins(found, batch[1][None])).sum() if classes else 1 - 2 * (batch[1].sum() - found.sum())

    task = AttributionTask(loss_func=output, target_func=target, model=model, checkpoints=model.state_dict())
    attributor = TRAKAttributor(
        task=task,
        correct_probability_func=probability,
        projector_kwargs={"proj_dim": SIZE, "proj_seed": handed.about["seed"], "device": "cpu"},
        device="cpu",
    )
    attributor.cache(loader(handed, "train"))
    with torch.no_grad():
        return attributor.attribute(loader(handed, "query")).double().numpy().T


def loader(handed: Handover, part: str, *, at_once: int = BATCH) -> DataLoader:
    arrays = handed.arrays
    return DataLoader(TensorDataset(arrays[f"x_{part}"], arrays[f"y_{part}"]), batch_size=at_once, shuffle=False)


if __name__ == "__main__":
    drive({"ekfac": ekfac, "cg": cg, "trak": trak})
