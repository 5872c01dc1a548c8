"""TRAK (Park et al. 2023, arXiv 2303.14186, section 3): influence in the linearised model, in a random projection.

    score(q, n) = < phi_q, (Phi^T Phi)^-1 phi_n > Q_n

- `phi_n` is the projected gradient of an example's responses (`Task.responses`: margins, or predictions).
- `Q_n` is the derivative of the example's loss by its responses, -(1-p) for a margin.
- `phi_q` is the projected gradient of the query's cost. With the margin as measurement, the minus signs of `phi_q` and `Q_n`
  cancel, and this is the paper's score.

Two things differ from the paper. Its projection is dense; a CountSketch costs the same for any projection size. Over an ensemble
it averages `phi_q^T (Phi^T Phi)^-1 phi_n` and `Q_n` separately, whereas the mean of scores averages their product. An example
with many terms, such as a document, has the sum of its terms' responses and the mean of their derivatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tda.capture import captured
from tda.data import Batch, TensorBatch
from tda.ggn import pack
from tda.gradients import layer_input
from tda.model import Layer
from tda.task import Task

RIDGE = 1e-8  # of the kernel's mean eigenvalue: fewer rows than values leave it singular; the paper's has none


@dataclass(frozen=True)
class CountSketch:
    """A random projection (Charikar et al. 2002): each value is added, with a random sign, to one random place of `size`."""

    place: Int[Tensor, " value"]
    sign: Float[Tensor, " value"]
    size: int

    @classmethod
    def draw(cls, num_values: int, *, size: int, seed: int, like: Tensor) -> "CountSketch":
        """A projection of gradients with `num_values` values, in the dtype and on the device of `like`."""
        generator = torch.Generator().manual_seed(seed)
        place = torch.randint(size, (num_values,), generator=generator)
        sign = torch.randint(2, (num_values,), generator=generator) * 2 - 1
        return cls(place.to(like.device), sign.to(like), size)

    def apply(self, rows: Float[Tensor, "row value"]) -> Float[Tensor, "row size"]:
        """The projection of gradients."""
        return rows.new_zeros(self.size, len(rows)).index_add_(0, self.place, self.sign[:, None] * rows.T).T


def features(
    model: nn.Module, layers: Sequence[Layer], batch: Batch | TensorBatch, *, task: Task, sketch: CountSketch
) -> tuple[Float[Tensor, "batch size"], Float[Tensor, " batch"]]:
    """`phi` and `Q` of every example in the batch."""
    gradients: dict[str, Tensor] = {}

    def keep(layer: Layer, a: Tensor, Ds: Tensor) -> None:
        gradients[layer.name] = torch.bmm(Ds.mT, a)

    with captured(model, layers, encode=layer_input, consume=keep):
        responses, slopes = task.responses(task.outputs(model, batch), batch)
        responses.sum().backward()
    owner = torch.repeat_interleave(torch.arange(len(batch.rows), device=slopes.device), batch.sizes)
    Q = slopes.new_zeros(len(batch.rows)).index_add_(0, owner, slopes.detach().mean(dim=1)) / batch.sizes
    return sketch.apply(pack(gradients, layers)), Q


def trak_scores(
    query: Float[Tensor, "query size"], Phi: Float[Tensor, "row size"], Q: Float[Tensor, " row"]
) -> Float[Tensor, "query row"]:
    """(query, row) scores, in float64."""
    query, Phi = query.double(), Phi.double()
    kernel = Phi.T @ Phi
    kernel.diagonal().add_(RIDGE * kernel.diagonal().mean())
    return torch.linalg.solve(kernel, query.T).T @ Phi.T * Q.double()
