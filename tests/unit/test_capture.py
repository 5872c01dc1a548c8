import pytest
import torch

from tda.data import batches
from tda.gradients import gradient_rows, project_queries, query_gradients
from tda.model import tracked_layers
from tda.projection import random_projections
from tda.task import CausalLM
from tests.helpers import dense_gradient, document_loss, random_documents, tiny_gpt2, tiny_llama

MODELS = {"llama": tiny_llama, "llama untied": lambda: tiny_llama(tie=False), "gpt2": tiny_gpt2}


def doubled(projections):
    from dataclasses import replace

    return {name: replace(held, P_i=held.P_i.double(), P_o=held.P_o.double()) for name, held in projections.items()}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_query_gradients_are_those_of_autograd(build):
    model, documents = build(), random_documents()
    layers = tracked_layers(model)
    gradients, order = query_gradients(model, layers, batches(documents, batch_tokens=24), task=CausalLM())
    assert sorted(order) == list(range(len(documents)))
    for place, row in enumerate(order):
        expected = dense_gradient(model, layers, document_loss(model, documents, row) / documents.num_loss_tokens[row])
        for layer in layers:
            torch.testing.assert_close(gradients[layer.name][place], expected[layer.name])


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_rows_are_projections_of_the_gradients_of_autograd(build):
    model, documents = build(), random_documents(loss_starts=[1, 2, 3, 1, 2])
    layers = tracked_layers(model)
    projections = doubled(random_projections(layers, rank=3, seed=0))
    rows, losses = gradient_rows(model, layers, documents.batch(range(5)), task=CausalLM(), projections=projections)
    for row in range(5):
        loss = document_loss(model, documents, row)
        expected = project_queries(
            {name: G[None] for name, G in dense_gradient(model, layers, loss).items()}, layers, projections
        )
        torch.testing.assert_close(rows[row], expected[0])
        torch.testing.assert_close(losses[row], loss.detach() / documents.num_loss_tokens[row])


def test_padding_and_batch_composition_change_nothing():
    model, documents = tiny_llama(), random_documents(6)
    layers = tracked_layers(model)
    projections = doubled(random_projections(layers, rank=4, seed=1))
    together, _ = gradient_rows(model, layers, documents.batch(range(6)), task=CausalLM(), projections=projections)
    for row in range(6):
        alone, _ = gradient_rows(model, layers, documents.batch([row]), task=CausalLM(), projections=projections)
        torch.testing.assert_close(together[row], alone[0])


def test_layers_that_read_one_input_form_a_group_and_tied_heads_are_left_out():
    layers = {layer.name: layer for layer in tracked_layers(tiny_llama())}
    assert layers["model.layers.0.self_attn.k_proj"].group == "model.layers.0.self_attn.q_proj"
    assert layers["model.layers.0.self_attn.o_proj"].group == "model.layers.0.self_attn.o_proj"
    assert layers["model.layers.1.mlp.up_proj"].group == "model.layers.1.mlp.gate_proj"
    assert "lm_head" not in layers
    assert "lm_head" in {layer.name for layer in tracked_layers(tiny_llama(tie=False))}


def test_a_pattern_chooses_layers_and_one_that_matches_nothing_is_refused():
    assert len(tracked_layers(tiny_llama(), r".*mlp\..*")) == 6
    with pytest.raises(ValueError, match=r"curvature.layers: 'nothing' matches none"):
        tracked_layers(tiny_llama(), "nothing")


def test_training_mode_is_refused():
    model, documents = tiny_llama(), random_documents()
    layers = tracked_layers(model)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        query_gradients(model, layers, batches(documents, batch_tokens=24), task=CausalLM())
