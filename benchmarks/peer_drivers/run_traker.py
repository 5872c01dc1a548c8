"""TRAK (PyPI `traker`): one run, gradients of all parameters projected to 512 numbers, in float32 on the CPU."""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from handover import Handover, drive, margins
from torch import Tensor, nn
from torch.func import functional_call
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput

BATCH = 256
SIZE = 512  # numbers that a gradient is projected to


class Output(AbstractModelOutput):
    """What the loss is a function of: margins, or predictions of one number."""

    def __init__(self, handed: Handover):
        self.classes = handed.about["loss"] == "cross_entropy"

    def get_output(self, model: nn.Module, weights: dict, buffers: dict, x: Tensor, y: Tensor) -> Tensor:
        """Of one example."""
        outputs = functional_call(model, (weights, buffers), (x[None],))
        return margins(outputs, y[None]).sum() if self.classes else outputs.sum()

    def get_out_to_loss_grad(self, model: nn.Module, weights: dict, buffers: dict, batch: list[Tensor]) -> Tensor:
        """Minus the derivative of the loss by the output."""
        with torch.no_grad():
            outputs = functional_call(model, (weights, buffers), (batch[0],))
        if self.classes:
            return torch.sigmoid(-margins(outputs, batch[1]))[:, None]
        return 2 * (batch[1].reshape(len(outputs), -1) - outputs)


def trak(handed: Handover) -> np.ndarray:
    if handed.about["loss"] != "cross_entropy" and handed.about["model"]["dims"][-1] != 1:
        raise ValueError("TRAK here knows regression of one number only")
    arrays, model = handed.arrays, handed.model()
    num_train, num_queries = len(arrays["x_train"]), len(arrays["x_query"])
    traker = TRAKer(
        model=model,
        task=Output(handed),
        train_set_size=num_train,
        save_dir=str(handed.folder / "trak"),
        device="cpu",
        proj_dim=SIZE,
        use_half_precision=False,
        projector_seed=handed.about["seed"],
        logging_level=logging.WARNING,
    )
    weights = model.state_dict()
    traker.load_checkpoint(weights, model_id=0)
    for batch in batches(arrays, "train"):
        traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    traker.start_scoring_checkpoint(exp_name="queries", checkpoint=weights, model_id=0, num_targets=num_queries)
    for batch in batches(arrays, "query"):
        traker.score(batch=batch, num_samples=len(batch[0]))
    scores = np.array(traker.finalize_scores(exp_name="queries"), dtype=np.float64).T
    if handed.about["loss"] == "cross_entropy":
        return scores
    # Of predictions, a score is how far the row lifts the query's: good where the prediction is too low.
    with torch.no_grad():
        errors = model(arrays["x_query"]).flatten() - arrays["y_query"].flatten()
    return scores * -np.sign(errors.numpy())[:, None]


def batches(arrays: dict[str, Tensor], part: str) -> Iterator[list[Tensor]]:
    yield from zip(arrays[f"x_{part}"].split(BATCH), arrays[f"y_{part}"].split(BATCH), strict=True)


if __name__ == "__main__":
    drive({"trak": trak})
