"""Inputs and pseudo-gradients of every tracked layer during one backward pass. The only file with hooks.

All parameters are frozen and the pass is differentiated with respect to the input embeddings alone, so that no weight gradient
is ever formed. Rows are padded on the right and attention is causal: padding cannot reach a real token, and no mask is passed.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tda.data import Batch
from tda.model import Layer

Labels = Literal["true", "sampled"]
Measurement = Literal["loss", "margin", "log_probability"]
Encode = Callable[[Layer, Tensor], Tensor | None]
Consume = Callable[[Layer, Tensor | None, Tensor], None]


@contextlib.contextmanager
def captured(model: nn.Module, layers: Sequence[Layer], *, encode: Encode, consume: Consume) -> Iterator[None]:
    """Inside the block, every backward pass hands over each layer's input and pseudo-gradient.

    `encode(layer, a)` gets the input `a` (batch, token, inputs), once for all layers that share it (`layer` is the first of
    them), and returns what is to be kept of it, for all of them, until the backward pass reaches the layer.
    `consume(layer, kept, Ds)` then gets that and the gradient `Ds` (batch, token, d_out) at the layer's output.

    Raises:
        ValueError: the model is in training mode, where dropout would make every gradient wrong.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes every gradient wrong; call model.eval() first")
    modules = dict(model.named_modules())
    by_name = {layer.name: layer for layer in layers}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    latest: tuple[Tensor | None, bool, Tensor | None] = (None, False, None)

    def on_input(layer: Layer, a: Tensor) -> Tensor | None:
        nonlocal latest
        if latest[0] is not a or latest[1] != layer.bias:
            latest = (a, layer.bias, encode(by_name[layer.group], a.detach()))
        return latest[2]

    def on_layer(layer: Layer) -> Callable:
        def hook(_module: nn.Module, inputs: tuple, output: Tensor) -> None:
            kept = on_input(layer, inputs[0])
            if output.requires_grad:
                output.register_hook(lambda Ds: consume(layer, kept, Ds))

        return hook

    def release(_module: nn.Module, _inputs: tuple, _output: object) -> None:
        nonlocal latest
        latest = (None, False, None)

    handles = [model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())]
    handles += [modules[layer.name].register_forward_hook(on_layer(layer)) for layer in layers]
    handles.append(model.register_forward_hook(release))
    model.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


def token_losses(
    model: nn.Module, batch: Batch, *, labels: Labels = "true", generator: torch.Generator | None = None
) -> Float[Tensor, "batch prediction"]:
    """Cross-entropy of every prediction in nats, zero where it does not count.

    With sampled labels the loss is that of labels drawn from the model itself, whose squared gradients average to the true
    Fisher matrix (Martens 2020, section 5), which for cross-entropy is the Gauss-Newton matrix.
    """
    logits = at_least_float32(model(input_ids=batch.tokens, use_cache=False).logits[:, :-1])
    targets = batch.tokens[:, 1:] if labels == "true" else sample_labels(logits.detach(), generator=generator)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return losses * batch.loss_mask


def token_costs(model: nn.Module, batch: Batch, *, measurement: Measurement) -> Float[Tensor, "batch prediction"]:
    """The measurement of every prediction, signed so that lower is better: loss, -log p/(1-p), or -log p."""
    if measurement in ("loss", "log_probability"):
        return token_losses(model, batch)
    logits = at_least_float32(model(input_ids=batch.tokens, use_cache=False).logits[:, :-1])
    targets = batch.tokens[:, 1:, None]
    right = logits.gather(2, targets)[..., 0]
    others = logits.scatter(2, targets, -torch.inf).logsumexp(dim=2)  # log of the sum over every other token
    return (others - right) * batch.loss_mask


def sample_labels(
    logits: Float[Tensor, "batch token vocabulary"], *, generator: torch.Generator | None = None
) -> Int[Tensor, "batch token"]:
    """A label for every place, drawn from softmax(logits)."""
    probabilities = logits.softmax(dim=2)
    flat = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
    return flat.view(logits.shape[0], logits.shape[1])


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or in float64 if they are: reductions over data are never narrower."""
    return values if values.dtype == torch.float64 else values.float()
