"""Gradient rows without hooks, so that whole decoder layers can be compiled; the rows are those of `gradients.gradient_rows`.

Every tracked layer gets a perturbation R_n for each document n, which is zero and acts on the document's tokens t. Its gradient
is the document's row (LoGra, arXiv 2405.13954, figure 2):

    y_t = W x_t + P_o R_n P_i^T x_t,        dL / dR_n  at R = 0  =  P_o^T G_n P_i

The perturbation itself is never computed: the layer computes `W x_t` and has a derivative of its own, for which it keeps only
`P_i^T x_t` of its input.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tda.gradients import outer_products
from tda.losses import Backend, at_least_float32
from tda.model import Layer, layer_matrix, plain_head
from tda.packing import PackedBatch, spread, within_documents
from tda.projection import Projection, encode_inputs
from tda.task import CausalLM, Task

MOST_GRAPHS = 64  # compiled graphs of the code that decoder layers share, one per kind of layer and grid; torch's limit is 8


class _Perturbed(torch.autograd.Function):
    """`x W^T + b`, whose backward also gives the gradient of every document's perturbation R."""

    @staticmethod
    @no_type_check
    def forward(ctx, x, W, bias, projected, P_o, R, slots, grid):
        ctx.save_for_backward(W, projected, P_o, slots, grid)
        return nn.functional.linear(x, W, bias)

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx, Ds):
        W, projected, P_o, slots, grid = ctx.saved_tensors
        dx = Ds @ W if ctx.needs_input_grad[0] else None
        sides = (spread(side.flatten(0, -2), slots, grid) for side in (Ds @ P_o, projected))
        dR = outer_products(*sides).view(-1, P_o.shape[1], projected.shape[-1])
        return dx, None, None, None, None, dR, None, None


class _RowLayer(nn.Module):
    """A linear layer with perturbations, which `start` makes for a batch."""

    def __init__(self, module: nn.Module, layer: Layer, projection: Projection):
        super().__init__()
        self.module, self.biased = module, layer.bias
        self.register_buffer("P_i", projection.P_i, persistent=False)
        self.register_buffer("P_o", projection.P_o, persistent=False)
        self.R = self.slots = self.grid = None

    @property
    def weight(self) -> Tensor:
        """The wrapped layer's weight, for code that asks a linear layer for it."""
        return self.module.weight

    def start(self, batch: PackedBatch) -> Tensor:
        """The perturbations (document, k_out, k_in) of `batch`, to be differentiated by."""
        self.slots, self.grid = batch.slots, batch.shape_of_grid
        zero = at_least_float32(self.P_o.new_zeros(()))
        self.R = zero.expand(batch.grid[0], self.P_o.shape[1], self.P_i.shape[1]).requires_grad_()
        for tensor, axes in ((self.R, (0,)), (self.grid, (0, 1))):
            for axis in axes:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return self.R

    @no_type_check
    def forward(self, x):
        projected = encode_inputs(x.detach(), self.P_i, bias=self.biased)  # the compiler does this once for a shared input
        W = layer_matrix(self.module, self.module.weight, None)
        return _Perturbed.apply(x, W, self.module.bias, projected, self.P_o, self.R, self.slots, self.grid)


RowsOf = Callable[[PackedBatch], tuple[Float[Tensor, "document values"], Float[Tensor, " document"]]]


@contextlib.contextmanager
def row_layers(
    model: nn.Module,
    layers: Sequence[Layer],
    *,
    task: Task,
    projections: dict[str, Projection],
    backend: Backend | None = "inductor",
) -> Iterator[RowsOf]:
    """Yields a function that gives the rows of `gradients.gradient_rows`; a `backend` compiles decoder layers and losses.

    Batches should all have the same number of tokens (`fill_to` of `packing.pack`): another number is compiled anew, whereas
    another number or length of documents is not.

    Raises:
        ValueError: the model is in training mode, where dropout would make every gradient wrong.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes every gradient wrong; call model.eval() first")
    plain_head(model)  # probes a model it has not seen: before layers are exchanged
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    inputs = {layer.name: projections[layer.name].P_i.to(model.dtype) for layer in layers if layer.group == layer.name}
    exchanged = {  # layers that share an input get the same tensor P_i, so that the compiler multiplies by it once
        layer.name: _RowLayer(
            model.get_submodule(layer.name),
            layer,
            Projection(inputs[layer.group], projections[layer.name].P_o.to(model.dtype)),
        )
        for layer in layers
    }
    compiled = decoder_layers(model) if backend else []
    if isinstance(task, CausalLM):
        task = replace(task, backend=backend)

    def rows_of(batch: PackedBatch) -> tuple[Tensor, Tensor]:
        R = [exchanged[layer.name].start(batch) for layer in layers]
        total, losses = task.losses(model, batch)
        rows = torch.autograd.grad(total, R)
        return torch.cat([held[: len(batch.rows)].flatten(1) for held in rows], dim=1), losses / batch.sizes

    model.requires_grad_(False)
    try:
        for name, row_layer in exchanged.items():
            model.set_submodule(name, row_layer)
        for decoder_layer in compiled:
            decoder_layer.compile(backend=backend, fullgraph=True)
        with within_documents(model), torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
            yield rows_of
    finally:
        for decoder_layer in compiled:
            decoder_layer._compiled_call_impl = None
        for name, row_layer in exchanged.items():
            model.set_submodule(name, row_layer.module)
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a language model: its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))
