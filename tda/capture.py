"""Inputs and pseudo-gradients of every tracked layer during one backward pass. The only file with hooks.

All parameters are frozen. What the pass is differentiated with respect to are the outputs of the layers that nothing before them
depends on, so that no weight gradient is ever formed, nor anything below the first tracked layer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from tda.model import Layer, layer_inputs, layer_outputs, plain_head

Encode = Callable[[Layer, Tensor], Tensor | None]
Consume = Callable[[Layer, Tensor | None, Tensor], None]


@contextlib.contextmanager
def captured(model: nn.Module, layers: Sequence[Layer], *, encode: Encode, consume: Consume) -> Iterator[None]:
    """Inside the block, every backward pass hands over each layer's input and pseudo-gradient.

    `encode(layer, a)` gets the input `a` (batch, position, inputs), once for all layers that share it (`layer` is the first of
    them), and returns what is to be kept of it, for all of them, until the backward pass reaches the layer.
    `consume(layer, kept, Ds)` then gets that and the gradient `Ds` (batch, position, d_out) at the layer's output. Positions are
    those of `model.layer_inputs`.

    Raises:
        ValueError: the model is in training mode, where dropout would make every gradient wrong.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes every gradient wrong; call model.eval() first")
    plain_head(model)  # what it has to run, it runs before there are hooks
    modules = dict(model.named_modules())
    by_name = {layer.name: layer for layer in layers}
    shape: Sequence[int] = ()
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    last_of_group = {layer.group: layer.name for layer in layers}
    shared: dict[str, tuple[Tensor, Tensor | None]] = {}  # by group, until its last layer has run; others may run in between

    def on_input(layer: Layer, module: nn.Module, a: Tensor) -> Tensor | None:
        held = shared.get(layer.group)
        if held is None or held[0] is not a:
            held = shared[layer.group] = (a, encode(by_name[layer.group], layer_inputs(module, a.detach(), shape)))
        if layer.name == last_of_group[layer.group]:
            del shared[layer.group]
        return held[1]

    def on_layer(layer: Layer) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            kept = on_input(layer, module, inputs[0])
            if not output.requires_grad:
                output = output.requires_grad_().clone()  # a copy, since what follows may work in place, on no leaf
            seen = shape
            output.register_hook(lambda Ds: consume(layer, kept, layer_outputs(module, Ds, seen)))
            return output

        return hook

    def start(_module: nn.Module, inputs: tuple, named: dict) -> None:
        nonlocal shape
        shape = next(tuple(one.shape) for one in (*inputs, *named.values()) if isinstance(one, Tensor))

    def release(_module: nn.Module, _inputs: tuple, _output: object) -> None:
        shared.clear()

    handles = [modules[layer.name].register_forward_hook(on_layer(layer)) for layer in layers]
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
