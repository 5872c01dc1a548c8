"""Per-document gradients: LoGra rows for the store, full gradients of a few queries."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda.capture import captured
from tda.data import Batch
from tda.losses import Measurement, document_costs, document_losses
from tda.model import Layer
from tda.projection import Projection, append_one, encode_inputs


def gradient_rows(
    model: nn.Module, layers: Sequence[Layer], batch: Batch, *, projections: dict[str, Projection]
) -> tuple[Float[Tensor, "batch values"], Float[Tensor, " batch"]]:
    """The projected gradients `P_o^T G P_i` of every document's summed token loss, layers side by side; its mean loss (nats)."""
    rows: dict[str, Tensor] = {}

    def project_inputs(layer: Layer, a: Tensor) -> Tensor:
        return encode_inputs(a, projections[layer.name].P_i, bias=layer.bias)

    def add_rows(layer: Layer, projected: Tensor, Ds: Tensor) -> None:
        rows[layer.name] = torch.bmm((Ds @ projections[layer.name].P_o).mT, projected).flatten(1)

    with captured(model, layers, encode=project_inputs, consume=add_rows):
        total, losses = document_losses(model, batch)
        total.backward()
    return torch.cat([rows[layer.name] for layer in layers], dim=1), losses / batch.loss_mask.sum(dim=1)


def query_gradients(
    model: nn.Module, layers: Sequence[Layer], batches: Iterable[Batch], *, measurement: Measurement
) -> tuple[dict[str, Float[Tensor, "query d_out d_in"]], list[int]]:
    """The full gradient of every query's mean cost per token, by layer, and the queries' row numbers in their order.

    A cost is lower where the model does better: the loss, minus the margin, or minus the log-probability.
    """
    gradients: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    order: list[int] = []

    def keep_inputs(layer: Layer, a: Tensor) -> Tensor:
        return append_one(a, bias=layer.bias)

    def add_gradients(layer: Layer, a: Tensor, Ds: Tensor) -> None:
        gradients[layer.name].append(Ds.mT @ a)

    with captured(model, layers, encode=keep_inputs, consume=add_gradients):
        for batch in batches:
            total, _costs = document_costs(model, batch, weights=1 / batch.loss_mask.sum(dim=1), measurement=measurement)
            total.backward()
            order += batch.rows
    return {name: torch.cat(held) for name, held in gradients.items()}, order


def project_queries(
    gradients: dict[str, Float[Tensor, "query d_out d_in"]], layers: Sequence[Layer], projections: dict[str, Projection]
) -> Float[Tensor, "query values"]:
    """Full gradients as rows, in the layout of `gradient_rows`."""
    return torch.cat([projections[layer.name].apply(gradients[layer.name]).flatten(1) for layer in layers], dim=1)
