"""Layers of models that others have written: followed rightly, or refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tda.attribute import attribute
from tda.model import Layer
from tda.task import Classification
from tests.unit.test_attribute import gradient, recorded_run


class Function(nn.Module):
    """A linear layer `body`, used as a function says, with a head."""

    def __init__(self, function, body=None):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.body, self.head = function, body or nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.function(self.body, x))


class Doubled(nn.Linear):
    """A layer that is no `W a + b` of its weight, as weight standardisation is not."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def hooked() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda _layer, _inputs, output: output.tanh())
    return layer


def assert_dots_are_those_of_autograd(run, task, train, queries, layers):
    model = run.at(-1).requires_grad_()
    rows = torch.stack([gradient(model, layers, task.losses(model, train.batch([row]))[0]) for row in range(len(train))])
    asked = torch.stack([
        gradient(model, layers, task.costs(model, queries.batch([row]), weights=torch.ones(1))[0]) for row in range(len(queries))
    ])
    scores = attribute("gradient_dot", run, task, train, queries).values
    np.testing.assert_allclose(scores, (asked @ rows.T).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Function(lambda body, x: F.linear(body(x).tanh(), body.weight)),
        lambda: Function(lambda body, x: body(x).tanh() + body.bias),
        lambda: Function(lambda body, x: body(x).tanh() / body.weight.norm()),
        lambda: Function(lambda body, x: body(x).tanh(), Doubled(4, 4)),
        lambda: Function(lambda body, x: body(x), hooked()),
    ],
    ids=["in a function too", "its bias too", "its norm", "another weight", "another output"],
)
def test_a_weight_whose_gradient_is_more_than_its_layers_is_refused(model):
    run, task, train, queries = recorded_run(model(), torch.randn(12, 4))
    with pytest.raises(
        ValueError, match=r"layers: body: a layer's inputs and .* do not give the gradient of its weight; expected"
    ):
        attribute("gradient_dot", run, task, train, queries)
    attribute("gradient_dot", run, task, train, queries, layers="head")


def test_a_layer_that_runs_without_gradients_is_refused():
    run, task, train, queries = recorded_run(Function(lambda body, x: torch.no_grad()(body)(x).tanh()), torch.randn(12, 4))
    with pytest.raises(ValueError, match=r"body: runs without gradients, under torch\.no_grad or in reentrant"):
        attribute("gradient_dot", run, task, train, queries)


def test_a_model_whose_loss_hangs_on_the_rest_of_the_batch_is_refused():
    mixing = Function(lambda body, x: torch.softmax(body(x) @ x.T, dim=1) @ x)
    run, task, train, queries = recorded_run(mixing, torch.randn(12, 4))
    with pytest.raises(ValueError, match=r"attribute: the loss of row 0 is .* alone and .* beside others; expected"):
        attribute("gradient_dot", run, task, train, queries)


class Survival(Classification):
    """Cox's partial likelihood: a row's risk is compared with those that live longer. Half of the rows are censored."""

    def outputs(self, model, batch):
        return model(batch.x)[:, :1]

    def output_losses(self, outputs, batch):
        risks, times = outputs[:, 0], batch.x[:, 0]
        at_risk = torch.where(times >= times[:, None], risks, -torch.inf).logsumexp(dim=1)
        return (batch.y % 2) * (at_risk - risks)


def test_a_loss_that_hangs_on_other_rows_is_refused_wherever_the_first_row_stands():
    """Row 0 is censored, so that its loss is 0 with any others."""
    run, _task, train, queries = recorded_run(Function(lambda body, x: body(x).tanh()), torch.randn(12, 4))
    with pytest.raises(ValueError, match=r"attribute: the loss of row .* alone and .* beside others; expected a model and a"):
        attribute("gradient_dot", run, Survival("loss"), train, queries)


class FlatOfZero(Classification):
    """A loss that is flat for class 0, that of row 0, as a hinge is where an example is classified well."""

    def output_losses(self, outputs, batch):
        return (batch.y > 0) * super().output_losses(outputs, batch)


def test_a_weight_that_is_used_elsewhere_is_refused_though_the_loss_of_the_first_row_is_flat():
    model = Function(lambda body, x: F.linear(body(x).tanh(), body.weight))
    run, _task, train, queries = recorded_run(model, torch.randn(12, 4))
    with pytest.raises(ValueError, match="layers: body: a layer's inputs and"):
        attribute("gradient_dot", run, FlatOfZero("loss"), train, queries)


def test_a_layer_that_does_not_see_the_examples_is_refused():
    constant = Function(lambda body, x: x + body(x.new_ones(1, 1, 2, 2)).flatten(1), nn.Conv2d(1, 4, 2))
    run, task, train, queries = recorded_run(constant, torch.randn(12, 4))
    with pytest.raises(ValueError, match="layers: body: an example whose loss has no weight has a gradient there; expected"):
        attribute("gradient_dot", run, task, train, queries)


def test_a_model_that_calls_none_of_its_layers_is_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return F.linear(x, self.layer.weight, self.layer.bias)

    run, task, train, queries = recorded_run(Functional(), torch.randn(12, 4))
    with pytest.raises(
        ValueError, match="layers: the model calls none of layer; expected layers that it calls; a weight that is"
    ):
        attribute("gradient_dot", run, task, train, queries)


def test_an_input_may_be_given_by_name():
    scores = [
        attribute("source", *recorded_run(Function(function), torch.linspace(-1, 1, 48).reshape(12, 4)), num_segments=1).values
        for function in (lambda body, x: body(x).tanh(), lambda body, x: body(input=x).tanh())
    ]
    np.testing.assert_array_equal(*scores)


class Called(Classification):
    """A task that calls a model in another way than with a tensor of all examples."""

    def outputs(self, model, batch):
        return self.measure(model, batch.x)


@pytest.mark.parametrize(
    ("take", "call"),
    [
        (lambda body, x: body(x["x"]).tanh(), lambda model, x: model({"x": x})),
        (lambda body, x: body(x[1][0]).tanh(), lambda model, x: model((2, [x]))),
        (lambda body, x: body(x[1]).tanh(), lambda model, x: model((torch.tensor(1.0), x))),
        (lambda body, x: body(x).tanh(), lambda model, x: model.head(model.body(x).tanh())),
    ],
    ids=["a dictionary", "a tuple", "a number first", "its parts"],
)
def test_a_task_may_call_a_model_in_its_own_way(take, call, monkeypatch):
    monkeypatch.setattr(Called, "measure", staticmethod(call), raising=False)
    x = torch.linspace(-1, 1, 48).reshape(12, 4)
    run, task, train, queries = recorded_run(Function(lambda body, x: body(x).tanh()), x)
    expected = attribute("source", run, task, train, queries, num_segments=1).values
    run.model.function = take
    np.testing.assert_array_equal(attribute("source", run, Called(), train, queries, num_segments=1).values, expected)


def test_a_model_that_ran_compiled_before_is_followed():
    """Compiled code that is kept from then knows of no hooks."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    run, task, train, queries = recorded_run(torch.compile(plain, backend="eager"), torch.randn(12, 4))
    for num_rows in (1, 2, 3, 12):
        run.model(train.x[:num_rows])
        with torch.no_grad():
            run.model(train.x[:num_rows])
    layers = [Layer("_orig_mod.0", 5, 6, True, ""), Layer("_orig_mod.2", 7, 3, True, "")]
    assert_dots_are_those_of_autograd(run, task, train, queries, layers)


def test_a_model_that_computes_in_less_than_its_weights_is_followed():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

        @torch.autocast("cpu", torch.bfloat16)
        def forward(self, x):
            return self.body(x)

    run, task, train, queries = recorded_run(Narrow(), torch.randn(12, 4))
    narrow = attribute("source", run, task, train, queries, num_segments=1).values
    run.model.__class__ = type("Wide", (Narrow,), {"forward": lambda self, x: self.body(x)})
    np.testing.assert_allclose(narrow, attribute("source", run, task, train, queries, num_segments=1).values, atol=0.02)


@pytest.mark.filterwarnings("ignore:attribute. scores follow", "ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_padding_is_followed():
    """Torch would leave the padding out of its layers, in nested tensors, and run each as a single operation."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
            self.tokens, self.body, self.head = nn.Embedding(7, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(self.tokens(x), src_key_padding_mask=x == 0)[:, 0])

    x = torch.randint(1, 7, (12, 5))
    x[::2, 3:] = 0
    run, task, train, queries = recorded_run(Encoder(), x)
    layers = [
        Layer(f"body.layers.{number}.linear{place}", d_in + 1, d_out, True, "")
        for number in range(2)
        for place, d_in, d_out in ((1, 8, 16), (2, 16, 8))
    ]
    layers.append(Layer("head", 9, 3, True, ""))
    assert_dots_are_those_of_autograd(run, task, train, queries, layers)
    assert torch.backends.mha.get_fastpath_enabled()
