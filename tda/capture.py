"""Inputs and pseudo-gradients of every tracked layer, taken by hooks in one forward and backward pass.

A layer's gradient for one example is the sum over positions of `Ds a^T`, so these two are all that any method needs. Parameters
are frozen during the pass, and autograd starts at the outputs of the first tracked layers: no weight gradient is formed, and
nothing below them is differentiated.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tda.model import Layer, input_of, layer_inputs, layer_outputs, modules_by_weight, one_hot, plain_head

Encode = Callable[[Layer, Tensor], Tensor | None]
Consume = Callable[[Layer, Tensor | None, Tensor], None]


@contextlib.contextmanager
def captured(model: nn.Module, layers: Sequence[Layer], *, encode: Encode, consume: Consume) -> Iterator[None]:
    """Inside the block, every pass through `model` calls `encode` with each layer's input and `consume` with its pseudo-gradient.

    `encode(layer, a)` is called in the forward pass with the input `a` (batch, position, inputs), once for all layers of a group
    (`layer` is the first of them), and returns what to keep of it. `consume(layer, kept, Ds)` is called in the backward pass with
    that and with the gradient `Ds` (batch, position, d_out) at the layer's output. `model.layer_inputs` says what positions are.

    The matrix of an embedding has a row for each token, as that of a head. A look-up multiplies it from the other side, so that
    `a` is the gradient at its output, `Ds` is one-hot, and both are called in the backward pass. A head with the same weight is
    another use of the layer: the gradient is the sum over all uses.

    Raises:
        ValueError: the model is in training mode, where dropout would make every gradient wrong; or, at a pass, a layer runs
            without gradients.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes every gradient wrong; call model.eval() first")
    plain_head(model)  # probes a model it has not seen: before there are hooks
    modules = dict(model.named_modules())
    sharing = modules_by_weight(model)
    by_name = {layer.name: layer for layer in layers}
    shape: Sequence[int] = ()  # of the model's input; () where the task calls only parts of the model
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    last_of_group = {layer.group: layer.name for layer in layers}
    shared: dict[str, tuple[Tensor, Tensor | None]] = {}  # by group: input and what is kept of it, until its last layer has run

    def as_weight(module: nn.Module, values: Tensor) -> Tensor:
        return values.to(module.weight.dtype)  # under autocast, values are narrower

    def on_input(layer: Layer, module: nn.Module, a: Tensor, seen: Sequence[int]) -> Tensor | None:
        held = shared.get(layer.group)
        if held is None or held[0] is not a:
            held = shared[layer.group] = (
                a,
                encode(by_name[layer.group], layer_inputs(module, as_weight(module, a.detach()), seen)),
            )
        if layer.name == last_of_group[layer.group]:
            del shared[layer.group]
        return held[1]

    def on_layer(layer: Layer) -> Callable:
        def look_up(module: nn.Embedding, tokens: Tensor, Ds: Tensor, seen: Sequence[int]) -> None:
            kept = encode(layer, layer_inputs(module, Ds, seen))
            consume(layer, kept, layer_outputs(module, one_hot(module, tokens, like=Ds), seen))

        def hook(module: nn.Module, inputs: tuple, named: dict, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise ValueError(
                    f"{layer.name}: runs without gradients, under torch.no_grad or in reentrant checkpoints; expected a layer "
                    "that is differentiated; leave it out by the pattern of layers (curvature.layers in params.yaml, for "
                    "`attribute`: layers)"
                )
            a = input_of(inputs, named)
            seen = shape or a.shape[:1]
            if not output.requires_grad:
                output = output.requires_grad_().clone()  # not the leaf itself: the next layer may change its input in place
            if isinstance(module, nn.Embedding):
                output.register_hook(lambda Ds: look_up(module, a, as_weight(module, Ds), seen))
            else:
                kept = on_input(layer, module, a, seen)
                output.register_hook(lambda Ds: consume(layer, kept, layer_outputs(module, as_weight(module, Ds), seen)))
            return output

        return hook

    def start(_module: nn.Module, inputs: tuple, named: dict) -> None:
        nonlocal shape
        tensors = (one for one in tree_leaves((inputs, named)) if isinstance(one, Tensor) and one.ndim)
        shape = next((tuple(one.shape) for one in tensors), ())

    def release(_module: nn.Module, _inputs: tuple, _output: object) -> None:
        shared.clear()

    handles = [
        module.register_forward_hook(on_layer(layer), with_kwargs=True)
        for layer in layers
        for module in sharing.get(id(modules[layer.name].weight), [modules[layer.name]])
    ]
    for module in {model, getattr(model, "base_model", model)}:
        handles += [module.register_forward_pre_hook(start, with_kwargs=True), module.register_forward_hook(release)]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
