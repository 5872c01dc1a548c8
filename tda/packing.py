"""Packed batches: documents one after another in a single row of tokens, without padding, where attention stays in each document.

Layers other than attention see the single row. For attention, and for sums over a document's tokens, tokens are spread over a
grid (document, position), one document per row: there plain causal attention is right, and a sum over tokens is a matrix
product. `spread` and `gathered` go to the grid and back, by each token's slot in it.

A model runs on packed batches inside `within_documents`; `packs` tells whether it can.
"""

import bisect
import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, no_type_check
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from tda.data import Batch, Documents
from tda.model import plain_head
from tda.parallel import DEVICE_ERRORS
from tda.streaming import Copy, start_copy, to_device

WITHIN_DOCUMENTS = "within_documents"  # the name under which transformers knows our attention
PROBE_LENGTHS = (3, 2)  # documents of any two lengths show whether a model keeps them apart
PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN's would plan every new grid anew
NEARLY_ALIKE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # of what mixing changes


@dataclass(frozen=True)
class PackedBatch:
    """Documents packed into one row of tokens.

    `layout` is everything that the device needs, concatenated so that it is a single copy: tokens, their positions, their
    slots, then the places and the targets of the predictions that count.
    """

    rows: list[int]  # row numbers of the documents
    layout: Int[Tensor, " number"]
    num_tokens: int  # filling included
    grid: tuple[int, int]  # (documents and filling, positions)

    def _part(self, start: int, stop: int) -> Tensor:
        return self.layout[start:stop]

    @property
    def tokens(self) -> Int[Tensor, "1 token"]:
        """Token ids."""
        return self._part(0, self.num_tokens)[None]

    @property
    def slots(self) -> Int[Tensor, " token"]:
        """Every token's place in the flattened grid."""
        return self._part(2 * self.num_tokens, 3 * self.num_tokens)

    @property
    def predictions(self) -> tuple[Int[Tensor, " prediction"], Int[Tensor, " prediction"]]:
        """The places in the row of the predictions that count, and the tokens that they are to predict."""
        middle = (3 * self.num_tokens + len(self.layout)) // 2
        return self._part(3 * self.num_tokens, middle), self._part(middle, len(self.layout))

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        positions = self._part(self.num_tokens, 2 * self.num_tokens)[None]
        return {"input_ids": self.tokens, "position_ids": positions, "slots": self.slots, "grid": self.shape_of_grid}

    @property
    def counts(self) -> Bool[Tensor, "1 token"]:
        """True for every token except a document's last one, which predicts nothing, and filling."""
        positions = self._part(self.num_tokens, 2 * self.num_tokens)
        goes_on = F.pad(positions[1:] > 0, (0, 1))
        return (goes_on & (self.slots < len(self.rows) * self.grid[1]))[None]

    @cached_property
    def shape_of_grid(self) -> Tensor:
        """An empty tensor of the grid's shape: in compiled layers, sizes of tensors may change but plain numbers may not."""
        return self.layout.new_empty(()).expand(self.grid)

    def documents_of(self, places: Int[Tensor, " place"]) -> Int[Tensor, " place"]:
        """The document that each place of the row belongs to, by its number in `rows`."""
        return self.slots[places] // self.grid[1]

    def sums(self, values: Float[Tensor, " prediction"]) -> Float[Tensor, " document"]:
        """Sums over documents of a number per prediction that counts."""
        places, _targets = self.predictions
        spread = values.new_zeros(self.grid[0] * self.grid[1]).index_copy_(0, self.slots[places], values)
        return spread.view(self.grid).sum(dim=1)[: len(self.rows)]

    @property
    def sizes(self) -> Float[Tensor, " document"]:
        """Predictions of every document that count."""
        return self.sums(torch.ones(len(self.predictions[0]), device=self.layout.device))

    def by_document(self, x: Float[Tensor, "1 token k"]) -> Float[Tensor, "document position k"]:
        """Tokens spread over the grid, with zeros elsewhere."""
        return spread(x[0], self.slots, self.shape_of_grid)[: len(self.rows)]

    def to(self, device: torch.device, *, copy: Copy = start_copy) -> "PackedBatch":
        """The batch on `device`."""
        return PackedBatch(self.rows, to_device(self.layout, device, copy=copy), self.num_tokens, self.grid)


DocumentBatch = Batch | PackedBatch


def pack(documents: Documents, rows: Sequence[int], *, fill_to: int = 0) -> PackedBatch:
    """The documents in `rows`, one after another, filled up to `fill_to` tokens with tokens that belong to none of them."""
    lengths = [len(documents.tokens[row]) for row in rows]
    longest = max(lengths)
    lacking = max(0, fill_to - sum(lengths))
    filling = [min(longest, lacking - start) for start in range(0, lacking, longest)]
    held = np.array(lengths + filling)
    starts = np.cumsum(held) - held
    number = np.repeat(np.arange(len(held)), held)
    position = np.arange(len(number)) - starts[number]
    tokens = np.concatenate([*(documents.tokens[row] for row in rows), np.zeros(lacking, np.int64)])
    first = np.concatenate([documents.loss_starts[np.asarray(rows)], held[len(rows) :]])
    places = np.flatnonzero((position + 1 >= first[number]) & (position + 1 < held[number]))
    layout = np.concatenate([tokens, position, number * longest + position, places, tokens[places + 1]])
    return PackedBatch(list(rows), torch.from_numpy(layout.astype(np.int64)), len(tokens), (len(held), longest))


def pack_plan(lengths: Sequence[int] | np.ndarray, *, batch_tokens: int) -> list[list[int]]:
    """Row numbers of batches of at most `batch_tokens` tokens: each batch always takes the longest document that still fits.

    Most documents of a batch are therefore of similar length. As in `data.batch_plan`, the plan depends on the lengths alone,
    and a document longer than `batch_tokens` gets a batch of its own.
    """
    waiting: dict[int, list[int]] = defaultdict(list)
    for row in range(len(lengths) - 1, -1, -1):
        waiting[int(lengths[row])].append(row)
    known = sorted(waiting)
    plan: list[list[int]] = []
    while known:
        length = known[-1]
        batch: list[int] = []
        room = max(batch_tokens, length)
        while length is not None:
            batch.append(waiting[length].pop())
            room -= length
            if not waiting[length]:
                known.remove(length)
            place = bisect.bisect_right(known, room)
            length = known[place - 1] if place else None
        plan.append(batch)
    return plan


class _Spread(torch.autograd.Function):
    """Writes rows to their slots, among rows of zeros that have no gradient."""

    @staticmethod
    @no_type_check
    def forward(ctx, x, slots, num_slots):
        ctx.save_for_backward(slots)
        return x.new_zeros(num_slots, *x.shape[1:]).index_copy(0, slots, x)

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx, g):
        return g.index_select(0, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """Reads rows from their slots, each once."""

    @staticmethod
    @no_type_check
    def forward(ctx, x, slots):
        ctx.save_for_backward(slots)
        ctx.num_slots = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx, g):
        (slots,) = ctx.saved_tensors
        rows = g.flatten(1)  # in `_Spread`'s shape, the compiler would keep its zeros from the forward pass, for use here
        return rows.new_zeros(ctx.num_slots, rows.shape[1]).index_copy(0, slots, rows).view(-1, *g.shape[1:]), None


@no_type_check  # is compiled, and so are the functions above
def spread(x, slots, grid):
    """Tokens (token, ...) spread over the grid (document, position, ...), zeros elsewhere; a view if every slot is taken."""
    num_slots = grid.shape[0] * grid.shape[1]
    held = x if num_slots == x.shape[0] else _Spread.apply(x, slots, num_slots)
    return held.view(*grid.shape, *x.shape[1:])


@no_type_check
def gathered(x, slots):
    """`spread` undone."""
    held = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return held if held.shape[0] == slots.shape[0] else _Gather.apply(held, slots)


@no_type_check
def attend_within_documents(module, query, key, value, _mask, *, slots, grid, scaling=None, dropout=0.0, **_more):
    """Causal attention inside every document, as an attention function of transformers, on (1, head, token, size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    in_grid = (spread(x[0].transpose(0, 1), slots, grid).transpose(1, 2) for x in (query, key, value))
    attended, _ = sdpa_attention_forward(module, *in_grid, None, dropout=dropout, scaling=scaling, is_causal=True)
    return gathered(attended, slots)[None], None


@contextlib.contextmanager
def within_documents(model: nn.Module) -> Iterator[None]:
    """Inside the block the model runs on packed batches, and only on these."""
    from transformers import AttentionInterface

    plain_head(model)  # probes a model it has not seen: before the block, on a batch that is not packed
    AttentionInterface.register(WITHIN_DOCUMENTS, attend_within_documents)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = WITHIN_DOCUMENTS
    try:
        with sdpa_kernel(PLANLESS):
            yield
    finally:
        config._attn_implementation = before


_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def packs(model: nn.Module) -> bool:
    """Whether the model treats packed documents as it treats single ones; found out by a few tokens, once per model.

    False for sliding-window attention and for attention with capped logits, which ours does not have.
    """
    if model not in _packs:
        _packs[model] = _probe(model)
    return _packs[model]


@torch.no_grad()
def _probe(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "base_model"):
        return False
    if any(getattr(config.get_text_config(), name, None) for name in ("sliding_window", "attn_logit_softcapping")):
        return False
    tokens = [np.arange(1, length + 1, dtype=np.int32) for length in PROBE_LENGTHS]
    names = [str(length) for length in PROBE_LENGTHS]
    documents = Documents(names, names, names, names, tokens, np.ones(len(tokens), np.int64))
    batch = pack(documents, range(len(tokens)), fill_to=sum(PROBE_LENGTHS) + 1).to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        with within_documents(model):
            packed = _hidden(model, **batch.inputs)
        alone, mixed = torch.cat([_plainly(model, one) for one in tokens]), _plainly(model, np.concatenate(tokens))
        unlike = (packed[: len(alone)] - alone).norm()
        return bool(unlike < NEARLY_ALIKE[next(model.parameters()).dtype] * (mixed - alone).norm())
    except DEVICE_ERRORS:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        model.train(was_training)


def _plainly(model: nn.Module, tokens: np.ndarray) -> Float[Tensor, "token d"]:
    device = next(model.parameters()).device
    return _hidden(model, input_ids=torch.from_numpy(tokens.astype(np.int64))[None].to(device))


def _hidden(model: nn.Module, **inputs: Any) -> Float[Tensor, "token d"]:
    return model.base_model(**inputs, use_cache=False).last_hidden_state[0].float()
