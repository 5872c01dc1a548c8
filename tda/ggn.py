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

    Uses forward-mode derivatives, or two backward passes for a model with operations that have none.

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
        matrices = {name: matrix.detach().requires_grad_() for name, matrix in weights.items()}
        held = [matrices[layer.name] for layer in layers]
        z = outputs(matrices, batch)
        u = torch.zeros_like(z, requires_grad=True)
        Ju = torch.autograd.grad(z, held, u, create_graph=True, materialize_grads=True)
        leaf = z.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(task.output_losses(leaf, batch).sum(), leaf, create_graph=True)
        products = []
        for tangent in v:
            directions = unpack(tangent, layers)
            (Jv,) = torch.autograd.grad(Ju, u, [directions[layer.name] for layer in layers], retain_graph=True)
            (HJv,) = torch.autograd.grad(slopes, leaf, Jv, retain_graph=True)
            products.append(torch.cat([part.flatten() for part in torch.autograd.grad(z, held, HJv, retain_graph=True)]))
        return torch.stack(products)

    multiply = forward_and_back

    def product(v: Float[Tensor, "query value"]) -> Float[Tensor, "query value"]:
        nonlocal multiply
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # other attention kernels have no forward and no second derivative
            try:
                return sum(multiply(batch, v) for batch in batches) * (weight / num_rows)
            except DEVICE_ERRORS:
                raise
            except RuntimeError:  # an operation has no forward derivative, or none that `torch.func` finds
                if multiply is back_twice:
                    raise
                multiply = back_twice
        return product(v)

    return product


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
