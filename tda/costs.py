"""The floating-point operations and bytes of every pass, counted from shapes alone.

A multiply-add is two operations. Only matrix products count, attention as if every position saw every other; norms, softmax,
sampling of labels and the optimizer do not. A batch costs as much as its padded tokens.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from tda.ekfac import strip_width
from tda.model import EVERY_LAYER, Layer, embedding_layers, num_parameters, num_trained_parameters, tracked_layers
from tda.stored_rows import stored_bytes

FLOAT = 4  # bytes of a float32
EIGH = 9  # operations per cube of the size: tridiagonal form, its eigenvectors, and back (Golub and Van Loan, section 8.3)
ROW_COLUMNS = 110  # bytes of a stored row beside its vector: id, content hash, source and six numbers


@dataclass(frozen=True)
class Block:
    """Attention of one decoder block. It stands before the matrix numbered `after`."""

    after: int
    width: int  # heads times their size


@dataclass(frozen=True)
class Decoder:
    """The shapes of a causal language model that its costs depend on; `matrices` are its linear layers in the order of use."""

    matrices: tuple[Layer, ...]
    tracked: tuple[Layer, ...]
    attention: tuple[Block, ...]
    head: tuple[int, int]  # hidden size, vocabulary
    parameters: int  # shared ones counted once
    frozen: frozenset[str] = frozenset()  # names of the matrices that training leaves as they are, beside adapters
    frozen_parameters: int = 0
    embedding: Layer | None = None  # the matrix of tokens, if it is trained
    follows_embedding: bool = False  # whether it is tracked too, with a head that shares it

    @property
    def trained(self) -> tuple[Layer, ...]:
        """The matrices that training changes."""
        return tuple(layer for layer in self.matrices if layer.name not in self.frozen)

    @property
    def trained_parameters(self) -> int:
        """What a checkpoint holds."""
        return self.parameters - self.frozen_parameters

    @property
    def first(self) -> int:
        """The place of the first tracked matrix: a frozen pass differentiates nothing below."""
        names = {layer.name for layer in self.tracked}
        return next(place for place, layer in enumerate(self.matrices) if layer.name in names)

    @property
    def head_is_matrix(self) -> bool:
        """Whether the last matrix is the head, which it is if the head shares no weight with the embedding."""
        return (self.matrices[-1].d_in, self.matrices[-1].d_out) == self.head

    @property
    def head_is_tracked(self) -> bool:
        """Whether the head is tracked; its logits are then taken at all tokens."""
        return self.head_is_matrix and self.matrices[-1].name in {layer.name for layer in self.tracked}

    @property
    def body(self) -> int:
        """Weights of the matrices, biases not counted."""
        return sum(_weights(layer) for layer in self.matrices)

    @property
    def gradient(self) -> int:
        """Values of a full gradient of the tracked layers."""
        return _values(set(self.uses))

    @property
    def uses(self) -> tuple[Layer, ...]:
        """The tracked layers as often as they are used: an embedding that shares its weight with the head is there twice."""
        return (*self.tracked, self.embedding) if self.embedding and self.follows_embedding else self.tracked

    @property
    def sides(self) -> list[int]:
        """The sizes of the covariances: inputs of every group of tracked layers, outputs of every tracked layer."""
        return [layer.d_in for layer in self.groups().values()] + [layer.d_out for layer in self.tracked]

    def groups(self) -> dict[str, Layer]:
        """The first layer of each group that shares an input."""
        held: dict[str, Layer] = {}
        for layer in self.tracked:
            held.setdefault(layer.group, layer)
        return held


def _weights(layer: Layer) -> int:
    return (layer.d_in - layer.bias) * layer.d_out


def _values(layers: Iterable[Layer]) -> int:
    return sum(layer.d_in * layer.d_out for layer in layers)


def _kept(side: int, rank: int) -> int:
    """The size of a side of a layer after projection to `rank`; 0 is no projection."""
    return min(rank, side) if rank else side


@dataclass(frozen=True)
class Load:
    """The quantities of batches that costs depend on. Loads add up."""

    documents: int = 0
    tokens: int = 0  # padding included
    squares: int = 0  # of the padded length, summed over documents
    predictions: int = 0  # that count in the loss

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.squares + other.squares,
            self.predictions + other.predictions,
        )


def load_of(plan: Iterable[Sequence[int]], lengths: np.ndarray, predictions: np.ndarray) -> Load:
    """The load of batches of rows, each padded to its longest document."""
    total = Load()
    for rows in plan:
        if len(rows):
            longest = int(lengths[list(rows)].max())
            total += Load(len(rows), len(rows) * longest, len(rows) * longest**2, int(predictions[list(rows)].sum()))
    return total


# passes over a model


def forward(model: Decoder, load: Load, *, logits: bool = False) -> int:
    """A forward pass; the head runs on the predictions that count, or with `logits` on all tokens."""
    attention = 4 * load.squares * sum(block.width for block in model.attention)
    return 2 * load.tokens * _outside_head(model) + attention + _head(model, load, logits=logits)


def _head(model: Decoder, load: Load, *, logits: bool) -> int:
    return 2 * (load.tokens if logits else load.predictions) * model.head[0] * model.head[1]


def _without_head(model: Decoder) -> tuple[Layer, ...]:
    return model.matrices[:-1] if model.head_is_matrix else model.matrices


def _outside_head(model: Decoder) -> int:
    return model.body - (model.head[0] * model.head[1] if model.head_is_matrix else 0)


def training_step(model: Decoder, load: Load) -> int:
    """Forward and backward for all trained weights: without adapters, three times the products of the forward pass."""
    if not model.frozen:
        return 3 * forward(model, load)
    adapters = tracking(model, EVERY_LAYER)
    return frozen_pass(adapters, load) + 2 * load.tokens * adapters.gradient


def frozen_pass(model: Decoder, load: Load) -> int:
    """Forward, and backward to the outputs of the first tracked layers: no weight gradient, nothing below."""
    first, group = _start(model)
    above = sum(_weights(layer) for layer in _without_head(model)[first:] if layer.group != group)
    attention = 8 * load.squares * sum(block.width for block in model.attention if block.after > first)
    logits = model.head_is_tracked
    backward_of_head = 0 if logits and model.matrices[-1].group == group else _head(model, load, logits=logits)
    return forward(model, load, logits=logits) + 2 * load.tokens * above + attention + backward_of_head


def _start(model: Decoder) -> tuple[int, str]:
    """The place of the first tracked matrix and its group, whose inputs need no gradient: none, with an embedding before it."""
    return (0, "") if model.follows_embedding else (model.first, model.matrices[model.first].group)


def covariance_pass(model: Decoder, load: Load, *, rank: int = 0) -> int:
    """A frozen pass, and both covariances of every tracked layer; with a `rank`, of projected inputs and outputs."""
    products = sum(
        side * min(rank, side) + _lower_product(min(rank, side)) if rank else _lower_product(side) for side in model.sides
    )
    return frozen_pass(model, load) + 2 * load.tokens * products


def _lower_product(side: int) -> int:
    """Multiply-adds of a row's outer product with itself, as `ekfac.add_lower_products` does it."""
    strip = strip_width(side)
    return sum((side - start) * min(strip, side - start) for start in range(0, side, strip))


def eigenvalue_pass(model: Decoder, load: Load, *, rank: int = 0) -> int:
    """A frozen pass, both sides of every tracked layer rotated (with a `rank`: projected), and their product per document.

    A side is rotated token by token, or as the rows of the documents' gradients if they are fewer. That is decided for every
    batch: for the sum of several loads this is the most that it can be.
    """
    if rank:
        return row_pass(model, load, rank=rank)
    rotated = 0
    for group, first in model.groups().items():
        rows = load.documents * sum(layer.d_out for layer in model.tracked if layer.group == group)
        rotated += first.d_in * (rows * first.d_in if rows < load.tokens else load.tokens * (first.d_in - first.bias))
    for layer in model.tracked:
        rotated += min(load.documents * layer.d_in, load.tokens) * layer.d_out**2
    return frozen_pass(model, load) + 2 * (rotated + load.tokens * model.gradient)


def row_pass(model: Decoder, load: Load, *, rank: int) -> int:
    """A frozen pass, both sides of every tracked layer projected, and their product per document."""
    inputs = sum((layer.d_in - layer.bias) * min(rank, layer.d_in) for layer in model.groups().values())
    outputs = sum(layer.d_out * min(rank, layer.d_out) for layer in model.tracked)
    products = sum(min(rank, layer.d_in) * min(rank, layer.d_out) for layer in model.tracked)
    return frozen_pass(model, load) + 2 * load.tokens * (inputs + outputs + products)


def query_pass(model: Decoder, load: Load) -> int:
    """A frozen pass that keeps every document's full gradient."""
    return frozen_pass(model, load) + 2 * load.tokens * _values(model.uses)


def dot_pass(model: Decoder, load: Load, *, queries: int) -> int:
    """A frozen pass with the dot products of every document's full gradient with `queries` others."""
    return query_pass(model, load) + 2 * load.documents * queries * _values(model.uses)


def embedding_pass(model: Decoder, load: Load) -> int:
    """A frozen pass that squares every document's gradient of the embedding, by each of its uses; without one, nothing."""
    if not model.follows_embedding:
        return 0
    alone = replace(model, tracked=tuple(layer for layer in model.tracked if layer == model.embedding))
    return query_pass(alone, load)


def product_pass(model: Decoder, load: Load, *, vectors: int) -> int:
    """The Gauss-Newton matrix of all tracked layers times `vectors`: forward and back, and for each vector back twice.

    On the way back each matrix has the gradients of its input, if something tracked lies below, and of its weight, if tracked.
    """
    first, group = _start(model)
    tracked = {layer.name for layer in model.tracked}
    body = [layer for layer in _without_head(model)[first:] if layer.group != group or layer.name in tracked]
    weights = sum(_weights(layer) * ((layer.group != group) + (layer.name in tracked)) for layer in body)
    attention = sum(block.width for block in model.attention if block.after > first)
    head = (2 if model.head_is_tracked else 1) * _head(model, load, logits=True)
    back = 2 * load.tokens * weights + head + 8 * load.squares * attention
    return forward(model, load, logits=True) + (1 + 2 * vectors) * back


# algebra on factors


def eigenbases(model: Decoder, *, rank: int = 0) -> int:
    """The eigenvectors of both covariances of every tracked layer, in float64."""
    return EIGH * sum(_kept(side, rank) ** 3 for side in model.sides)


def applications(model: Decoder, *, queries: int) -> int:
    """A function of the curvature applied to `queries` full gradients: into the eigenbasis and back."""
    return 4 * queries * sum(layer.d_in * layer.d_out * (layer.d_in + layer.d_out) for layer in model.tracked)


def projections(model: Decoder, *, queries: int, rank: int) -> int:
    """`queries` full gradients projected to rows."""
    return (
        2 * queries * sum(min(rank, layer.d_out) * layer.d_in * (layer.d_out + min(rank, layer.d_in)) for layer in model.tracked)
    )


# bytes


def row_values(model: Decoder, *, rank: int) -> int:
    """Numbers of a gradient row."""
    return sum(min(rank, layer.d_in) * min(rank, layer.d_out) for layer in model.tracked)


def row_bytes(model: Decoder, *, rank: int, dtype: str) -> int:
    """A row of the gradient store with its columns."""
    return stored_bytes(row_values(model, rank=rank), dtype) + ROW_COLUMNS


def checkpoint_bytes(model: Decoder, *, copies: int) -> int:
    """A checkpoint: `copies` times the trained weights, such as themselves, their mean and two moments."""
    return copies * FLOAT * model.trained_parameters


def factor_bytes(model: Decoder, *, adam: str, rank: int = 0, fitted: bool = True) -> int:
    """The factors of a segment: eigenvectors, corrected eigenvalues, and AdamW's P unless `adam` is none.

    With a `rank` they are in projected space, and the projections come on top. Factors that are not `fitted` are only projections
    and P.
    """
    values = 0
    if fitted:
        values += sum(_kept(side, rank) ** 2 for side in model.sides)
        values += sum(_kept(layer.d_in, rank) * _kept(layer.d_out, rank) for layer in model.tracked)
    if rank:
        values += sum(side * _kept(side, rank) for side in model.sides)
    if adam != "none":
        values += model.gradient
    if adam == "symmetric":
        values += sum(layer.d_in**2 + layer.d_out**2 + layer.d_in * layer.d_out for layer in model.tracked)
    return FLOAT * values


# a model's shapes


_NUMBER = re.compile(r"\.(\d+)\.")  # of a block, in the name of its layers


def with_blocks(model: Decoder, number: int) -> Decoder:
    """The model with as many blocks, each like the first, where it has one; its parameters are not counted anew.

    Raises:
        ValueError: its layers do not stand in numbered blocks.
    """
    inside = [layer for layer in model.matrices if _NUMBER.search(layer.name)]
    if not inside or len(model.attention) != 1:
        raise ValueError(
            "plan: the model's linear layers do not stand in numbered blocks, so that its costs cannot be counted from one; "
            f"got {', '.join(layer.name for layer in model.matrices[:4])}, ..."
        )
    after = model.matrices[model.matrices.index(inside[-1]) + 1 :]
    attention = tuple(
        replace(model.attention[0], after=model.attention[0].after + block * len(inside)) for block in range(number)
    )
    deep = replace(
        model,
        matrices=(*(_renumbered(layer, block) for block in range(number) for layer in inside), *after),
        attention=attention,
        frozen=frozenset(_numbered(name, block) for name in model.frozen for block in range(number)),
    )
    return tracking(deep, EVERY_LAYER)


def with_vocabulary(model: Decoder, size: int) -> Decoder:
    """The model with as many tokens; its parameters are not counted anew."""
    head = (model.head[0], size)
    embedding = model.embedding and replace(model.embedding, d_out=size)
    if not model.head_is_matrix:
        return replace(model, head=head, embedding=embedding)
    matrices = (*model.matrices[:-1], replace(model.matrices[-1], d_out=size))
    return tracking(replace(model, matrices=matrices, head=head, embedding=embedding), EVERY_LAYER)


def _renumbered(layer: Layer, block: int) -> Layer:
    return replace(layer, name=_numbered(layer.name, block), group=_numbered(layer.group, block))


def _numbered(name: str, block: int) -> str:
    return _NUMBER.sub(f".{block}.", name, count=1)


def tracking(model: Decoder, pattern: str) -> Decoder:
    """The model with those trained layers tracked whose whole name matches `pattern`; a group is named after its first that is.

    Raises:
        ValueError: none matches.
    """
    chosen = [layer for layer in model.trained if re.fullmatch(pattern, layer.name)]
    if not chosen:
        raise ValueError(
            f"curvature.layers: {pattern!r} matches none of the model's linear layers; they are "
            f"{', '.join(layer.name for layer in model.trained[:8])}, ..."
        )
    leaders: dict[str, str] = {}
    for layer in chosen:
        leaders.setdefault(layer.group, layer.name)
    return replace(model, tracked=tuple(replace(layer, group=leaders[layer.group]) for layer in chosen))


def with_embedding(model: Decoder, pattern: str) -> Decoder:
    """The model with its embedding tracked, and the head if it shares the weight, as averaged influence does."""
    embedding = model.embedding
    if embedding is None or not re.fullmatch(pattern, embedding.name):
        return model
    shared = () if model.head_is_matrix else (embedding,)
    return replace(model, matrices=model.matrices + shared, tracked=model.tracked + shared, follows_embedding=True)


def shapes_of(model: nn.Module) -> Decoder:
    """The shapes of a causal language model, all of whose trained linear layers are tracked. It is run on a few tokens.

    Raises:
        ValueError: its configuration does not say how its attention is shaped.
    """
    layers, trained = tracked_layers(model, frozen_too=True), {layer.name for layer in tracked_layers(model)}
    config = model.config.get_text_config()
    heads, blocks = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not heads or not blocks:
        raise ValueError(
            f"plan: {type(model).__name__} does not say num_attention_heads and num_hidden_layers in its configuration; expected "
            "a decoder of transformers"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    body = [(place, layer) for place, layer in enumerate(layers) if (layer.d_in, layer.d_out) != (hidden, vocabulary)]
    each = len(body) // blocks
    starts = range(0, blocks * each, each)
    return tracking(
        Decoder(
            tuple(layers),
            (),
            tuple(Block(_after_projections(body[start : start + each], trained), heads * size) for start in starts),
            (hidden, vocabulary),
            num_parameters(model),
            frozen=frozenset(layer.name for layer in layers if layer.name not in trained),
            frozen_parameters=num_parameters(model) - num_trained_parameters(model),
            embedding=next((layer for layer in embedding_layers(model) if layer.d_out == vocabulary), None),
        ),
        EVERY_LAYER,
    )


def _after_projections(block: Sequence[tuple[int, Layer]], trained: set[str]) -> int:
    """The place of the first matrix in a block, no adapter, that reads something else than the block's first."""
    own = [(place, layer) for place, layer in block if layer.name not in trained] or block
    return next((place for place, layer in own if layer.group != own[0][1].group), block[-1][0] + 1)
