import pytest
import torch
from torch import nn

from tda.capture import captured
from tda.data import Examples, batches
from tda.gradients import gradient_rows, project_queries, query_gradients
from tda.model import tracked_layers
from tda.projection import random_projections
from tda.task import CausalLM, Regression
from tests.helpers import dense_gradient, document_loss, random_documents, tiny_gpt2, tiny_llama, tiny_opt, with_adapter

MODELS = {
    "llama": tiny_llama,
    "llama untied": lambda: tiny_llama(tie=False),
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "adapted": lambda: with_adapter(tiny_llama()),
}


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


def test_what_several_layers_read_is_encoded_once_whatever_runs_between_them():
    """Between the A of adapters that read the same run their B; the input's covariance would be counted for each of them."""
    model, documents = with_adapter(tiny_llama()), random_documents()
    layers = tracked_layers(model)
    assert [layer.group for layer in layers] != sorted(layer.group for layer in layers)
    seen: list[str] = []
    with captured(model, layers, encode=lambda layer, a: seen.append(layer.name), consume=lambda *_: None):
        CausalLM().losses(model, documents.batch(range(3)))[0].backward()
        assert sorted(seen) == sorted({layer.group for layer in layers})


def test_layers_that_read_one_input_form_a_group_and_tied_heads_are_left_out():
    layers = {layer.name: layer for layer in tracked_layers(tiny_llama())}
    assert layers["model.layers.0.self_attn.k_proj"].group == "model.layers.0.self_attn.q_proj"
    assert layers["model.layers.0.self_attn.o_proj"].group == "model.layers.0.self_attn.o_proj"
    assert layers["model.layers.1.mlp.up_proj"].group == "model.layers.1.mlp.gate_proj"
    assert "lm_head" not in layers
    assert "lm_head" in {layer.name for layer in tracked_layers(tiny_llama(tie=False))}


def test_a_pattern_chooses_layers_and_one_that_matches_nothing_is_refused():
    assert len(tracked_layers(tiny_llama(), r".*mlp\..*")) == 6
    with pytest.raises(ValueError, match=r"layers: 'nothing' \(curvature.layers in params.yaml\) matches none"):
        tracked_layers(tiny_llama(), "nothing")


def test_training_mode_is_refused():
    model, documents = tiny_llama(), random_documents()
    layers = tracked_layers(model)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        query_gradients(model, layers, batches(documents, batch_tokens=24), task=CausalLM())


class Flattening(nn.Module):
    """A linear layer over every position of an example, which it may see flattened in some way, and one over their sum."""

    def __init__(self, flatten):
        super().__init__()
        torch.manual_seed(0)
        self.each, self.of_sum, self.flatten = nn.Linear(3, 4), nn.Linear(4, 2), flatten

    def forward(self, x):
        return self.of_sum(self.each(self.flatten(x)).tanh().reshape(x.shape[0], -1, 4).sum(dim=1))


@pytest.mark.parametrize("num_examples", [1, 5])
def test_positions_that_a_model_flattens_belong_to_their_examples(num_examples):
    examples = Examples(torch.randn(num_examples, 6, 3), torch.randn(num_examples, 2))
    found = []
    for flatten in (lambda x: x, lambda x: x.reshape(-1, 3), lambda x: x.reshape(len(x), 2, 3, 3)):
        model = Flattening(flatten).eval()
        layers = tracked_layers(model, probe=lambda model: model(examples.x))
        held = [examples.batch(range(num_examples))]
        found.append(query_gradients(model, layers, held, task=Regression("squared_error"))[0])
    for other in found[1:]:
        for name, G in found[0].items():
            torch.testing.assert_close(other[name], G)


def test_rows_of_which_it_is_not_known_whose_they_are_are_refused():
    """The first five rows of ten: the same number as of examples would have, were they not rows of two of them."""
    examples = Examples(torch.randn(5, 6, 3), torch.randn(5, 2))
    for flatten in (lambda x: x.reshape(-1, 3)[:20], lambda x: x.transpose(0, 1), lambda x: x.reshape(15, 2, 3)):
        model = Flattening(flatten).eval()
        layers = tracked_layers(model, probe=lambda model: model.each(examples.x))
        with pytest.raises(ValueError, match="which of its rows belongs to which example is not known"):
            query_gradients(model, layers, [examples.batch(range(5))], task=Regression("squared_error"))


def test_frozen_layers_are_left_out_unless_all_is_frozen():
    model = tiny_llama()
    names = [layer.name for layer in tracked_layers(model)]
    for name in names[:-2]:
        model.get_submodule(name).requires_grad_(False)
    assert [layer.name for layer in tracked_layers(model)] == names[-2:]
    with pytest.raises(
        ValueError, match=r"matches none of the linear layers that are trained, which are .*up_proj, .*down_proj$"
    ):
        tracked_layers(model, r".*layers\.0.*")
    assert [layer.name for layer in tracked_layers(model.requires_grad_(False))] == names
