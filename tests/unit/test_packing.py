from dataclasses import replace

import numpy as np
import pytest
import torch

from tda.data import batch_plan
from tda.gradients import gradient_rows
from tda.losses import document_costs, document_losses
from tda.model import tracked_layers
from tda.packing import gathered, pack, pack_plan, packs, spread, within_documents
from tda.projection import random_projections
from tda.row_layers import decoder_layers, row_layers
from tda.task import CausalLM
from tests.helpers import VOCABULARY, random_documents, tiny_gpt2, tiny_llama, with_adapter

MODELS = {
    "llama": tiny_llama,
    "llama untied": lambda: tiny_llama(tie=False),
    "gpt2": tiny_gpt2,
    "adapted": lambda: with_adapter(tiny_llama()).base_model.model,
}
SIZES = {  # of other models
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ROWS = [4, 0, 7, 2]
FILL = 50  # more than the documents in ROWS have


def documents():
    return random_documents(9, loss_starts=[1, 2, 3, 1, 2, 1, 1, 2, 3])


def in_double(projections):
    return {name: replace(held, P_i=held.P_i.double(), P_o=held.P_o.double()) for name, held in projections.items()}


@pytest.fixture(params=MODELS)
def case(request):
    model = MODELS[request.param]()
    layers = tracked_layers(model)
    return model, layers, in_double(random_projections(layers, rank=3, seed=0))


@pytest.mark.parametrize("fill_to", [0, FILL])
def test_a_packed_batch_holds_documents_and_their_predictions(fill_to):
    held = documents()
    batch = pack(held, ROWS, fill_to=fill_to)
    lengths = held.lengths[ROWS]
    assert batch.tokens.shape == (1, max(fill_to, lengths.sum()))
    places, targets = batch.predictions
    expected = [token for row in ROWS for token in held.tokens[row][held.loss_starts[row] :]]
    assert targets.tolist() == expected
    assert batch.documents_of(places).tolist() == np.repeat(range(4), held.num_loss_tokens[ROWS]).tolist()
    for at, row in enumerate(ROWS):
        start = int(lengths[:at].sum())
        assert batch.tokens[0, start : start + lengths[at]].tolist() == held.tokens[row].tolist()
        assert batch.inputs["position_ids"][0, start : start + lengths[at]].tolist() == list(range(lengths[at]))
    assert batch.sizes.tolist() == held.num_loss_tokens[ROWS].tolist()
    assert batch.sums(torch.ones(len(places))).tolist() == held.num_loss_tokens[ROWS].tolist()


def test_the_grid_has_every_document_in_a_row_of_its_own():
    held = documents()
    batch = pack(held, ROWS, fill_to=FILL)
    x = torch.arange(1.0, FILL + 1)[None, :, None]
    grid = batch.by_document(x)[..., 0]
    lengths = held.lengths[ROWS]
    for at, length in enumerate(lengths):
        start = int(lengths[:at].sum())
        assert grid[at].tolist() == [*range(start + 1, start + 1 + length), *[0] * (grid.shape[1] - length)]


def test_into_the_grid_and_back_is_nothing_to_values_and_gradients():
    batch = pack(documents(), ROWS)
    x = torch.randn(batch.num_tokens, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x):
        return gathered(spread(x, batch.slots, batch.shape_of_grid).sin(), batch.slots)

    torch.testing.assert_close(there_and_back(x), x.sin())
    assert torch.autograd.gradcheck(there_and_back, x)


def test_losses_of_packed_documents_are_those_of_padded_ones(case):
    model, _layers, _projections = case
    held = documents()
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    expected = document_losses(model, held.batch(ROWS), weights=weights)
    with within_documents(model):
        found = document_losses(model, pack(held, ROWS, fill_to=FILL), weights=weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(document_losses(model, held.batch(ROWS), weights=weights), expected)  # all as it was before


def test_margins_of_packed_documents_are_those_of_padded_ones():
    model, held, weights = tiny_llama(), documents(), torch.arange(1.0, 5.0, dtype=torch.float64)
    expected = document_costs(model, held.batch(ROWS), weights=weights, measurement="margin")
    with within_documents(model):
        found = document_costs(model, pack(held, ROWS, fill_to=FILL), weights=weights, measurement="margin")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sampled_labels_do_not_depend_on_packing():
    model, held = tiny_llama(), documents()
    expected, _ = document_losses(model, held.batch(ROWS), labels="sampled", generator=torch.Generator().manual_seed(3))
    with within_documents(model):
        batch = pack(held, ROWS, fill_to=FILL)
        found, _ = document_losses(model, batch, labels="sampled", generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected)


def test_no_document_sees_another(case):
    model, layers, projections = case
    held = documents()
    with within_documents(model):
        before, _ = gradient_rows(model, layers, pack(held, ROWS), task=CausalLM(), projections=projections)
        held.tokens[ROWS[1]] = (held.tokens[ROWS[1]] + 1) % VOCABULARY
        after, _ = gradient_rows(model, layers, pack(held, ROWS), task=CausalLM(), projections=projections)
    for at in (0, 2, 3):
        torch.testing.assert_close(after[at], before[at])
    assert (after[1] - before[1]).norm() > 0.01 * before[1].norm()


@pytest.mark.parametrize("fill_to", [0, FILL])
def test_rows_of_packed_documents_are_those_of_padded_ones(case, fill_to):
    model, layers, projections = case
    held = documents()
    expected = gradient_rows(model, layers, held.batch(ROWS), task=CausalLM(), projections=projections)
    with within_documents(model):
        found = gradient_rows(model, layers, pack(held, ROWS, fill_to=fill_to), task=CausalLM(), projections=projections)
    with row_layers(model, layers, task=CausalLM(), projections=projections, backend=None) as rows_of:
        as_gradients = rows_of(pack(held, ROWS, fill_to=fill_to))
    for ours in (found, as_gradients):
        torch.testing.assert_close(ours[0], expected[0])
        torch.testing.assert_close(ours[1], expected[1], check_dtype=False)


def test_layers_are_put_back(case):
    model, layers, projections = case
    names = {name: type(module) for name, module in model.named_modules()}
    model.requires_grad_(True)
    with (
        pytest.raises(KeyError),
        row_layers(model, layers, task=CausalLM(), projections=projections, backend="eager"),
    ):
        raise KeyError
    assert {name: type(module) for name, module in model.named_modules()} == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))
    model.train()
    with (
        pytest.raises(ValueError, match="training mode"),
        row_layers(model, layers, task=CausalLM(), projections=projections),
    ):
        pass


@pytest.mark.filterwarnings("ignore")  # by torch itself, while it traces
def test_compiled_layers_give_equal_rows_in_one_graph_each(case):
    model, layers, projections = case
    held = documents()
    whole = gradient_rows(model, layers, held.batch(range(len(held))), task=CausalLM(), projections=projections)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    with row_layers(model, layers, task=CausalLM(), projections=projections, backend="aot_eager") as rows_of:
        for rows in (ROWS, [1, 3, 5], [6, 8]):  # other numbers of documents, of other lengths: nothing is compiled again
            found, losses = rows_of(pack(held, rows, fill_to=FILL))
            expected = (whole[0][rows], whole[1][rows])
            torch.testing.assert_close(found, expected[0])
            torch.testing.assert_close(losses, expected[1], check_dtype=False)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    losses_of_blocks = not any(layer.name == "lm_head" for layer in layers)  # a head that is tracked is called as it is
    # of the first layer, whose input has no gradient, of all others, and of the losses
    assert graphs == [2 + losses_of_blocks] * 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_batches_are_as_full_as_can_be():
    lengths = np.random.default_rng(0).integers(1, 100, size=500)
    plan = pack_plan(lengths, batch_tokens=256)
    assert sorted(row for batch in plan for row in batch) == list(range(500))
    totals = [int(lengths[batch].sum()) for batch in plan]
    assert max(totals) <= 256
    assert len(plan) == -(-lengths.sum() // 256)  # none could be saved
    assert sum(total == 256 for total in totals) > 0.9 * len(plan)
    assert plan == pack_plan(lengths, batch_tokens=256)


def test_a_document_longer_than_a_batch_has_one_of_its_own():
    assert pack_plan([5, 30, 4], batch_tokens=10) == [[1], [0, 2]] == batch_plan([5, 30, 4], batch_tokens=10)
    assert pack_plan([], batch_tokens=10) == []


def test_models_that_cannot_keep_documents_apart_are_known():
    from transformers import MistralConfig, MistralForCausalLM

    assert packs(tiny_llama())
    assert packs(tiny_gpt2())
    windowed = MistralForCausalLM(
        MistralConfig(
            **SIZES,
            num_hidden_layers=1,
            sliding_window=4,
        )
    )
    assert not packs(windowed.eval())
    assert not packs(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, True), (torch.float32, False)])
def test_what_rounding_changes_is_no_mixture(dtype, expected):
    """Kernels of other sizes round differently: by as much as bfloat16 does, which is little beside what mixing changes."""
    model = tiny_llama().to(dtype)
    generator = torch.Generator().manual_seed(0)

    def rounded(_module, _inputs, output):
        hidden = output.last_hidden_state
        noise = torch.randn(hidden.shape, generator=generator).to(hidden)
        output.last_hidden_state = hidden + 2**-8 * hidden.abs() * noise

    model.base_model.register_forward_hook(rounded)
    assert packs(model) is expected


def test_a_device_that_fails_is_no_model_that_mixes(monkeypatch):
    def full(*_inputs, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tda.packing.attend_within_documents", full)
    with pytest.raises(torch.OutOfMemoryError):
        packs(tiny_llama())


@pytest.mark.filterwarnings("ignore")  # by torch itself, while it traces
def test_layers_of_several_kinds_compile_for_grids_of_every_kind():
    """More graphs of one code than torch allows by default, which would end the run."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(**SIZES, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], pad_token_id=None, use_cache=False)
    model, held = SmolLM3ForCausalLM(config).eval(), random_documents(12)
    layers = tracked_layers(model)
    projections = random_projections(layers, rank=3, seed=0)
    torch._dynamo.reset()
    grids = [[row] for row in range(6)] + [[0, 1], [2, 3, 4], list(range(5)), list(range(12))]
    with row_layers(model, layers, task=CausalLM(), projections=projections, backend="eager") as rows_of:
        for rows in grids:
            for fill in (0, 40):
                vectors, _losses = rows_of(pack(held, rows, fill_to=fill))
                assert len(vectors) == len(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_in_the_loop_waits_for_the_gpu():
    device = torch.device("cuda")
    model, held = tiny_llama().float().to(device), documents()
    layers = tracked_layers(model)
    projections = {
        name: replace(one, P_i=one.P_i.to(device), P_o=one.P_o.to(device))
        for name, one in random_projections(layers, rank=3, seed=0).items()
    }
    with row_layers(model, layers, task=CausalLM(), projections=projections) as rows_of:
        rows_of(pack(held, ROWS, fill_to=FILL).to(device))
        torch.cuda.set_sync_debug_mode("error")
        try:
            found, _ = rows_of(pack(held, ROWS, fill_to=FILL).to(device))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    on_cpu = {name: replace(one, P_i=one.P_i.cpu(), P_o=one.P_o.cpu()) for name, one in projections.items()}
    expected, _ = gradient_rows(model.cpu(), layers, held.batch(ROWS), task=CausalLM(), projections=on_cpu)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))  # TF32
