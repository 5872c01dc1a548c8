"""The empirical neural tangent kernel of a model over all tracked layers.

    K(x, x') = 1/C sum over outputs k of < gradient of f_k at x, gradient of f_k at x' >

It is averaged over the C outputs (the pseudo-NTK of Mohamadi, Bae and Sutherland 2023, arXiv 2206.12543), and exact. If
examples have one position, a layer's part is the product of two Gram matrices, of its inputs and of its pseudo-gradients; if
they have several, it is the Gram matrix of whole gradients.

An optimizer that moves weights by P g trains in the kernel of gradients scaled by P^(1/2). If P is an outer product, scaling
gradients means scaling inputs and pseudo-gradients (`rank_one_roots`).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda.capture import captured
from tda.data import Data
from tda.losses import at_least_float32
from tda.model import Layer
from tda.projection import append_one
from tda.task import Task

MEAN_FLOOR = 1e-3  # of means of second moments, relative to the overall mean
BLOCK_VALUES = 1 << 27  # values of whole gradients that are in memory at once
Roots = tuple[Float[Tensor, " d_out"], Float[Tensor, " d_in"]]  # their outer product is P^(1/2)


def rank_one_roots(v: Float[Tensor, "d_out d_in"]) -> Roots:
    """Factors of the root of Adam's P = v^(-1/2), for `v` (bias-corrected second moments) as the outer product of its means.

    Adafactor approximates `v` in this way (Shazeer and Stern 2018). Means are at least `MEAN_FLOOR` of the overall mean:
    smaller ones are of dead units, and the P of a weight that never had a gradient means nothing.
    """
    mean = v.mean()
    by_row, by_column = (v.mean(dim=dim).clamp_min(MEAN_FLOOR * mean) for dim in (1, 0))
    return (by_row / mean.sqrt()) ** -0.25, (by_column / mean.sqrt()) ** -0.25


def tangent_kernel(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Data,
    *,
    task: Task,
    batch_size: int,
    roots: dict[str, Roots] | None = None,
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n output"]]:
    """The kernel of all pairs of examples in `data`, and their outputs; `roots` (by layer) scales gradients.

    Raises:
        ValueError: an example has more than one term in the loss, so that its outputs are not one vector.
    """
    inputs: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    pseudo_gradients: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}  # (batch, output, position, d_out)
    outputs: list[Tensor] = []

    def keep_inputs(layer: Layer, a: Tensor) -> Tensor:
        a = append_one(at_least_float32(a), bias=layer.bias)
        return a if roots is None else a * roots[layer.name][1]

    of_outputs: dict[str, list[Tensor]] = {}

    def keep(layer: Layer, a: Tensor, Ds: Tensor) -> None:
        if layer.name not in of_outputs:
            inputs[layer.name].append(a)
        Ds = at_least_float32(Ds)
        of_outputs.setdefault(layer.name, []).append(Ds if roots is None else Ds * roots[layer.name][0])

    with captured(model, layers, encode=keep_inputs, consume=keep):
        for start in range(0, len(data), batch_size):
            rows = range(start, min(start + batch_size, len(data)))
            predicted = task.outputs(model, data.batch(rows))
            if predicted.shape[0] != len(rows):
                raise ValueError(
                    f"tangent kernel: {predicted.shape[0]} predictions for {len(rows)} examples; expected one of each; use a "
                    "method that takes documents, as source"
                )
            of_outputs.clear()
            for output in range(predicted.shape[1]):
                predicted[:, output].sum().backward(retain_graph=output + 1 < predicted.shape[1])
            for name, held in of_outputs.items():
                pseudo_gradients[name].append(torch.stack(held, dim=1))
            outputs.append(predicted.detach())
    values = torch.cat(outputs)
    K = values.new_zeros(len(data), len(data))
    for layer in layers:
        K += _layer_kernel(torch.cat(inputs.pop(layer.name)), torch.cat(pseudo_gradients.pop(layer.name)))
    return K / values.shape[1], values


def _layer_kernel(a: Float[Tensor, "n position d_in"], Ds: Float[Tensor, "n output position d_out"]) -> Float[Tensor, "n n"]:
    """Sum over outputs of the Gram matrix of the layer's gradients."""
    if a.shape[1] == 1:
        a, Ds = a.flatten(1), Ds.flatten(1)
        return (a @ a.T) * (Ds @ Ds.T)
    K = a.new_zeros(len(a), len(a))
    size = max(1, BLOCK_VALUES // (len(a) * a.shape[2]))  # outputs of the layer at once
    for output in range(Ds.shape[1]):
        for start in range(0, Ds.shape[3], size):
            G = (Ds[:, output, :, start : start + size].mT @ a).flatten(1)
            K.addmm_(G, G.T)
    return K
