"""What is trained and what is measured: the one thing that a user tells of a model, whatever the model is.

A task knows two numbers of an example: its training loss, with labels that are true or sampled from the model itself, and its
cost, the measurement that scores predict, signed so that lower is better.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tda.data import Batch, TensorBatch
from tda.losses import Labels, Measurement, at_least_float32, document_costs, document_losses, draw

RegressionMeasurement = Literal["absolute_error", "squared_error"]


@runtime_checkable
class Task(Protocol):
    """Training loss and cost of the examples in a batch; each returns a sum to be differentiated, and every example's value.

    The training loss of a step is the mean over the terms (`batch.sizes`) of its examples: over examples, or over tokens.
    """

    def losses(
        self,
        model: nn.Module,
        batch: Batch | TensorBatch,
        *,
        weights: Float[Tensor, " example"] | None = None,
        labels: Labels = "true",
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """The sum over examples of `weights` (default 1) times the loss, and the losses, each summed over the example's terms.

        With sampled labels, squared gradients average to the Gauss-Newton matrix of the loss (Martens 2020, section 5).
        """
        ...

    def costs(
        self, model: nn.Module, batch: Batch | TensorBatch, *, weights: Float[Tensor, " example"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """The same of the measurement, signed so that lower is better."""
        ...


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: cross-entropy in nats, summed over the predictions of a document that count.

    The cost is the loss, minus the margin (log p/(1-p)), or minus the log-probability.
    """

    measurement: Measurement = "loss"

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        weights: Float[Tensor, " example"] | None = None,
        labels: Labels = "true",
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """See `Task.losses`."""
        return document_losses(model, batch, weights=weights, labels=labels, generator=generator)

    def costs(
        self, model: nn.Module, batch: Batch, *, weights: Float[Tensor, " example"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """See `Task.costs`."""
        return document_costs(model, batch, weights=weights, measurement=self.measurement)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy (nats) of `model(x)`, logits (example, class), against the class numbers `y`.

    The cost is minus the margin log p/(1-p) of the true class, the loss, or minus the log-probability.
    """

    measurement: Measurement = "margin"

    def losses(
        self,
        model: nn.Module,
        batch: TensorBatch,
        *,
        weights: Float[Tensor, " example"] | None = None,
        labels: Labels = "true",
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """See `Task.losses`."""
        logits = at_least_float32(model(batch.x))
        y = batch.y
        if labels == "sampled":
            uniform = torch.rand(len(logits), generator=generator, device=logits.device)
            y = draw(logits.detach().softmax(dim=1), uniform)
        return _weighted(F.cross_entropy(logits, y, reduction="none"), weights)

    def costs(
        self, model: nn.Module, batch: TensorBatch, *, weights: Float[Tensor, " example"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """See `Task.costs`."""
        if self.measurement != "margin":
            return self.losses(model, batch, weights=weights)
        logits = at_least_float32(model(batch.x))
        right = logits.gather(1, batch.y[:, None])[:, 0]
        others = logits.scatter(1, batch.y[:, None], -torch.inf).logsumexp(dim=1)
        return _weighted(others - right, weights)


@dataclass(frozen=True)
class Regression:
    """Squared error of `model(x)` against `y`, both (example, ...), summed over the outputs of an example.

    The cost is that, or the summed absolute error.
    """

    measurement: RegressionMeasurement = "absolute_error"

    def losses(
        self,
        model: nn.Module,
        batch: TensorBatch,
        *,
        weights: Float[Tensor, " example"] | None = None,
        labels: Labels = "true",
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """See `Task.losses`. The square of an error is minus the log-likelihood of a Gaussian of variance 1/2."""
        errors = _errors(model, batch)
        if labels == "sampled":
            drawn = torch.randn(errors.shape, generator=generator, device=errors.device, dtype=errors.dtype) * 0.5**0.5
            errors = errors - errors.detach() + drawn
        return _weighted(errors.square().sum(dim=1), weights)

    def costs(
        self, model: nn.Module, batch: TensorBatch, *, weights: Float[Tensor, " example"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """See `Task.costs`."""
        errors = _errors(model, batch)
        return _weighted((errors.abs() if self.measurement == "absolute_error" else errors.square()).sum(dim=1), weights)


def _errors(model: nn.Module, batch: TensorBatch) -> Float[Tensor, "example output"]:
    """Prediction minus target.

    Raises:
        ValueError: they are of different shapes, which subtraction would quietly spread over each other.
    """
    predicted = at_least_float32(model(batch.x))
    if predicted.shape[0] != batch.y.shape[0] or predicted.flatten(1).shape != batch.y.reshape(len(batch.y), -1).shape:
        raise ValueError(
            f"regression: the model's outputs are {tuple(predicted.shape)}, the targets {tuple(batch.y.shape)}; expected as many "
            "values per example"
        )
    return predicted.reshape(len(predicted), -1) - batch.y.reshape(len(batch.y), -1)


def _weighted(values: Float[Tensor, " example"], weights: Float[Tensor, " example"] | None) -> tuple[Tensor, Tensor]:
    return (values if weights is None else weights * values).sum(), values.detach()
