"""Per-example gradients: projected rows (LoGra) for the store, full gradients of a few queries, and dot products with these."""

from collections.abc import Callable, Iterable, Sequence
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda.capture import captured
from tda.data import Batch, TensorBatch
from tda.losses import at_least_float32
from tda.model import Layer, layer_matrix
from tda.packing import PackedBatch
from tda.projection import Projection, append_one, encode_inputs, project
from tda.task import Task

QUERY_VALUES = 1 << 27  # values of query gradients that are in memory at once
SAME = 0.01  # relative distance of gradients or losses that are the same: rounding is far below, also in bfloat16


def gradient_rows(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch | PackedBatch | TensorBatch,
    *,
    task: Task,
    projections: dict[str, Projection],
) -> tuple[Float[Tensor, "batch values"], Float[Tensor, " batch"]]:
    """Every example's row `P_o^T G P_i`, layers side by side, with G the gradient of its summed loss; and its mean loss per term.

    G is never formed: both sides are projected first. Sums over positions are in float32 or wider.
    """
    rows: dict[str, Tensor] = {}

    def project_inputs(layer: Layer, a: Tensor) -> Tensor:
        return encode_inputs(a, projections[layer.name].P_i, bias=layer.bias)

    def add_rows(layer: Layer, projected: Tensor, Ds: Tensor) -> None:
        rows[layer.name] = outer_products(batch.by_document(Ds @ projections[layer.name].P_o), batch.by_document(projected))

    with captured(model, layers, encode=project_inputs, consume=add_rows):
        total, losses = task.losses(model, batch)
        total.backward()
    return torch.cat([rows[layer.name] for layer in layers], dim=1), losses / batch.sizes


@no_type_check  # is compiled
def outer_products(outputs, inputs):
    """Sums over positions of `outputs inputs^T`: (document, position, k_out) and k_in give (document, k_out k_in)."""
    return torch.bmm(at_least_float32(outputs).mT, at_least_float32(inputs)).flatten(1)


def layer_input(layer: Layer, a: Tensor) -> Tensor:
    """For `captured`: keep a layer's input as it is, with a 1 appended where there is a bias."""
    return append_one(a, bias=layer.bias)


def query_gradients(
    model: nn.Module, layers: Sequence[Layer], batches: Iterable[Batch | TensorBatch], *, task: Task
) -> tuple[dict[str, Float[Tensor, "query d_out d_in"]], list[int]]:
    """Full gradients of the queries' mean costs per term, by layer; and the queries' numbers in the order of the gradients."""
    gradients: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    of_batch: dict[str, Tensor] = {}
    order: list[int] = []

    def add_gradients(layer: Layer, a: Tensor, Ds: Tensor) -> None:
        of_batch[layer.name] = of_batch.get(layer.name, 0) + Ds.mT @ a

    with captured(model, layers, encode=layer_input, consume=add_gradients):
        for batch in batches:
            total, _costs = task.costs(model, batch, weights=1 / batch.sizes)
            total.backward()
            for name, held in gradients.items():
                held.append(of_batch.pop(name))
            order += batch.rows
    return {name: torch.cat(held) for name, held in gradients.items()}, order


def weighted_sum(
    blocks: Iterable[tuple[dict[str, Float[Tensor, "query d_out d_in"]], Sequence[int]]], weights: Float[Tensor, " query"]
) -> dict[str, Float[Tensor, "1 d_out d_in"]]:
    """The sum of the queries' gradients, each times its weight. A block has gradients and the queries' numbers."""
    sums: dict[str, Tensor] = {}
    for block, rows in blocks:
        for name, G in block.items():
            share = torch.tensordot(weights[list(rows)].to(G), G, dims=1)[None]
            sums[name] = sums[name] + share if name in sums else share
    return sums


def gradient_dots(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch | TensorBatch,
    *,
    task: Task,
    queries: dict[str, Float[Tensor, "query d_out d_in"]],
) -> Float[Tensor, "batch query"]:
    """Dot products of `queries` with the gradient of every example's summed loss, which is formed for one layer at a time."""

    def dots(name: str, a: Tensor, Ds: Tensor) -> Tensor:
        if a.shape[1] == 1 or len(queries[name]) == 1:  # the sum of Ds^T q a: no gradient is formed
            return torch.stack([((a @ q.T) * Ds).sum(dim=(1, 2)) for q in queries[name]], dim=1)
        return torch.bmm(Ds.mT, a).flatten(1) @ queries[name].flatten(1).T

    return _over_layers(model, layers, batch, task=task, of=dots)


def gradient_squares(
    model: nn.Module, layers: Sequence[Layer], batch: Batch | TensorBatch, *, task: Task
) -> Float[Tensor, " batch"]:
    """Squared norms of the full gradient of every example's summed loss, from the Gram matrices of its positions."""
    return _over_layers(model, layers, batch, task=task, of=lambda _, a, Ds: ((a @ a.mT) * (Ds @ Ds.mT)).sum(dim=(1, 2)))


def _over_layers(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch | TensorBatch,
    *,
    task: Task,
    of: Callable[[str, Float[Tensor, "batch position d_in"], Float[Tensor, "batch position d_out"]], Tensor],
) -> Tensor:
    """The sum over uses of layers of `of(layer name, a, Ds)`, a function of every example's inputs and pseudo-gradients."""
    parts: list[Tensor] = []

    def add(layer: Layer, a: Tensor, Ds: Tensor) -> None:
        parts.append(of(layer.name, a, Ds))

    with captured(model, layers, encode=layer_input, consume=add):
        total, _losses = task.losses(model, batch)
        total.backward()
    return torch.stack(parts).sum(dim=0)


def check_gradients(
    model: nn.Module, layers: Sequence[Layer], batch: Batch | TensorBatch, *, counted: int, task: Task
) -> set[str]:
    """The names of the layers that have a gradient; refused are those whose inputs and pseudo-gradients do not give it.

    Where the example at place `counted` alone counts in the loss, no other has a gradient at any layer: else the model mixes
    examples, or the axes of examples and positions. And its own gradient is autograd's: else the layer is not `W a + b`, or its
    weight acts in other places too.

    Raises:
        ValueError: it is otherwise; the message says at which layers.
    """
    mixed: list[str] = []
    seen: dict[str, Tensor] = {}
    modules = {layer.name: model.get_submodule(layer.name) for layer in layers}

    def look(layer: Layer, a: Tensor, Ds: Tensor) -> None:
        moved = (Ds.abs() > 0).any(dim=-1) & (a.abs() > 0).any(dim=-1)  # NaN is not above 0: it says nothing
        if len(moved) != len(batch.rows) or moved[alone == 0].any():
            mixed.append(layer.name)
        else:
            seen[layer.name] = seen.get(layer.name, 0) + Ds[counted].mT @ a[counted]

    alone = (torch.arange(len(batch.rows)) == counted).float().to(batch.sizes.device)
    with captured(model, layers, encode=layer_input, consume=look):
        parameters = [part for layer in layers for part in _parameters(layer, modules[layer.name])]
        for parameter in parameters:
            parameter.requires_grad_()
        total, _losses = task.losses(model, batch, weights=alone)
        if not total.requires_grad:
            return set()
        gradients = iter(torch.autograd.grad(total, parameters, materialize_grads=True))
    if mixed:
        raise ValueError(
            f"layers: {', '.join(mixed[:4])}: an example whose loss has no weight has a gradient there; expected layers that see "
            "examples first, or examples and positions flattened in this order, a model that treats every example by itself, and "
            "a task that weighs losses; leave them out by the pattern of layers (`layers` of `attribute`)"
        )
    off = []
    for layer in layers:
        weight, *bias = (next(gradients) for _ in _parameters(layer, modules[layer.name]))
        expected = layer_matrix(modules[layer.name], weight, bias[0] if bias else None)
        if torch.dist(seen.get(layer.name, torch.zeros_like(expected)), expected) > SAME * expected.norm():
            off.append(layer.name)
    if off:
        raise ValueError(
            f"layers: {', '.join(off[:4])}: a layer's inputs and the gradients at its outputs do not give the gradient of its "
            "weight; expected layers that return W a + b, with weights that are used nowhere else; leave them out by the pattern "
            "of layers (`layers` of `attribute`)"
        )
    return set(seen)


@torch.no_grad()
def check_losses(
    model: nn.Module, each: Iterable[Batch | TensorBatch], together: Batch | TensorBatch, *, task: Task
) -> Float[Tensor, " example"]:
    """The losses of the examples of a batch. Refused where one is another than alone, as `each` has the same examples."""
    beside = task.losses(model, together)[1]
    alone = torch.cat([task.losses(model, batch)[1] for batch in each])
    off = ((alone - beside).abs() > SAME * (1 + alone.abs())).nonzero()[:, 0].tolist()
    if off:
        raise ValueError(
            f"attribute: the loss of row {together.rows[off[0]]} is {alone[off[0]]:.4g} alone and {beside[off[0]]:.4g} beside "
            "others; expected a model and a loss that treat every example by itself, padding too, and draw nothing at random in "
            "eval mode"
        )
    return beside


def _parameters(layer: Layer, module: nn.Module) -> list[nn.Parameter]:
    return [module.weight, module.bias] if layer.bias else [module.weight]


def project_queries(
    gradients: dict[str, Float[Tensor, "query d_out d_in"]], layers: Sequence[Layer], projections: dict[str, Projection]
) -> Float[Tensor, "query values"]:
    """Full gradients projected to rows, in the layout of `gradient_rows`."""
    projected = project(gradients, layers, projections)
    return torch.cat([projected[layer.name].flatten(1) for layer in layers], dim=1)
