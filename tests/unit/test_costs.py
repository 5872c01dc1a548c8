"""Counted work against torch's own count of it, and counted bytes against what is written."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.common import count_flops
from tda import costs
from tda.data import batch_plan, batches
from tda.ekfac import EKFAC, add_lower_products, corrected_eigenvalues, covariances, eigenbasis, squared_gradients
from tda.factors import SegmentFactors, save_factors
from tda.ggn import gauss_newton_product
from tda.gradients import gradient_dots, gradient_rows, query_gradients
from tda.losses import document_losses
from tda.model import Layer, embedding_layers, tracked_layers
from tda.projection import random_projections
from tda.task import CausalLM
from tests.helpers import random_documents, tiny_gpt2, tiny_llama, with_adapter

RANK = 3
TOKENS = 24  # of a batch: the documents come in several
MODELS = {
    "llama": tiny_llama,
    "untied": lambda: tiny_llama(tie=False),
    "gpt2": tiny_gpt2,
    "adapted": lambda: with_adapter(tiny_llama()).base_model.model,
}
PATTERNS = {"all": ".*", "above": r".*\.1\.mlp\..*", "outputs": r".*(o_proj|attn\.c_proj|down_proj)(\..*)?"}


@pytest.fixture(params=[(name, pattern) for name in MODELS for pattern in PATTERNS], ids="-".join)
def case(request):
    name, pattern = request.param
    model = MODELS[name]()
    documents = random_documents(7, loss_starts=[1, 2, 3, 1, 1, 2, 1])
    layers = tracked_layers(model, PATTERNS[pattern])
    shapes = costs.tracking(costs.shapes_of(model), PATTERNS[pattern])
    plan = batch_plan(documents.lengths, batch_tokens=TOKENS)
    load = costs.load_of(plan, documents.lengths, documents.num_loss_tokens)
    return model, layers, documents, shapes, load


def test_tracked_layers_are_those_of_the_model(case):
    _model, layers, _documents, shapes, _load = case
    assert list(shapes.tracked) == layers


def test_a_load_is_that_of_the_batches(case):
    _model, _layers, documents, _shapes, load = case
    held = list(batches(documents, batch_tokens=TOKENS))
    assert len(held) > 2
    assert load.tokens == sum(batch.tokens.numel() for batch in held)
    assert load.predictions == sum(int(batch.loss_mask.sum()) for batch in held)
    assert load.squares == sum(len(batch.rows) * batch.tokens.shape[1] ** 2 for batch in held)
    assert load.documents == len(documents)


def test_training(case):
    model, _layers, documents, shapes, load = case

    def steps():
        for batch in batches(documents, batch_tokens=TOKENS):
            document_losses(model, batch)[0].backward()

    assert count_flops(steps) == costs.training_step(shapes, load)


def test_forward(case):
    model, _layers, documents, shapes, load = case

    @torch.no_grad()
    def passes():
        for batch in batches(documents, batch_tokens=TOKENS):
            document_losses(model, batch)

    assert count_flops(passes) == costs.forward(shapes, load)


def test_covariances_and_eigenvalues(case):
    model, layers, documents, shapes, load = case

    def sums():
        return covariances(
            model, layers, batches(documents, batch_tokens=TOKENS), task=CausalLM(), generator=torch.Generator().manual_seed(0)
        )

    assert count_flops(sums) == costs.covariance_pass(shapes, load)
    basis = eigenbasis(sums(), layers)

    def corrected():
        corrected_eigenvalues(
            model,
            layers,
            batches(documents, batch_tokens=TOKENS),
            task=CausalLM(),
            basis=basis,
            generator=torch.Generator().manual_seed(0),
        )

    plan = batch_plan(documents.lengths, batch_tokens=TOKENS)
    loads = [costs.load_of([rows], documents.lengths, documents.num_loss_tokens) for rows in plan]
    assert (
        count_flops(corrected) == sum(costs.eigenvalue_pass(shapes, one) for one in loads) <= costs.eigenvalue_pass(shapes, load)
    )


def test_rows(case):
    model, layers, documents, shapes, load = case
    projections = {
        name: replace(held, P_i=held.P_i.double(), P_o=held.P_o.double())
        for name, held in random_projections(layers, rank=RANK, seed=0).items()
    }

    def rows():
        for batch in batches(documents, batch_tokens=TOKENS):
            gradient_rows(model, layers, batch, task=CausalLM(), projections=projections)

    assert count_flops(rows) == costs.row_pass(shapes, load, rank=RANK)


def test_queries_and_dots(case):
    model, layers, documents, shapes, load = case

    def queries():
        return query_gradients(model, layers, batches(documents, batch_tokens=TOKENS), task=CausalLM())[0]

    assert count_flops(queries) == costs.query_pass(shapes, load)
    held = {name: G[:2] for name, G in queries().items()}

    def dots():
        for batch in batches(documents, batch_tokens=TOKENS):
            gradient_dots(model, layers, batch, task=CausalLM(), queries=held)

    assert count_flops(dots) == costs.dot_pass(shapes, load, queries=2)


def test_passes_that_follow_the_embedding(case):
    model, layers, documents, shapes, load = case
    whole = costs.with_embedding(shapes, ".*")
    if "lora" in layers[0].name:
        assert whole == shapes  # its embedding is frozen
        return
    embedding = embedding_layers(model)[0]
    assert whole.embedding == embedding
    followed = [*layers, embedding]

    def queries():
        return query_gradients(model, followed, batches(documents, batch_tokens=TOKENS), task=CausalLM())[0]

    def dots():
        for batch in batches(documents, batch_tokens=TOKENS):
            gradient_dots(model, followed, batch, task=CausalLM(), queries=held)

    def squares():
        held = batches(documents, batch_tokens=TOKENS)
        squared_gradients(model, [embedding], held, task=CausalLM(), generator=torch.Generator())

    assert count_flops(queries) == costs.query_pass(whole, load)
    held = {name: G[:2] for name, G in queries().items()}
    assert count_flops(dots) == costs.dot_pass(whole, load, queries=2)
    assert count_flops(squares) == costs.embedding_pass(whole, load)
    product = gauss_newton_product(model, followed, list(batches(documents, batch_tokens=TOKENS)), task=CausalLM(), weight=1.0)
    v = torch.randn(3, whole.gradient, dtype=torch.float64)
    product(v[:1])  # the first product checks derivatives
    assert count_flops(lambda: product(v)) == costs.product_pass(whole, load, vectors=3)


@pytest.mark.parametrize("vectors", [1, 3])
def test_gauss_newton_products(case, vectors):
    model, layers, documents, shapes, load = case
    held = list(batches(documents, batch_tokens=TOKENS))
    product = gauss_newton_product(model, layers, held, task=CausalLM(), weight=1.0)
    v = torch.randn(vectors, shapes.gradient, dtype=torch.float64)
    product(v[:1])  # the first product checks derivatives
    assert count_flops(lambda: product(v)) == costs.product_pass(shapes, load, vectors=vectors)


def test_a_model_of_one_block_says_all_of_a_deeper_one():
    from transformers import LlamaConfig, LlamaForCausalLM

    def made(num_layers: int):
        shape = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11}
        return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=num_layers, tie_word_embeddings=False)).eval()

    one, deep = costs.shapes_of(made(1)), costs.shapes_of(made(3))
    assert costs.with_blocks(one, 3) == replace(deep, parameters=one.parameters)


def test_bytes_of_factors_are_those_of_the_file(case, tmp_path):
    model, layers, documents, shapes, _load = case
    sums = covariances(
        model.float(),
        layers,
        batches(documents, batch_tokens=TOKENS),
        task=CausalLM(),
        generator=torch.Generator().manual_seed(0),
    )
    basis = eigenbasis(sums, layers)
    plain = {layer.name: EKFAC(*basis[layer.name], torch.ones(layer.d_out, layer.d_in)) for layer in layers}
    P = {layer.name: torch.ones(layer.d_out, layer.d_in) for layer in layers}
    for adam, held in (("none", {}), ("scalar", P)):
        save_factors(tmp_path / "factors", SegmentFactors(layers, plain, {}, held, {}, 1))
        header = int.from_bytes((tmp_path / "factors").read_bytes()[:8], "little") + 8
        assert (tmp_path / "factors").stat().st_size - header == costs.factor_bytes(shapes, adam=adam)


@pytest.mark.parametrize("width", [7, 64, 300])
def test_a_triangle_of_a_product_is_counted_as_it_is_made(width):
    rows = torch.randn(5, width)
    layer = Layer("wide", width, width, False, "wide")
    shapes = costs.Decoder((layer,), (layer,), (), (1, 1), 0)
    more = costs.covariance_pass(shapes, costs.Load(tokens=5)) - costs.frozen_pass(shapes, costs.Load(tokens=5))
    assert more == 2 * count_flops(lambda: add_lower_products(torch.zeros(width, width), rows))  # inputs and outputs


def test_a_row_has_as_many_values_as_its_projections(case):
    _model, layers, _documents, shapes, _load = case
    assert costs.row_values(shapes, rank=RANK) == sum(
        held.size for held in random_projections(layers, rank=RANK, seed=0).values()
    )


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"curvature.layers: 'nothing' matches none of the model's linear layers; they are model"
    ):
        costs.tracking(costs.shapes_of(tiny_llama()), "nothing")


def test_loads_add_up():
    lengths = np.array([3, 5, 2])
    plan = [[0], [1, 2]]
    whole = costs.load_of(plan, lengths, lengths - 1)
    assert whole == costs.load_of(plan[:1], lengths, lengths - 1) + costs.load_of(plan[1:], lengths, lengths - 1)
    assert (whole.tokens, whole.squares, whole.predictions) == (3 + 2 * 5, 9 + 2 * 25, 7)
