"""Factors do not depend on how layers are divided, nor on whether documents are packed; narrow models give nearly the same."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tda import ekfac
from tda.ekfac import Covariances, add_squared_gradients, corrected_eigenvalues, covariances, eigenbasis
from tda.fit_factors import bytes_to_fit, fit_factors, layer_blocks
from tda.model import Layer, tracked_layers
from tda.packing import pack, within_documents
from tda.preconditioner import scaled_factors
from tda.projection import random_projections
from tda.task import CausalLM
from tests.helpers import random_documents, tiny_gpt2, tiny_llama

ROWS = [4, 0, 7, 2]
FILL = 50  # more than the documents in ROWS have


def fit(model, documents, **changes):
    layers = tracked_layers(model)
    P = {layer.name: torch.rand(layer.d_out, layer.d_in, dtype=torch.float64).add(0.5) for layer in layers}
    settings = {
        "task": CausalLM(),
        "pattern": ".*",
        "weight": 0.3,
        "P": P,
        "adam": "none",
        "projections": None,
        "batch_tokens": 24,
        "seed": 5,
        "workers": 1,
        "device": torch.device("cpu"),
    }
    return fit_factors([0], lambda _checkpoint: model, documents, **settings | changes)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("adam", ["none", "symmetric"])
def test_factors_do_not_depend_on_how_layers_are_divided(build, adam):
    model, documents = build(), random_documents(12)
    torch.manual_seed(0)
    whole = fit(model, documents, adam=adam, room=float("inf"))
    torch.manual_seed(0)
    divided = fit(model, documents, adam=adam, room=1.0)  # a block for every input that is read
    for kind in ("plain", "scaled"):
        assert list(getattr(divided, kind)) == list(getattr(whole, kind))
        for name, expected in getattr(whole, kind).items():
            found = getattr(divided, kind)[name]
            torch.testing.assert_close(found.Lambda, expected.Lambda)
            torch.testing.assert_close(found.Q_A, expected.Q_A)
            torch.testing.assert_close(found.Q_S, expected.Q_S)
    assert bool(whole.scaled) == (adam == "symmetric")


def test_blocks_keep_order_and_shared_inputs_and_hold_as_much_as_fits():
    layers = [
        layer
        for number in range(4)
        for layer in (
            Layer(f"{number}.q", 6, 6, False, f"{number}.q"),
            Layer(f"{number}.k", 6, 2, False, f"{number}.q"),
            Layer(f"{number}.o", 6, 6, False, f"{number}.o"),
            Layer(f"{number}.up", 6, 20, False, f"{number}.up"),
            Layer(f"{number}.down", 20, 6, False, f"{number}.down"),
        )
    ]
    for copies in (2, 3):
        for scaled in (False, True):
            largest = max(bytes_to_fit([layer], copies=copies, scaled=scaled) for layer in layers)
            for room in (1.0, 1.0 * largest, 2.0 * largest, 3.5 * largest, 1e9):
                blocks = layer_blocks(layers, room=room, copies=copies, scaled=scaled)
                assert [layer for block in blocks for layer in block] == layers
                for block, following in zip(blocks, [*blocks[1:], None], strict=True):
                    groups = {layer.group for layer in block}
                    assert len(groups) == 1 or bytes_to_fit(block, copies=copies, scaled=scaled) <= room
                    if following:
                        assert not groups & {layer.group for layer in following}
                        begun = [layer for layer in following if layer.group == following[0].group]
                        assert bytes_to_fit([*block, *begun], copies=copies, scaled=scaled) > room


def test_what_fitting_takes_is_what_its_sums_and_bases_take():
    (layer, other) = (Layer("a", 3, 5, False, "a"), Layer("b", 3, 2, False, "a"))
    sums = 3 * 3 + 5 * 5 + 2 * 2
    assert bytes_to_fit([layer, other], copies=3) == 4 * max(3 * sums, sums + 3 * (15 + 6))
    assert bytes_to_fit([layer, other], copies=1, narrow=True) == 4 * max(sums, sums // 2 + 15 + 6)
    apart = sums + 3 * 3  # scaled gradients share no input
    assert bytes_to_fit([layer, other], copies=3, scaled=True) == 4 * (21 + max(3 * apart, apart + 3 * 21))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("fill_to", [0, FILL])
def test_packed_documents_have_the_curvature_of_padded_ones(build, fill_to):
    """The same labels are drawn for both: a number for every prediction, document by document."""
    model, documents = build(), random_documents(9, loss_starts=[1, 2, 3, 1, 2, 1, 1, 2, 3])
    layers = tracked_layers(model)
    root_P = {layer.name: torch.rand(layer.d_out, layer.d_in, dtype=torch.float64) for layer in layers}
    projections = {
        name: replace(held, P_i=held.P_i.double(), P_o=held.P_o.double())
        for name, held in random_projections(layers, rank=3, seed=0).items()
    }
    basis = None

    def passes(batch):
        def given() -> dict:
            return {"task": CausalLM(), "generator": torch.Generator().manual_seed(0)}

        nonlocal basis
        plain = covariances(model, layers, [batch], **given())
        projected = covariances(model, layers, [batch], projections=projections, **given())
        basis = basis or eigenbasis(Covariances(dict(plain.A), dict(plain.S), plain.count), layers)  # which uses them up
        Lambda, count = corrected_eigenvalues(model, layers, [batch], basis=basis, **given())
        scaled, _ = scaled_factors(model, layers, [batch], root_P=root_P, basis=None, **given())
        _, scaled_Lambda = scaled_factors(model, layers, [batch], root_P=root_P, basis=basis, **given())
        numbers = [plain.A, plain.S, projected.A, projected.S, Lambda, scaled.A, scaled.S, scaled_Lambda]
        return numbers, (plain.count, projected.count, count, scaled.count)

    expected, counts = passes(documents.batch(ROWS))
    with within_documents(model):
        found, packed_counts = passes(pack(documents, ROWS, fill_to=fill_to))
    assert packed_counts == counts
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_factors_of_packed_documents_are_as_near_as_other_draws_of_labels(monkeypatch):
    """Packed batches hold documents in another order, so that other labels are drawn; with true ones both agree."""
    model, documents = tiny_llama(), random_documents(12)
    monkeypatch.setattr("tda.losses.sample_labels", lambda p, uniform: p.argmax(dim=1))
    padded, packed = fit(model, documents), fit(model, documents, packed=True)
    for name, expected in padded.plain.items():
        torch.testing.assert_close(packed.plain[name].Lambda, expected.Lambda)
        torch.testing.assert_close(packed.plain[name].Q_A, expected.Q_A)


def test_what_does_not_pack_is_fitted_as_it_is():
    """Of a model that mixes packed documents the factors are those of padded ones."""
    model, documents = tiny_llama(), random_documents(12)
    model.config.sliding_window = 4
    padded, packed = fit(model, documents), fit(model, documents, packed=True)
    for name, expected in padded.plain.items():
        torch.testing.assert_close(packed.plain[name].Lambda, expected.Lambda)


def test_a_layer_that_no_block_has_room_for_is_refused(monkeypatch):
    monkeypatch.setattr("tda.fit_factors.free_memory", lambda _device: 2**10)
    with pytest.raises(ValueError, match=r"curvature: the factors of .*q_proj.* take 0.0 GiB, 0.0 are free; leave wide"):
        fit(tiny_llama(), random_documents(4))


def test_a_model_in_bfloat16_has_nearly_the_same_factors_in_float32():
    documents = random_documents(40)
    wide, narrow = fit(tiny_llama().float(), documents), fit(tiny_llama().bfloat16(), documents)
    for name, expected in wide.plain.items():
        found = narrow.plain[name]
        assert {found.Lambda.dtype, found.Q_A.dtype, found.Q_S.dtype} == {torch.float32}
        G = torch.randn(8, *expected.Lambda.shape, generator=torch.Generator().manual_seed(0))
        applied, nearly = (held.apply(lambda values: values, G) for held in (expected, found))
        assert (nearly - applied).norm() < 0.1 * applied.norm()


def test_one_model_at_a_time_is_in_memory():
    alive: list[weakref.ref] = []
    most = 0

    def load(checkpoint):
        nonlocal most
        gc.collect()
        model = tiny_llama(seed=checkpoint)
        alive.append(weakref.ref(model))
        most = max(most, sum(one() is not None for one in alive))
        return model

    documents, layers = random_documents(12), tracked_layers(tiny_llama())
    P = {layer.name: torch.ones(layer.d_out, layer.d_in, dtype=torch.float64) for layer in layers}
    settings = {"task": CausalLM(), "pattern": ".*", "weight": 1.0, "P": P, "adam": "none", "projections": None}
    fit_factors(
        [0, 1, 2], load, documents, batch_tokens=24, seed=0, workers=1, device=torch.device("cpu"), packed=True, **settings
    )
    assert len(alive) > 3
    assert most == 1


@pytest.mark.parametrize("one_by_one", [0, 10**9])
def test_scaled_factors_do_not_depend_on_how_many_gradients_are_formed_at_once(monkeypatch, one_by_one):
    monkeypatch.setattr("tda.preconditioner.ONE_BY_ONE", one_by_one)
    model, documents = tiny_llama(), random_documents(6)
    layers = tracked_layers(model)
    root_P = {layer.name: torch.linspace(0.5, 2, layer.d_out * layer.d_in).double().view(layer.d_out, -1) for layer in layers}
    found, _none = scaled_factors(
        model,
        layers,
        [documents.batch(range(6))],
        task=CausalLM(),
        root_P=root_P,
        basis=None,
        generator=torch.Generator().manual_seed(0),
    )
    expected, generator = {layer.name: 0 for layer in layers}, torch.Generator().manual_seed(0)
    modules = dict(model.named_modules())
    batch = documents.batch(range(6))
    uniform = torch.rand(int(batch.loss_mask.sum()), generator=generator)
    monkeypatch.setattr("torch.rand", lambda *_size, **_named: uniform[:count])
    for row in range(6):
        alone = documents.batch([row])
        count = int(alone.loss_mask.sum())
        model.zero_grad()
        CausalLM().losses(model.requires_grad_(), alone, labels="sampled", generator=generator)[0].backward()
        uniform = uniform[count:]
        for layer in layers:
            G = root_P[layer.name] * modules[layer.name].weight.grad
            expected[layer.name] = expected[layer.name] + G @ G.T
    for layer in layers:
        torch.testing.assert_close(found.S[layer.name], expected[layer.name])


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("one_by_one", [0, 10**9])
@pytest.mark.parametrize("rotated", ["", "S", "A", "SA"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_squares_are_those_of_every_gradient(monkeypatch, positions, one_by_one, rotated, dtype):
    monkeypatch.setattr(ekfac, "ONE_BY_ONE", one_by_one)
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = (torch.randn(4, positions, d, dtype=torch.float64, generator=generator).to(dtype) for d in (3, 6))
    Q = {f"Q_{side}": some_rotation(d, generator).to(dtype) for side, d in (("S", 3), ("A", 6)) if side in rotated}
    Q_S, Q_A = Q.get("Q_S", torch.eye(3)).double(), Q.get("Q_A", torch.eye(6)).double()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.ones(3, 6, dtype=wide)
    add_squared_gradients(total, outputs, inputs, **Q)
    expected = torch.ones(3, 6, dtype=torch.float64)
    for one_outputs, one_inputs in zip(outputs.double(), inputs.double(), strict=True):
        expected += (Q_S.T @ one_outputs.T @ one_inputs @ Q_A).square()
    torch.testing.assert_close(total.double(), expected, **({"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}))


def some_rotation(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


@pytest.mark.parametrize("one_by_one", [0, 10**9])
def test_the_operations_of_squares_are_those_of_the_gradients(monkeypatch, one_by_one):
    monkeypatch.setattr(ekfac, "ONE_BY_ONE", one_by_one)
    with FlopCounterMode(display=False) as counter:
        add_squared_gradients(torch.zeros(3, 6), torch.zeros(4, 5, 3), torch.zeros(4, 5, 6))
        formed = counter.get_total_flops()
        add_squared_gradients(torch.zeros(3, 6), torch.zeros(4, 5, 3), torch.zeros(4, 5, 6), Q_S=torch.eye(3), Q_A=torch.eye(6))
    assert formed == 2 * 4 * 5 * 3 * 6
    assert counter.get_total_flops() == 2 * formed + 2 * 4 * 3 * 6 * (3 + 6)
