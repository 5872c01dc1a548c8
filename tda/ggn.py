"""Products with the Gauss-Newton matrix G of the training loss over all tracked layers; G itself is never formed.

    G v = mean over rows of  w sum over terms of  J^T H J v

`J` is the derivative of a term's outputs by the tracked weights, and `H` the second derivative of its loss by the outputs
(Martens 2020, section 3). `w` is the training loss's factor on a row's summed loss, as for `EKFAC.Lambda`. Vectors are (query,
value): a row per query, the layers' (d_out, d_in) matrices flattened side by side (`pack`).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tda.data import Batch, TensorBatch
from tda.model import Layer, layer_matrix, layer_parameters, parameter_name, plain_head
from tda.parallel import DEVICE_ERRORS
from tda.task import Task

Product = Callable[[Float[Tensor, "query value"]], Float[Tensor, "query value"]]
BACK_TWICE_ON = ("cpu",)  # kinds of device, where it is faster; on others, all vectors are multiplied together in forward mode
TWICE = 1e-3  # rounding of a check that second derivatives are whole


def pack(matrices: dict[str, Float[Tensor, "*query d_out d_in"]], layers: Sequence[Layer]) -> Float[Tensor, "*query value"]:
    """The layers' matrices, flattened side by side."""
    return torch.cat([matrices[layer.name].flatten(-2) for layer in layers], dim=-1)


def unpack(values: Float[Tensor, "*query value"], layers: Sequence[Layer]) -> dict[str, Float[Tensor, "*query d_out d_in"]]:
    """The inverse of `pack`."""
    parts = values.split([layer.d_out * layer.d_in for layer in layers], dim=-1)
    return {layer.name: part.unflatten(-1, (layer.d_out, layer.d_in)) for layer, part in zip(layers, parts, strict=True)}


def gauss_newton_product(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch | TensorBatch], *, task: Task, weight: float
) -> Product:
    """Products with G, the mean over the rows of `batches`; `weight` is `w` above.

    Two backward passes for each vector, through a graph that all share, or forward-mode derivatives of all vectors together: by
    the device, and the other way for a model with operations that lack what the one needs.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes every product another one; call model.eval() first")
    plain_head(model)  # probes a model it has not seen: before it is differentiated
    network, modules = _Outputs(model, task), {layer.name: model.get_submodule(layer.name) for layer in layers}
    weights = {layer.name: _matrix(layer, modules[layer.name]).detach() for layer in layers}
    num_rows = sum(len(batch.rows) for batch in batches)

    def outputs(matrices: dict[str, Tensor], batch: Batch | TensorBatch) -> Tensor:
        named = {
            f"model.{parameter_name(name, key)}": value
            for name, matrix in matrices.items()
            for key, value in layer_parameters(modules[name], matrix).items()
        }
        return functional_call(network, named, (batch,))

    def forward_and_back(batch: Batch | TensorBatch, v: Tensor) -> Tensor:
        def slopes(z: Tensor) -> Tensor:
            return grad(lambda z: task.output_losses(z, batch).sum())(z)

        z, pull = vjp(lambda matrices: outputs(matrices, batch), weights)
        Jv = vmap(lambda t: jvp(lambda matrices: outputs(matrices, batch), (weights,), (unpack(t, layers),))[1])(v)
        HJv = vmap(lambda t: jvp(slopes, (z,), (t,))[1])(Jv)
        return vmap(lambda t: pack(pull(t)[0], layers))(HJv)

    @torch.enable_grad()
    def back_twice(batch: Batch | TensorBatch, v: Tensor) -> Tensor:
        """J v without forward mode: the derivative of J^T u by u, applied to v."""
        nonlocal checked
        matrices = {name: matrix.detach().requires_grad_() for name, matrix in weights.items()}
        z = outputs(matrices, batch)
        u = torch.zeros_like(z, requires_grad=True)
        pulled = torch.autograd.grad(z, list(matrices.values()), u, create_graph=True, allow_unused=True)
        Ju = {name: G for name, G in zip(matrices, pulled, strict=True) if G is not None}
        if not checked:
            _check_twice_differentiable(z, matrices, Ju, u)
            checked = True
        leaf = z.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(task.output_losses(leaf, batch).sum(), leaf, create_graph=True)
        products = []
        for tangent in v:
            directions = unpack(tangent, layers)
            (Jv,) = torch.autograd.grad(list(Ju.values()), u, [directions[name] for name in Ju], retain_graph=True)
            (HJv,) = torch.autograd.grad(slopes, leaf, Jv, retain_graph=True)
            back = torch.autograd.grad(z, list(matrices.values()), HJv, retain_graph=True, materialize_grads=True)
            products.append(torch.cat([part.flatten() for part in back]))
        return torch.stack(products)

    checked = False
    ways = [forward_and_back, back_twice]
    if next(iter(weights.values())).device.type in BACK_TWICE_ON:
        ways.reverse()

    def product(v: Float[Tensor, "query value"]) -> Float[Tensor, "query value"]:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # other attention kernels have no forward and no second derivative
            try:
                return sum(ways[0](batch, v) for batch in batches) * (weight / num_rows)
            except DEVICE_ERRORS:
                raise
            except RuntimeError:  # an operation has no such derivative, or none that `torch.func` finds
                if len(ways) == 1:
                    raise
                ways.pop(0)
        return product(v)

    return product


def _check_twice_differentiable(z: Tensor, held: dict[str, Tensor], Ju: dict[str, Tensor], u: Tensor) -> None:
    """Refuse a derivative of J^T u that lacks a part: autograd is silent about functions that can be differentiated only once.

    If v is J^T w divided by its square, in every layer, w J v is the number of layers.
    """
    w = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    once = torch.autograd.grad(z, [held[name] for name in Ju], w, retain_graph=True)
    squares = [part.square().sum() for part in once]
    v = [torch.where(square > 0, part / square, 0) for part, square in zip(once, squares, strict=True)]
    (Jv,) = torch.autograd.grad(list(Ju.values()), u, v, retain_graph=True)
    found, expected = (w * Jv).sum().item(), sum(int(square > 0) for square in squares)
    if abs(found - expected) > TWICE * expected:
        raise RuntimeError(
            f"Gauss-Newton products: second derivatives reach {found:.4g} of {expected} layers; expected a model that can be "
            "differentiated twice, or in forward mode; look for functions that are once_differentiable, or that cut the graph"
        )


def _matrix(layer: Layer, module: nn.Module) -> Tensor:
    return layer_matrix(module, module.weight, module.bias if layer.bias else None)


class _Outputs(nn.Module):
    """A task's outputs on a batch, as a module around the model, whose weights `functional_call` can set."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Batch | TensorBatch) -> Float[Tensor, "term output"]:
        return self.task.outputs(self.model, batch)


def queries_at_once(layers: Sequence[Layer], *, positions: int, values: int) -> int:
    """For how many queries a vector, or one layer's activations at `positions`, has about `values` values; at least one."""
    vector = sum(layer.d_out * layer.d_in for layer in layers)
    return max(1, values // max(vector, positions * max(max(layer.d_out, layer.d_in) for layer in layers)))
