"""Fitting the EK-FAC factors of a segment, for as many layers at a time as memory has room for.

Factors grow with the square of a layer's width: the covariances of Llama-3-8B are 92 GB. Layers are therefore fitted in blocks,
each by passes of its own. All passes see the same sampled labels, so factors do not depend on how layers are divided, and a
backward pass ends at the first layer of its block.

    fit_factors -> per block: _fit_plain, and _fit_scaled for AdamW's symmetric form -> Passes.over -> the passes of ekfac.py
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from tda.data import Data, Documents, batch_plan
from tda.ekfac import EKFAC, Covariances, add_by_name, basis_like, corrected_eigenvalues, covariances, eigenbasis
from tda.factors import SegmentFactors
from tda.losses import at_least_float32
from tda.model import Layer, tracked_layers
from tda.packing import pack, pack_plan, packs, within_documents
from tda.parallel import parallel_map, products_in_tf32
from tda.preconditioner import scaled_eigenbasis, scaled_factors
from tda.projection import Projection
from tda.task import Task
from tda.usage import free_memory, memory_rise

NUM_SHARDS = 4  # of the data, per checkpoint; fixed, so that the order of sums does not depend on the number of workers
FLOAT = 4  # bytes
SHARE_OF_FREE = 0.6  # of the free memory that factors may take; activations and eigendecompositions need the rest
SHARE_BESIDE_A_PASS = 0.8  # the same on a GPU, where the activations of a batch are measured and already taken off

Squares = tuple[dict[str, Tensor], int]  # sums over documents, by layer, and the number of documents
Scaled = tuple[Covariances, dict[str, Tensor]]
Result = TypeVar("Result")
Work = Callable[[nn.Module, Iterator, torch.Generator, Result | None], Result]  # (model, batches, generator, sums to add to)


class OneModel:
    """Holds the model of one checkpoint on the device, and frees it before it loads another."""

    def __init__(self, load: Callable[[str | int], nn.Module], device: torch.device):
        self._load, self._device = load, device
        self._held: tuple[str | int, nn.Module] | None = None

    def at(self, checkpoint: str | int) -> nn.Module:
        """The model at a checkpoint; callers must not keep a reference to it."""
        if self._held is None or self._held[0] != checkpoint:
            self._held = None
            self._held = checkpoint, self._load(checkpoint).to(self._device)
        return self._held[1]

    @property
    def like(self) -> Tensor:
        """An empty tensor with the dtype and the device of the weights."""
        assert self._held is not None, "no checkpoint was asked for yet"
        return next(self._held[1].parameters()).new_empty(0)


@dataclass(frozen=True)
class Passes:
    """Passes over the data at every checkpoint of a segment."""

    checkpoints: Sequence[str | int]
    model: OneModel
    data: Data
    packed: bool
    batch_tokens: int
    seed: int
    workers: int
    device: torch.device

    def over(self, work: Work[Result], add: Callable[[Result, Result], Result], description: str, *, salt: int) -> Result:
        """The sum of `work` over all shards of the data at every checkpoint; passes with another `salt` draw other labels.

        On the CPU shards run in parallel, each with sums of its own, which are then added in a fixed order.
        """
        parts = [(checkpoint, shard) for checkpoint in self.checkpoints for shard in range(NUM_SHARDS)]
        total: Result | None = None

        def one(part: tuple[str | int, int]) -> Result:
            return self.part(work, *part, salt=salt, into=None if self.apart else total)

        for done in parallel_map(one, parts, workers=self.workers, description=description):
            total = done if total is None or not self.apart else add(total, done)
        return total

    def part(self, work: Work[Result], checkpoint: str | int, shard: int, *, salt: int, into: Result | None = None) -> Result:
        """`work` over one shard of the data at one checkpoint; its sums are added to `into` if that is given."""
        number = self.checkpoints.index(checkpoint) * NUM_SHARDS + shard
        generator = torch.Generator(self.device).manual_seed((self.seed * 8 + salt) * 2**20 + number)
        model = self.model.at(checkpoint)
        with within_documents(model) if self.packed else contextlib.nullcontext(), products_in_tf32(model):
            return work(model, map(self._batch, self._plan[shard::NUM_SHARDS]), generator, into)

    @property
    def apart(self) -> bool:
        """Whether every shard of the data has sums of its own."""
        return self.device.type == "cpu"

    @cached_property
    def _plan(self) -> list[list[int]]:
        return (pack_plan if self.packed else batch_plan)(self.data.lengths, batch_tokens=self.batch_tokens)

    def _batch(self, rows: list[int]):
        if self.packed:
            return pack(self.data, rows, fill_to=self.batch_tokens).to(self.device)
        return self.data.batch(rows).to(self.device)


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
    """EK-FAC of one segment, on the CPU: covariances and eigenvalues averaged over its checkpoints, in one common basis.

    Args:
        checkpoints: names of the segment's checkpoints, as `load` takes them.
        load: gives the model at a checkpoint.
        data: what the factors are fitted on.
        task: its loss, with sampled labels, drawn anew at every checkpoint and in every pass.
        pattern: a regular expression on names of layers; those that match are tracked.
        weight: the training loss's factor on an example's summed loss.
        P: AdamW's preconditioner by layer; empty without one.
        adam: how it enters (`preconditioner.py`); only "symmetric" needs factors of its own here.
        projections: makes projections of the layers; with it, everything happens in projected space.
        batch_tokens: tokens (or examples) of a batch.
        seed: of the sampled labels.
        workers: processes, on a CPU.
        device: where passes run.
        packed: whether documents are packed without padding, if the model can keep them apart.
        room: bytes that factors may take at once; by default most of what is free.
        fitted: if not, only layers and projections are determined, and the factors are left to `row_curvature`.

    Layers that share an input, or one alone, whose factors take more memory than there is are refused with ValueError.
    """
    model = OneModel(load, device)
    layers = tracked_layers(
        model.at(checkpoints[-1]), pattern, probe=lambda model: task.losses(model, data.batch([0]).to(device))
    )
    chosen = projections(layers) if projections else None
    if not fitted:
        return SegmentFactors(layers, {}, {}, P, chosen or {}, len(data))
    packed = packed and isinstance(data, Documents) and packs(model.at(checkpoints[-1]))
    passes = Passes(checkpoints, model, data, packed, batch_tokens, seed, workers if device.type == "cpu" else 1, device)
    blocks = [layers]
    if not chosen:
        room = _room(passes, layers, task=task) if room is None else room
        copies = 1 + workers if passes.apart else 1
        narrow = model.like.dtype == torch.bfloat16
        blocks = layer_blocks(layers, room=room, copies=copies, narrow=narrow, scaled=adam == "symmetric")
        _check_fits(blocks, free_memory(device), copies=copies, narrow=narrow, scaled=adam == "symmetric")
    plain, scaled = {}, {}
    for number, block in enumerate(blocks, start=1):
        name = f" of layers {number}/{len(blocks)}" if len(blocks) > 1 else ""
        plain |= _fit_plain(passes, block, task=task, weight=weight, projections=chosen, name=name)
        if adam == "symmetric":
            root_P = {layer.name: P[layer.name].to(device).sqrt() for layer in block}
            scaled |= _fit_scaled(passes, block, task=task, weight=weight, root_P=root_P, name=name)
    return SegmentFactors(layers, plain, scaled, P, chosen or {}, len(data))


def _room(passes: Passes, layers: Sequence[Layer], *, task: Task) -> float:
    """Bytes that are left for factors beside everything else that a pass needs."""
    if passes.apart:
        return SHARE_OF_FREE * free_memory(passes.device)

    def one_batch(model: nn.Module, batches: Iterator, generator: torch.Generator, _into: None) -> None:
        covariances(model, layers[:1], itertools.islice(batches, 1), task=task, generator=generator)  # back to the first layer

    rise = memory_rise(lambda: passes.part(one_batch, passes.checkpoints[-1], 0, salt=0), device=passes.device)
    return SHARE_BESIDE_A_PASS * (free_memory(passes.device) - rise)


def layer_blocks(
    layers: Sequence[Layer], *, room: float, copies: int, narrow: bool = False, scaled: bool = False
) -> list[list[Layer]]:
    """`layers` in blocks, in their order: as many in each as can be fitted in `room` bytes. Layers of a group stay together."""
    blocks: list[list[Layer]] = []
    for group in dict.fromkeys(layer.group for layer in layers):
        members = [layer for layer in layers if layer.group == group]
        if not blocks or bytes_to_fit([*blocks[-1], *members], copies=copies, narrow=narrow, scaled=scaled) > room:
            blocks.append([])
        blocks[-1] += members
    return blocks


def _check_fits(blocks: list[list[Layer]], free: int, *, copies: int, narrow: bool, scaled: bool) -> None:
    """Refuse with ValueError layers that share an input, or one alone, whose factors take more than is free."""
    for block in blocks:
        needed = bytes_to_fit(block, copies=copies, narrow=narrow, scaled=scaled)
        if needed > free:
            raise ValueError(
                f"curvature: the factors of {', '.join(layer.name for layer in block)} take {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} are free; leave wide layers out, as a head, by the pattern of layers (curvature.layers in "
                "params.yaml), or set curvature.space to projected"
            )


def bytes_to_fit(layers: Sequence[Layer], *, copies: int, narrow: bool = False, scaled: bool = False) -> int:
    """The most bytes that fitting `layers` takes: all covariances, or later the bases and all eigenvalues.

    `copies` is how many sums of a kind exist at once: one, or each worker's and the total. With `narrow`, bases are in bfloat16
    (but those of `scaled` gradients never are).
    """
    outputs = sum(layer.d_out**2 for layer in layers)
    inputs = sum(layer.d_in**2 for layer in layers if scaled or layer.name == layer.group)
    gradients = sum(layer.d_in * layer.d_out for layer in layers)
    covariances = inputs + outputs
    held = gradients if scaled else 0  # the optimizer's preconditioner
    bases = covariances // (2 if narrow and not scaled else 1)
    return FLOAT * (held + max(copies * covariances, bases + copies * gradients))


def _fit_plain(
    passes: Passes,
    layers: list[Layer],
    *,
    task: Task,
    weight: float,
    projections: dict[str, Projection] | None,
    name: str,
) -> dict[str, EKFAC]:
    def covary(model: nn.Module, batches: Iterator, generator: torch.Generator, into: Covariances | None) -> Covariances:
        return covariances(model, layers, batches, task=task, generator=generator, projections=projections, into=into)

    basis = eigenbasis(passes.over(covary, Covariances.add_, f"covariances{name}", salt=1), layers)
    rotated = basis
    if projections is not None:
        rotated = {one: (projections[one].P_i @ Q_A, projections[one].P_o @ Q_S) for one, (Q_A, Q_S) in basis.items()}
    rotated = basis_like(passes.model.like, rotated)  # once for all shards

    def correct(model: nn.Module, batches: Iterator, generator: torch.Generator, into: Squares | None) -> Squares:
        return corrected_eigenvalues(model, layers, batches, task=task, basis=rotated, generator=generator, into=into)

    Lambda, num_documents = passes.over(correct, _added, f"eigenvalues{name}", salt=2)
    return _factors(basis, Lambda, weight=weight / num_documents)


def _fit_scaled(
    passes: Passes, layers: list[Layer], *, task: Task, weight: float, root_P: dict[str, Tensor], name: str
) -> dict[str, EKFAC]:
    def scale(basis: dict | None) -> Work[Scaled]:
        return lambda model, batches, generator, into: scaled_factors(
            model, layers, batches, task=task, root_P=root_P, basis=basis, generator=generator, into=into
        )

    def add(some: Scaled, more: Scaled) -> Scaled:
        add_by_name(some[1], more[1])
        return some[0].add_(more[0]), some[1]

    sums, _none = passes.over(scale(None), add, f"scaled covariances{name}", salt=3)
    basis = scaled_eigenbasis(sums, layers)
    rotations = basis_like(at_least_float32(passes.model.like), basis)  # once for all shards
    counted, Lambda = passes.over(scale(rotations), add, f"scaled eigenvalues{name}", salt=4)
    return _factors(basis, Lambda, weight=weight / counted.count)


def _added(some: Squares, more: Squares) -> Squares:
    add_by_name(some[0], more[0])
    return some[0], some[1] + more[1]


def _factors(basis: dict[str, tuple[Tensor, Tensor]], Lambda: dict[str, Tensor], *, weight: float) -> dict[str, EKFAC]:
    return {name: EKFAC(Q_A, Q_S, (Lambda[name] * weight).cpu()) for name, (Q_A, Q_S) in basis.items()}
