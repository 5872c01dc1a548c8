import functools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tda.gradient_log
from tda.config import load_config
from tda.gradient_log import _as_rows, row_engine
from tda.model import tracked_layers
from tda.projection import random_projections
from tda.row_layers import row_layers
from tda.streaming import HostBuffers
from tests.helpers import random_documents, tiny_llama
from tests.toy import PARAMS

CPU = torch.device("cpu")
RANK, BATCH_TOKENS = 3, 40
WAITS_FOR_A_GPU = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "repeat_interleave")


def settings(**compute):
    config = load_config(PARAMS)
    gradients = config.gradients.model_copy(update={"rank": RANK, "batch_tokens": BATCH_TOKENS})
    return config.model_copy(update={"gradients": gradients, "compute": config.compute.model_copy(update=compute)})


@pytest.fixture
def made(monkeypatch):
    """A model, its layers, projections and documents; what would be compiled takes its usual way, but is not."""
    monkeypatch.setattr(tda.gradient_log, "row_layers", functools.partial(row_layers, backend=None))
    model = tiny_llama().float()
    layers = tracked_layers(model)
    return model, layers, random_projections(layers, rank=RANK, seed=0), random_documents(13)


class Waits(TorchDispatchMode):
    """Counts the operators that a GPU's host would wait for: those whose result or its shape the host has to know."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = (
            any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]) if name == "index" else False
        )
        if name in WAITS_FOR_A_GPU or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def rows_by_document(config, made):
    model, layers, projections, documents = made
    found = {}
    with row_engine(config, model, layers, projections, device=CPU) as engine:
        for batch in engine.plan(documents.lengths):
            found |= dict(zip(batch, engine.numbers(documents, batch), strict=True))
    return torch.stack([found[row] for row in range(len(documents))])


def test_rows_do_not_depend_on_the_engine(made):
    torch.testing.assert_close(
        rows_by_document(settings(compile="always"), made),
        rows_by_document(settings(compile="never"), made),
        rtol=1e-4,
        atol=1e-3,
    )
    torch.testing.assert_close(
        rows_by_document(settings(compile="auto"), made), rows_by_document(settings(compile="never"), made)
    )


def test_a_model_that_mixes_documents_is_not_compiled(made, monkeypatch):
    monkeypatch.setattr(tda.gradient_log, "packs", lambda model: False)
    rows_by_document(settings(compile="auto"), made)
    with pytest.raises(ValueError, match=r"compute.compile: .* mixes documents that stand in one row.*auto or never"):
        rows_by_document(settings(compile="always"), made)


def test_rows_of_bfloat16_weights_are_near_and_their_sums_are_wider(made):
    model, layers, projections, documents = made
    exact = rows_by_document(settings(compile="always"), made)
    for compiled in ("always", "never"):
        rounded = rows_by_document(settings(compile=compiled), (model.bfloat16(), layers, projections, documents))
        assert rounded.dtype == torch.float32
        cosines = torch.cosine_similarity(rounded[:, :-1], exact[:, :-1], dim=1)
        assert cosines.min() > 0.9  # bfloat16 has 8 bits
        assert not torch.equal(rounded.bfloat16().float(), rounded)


def test_a_batch_is_one_copy_there_and_one_back_and_nothing_waits(made):
    model, layers, projections, documents = made
    copied = []

    def counting(target, source):
        copied.append((source.dtype, source.nbytes))
        target.copy_(source)

    config = settings(compile="always")
    width = sum(held.size for held in projections.values()) + 1
    buffers = HostBuffers(len(documents), width, device=CPU, copy=counting)
    with row_engine(config, model, layers, projections, device=CPU, copy=counting) as engine:
        plan = engine.plan(documents.lengths)
        assert len(plan) > 2
        with Waits() as waits:
            for batch in plan:
                buffers.fetch(engine.numbers(documents, batch))
    assert waits.seen == []
    predictions = [int(documents.num_loss_tokens[batch].sum()) for batch in plan]
    expected = []
    for batch, count in zip(plan, predictions, strict=True):
        expected += [(torch.int64, 8 * (3 * BATCH_TOKENS + 2 * count)), (torch.float32, 4 * len(batch) * width)]
    assert copied == expected


def test_documents_are_packed_where_they_would_have_much_padding(made, monkeypatch):
    taken = []
    gradient_rows = tda.gradient_log.gradient_rows

    def noted(model, layers, batch, **kwargs):
        taken.append((batch.rows, type(batch).__name__))
        return gradient_rows(model, layers, batch, **kwargs)

    monkeypatch.setattr(tda.gradient_log, "gradient_rows", noted)
    model, layers, projections, documents = made
    order = sorted(range(len(documents)), key=lambda row: len(documents.tokens[row]))
    with row_engine(settings(compile="never"), model, layers, projections, device=CPU) as engine:
        uneven = engine.numbers(documents, [order[0], order[-1]])
        even = engine.numbers(documents, order[-1:])
    assert taken == [([order[0], order[-1]], "PackedBatch"), (order[-1:], "Batch")]
    torch.testing.assert_close(uneven[1], even[0], rtol=1e-4, atol=1e-3)


def test_the_padded_engine_would_wait(made):
    model, layers, projections, documents = made
    with row_engine(settings(compile="never"), model, layers, projections, device=CPU) as engine, Waits() as waits:
        engine.numbers(documents, [0, 1])
    assert waits.seen


def test_rows_keep_nothing_of_the_buffer():
    buffer = np.arange(8, dtype=np.float32).reshape(2, 4)
    rows = _as_rows(random_documents(2), [0, 1], buffer)
    buffer[:] = -1
    assert rows.vectors.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert rows.losses.tolist() == [3, 7]
