"""A task: what a model was trained to minimise, and what is measured on a query.

For every example a task gives

- its training loss, with true labels or with labels sampled from the model;
- its cost: the measurement that scores predict, signed so that lower is better;
- the outputs, a row per term, of which the loss is a convex function: the Gauss-Newton matrix and TRAK are made of these.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tda.data import Batch, TensorBatch
from tda.losses import (
    Backend,
    Labels,
    Measurement,
    at_least_float32,
    document_costs,
    document_logits,
    document_losses,
    logit_losses,
    margins,
    sample_labels,
)
from tda.packing import DocumentBatch

RegressionMeasurement = Literal["absolute_error", "squared_error"]


@runtime_checkable
class Task(Protocol):
    """Training loss and cost of the examples in a batch: each as a weighted sum to be differentiated, and by example.

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
        """The sum over examples of `weights` (default 1) times the loss, and every example's loss, summed over its terms.

        With sampled labels, squared gradients average to the Gauss-Newton matrix of the loss (Martens 2020, section 5).
        """
        ...

    def costs(
        self, model: nn.Module, batch: Batch | TensorBatch, *, weights: Float[Tensor, " example"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """The same for the measurement, signed so that lower is better."""
        ...

    def outputs(self, model: nn.Module, batch: Batch | TensorBatch) -> Float[Tensor, "term output"]:
        """What the loss is a function of, such as logits: a row for each term (`batch.sizes`) of every example, in order."""
        ...

    def output_losses(self, outputs: Float[Tensor, "term output"], batch: Batch | TensorBatch) -> Float[Tensor, " term"]:
        """The loss of every term, as a convex function of its own outputs; over an example's terms they sum to its loss."""
        ...

    def responses(
        self, outputs: Float[Tensor, "term output"], batch: Batch | TensorBatch
    ) -> tuple[Float[Tensor, "term response"], Float[Tensor, "term response"]]:
        """The numbers that TRAK models linearly, such as margins, and the derivative of the loss by each."""
        ...


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: cross-entropy in nats, summed over the predictions of a document that count.

    The cost is the loss, minus the margin log p/(1-p), or minus the log-probability. A `backend` compiles losses of true
    labels.
    """

    measurement: Measurement = "loss"
    backend: Backend | None = None

    def __post_init__(self) -> None:
        _refuse_unknown(self.measurement, Measurement)

    def losses(
        self,
        model: nn.Module,
        batch: DocumentBatch,
        *,
        weights: Float[Tensor, " example"] | None = None,
        labels: Labels = "true",
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """See `Task.losses`."""
        return document_losses(model, batch, weights=weights, labels=labels, generator=generator, backend=self.backend)

    def costs(
        self, model: nn.Module, batch: DocumentBatch, *, weights: Float[Tensor, " example"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """See `Task.costs`."""
        return document_costs(model, batch, weights=weights, measurement=self.measurement)

    def outputs(self, model: nn.Module, batch: DocumentBatch) -> Float[Tensor, "term output"]:
        """Logits of the predictions that count. See `Task.outputs`."""
        return document_logits(model, batch)

    def output_losses(self, outputs: Float[Tensor, "term output"], batch: DocumentBatch) -> Float[Tensor, " term"]:
        """See `Task.output_losses`."""
        return logit_losses(outputs, batch.predictions[1], None)

    def responses(
        self, outputs: Float[Tensor, "term output"], batch: DocumentBatch
    ) -> tuple[Float[Tensor, "term response"], Float[Tensor, "term response"]]:
        """Margins. See `Task.responses`."""
        return _margin_responses(outputs, batch.predictions[1])


class _ExampleTask:
    """What `Classification` and `Regression` share: loss and cost are functions of the model's outputs."""

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
        outputs = self.outputs(model, batch)
        if labels == "sampled":
            batch = replace(batch, y=self.sampled(outputs.detach(), generator))
        return _weighted(self.output_losses(outputs, batch), weights)

    def costs(
        self, model: nn.Module, batch: TensorBatch, *, weights: Float[Tensor, " example"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " example"]]:
        """See `Task.costs`."""
        return _weighted(self.output_costs(self.outputs(model, batch), batch), weights)


@dataclass(frozen=True)
class Classification(_ExampleTask):
    """Cross-entropy (nats) of `model(x)`, logits (example, class), against the class numbers `y`.

    The cost is minus the margin log p/(1-p) of the true class, the loss, or minus the log-probability.
    """

    measurement: Measurement = "margin"

    def __post_init__(self) -> None:
        _refuse_unknown(self.measurement, Measurement)

    def outputs(self, model: nn.Module, batch: TensorBatch) -> Float[Tensor, "term output"]:
        """Logits. See `Task.outputs`.

        Raises:
            ValueError: the model returns something else.
        """
        logits = _tensor(model(batch.x), "classification")
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"classification: the model's outputs are {tuple(logits.shape)}; expected (example, class), two classes or more; "
                "a model of one logit z can return (0, z)"
            )
        return at_least_float32(logits)

    def output_losses(self, outputs: Float[Tensor, "term output"], batch: TensorBatch) -> Float[Tensor, " term"]:
        """See `Task.output_losses`."""
        return logit_losses(outputs, _class_numbers(outputs, batch), None)

    def output_costs(self, outputs: Float[Tensor, "term output"], batch: TensorBatch) -> Float[Tensor, " term"]:
        """The cost of every example, as a function of its outputs."""
        if self.measurement != "margin":
            return self.output_losses(outputs, batch)
        return -margins(outputs, _class_numbers(outputs, batch))

    def sampled(self, outputs: Float[Tensor, "term output"], generator: torch.Generator | None) -> Int[Tensor, " term"]:
        """Targets drawn from the model's own distribution."""
        return sample_labels(outputs.softmax(dim=1), torch.rand(len(outputs), generator=generator, device=outputs.device))

    def responses(
        self, outputs: Float[Tensor, "term output"], batch: TensorBatch
    ) -> tuple[Float[Tensor, "term response"], Float[Tensor, "term response"]]:
        """Margins. See `Task.responses`."""
        return _margin_responses(outputs, _class_numbers(outputs, batch))


@dataclass(frozen=True)
class Regression(_ExampleTask):
    """Squared error of `model(x)` against `y`, both (example, ...), summed over the outputs of an example.

    `nn.MSELoss` takes the mean over outputs too: of several, a run with it has another loss. The cost is the squared error, or
    the summed absolute error.
    """

    measurement: RegressionMeasurement = "absolute_error"

    def __post_init__(self) -> None:
        _refuse_unknown(self.measurement, RegressionMeasurement)

    def outputs(self, model: nn.Module, batch: TensorBatch) -> Float[Tensor, "term output"]:
        """Predictions. See `Task.outputs`.

        Raises:
            ValueError: they are of another shape than the targets, over which subtraction would quietly spread them.
        """
        predicted = at_least_float32(_tensor(model(batch.x), "regression"))
        if predicted.shape[:1] != batch.y.shape[:1] or predicted.numel() != batch.y.numel():
            raise ValueError(
                f"regression: the model's outputs are {tuple(predicted.shape)}, the targets {tuple(batch.y.shape)}; expected as "
                "many values per example"
            )
        return predicted.reshape(len(predicted), -1)

    def output_losses(self, outputs: Float[Tensor, "term output"], batch: TensorBatch) -> Float[Tensor, " term"]:
        """See `Task.output_losses`."""
        return _errors(outputs, batch).square().sum(dim=1)

    def output_costs(self, outputs: Float[Tensor, "term output"], batch: TensorBatch) -> Float[Tensor, " term"]:
        """The cost of every example, as a function of its outputs."""
        errors = _errors(outputs, batch)
        return (errors.abs() if self.measurement == "absolute_error" else errors.square()).sum(dim=1)

    def sampled(self, outputs: Float[Tensor, "term output"], generator: torch.Generator | None) -> Float[Tensor, "term output"]:
        """Targets drawn from the model's own distribution: a squared error is minus the log-likelihood of variance 1/2."""
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
        return outputs - 0.5**0.5 * noise

    def responses(
        self, outputs: Float[Tensor, "term output"], batch: TensorBatch
    ) -> tuple[Float[Tensor, "term response"], Float[Tensor, "term response"]]:
        """Predictions. See `Task.responses`."""
        return outputs, 2 * _errors(outputs, batch)


def _refuse_unknown(measurement: object, known: object) -> None:
    if measurement not in get_args(known):
        raise ValueError(f"task: measurement: expected one of {', '.join(get_args(known))}; got {measurement!r}")


def _tensor(outputs: object, kind: str) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"{kind}: the model returns {type(outputs).__name__}; expected a tensor; wrap it in a module that returns its logits "
            "or predictions"
        )
    return outputs


def _class_numbers(logits: Float[Tensor, "term output"], batch: TensorBatch) -> Int[Tensor, " term"]:
    """The targets, which are refused with ValueError if they are no classes of these logits."""
    y, num_classes = batch.y, logits.shape[1]
    if y.is_floating_point() or y.shape != logits.shape[:1] or y.min() < 0 or y.max() >= num_classes:
        raise ValueError(
            f"classification: the targets are {y.dtype} {tuple(y.shape)}, from {y.min()} to {y.max()}; expected whole numbers "
            f"from 0 to {num_classes - 1}, one per example, since the model has {num_classes} outputs"
        )
    return y.long()


def _errors(outputs: Float[Tensor, "example output"], batch: TensorBatch) -> Float[Tensor, "example output"]:
    """Prediction minus target."""
    return outputs - batch.y.reshape(len(batch.y), -1)


def _margin_responses(
    logits: Float[Tensor, "term label"], targets: Int[Tensor, " term"]
) -> tuple[Float[Tensor, "term 1"], Float[Tensor, "term 1"]]:
    """Margins m, and the derivative of the loss log(1 + exp(-m)) by them: minus the probability of any other label."""
    m = margins(logits, targets)[:, None]
    return m, -torch.sigmoid(-m)


def _weighted(values: Float[Tensor, " example"], weights: Float[Tensor, " example"] | None) -> tuple[Tensor, Tensor]:
    return (values if weights is None else weights * values).sum(), values.detach()
