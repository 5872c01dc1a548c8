"""LoGra: projections of both sides of a layer's gradient (Choe et al. 2024, arXiv 2405.13954, section 3.1).

Since `G` is a sum of `Ds a^T`, projecting `a` by `P_i` and `Ds` by `P_o` before the product gives `P_o^T G P_i` without forming
`G`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from tda.model import Layer


@dataclass(frozen=True)
class Projection:
    """The two sides of one layer's projection, each with orthonormal columns; a gradient's row is `P_o^T G P_i`."""

    P_i: Float[Tensor, "d_in k_in"]
    P_o: Float[Tensor, "d_out k_out"]

    def apply(self, G: Float[Tensor, "*n d_out d_in"]) -> Float[Tensor, "*n k_out k_in"]:
        """The projection of gradients."""
        return self.P_o.T @ G @ self.P_i

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Projection":
        """The projection on `device`, in `dtype` if one is given."""
        return Projection(self.P_i.to(device, dtype), self.P_o.to(device, dtype))

    @property
    def size(self) -> int:
        """Values per row."""
        return self.P_i.shape[1] * self.P_o.shape[1]


def random_projections(layers: list[Layer], *, rank: int, seed: int) -> dict[str, Projection]:
    """Random orthonormal projections; layers that share an input share `P_i`."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    projections = {}
    for layer in layers:
        if layer.group not in inputs:
            inputs[layer.group] = _random_orthonormal(layer.d_in, rank, generator)
        projections[layer.name] = Projection(inputs[layer.group], _random_orthonormal(layer.d_out, rank, generator))
    return projections


def project(
    G: dict[str, Float[Tensor, "*n d_out d_in"]], layers: Sequence[Layer], projections: dict[str, Projection]
) -> dict[str, Float[Tensor, "*n k_out k_in"]]:
    """The projection of full gradients, by layer."""
    return {layer.name: projections[layer.name].to(G[layer.name].device).apply(G[layer.name]) for layer in layers}


def _random_orthonormal(size: int, rank: int, generator: torch.Generator) -> Tensor:
    gaussian = torch.randn(size, min(rank, size), generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(gaussian)
    return (Q * R.diagonal().sign()).float()  # the sign makes the distribution uniform (Mezzadri 2007)


@no_type_check  # is compiled: (batch, token, inputs) and (d_in, k) give (batch, token, k)
def encode_inputs(a, P, *, bias):
    """`[a, 1] P` where there is a bias, else `a P`; the column of ones is never formed."""
    return torch.nn.functional.linear(a, P[:-1].T, P[-1]) if bias else a @ P


def append_one(a: Float[Tensor, "batch token inputs"], *, bias: bool) -> Float[Tensor, "batch token d_in"]:
    """`[a, 1]` where there is a bias, else `a`."""
    return torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=2) if bias else a
