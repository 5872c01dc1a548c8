"""Fitting the EK-FAC factors of a segment, for as many layers at a time as memory has room for.

Factors grow with the square of a layer's width: those of Llama-3-8B are 92 GB of covariances. Layers are therefore taken in
blocks, each fitted by passes of its own, which see the same sampled labels: factors do not depend on how layers are divided. A
pass goes back no further than to its block's first layer.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tda.data import Data, Documents, batch_plan
from tda.ekfac import EKFAC, Covariances, corrected_eigenvalues, covariances, eigenbasis
from tda.factors import SegmentFactors
from tda.model import Layer, tracked_layers
from tda.packing import pack, pack_plan, packs, within_documents
from tda.parallel import parallel_map
from tda.preconditioner import scaled_eigenbasis, scaled_factors
from tda.projection import Projection
from tda.task import Task
from tda.usage import free_memory

NUM_SHARDS = 4  # per checkpoint; fixed, so that sums are taken in one order whatever the number of workers
FLOAT = 4  # bytes
SHARE_OF_FREE = 0.5  # of the memory that is free beside the model; activations and eigendecompositions need some too

Result = TypeVar("Result")
Work = Callable[[nn.Module, Iterator, torch.Generator], Result]


@dataclass(frozen=True)
class Passes:
    """Passes over the data at every checkpoint: how documents become batches, and where they go through which model."""

    checkpoints: Sequence[str | int]
    model: Callable[[str | int], nn.Module]  # on the device
    data: Data
    packed: bool
    batch_tokens: int
    seed: int
    workers: int
    device: torch.device

    def over(self, work: Work[Result], description: str, *, salt: int) -> Iterator[Result]:
        """`work` of every part of the data at every checkpoint, in their order; `salt` decides which labels it draws.

        Parts are done in parallel on the CPU.
        """
        lengths = self.data.lengths
        plan = (pack_plan if self.packed else batch_plan)(lengths, batch_tokens=self.batch_tokens)
        parts = [(checkpoint, shard) for checkpoint in self.checkpoints for shard in range(NUM_SHARDS)]

        def one(part: tuple[str | int, int]) -> Result:
            checkpoint, shard = part
            number = self.checkpoints.index(checkpoint) * NUM_SHARDS + shard
            generator = torch.Generator(self.device).manual_seed((self.seed * 8 + salt) * 2**20 + number)
            model = self.model(checkpoint)
            with within_documents(model) if self.packed else contextlib.nullcontext(), products_in_tf32(model):
                return work(model, map(self._batch, plan[shard::NUM_SHARDS]), generator)

        return parallel_map(one, parts, workers=self.workers, description=description)

    def _batch(self, rows: list[int]):
        if self.packed:
            return pack(self.data, rows, fill_to=self.batch_tokens).to(self.device)
        return self.data.batch(rows).to(self.device)


@contextlib.contextmanager
def products_in_tf32(model: nn.Module) -> Iterator[None]:
    """Inside the block a GPU multiplies float32 in TF32 if `model` is in bfloat16, every value of which TF32 has too."""
    before, weight = torch.get_float32_matmul_precision(), next(model.parameters())
    if weight.dtype == torch.bfloat16 and weight.device.type != "cpu":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fit_factors(
    checkpoints: Sequence[str | int],
    load: Callable[[str | int], nn.Module],
    data: Data,
    *,
    task: Task,
    pattern: str,
    weight: float,
    P: dict[str, Tensor],
    adam: str,
    projections: Callable[[list[Layer]], dict[str, Projection]] | None,
    batch_tokens: int,
    seed: int,
    workers: int,
    device: torch.device,
    packed: bool = False,
    room: float | None = None,
    fitted: bool = True,
) -> SegmentFactors:
    """EK-FAC of one segment: covariances and eigenvalues are averaged over its checkpoints, the basis is common to them.

    Labels are sampled afresh at every checkpoint and in every pass. `weight` is the training loss's factor on an example's summed
    loss. With `projections`, everything happens in projected space. `packed` documents stand one after another without padding,
    if the model keeps them apart. `room` is what factors may take at once, in bytes; by default, half of what is free. With
    `fitted` off the projections are all there is: the factors are left to `row_curvature`. Factors are on the CPU.
    """
    model = functools.lru_cache(maxsize=1)(lambda checkpoint: load(checkpoint).to(device))
    last = model(checkpoints[-1])
    layers = tracked_layers(last, pattern, probe=lambda model: task.losses(model, data.batch([0]).to(device)))
    chosen = projections(layers) if projections else None
    if not fitted:
        return SegmentFactors(layers, {}, {}, P, chosen or {}, len(data))
    packed = packed and isinstance(data, Documents) and packs(last)
    passes = Passes(checkpoints, model, data, packed, batch_tokens, seed, workers, device)
    room = SHARE_OF_FREE * free_memory(device) if room is None else room
    blocks = [layers] if chosen else layer_blocks(layers, room=room, copies=1 + workers, scaled=adam == "symmetric")
    plain, scaled = {}, {}
    for number, block in enumerate(blocks, start=1):
        name = f" of layers {number}/{len(blocks)}" if len(blocks) > 1 else ""
        plain |= _fit_plain(passes, block, task=task, weight=weight, projections=chosen, name=name)
        if adam == "symmetric":
            root_P = {layer.name: P[layer.name].to(device).sqrt() for layer in block}
            scaled |= _fit_scaled(passes, block, task=task, weight=weight, root_P=root_P, name=name)
    return SegmentFactors(layers, plain, scaled, P, chosen or {}, len(data))


def layer_blocks(layers: Sequence[Layer], *, room: float, copies: int, scaled: bool = False) -> list[list[Layer]]:
    """`layers` in their order, as many in a block as can be fitted in `room` bytes; those that share an input stay together.

    `copies` is how many sums of a kind there are at once, each worker's and the total.
    """
    blocks: list[list[Layer]] = []
    for group in dict.fromkeys(layer.group for layer in layers):
        members = [layer for layer in layers if layer.group == group]
        if not blocks or bytes_to_fit([*blocks[-1], *members], copies=copies, scaled=scaled) > room:
            blocks.append([])
        blocks[-1] += members
    return blocks


def bytes_to_fit(layers: Sequence[Layer], *, copies: int, scaled: bool = False) -> int:
    """The most that sums and bases of `layers` take: all covariances; or the bases, in narrow form too, and all eigenvalues."""
    outputs = sum(layer.d_out**2 for layer in layers)
    inputs = sum(layer.d_in**2 for layer in layers if scaled or layer.name == layer.group)
    gradients = sum(layer.d_in * layer.d_out for layer in layers)
    held = gradients if scaled else 0  # the optimizer's preconditioner
    return FLOAT * (held + max(copies * (inputs + outputs), 3 * (inputs + outputs) // 2 + copies * gradients))


def _fit_plain(
    passes: Passes,
    layers: list[Layer],
    *,
    task: Task,
    weight: float,
    projections: dict[str, Projection] | None,
    name: str,
) -> dict[str, EKFAC]:
    def covary(model: nn.Module, batches: Iterator, generator: torch.Generator) -> Covariances:
        return covariances(model, layers, batches, task=task, generator=generator, projections=projections)

    basis = eigenbasis(functools.reduce(Covariances.__add__, passes.over(covary, f"covariances{name}", salt=1)), layers)
    rotated = basis
    if projections is not None:
        rotated = {one: (projections[one].P_i @ Q_A, projections[one].P_o @ Q_S) for one, (Q_A, Q_S) in basis.items()}

    def correct(model: nn.Module, batches: Iterator, generator: torch.Generator) -> tuple[dict[str, Tensor], int]:
        return corrected_eigenvalues(model, layers, batches, task=task, basis=rotated, generator=generator)

    return _factors(basis, passes.over(correct, f"eigenvalues{name}", salt=2), weight=weight)


def _fit_scaled(
    passes: Passes, layers: list[Layer], *, task: Task, weight: float, root_P: dict[str, Tensor], name: str
) -> dict[str, EKFAC]:
    def scale(basis: dict | None) -> Work:
        return lambda model, batches, generator: scaled_factors(
            model, layers, batches, task=task, root_P=root_P, basis=basis, generator=generator
        )

    sums = (sums for sums, _ in passes.over(scale(None), f"scaled covariances{name}", salt=3))
    basis = scaled_eigenbasis(functools.reduce(Covariances.__add__, sums), layers)
    parts = passes.over(scale(basis), f"scaled eigenvalues{name}", salt=4)
    return _factors(basis, ((Lambda, counted.num_tokens) for counted, Lambda in parts), weight=weight)


def _factors(
    basis: dict[str, tuple[Tensor, Tensor]], parts: Iterator[tuple[dict[str, Tensor], int]], *, weight: float
) -> dict[str, EKFAC]:
    """Factors of the sums that `parts` of the data have, each with its number of documents, on the CPU."""
    total, num_documents = {}, 0
    for sums, count in parts:
        if count:
            total = {name: total[name] + values for name, values in sums.items()} if total else sums
            num_documents += count
    return {
        name: EKFAC(Q_A.cpu(), Q_S.cpu(), (total[name] * (weight / num_documents)).cpu()) for name, (Q_A, Q_S) in basis.items()
    }
