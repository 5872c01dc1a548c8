"""Embeddings, and heads that share their weight, as averaged influence follows them: against autograd and dense matrices."""

import numpy as np
import pytest
import torch
from torch import nn

from tda.attribute import attribute
from tda.averaged_influence import around, at_mean_of, averaged_response
from tda.data import Examples, batches
from tda.ekfac import squared_gradients
from tda.fitted import Fitted, Settings
from tda.ggn import gauss_newton_product, pack
from tda.gradients import gradient_dots, query_gradients
from tda.model import embedding_layers, tracked_layers
from tda.task import CausalLM, Classification
from tests.helpers import dense_gradient, random_documents, tiny_gpt2, tiny_llama
from tests.unit.test_attribute import gradient, recorded_run, setting
from tests.unit.test_solvers import SINGLE, dense_ggn


class TextClassifier(nn.Module):
    """Words of a text, and of its title, looked up in one table; word 0 is padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(7, 5, padding_idx=0), nn.Linear(5, 3)

    def forward(self, x):
        return self.head((self.words(x).sum(dim=1) + self.words(x[:, :2]).mean(dim=1)).tanh())


class HeadFirst(nn.Module):
    """A shared weight that `named_parameters` has under the head's name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.table = nn.Linear(4, 3), nn.Embedding(3, 4)
        self.table.weight = self.head.weight

    def forward(self, x):
        return self.head(self.table(x).sum(dim=1).tanh())


class Scaled(nn.Embedding):
    """An embedding whose output is no row of its weight, as Gemma's."""

    def forward(self, x):
        return 2 * super().forward(x)


def words(number: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, size, (number, 6), generator=torch.Generator().manual_seed(seed))


def case(kind: str):
    if kind in ("llama", "untied", "gpt2"):
        model = {"llama": tiny_llama, "untied": lambda: tiny_llama(tie=False), "gpt2": tiny_gpt2}[kind]()
        return model, CausalLM(), random_documents(4)
    model, size = (TextClassifier(), 7) if kind == "classifier" else (HeadFirst(), 3)
    return model.double().eval(), Classification(), Examples(words(4, size), torch.tensor([0, 1, 2, 1]))


KINDS = ["llama", "untied", "gpt2", "classifier", "head first"]


def followed(model, task, data):
    """The linear layers and the embedding of tokens."""
    own = not isinstance(model, HeadFirst)
    layers = tracked_layers(model, ".*", probe=lambda model: task.losses(model, data.batch([0]))) if own else []
    return [*layers, embedding_layers(model)[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_embeddings_are_those_of_autograd(kind):
    model, task, data = case(kind)
    layers = followed(model, task, data)
    held, order = query_gradients(model, layers, list(batches(data, batch_tokens=24)), task=task)
    batch = data.batch(range(len(data)))
    dots = gradient_dots(model, layers, batch, task=task, queries=held)
    for place, row in enumerate(order):
        one = data.batch([row])
        expected = dense_gradient(model, layers, task.costs(model, one, weights=1 / one.sizes)[0])
        for name, G in expected.items():
            torch.testing.assert_close(held[name][place], G, **SINGLE)
    rows = torch.stack([gradient(model, layers, task.losses(model, data.batch([row]))[0]) for row in range(len(data))])
    torch.testing.assert_close(dots, rows @ pack(held, layers).T, **SINGLE)


@pytest.mark.parametrize("kind", KINDS)
def test_gauss_newton_products_with_embeddings_are_those_of_the_dense_matrix(kind):
    model, task, data = case(kind)
    layers = followed(model, task, data)[-1:]
    G = dense_ggn(model, layers, data, task, weight=0.3)
    v = torch.randn(2, len(G), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if kind == "classifier":
        v[:, : model.words.embedding_dim] = 0  # the gradient at padding is 0, so that no vector has anything else there
    product = gauss_newton_product(model, layers, list(batches(data, batch_tokens=24)), task=task, weight=0.3)
    torch.testing.assert_close(product(v), v @ G, **SINGLE)


def test_squared_gradients_are_those_of_autograd_with_the_same_labels():
    model, task, data = case("untied")
    layer = embedding_layers(model)[0]
    held = list(batches(data, batch_tokens=24))
    sums = squared_gradients(model, [layer], held, task=task, generator=torch.Generator().manual_seed(3))
    generator, expected = torch.Generator().manual_seed(3), 0.0
    for batch in held:
        state = generator.get_state()
        for place in range(len(batch.rows)):
            generator.set_state(state)
            alone = (torch.arange(len(batch.rows)) == place).double()
            total, _losses = task.losses(model, batch, weights=alone, labels="sampled", generator=generator)
            (G,) = torch.autograd.grad(total, model.get_submodule(layer.name).weight)
            expected = expected + G.square()
    torch.testing.assert_close(sums[layer.name].double(), expected, **SINGLE)


def test_which_embeddings_are_followed():
    def names(kind, optimizer="sgd", pattern=".*"):
        run, task, train, queries = setting(kind, optimizer)
        held = Fitted(run, task, train, queries, Settings(layers=pattern), embeddings=True)
        return [layer.name for layer in held.layers if layer not in Fitted(run, task, train, queries, held.settings).layers]

    assert names("lm") == ["model.embed_tokens"]
    assert names("lm", pattern=".*mlp.*") == []
    assert names("classification") == []
    gpt2 = tiny_gpt2()
    assert [layer.name for layer in embedding_layers(gpt2)] == ["transformer.wte", "transformer.wpe"]
    gpt2.transformer.wte.weight.requires_grad_(False)
    assert [layer.name for layer in embedding_layers(gpt2)] == ["transformer.wpe"]
    assert [layer.name for layer in embedding_layers(HeadFirst())] == ["head"]


def test_embeddings_that_cannot_be_followed_are_left_out():
    """Positions are looked up once for all examples; a scaled table is no plain one; some are used in functions, or not used."""

    class Text(nn.Module):
        def __init__(self, table=nn.Embedding, more=lambda table, h: h):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.places, self.head, self.more = table(7, 5), nn.Embedding(6, 5), nn.Linear(5, 3), more
            self.unused, self.detached = nn.Embedding(7, 5), nn.Embedding(7, 5)

        def forward(self, x):
            looked_up = self.words(x) + self.places(torch.arange(6))[None] + self.detached(x).detach()
            return self.head(self.more(self.words, looked_up.sum(dim=1).tanh()))

    def functional(table, h):
        return h @ table.weight.T @ table.weight

    for model, expected in ((Text(), ["words"]), (Text(Scaled), []), (Text(more=functional), [])):
        run, task, train, queries = recorded_run(model, words(12, 7))
        held = Fitted(run, task, train, queries, Settings(), embeddings=True)
        assert [layer.name for layer in held.layers] == ["head", *expected]
        assert np.isfinite(attribute("averaged_influence", run, task, train, queries).values).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_averaged_influence_of_a_tied_model_is_the_dense_solution(optimizer):
    run, task, train, queries = setting("lm", optimizer)
    fitted = Fitted(run, task, train, queries, Settings(rounds=60, solver_terms=0, adam="symmetric"))
    place = at_mean_of(fitted, around([checkpoint.step for checkpoint in run.checkpoints], 0.5))
    layers, model = place.layers, place.model(-1)
    assert layers[-1].name == "model.embed_tokens"
    (segment,) = place.segments
    G = dense_ggn(model, layers, train, task, weight=1 / segment.tokens_per_document)
    q = torch.stack([
        gradient(model, layers, task.costs(model, one := queries.batch([row]), weights=1 / one.sizes)[0]) for row in range(3)
    ])
    P = torch.ones_like(q[0])
    if optimizer == "adamw":
        P = pack(place.preconditioner(segment.checkpoints), layers).double()
    damping = (run.optimizer.weight_decay + 4 / segment.time) / P
    expected = torch.linalg.solve(G + damping.diag(), q.T).T
    found = pack(averaged_response(place, place.query_gradients), layers).double()
    assert torch.dist(found, expected) < 0.02 * expected.norm()
