"""TRAK: the least-squares answer of a model that is linear in its weights, in a random projection (arXiv 2303.14186, section 3).

    score(q, n) = < phi_q, (Phi^T Phi)^-1 phi_n > Q_n

`phi_n` is the projected gradient of an example's responses (`Task.responses`: margins, or predictions), `Q_n` the derivative of
its loss by them, -(1-p) for a margin, and `phi_q` the projected gradient of the query's cost: with the margin as measurement,
there is a minus in both, and this is the paper's score. An example of many terms has the sum of their responses and the mean of
their derivatives. The paper draws a dense projection of random signs; here every weight has one sign and one of the projection's
values (a sparse Johnson-Lindenstrauss transform), at a cost that does not grow with their number.

The paper averages `phi_q^T (Phi^T Phi)^-1 phi_n` and `Q_n` over the models of an ensemble, each by itself; the mean of scores
averages their products, which differs by how the two vary together over models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tda.capture import captured
from tda.data import Batch, TensorBatch
from tda.ggn import pack
from tda.model import Layer
from tda.projection import append_one
from tda.task import Task

RIDGE = 1e-8  # of the kernel's mean eigenvalue: fewer rows than values leave it singular; the paper's has none


@dataclass(frozen=True)
class Sketch:
    """A projection of gradient rows: each of their values is added, with a sign, to one of the projection's."""

    place: Int[Tensor, " value"]
    sign: Float[Tensor, " value"]
    size: int

    @classmethod
    def draw(cls, num_values: int, *, size: int, seed: int, like: Tensor) -> "Sketch":
        """A random one of gradients of the dtype and on the device of `like`."""
        generator = torch.Generator().manual_seed(seed)
        place = torch.randint(size, (num_values,), generator=generator)
        sign = torch.randint(2, (num_values,), generator=generator) * 2 - 1
        return cls(place.to(like.device), sign.to(like), size)

    def apply(self, rows: Float[Tensor, "row value"]) -> Float[Tensor, "row size"]:
        """The projection of gradients."""
        return rows.new_zeros(self.size, len(rows)).index_add_(0, self.place, self.sign[:, None] * rows.T).T


def features(
    model: nn.Module, layers: Sequence[Layer], batch: Batch | TensorBatch, *, task: Task, sketch: Sketch
) -> tuple[Float[Tensor, "batch size"], Float[Tensor, " batch"]]:
    """`phi` and `Q` of every example."""
    gradients: dict[str, Tensor] = {}

    def keep_inputs(layer: Layer, a: Tensor) -> Tensor:
        return append_one(a, bias=layer.bias)

    def keep(layer: Layer, a: Tensor, Ds: Tensor) -> None:
        gradients[layer.name] = torch.bmm(Ds.mT, a)

    with captured(model, layers, encode=keep_inputs, consume=keep):
        responses, slopes = task.responses(task.outputs(model, batch), batch)
        responses.sum().backward()
    owner = torch.repeat_interleave(torch.arange(len(batch.rows), device=slopes.device), batch.sizes)
    Q = slopes.new_zeros(len(batch.rows)).index_add_(0, owner, slopes.detach().mean(dim=1)) / batch.sizes
    return sketch.apply(pack(gradients, layers)), Q


def trak_scores(
    query: Float[Tensor, "query size"], Phi: Float[Tensor, "row size"], Q: Float[Tensor, " row"]
) -> Float[Tensor, "query row"]:
    """The scores, in float64."""
    query, Phi = query.double(), Phi.double()
    kernel = Phi.T @ Phi
    kernel.diagonal().add_(RIDGE * kernel.diagonal().mean())
    return torch.linalg.solve(kernel, query.T).T @ Phi.T * Q.double()
