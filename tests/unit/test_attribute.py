"""The public API on models that are no language models, against autograd and dense matrices."""

import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tda.attribute import attribute
from tda.data import Examples
from tda.ekfac import corrected_eigenvalues, covariances, eigenbasis
from tda.fitted import Fitted, Settings
from tda.losses import sample_labels
from tda.means import RunningMean
from tda.methods import METHODS
from tda.scores import ensemble
from tda.task import CausalLM, Classification, Regression
from tda.trajectory import Recorder
from tests.helpers import dense_gradient, random_documents, tiny_llama


class ConvNet(nn.Module):
    """A convolution with stride and padding, one without a bias, in-place activations, and a layer used on vectors."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.second = nn.Conv2d(3, 2, 2, bias=False)
        self.last = nn.Linear(2 * 2 * 2, 3)

    def forward(self, x):
        x = torch.relu_(self.first(x))
        return self.last(torch.relu_(self.second(x)).flatten(1))


class Function(nn.Module):
    """A model without weights."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def mlp(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, outputs))


def examples(kind: str, num: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, *((1, 6, 6) if kind == "conv" else (4,)), generator=generator, dtype=torch.float64)
    if kind == "regression":
        return Examples(x, torch.randn(num, 2, generator=generator, dtype=torch.float64))
    return Examples(x, torch.randint(0, 3, (num,), generator=generator))


def setting(kind: str, optimizer: str = "sgd"):
    """A model trained for twelve steps, its task, its data and queries."""
    torch.manual_seed(0)
    if kind == "lm":
        model, task, train, queries = tiny_llama(), CausalLM(), random_documents(12), random_documents(3, seed=5)
    else:
        kinds = {"conv": ConvNet, "classification": mlp, "regression": lambda: mlp(2), "linear": lambda: nn.Linear(4, 3)}
        model = kinds[kind]().double()
        task = Regression() if kind == "regression" else Classification()
        train, queries = examples(kind, 12, 1), examples(kind, 3, 2)
    chosen = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, weight_decay=0.01),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    }[optimizer]()
    recorder = Recorder(model, chosen, num_steps=12, num_checkpoints=4)
    for step in range(12):
        rows = np.random.default_rng(step).choice(12, 4, replace=False)
        batch = train.batch(rows.tolist())
        loss = task.losses(model, batch)[0] / batch.sizes.sum()
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        recorder.step(rows)
    return recorder.run, task, train, queries


def gradient(model: nn.Module, layers, total) -> torch.Tensor:
    """All tracked parameters' gradient by autograd, layer by layer, weight then bias, as a matrix each."""
    return torch.cat([G.flatten() for G in dense_gradient(model, layers, total).values()])


@pytest.mark.parametrize("kind", ["classification", "regression", "conv", "lm"])
def test_gradient_dots_are_those_of_autograd(kind):
    run, task, train, queries = setting(kind)
    scores = attribute("gradient_dot", run, task, train, queries, num_segments=2)
    model = run.at(-1)
    layers = Fitted(run, task, train, queries, Settings()).layers
    assert len(layers) == {"classification": 3, "regression": 3, "conv": 3, "lm": 14}[kind]
    q = torch.stack([
        gradient(model, layers, task.costs(model, batch := queries.batch([row]), weights=1 / batch.sizes)[0]) for row in range(3)
    ])
    g = torch.stack([gradient(model, layers, task.losses(model, train.batch([row]))[0]) for row in range(12)])
    torch.testing.assert_close(torch.from_numpy(scores.values), q @ g.T)
    cosine = attribute("gradient_cosine", run, task, train, queries, num_segments=2)
    torch.testing.assert_close(torch.from_numpy(cosine.values), nn.functional.normalize(q) @ nn.functional.normalize(g).T)


def test_tracin_sums_dot_products_over_checkpoints():
    run, task, train, queries = setting("classification")
    scores = attribute("tracin", run, task, train, queries, num_segments=2)
    held = Fitted(run, task, train, queries, Settings(num_segments=2))
    expected = torch.zeros(3, 12, dtype=torch.float64)
    for segment in held.segments:
        for checkpoint in segment.checkpoints:
            model = run.at(checkpoint)
            for query in range(3):
                q = gradient(model, held.layers, task.costs(model, queries.batch([query]), weights=torch.ones(1))[0])
                for row in range(12):
                    g = gradient(model, held.layers, task.losses(model, train.batch([row]))[0])
                    # 0.05 / (1 - momentum), over the six steps of a segment, of which each row got its share
                    rate = sum(0.1 / len(rows) for rows in run.batches[segment.first_step - 1 : segment.last_step] if row in rows)
                    expected[query, row] += rate / 2 * (q @ g)
    torch.testing.assert_close(torch.from_numpy(scores.values), expected)


KINDS = ["classification", "regression", "conv", "linear", "lm"]
# surrogate takes no documents, which tests/unit/test_kernel.py holds it to
PAIRS = [(kind, method) for kind in KINDS for method in METHODS if method != "bm25" and (kind, method) != ("lm", "surrogate")]


@pytest.mark.parametrize(("kind", "method"), PAIRS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_method_scores_every_model(kind, optimizer, method):
    run, task, train, queries = setting(kind, optimizer)
    scores = attribute(method, run, task, train, queries, num_segments=2, iterations=2, retrainings=4)
    assert scores.values.shape == (3, 12)
    assert np.isfinite(scores.values).all()
    assert np.abs(scores.values).max() > 0
    twice = attribute(method, run, task, train, queries, num_segments=2, iterations=2, retrainings=4)
    assert np.array_equal(scores.values, twice.values)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"bm25", "datamodel", "replay"}))
def test_a_segment_in_which_nothing_was_learned_adds_nothing(method):
    run, task, train, queries = setting("classification", "adamw")
    rates = run.learning_rates.copy()
    rates[:6] = 0
    run = replace(run, learning_rates=rates)
    scores = attribute(method, run, task, train, queries, num_segments=2, iterations=3).values
    assert np.isfinite(scores).all()
    if method in {"source", "fast_source", "source_cg", "tracin"}:
        seen = np.isin(np.arange(12), np.concatenate(run.batches[6:]))
        assert (scores[:, ~seen] == 0).all()
        assert (scores[:, seen] != 0).all()


@pytest.mark.parametrize("method", ["ekfac_influence", "cg", "lissa", "astra"])
def test_the_influence_of_a_row_grows_with_how_often_the_run_drew_it(method):
    run, task, train, queries = setting("classification")
    draws = np.array([1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 5])
    uneven = replace(run, batches=[np.repeat(np.arange(12), draws)] * 12)
    equal = attribute(method, replace(run, batches=[]), task, train, queries, num_segments=2).values
    scores = attribute(method, uneven, task, train, queries, num_segments=2).values
    np.testing.assert_allclose(scores, equal * 12 * draws / 20, rtol=1e-9)


LEAVE_OUT = [
    "ekfac_influence",
    "source",
    "fast_source",
    "source_cg",
    "cg",
    "lissa",
    "astra",
    "averaged_influence",
    "surrogate",
    "replay",
]


@pytest.mark.parametrize("method", LEAVE_OUT)
def test_leaving_out_a_row_that_was_not_trained_on_has_no_effect(method):
    run, task, train, queries = setting("classification")
    more = examples("classification", 3, 7)
    train = Examples(torch.cat([train.x, more.x]), torch.cat([train.y, more.y]))
    values = attribute(method, run, task, train, queries, num_segments=2).values
    assert not values[:, 12:].any()
    assert values[:, :12].any(axis=0).all()


def test_an_ensemble_gives_every_member_an_equal_say_on_every_query():
    """Whatever a member's unit: ten times its scores change the ensemble's unit alone."""
    run, task, train, queries = setting("classification")
    members = [attribute(name, run, task, train, queries).values for name in ("source", "gradient_dot", "surrogate")]
    together = attribute("source+gradient_dot+surrogate", run, task, train, queries).values
    spreads = [values.std(axis=1) for values in members]
    for query in range(3):
        equal = sum(values[query] / spread[query] for values, spread in zip(members, spreads, strict=True)) / 3
        assert np.allclose(together[query], equal * np.mean([spread[query] for spread in spreads]))
    larger = ensemble([10 * members[0], *members[1:]])
    assert np.allclose(larger / larger.std(axis=1, keepdims=True), together / together.std(axis=1, keepdims=True))


def test_an_ensemble_with_a_member_that_says_nothing_is_what_the_others_say():
    said, silent = np.array([[1.0, -2.0, 4.0]]), np.zeros((1, 3))
    assert np.allclose(ensemble([said, silent]), said / 4)  # half of it, in half the spread


SAMPLED = ("source", "fast_source", "source_cg", "ekfac_influence", "cg")  # labels of curvature are drawn afresh in other batches
STOCHASTIC = ("lissa", "astra")  # the batches are what they solve with


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("bm25", *STOCHASTIC)])
def test_batching_changes_nothing(method):
    run, task, train, queries = setting("classification")
    whole = attribute(method, run, task, train, queries, num_segments=2)
    small = attribute(method, run, task, train, queries, num_segments=2, batch_size=5)
    if method in SAMPLED:
        assert np.corrcoef(whole.values.ravel(), small.values.ravel())[0, 1] > 0.9
    else:
        torch.testing.assert_close(torch.from_numpy(whole.values), torch.from_numpy(small.values))


def test_sampled_regression_labels_give_the_gauss_newton_matrix():
    """Squared gradients of sampled losses average to 2 J^T J, the Gauss-Newton matrix of a squared error."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    data = examples("regression", 1, 0)
    data = Examples(data.x[:, :3].repeat(40_000, 1), data.y.repeat(40_000, 1))
    total, _ = Regression().losses(model, data.batch(range(40_000)), labels="sampled", generator=torch.Generator().manual_seed(0))
    outputs = []
    model.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    total, _ = Regression().losses(model, data.batch(range(40_000)), labels="sampled", generator=torch.Generator().manual_seed(0))
    (Ds,) = torch.autograd.grad(total, outputs[-1])
    found = Ds.T @ Ds / len(Ds)  # of the outputs, where J = 1
    error = 4 * 2 / len(Ds) ** 0.5  # the mean of squares of N(0, 2): standard error sqrt(2) * 2 / sqrt(n); four of them
    assert (found - 2 * torch.eye(2, dtype=torch.float64)).abs().max() < error


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_classes_may_be_numbers_of_any_integer_type(dtype):
    run, task, train, queries = setting("classification")
    short = [Examples(data.x, data.y.to(dtype)) for data in (train, queries)]
    for method in ("surrogate", "source", "trak", "replay", "averaged_influence"):
        expected = attribute(method, run, task, train, queries, num_segments=2).values
        assert np.array_equal(attribute(method, run, task, *short, num_segments=2).values, expected)


def test_means_of_narrow_weights_are_summed_in_float32():
    model = nn.Linear(2, 1).bfloat16()
    mean = RunningMean(model)
    for _step in range(1000):  # a sum in bfloat16 would stay at 256 times the weight
        mean.add()
    for name, value in mean.take().items():
        torch.testing.assert_close(value, model.state_dict()[name].float())


def test_a_run_in_bfloat16_is_attributed_in_float32():
    run, task, train, queries = setting("classification", "adamw")
    narrow = {torch.bfloat16: lambda value: value.bfloat16(), torch.float32: lambda value: value.bfloat16().float()}
    found = []
    for dtype, rounded in narrow.items():
        checkpoints = [
            replace(
                checkpoint,
                weights={name: rounded(value) for name, value in checkpoint.weights.items()},
                second_moments={name: rounded(value) for name, value in checkpoint.second_moments.items()},
                mean_weights={name: value.float() for name, value in checkpoint.mean_weights.items()},
            )
            for checkpoint in run.checkpoints
        ]
        held = replace(run, model=copy.deepcopy(run.model).to(dtype), checkpoints=checkpoints)
        data = [Examples(rounded(each.x), each.y) for each in (train, queries)]
        found.append(attribute("surrogate+averaged_influence+source", held, task, *data, num_segments=2).values)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_regression_of_one_number_has_its_outputs_in_a_column_or_not(dtype):
    """Models and targets that drop the last dimension, in any pairing, and targets of another precision."""
    torch.manual_seed(0)
    column = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    flat = nn.Sequential(*column, nn.Flatten(0))
    x, y = torch.randn(12, 4), torch.randn(12, dtype=dtype)
    found = []
    for model in (column, flat):
        for targets in (y, y[:, None]):
            data = Examples(x, targets)
            recorder = Recorder(model, torch.optim.SGD(model.parameters(), lr=1e-9), num_steps=2, num_checkpoints=2)
            for _step in range(2):
                total, _losses = Regression().losses(model, data.batch(range(12)))
                total.backward()
                recorder.step(np.arange(12))
            method = "surrogate+averaged_influence+source"
            found.append(attribute(method, recorder.run, Regression(), data, data.select(range(3)), num_segments=1).values)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0])


def test_an_ensemble_is_the_mean_of_its_runs():
    first, task, train, queries = setting("classification")
    second, *_ = setting("classification", "adamw")
    each = [attribute("gradient_dot", run, task, train, queries).values for run in (first, second)]
    both = attribute("gradient_dot", [first, second], task, train, queries).values
    torch.testing.assert_close(torch.from_numpy(both), torch.from_numpy(sum(each) / 2))


def test_what_cannot_be_is_refused():
    run, task, train, queries = setting("classification")
    with pytest.raises(ValueError, match="unknown method 'nothing'; known are gradient_dot"):
        attribute("nothing", run, task, train, queries)
    with pytest.raises(ValueError, match="unknown settings depth; known are num_segments"):
        attribute("source", run, task, train, queries, depth=3)
    with pytest.raises(ValueError, match="the run saw row 11, the training data have 5 rows"):
        attribute("source", run, task, train.select(range(5)), queries)
    with pytest.raises(ValueError, match="no run; expected one or more"):
        attribute("source", [], task, train, queries)
    with pytest.raises(ValueError, match="bm25: the data have no tokens"):
        attribute("bm25", run, task, train, queries)
    with pytest.raises(ValueError, match="the targets \\(12,\\); expected as many values per example"):
        Regression().losses(run.at(-1), Examples(train.x, train.y.double()).batch(range(12)))
    whole = range(12)
    for logits, message in [
        (lambda x: x[:, :1], r"the model's outputs are \(12, 1\); expected \(example, class\), two classes or more"),
        (lambda x: (x,), "classification: the model returns tuple; expected a tensor; wrap it"),
    ]:
        with pytest.raises(ValueError, match=message):
            Classification().losses(Function(logits), train.batch(whole))
    for y in (train.y.double(), train.y[:, None], train.y + 1):
        with pytest.raises(
            ValueError, match=r"classification: the targets are torch.* expected whole numbers from 0 to 2, one per"
        ):
            Classification().losses(run.at(-1), Examples(train.x, y).batch(whole))
    with pytest.raises(
        ValueError, match=r"the model's outputs are \(\), the targets \(12,\); expected as many values per example"
    ):
        Regression().losses(Function(torch.mean), Examples(train.x, train.x[:, 0]).batch(whole))
    broken = Fitted(run, task, train, Examples(queries.x.clone(), queries.y), Settings())
    broken.queries.x[1] = torch.nan
    with pytest.raises(ValueError, match="the gradients of 1 of 3 queries are not finite, such as 1; expected finite inputs"):
        _ = broken.query_gradients
    with pytest.raises(ValueError, match="the learning rates of the run's 12 steps sum to 0; expected a run that has learned"):
        attribute("source", replace(run, learning_rates=np.zeros(12)), task, train, queries)
    with pytest.raises(ValueError, match="12 inputs and 3 targets"):
        Examples(train.x, train.y[:3])


def test_a_recorder_refuses_what_no_method_knows():
    model = mlp()
    with pytest.raises(ValueError, match=r"the optimizer is Adagrad; expected torch\.optim\.SGD or"):
        Recorder(model, torch.optim.Adagrad(model.parameters()), num_steps=6)
    with pytest.raises(ValueError, match="the optimizer sets nesterov"):
        Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True), num_steps=6)
    groups = [{"params": [parameter], "weight_decay": 0.1 * number} for number, parameter in enumerate(model.parameters())]
    with pytest.raises(ValueError, match="parameter groups differ in weight_decay"):
        Recorder(model, torch.optim.AdamW(groups), num_steps=6)
    groups = [{"params": [one], "weight_decay": 0.1 * (one is not model[0].weight)} for one in model.parameters()]
    with pytest.raises(
        ValueError, match=r"differ in weight_decay: \[0\.0, 0\.1\], 0 for 0\.weight; expected one value, and 0 for"
    ):
        Recorder(model, torch.optim.AdamW(groups), num_steps=6)
    with pytest.raises(ValueError, match="7 checkpoints of 6 steps"):
        Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), num_steps=6, num_checkpoints=7)


def test_eigenvalues_of_examples_with_one_position_are_those_of_formed_gradients():
    """The faster form, which squares both sides of an outer product, against the plain one."""
    run, task, train, queries = setting("classification")
    held = Fitted(run, task, train, queries, Settings())
    model = held.model(-1)
    whole, generator = [train.batch(range(12))], torch.Generator().manual_seed(0)
    basis = eigenbasis(covariances(model, held.layers, whole, task=task, generator=generator), held.layers)
    Lambda, count = corrected_eigenvalues(
        model,
        held.layers,
        whole,
        task=task,
        basis=basis,
        generator=torch.Generator().manual_seed(1),
    )
    assert count == 12
    uniform = torch.rand(12, generator=torch.Generator().manual_seed(1))
    labels = sample_labels(model(train.x).detach().softmax(dim=1), uniform)
    for row in range(12):
        loss = nn.functional.cross_entropy(model(train.x[[row]]), labels[[row]])
        for name, G in dense_gradient(model, held.layers, loss).items():
            Q_A, Q_S = basis[name]
            Lambda[name] -= (Q_S.T @ G @ Q_A).square()
    for values in Lambda.values():
        torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-12, rtol=0)


def recorded_run(model: nn.Module, x: torch.Tensor, *, trained: list | None = None, kind: type = torch.optim.SGD) -> tuple:
    """Six steps on `x`, three classes, by the `trained` parameters; the run, task, rows and queries."""
    train, task = Examples(x, torch.arange(len(x)) % 3), Classification()
    optimizer = kind(trained or model.parameters(), lr=0.05)
    recorder = Recorder(model, optimizer, num_steps=6, num_checkpoints=3)
    for step in range(6):
        rows = [(4 * step + place) % len(x) for place in range(4)]
        total, _losses = task.losses(model, train.batch(rows))
        optimizer.zero_grad()
        (total / 4).backward()
        optimizer.step()
        recorder.step(rows)
    return recorder.run, task, train, train.select(range(3))


@pytest.mark.parametrize("how", ["frozen", "not in the optimizer"])
def test_layers_that_were_not_trained_are_not_attributed(how):
    """A frozen backbone under a trained head: scores are those of the head alone, as the exact replay has them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    if how == "frozen":
        model[0].requires_grad_(False)
    run, task, train, queries = recorded_run(model, torch.randn(12, 4).double(), trained=list(model[2].parameters()))
    assert [layer.name for layer in Fitted(run, task, train, queries, Settings()).layers] == ["2"]
    head = attribute("source", run, task, train, queries, layers="2", num_segments=1).values
    np.testing.assert_allclose(attribute("source", run, task, train, queries, num_segments=1).values, head)
    exact = attribute("replay", run, task, train, queries).values
    assert np.corrcoef(head.ravel(), exact.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("method", ["gradient_dot", "cg", "surrogate"])
def test_biases_that_were_not_trained_are_not_followed(method):
    """A model with frozen biases is one that adds constants instead."""

    class Adds(nn.Module):
        def __init__(self, values):
            super().__init__()
            self.register_buffer("values", values)

        def forward(self, x):
            return x + self.values

    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    frozen[0].bias.requires_grad_(False)
    constant = nn.Sequential(nn.Linear(4, 6, bias=False), Adds(frozen[0].bias.detach()), nn.Tanh(), frozen[2]).double()
    constant[0].weight.data.copy_(frozen[0].weight)
    constant, x = copy.deepcopy(constant), torch.randn(12, 4).double()
    scores = [attribute(method, *recorded_run(model, x, kind=torch.optim.AdamW)).values for model in (frozen, constant)]
    np.testing.assert_allclose(*scores)


@pytest.mark.parametrize("flatten", [lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1).flatten(0, 1)])
def test_positions_before_examples_are_refused(flatten):
    """As many positions as there are rows in a batch, or both on one axis: shapes do not tell."""

    class PositionsFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.body(flatten(x)).tanh().view(x.shape[1], x.shape[0], 5).mean(dim=0))

    run, task, train, queries = recorded_run(PositionsFirst(), torch.randn(12, 2, 4))
    with pytest.raises(ValueError, match="layers: body: an example whose loss has no weight has a gradient there; expected"):
        attribute("gradient_dot", run, task, train, queries, batch_size=2)
    attribute("gradient_dot", run, task, train, queries, batch_size=2, layers="head")


def test_a_weight_made_of_others_is_not_followed_and_told_of():
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    run, task, train, queries = recorded_run(nn.Sequential(normed, nn.Linear(6, 3)), torch.randn(12, 4), kind=torch.optim.AdamW)
    with pytest.warns(UserWarning, match=r"scores follow 38% of the trained weights .*: 0.parametrizations.weight.original0"):
        attribute("source", run, task, train, queries)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_segments", 0, "num_segments: input should be greater than or equal to 1; got 0"),
        ("weights", "foo", "weights: input should be 'last' or 'mean'; got 'foo'"),
        ("splits", -1, "splits: input should be greater than or equal to 0; got -1"),
        ("damping", "abc", "damping: input should be a valid number.*; got 'abc'"),
        ("layers", "(", r"layers: '\(' is no regular expression: missing \)"),
        ("colour", 1, "unknown settings colour; known are num_segments"),
    ],
)
def test_settings_that_no_method_takes_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        attribute("source", *setting("classification"), **{name: value})


def test_a_model_whose_weights_are_mostly_not_followed_is_told_of():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.body(x)[0][:, -1])

    run, task, train, queries = recorded_run(Recurrent(), torch.randn(12, 6, 4))
    with pytest.warns(
        UserWarning, match=r"scores follow 8% of the trained weights .* left out .*: body.weight_ih_l0, body.weight_hh_l0"
    ):
        attribute("gradient_dot", run, task, train, queries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute("gradient_dot", run, task, train, queries, layers="head")  # chosen so
        attribute("gradient_dot", *setting("classification"))


@pytest.mark.parametrize("kind", [CausalLM, Classification, Regression])
def test_a_measurement_that_no_task_has_is_refused(kind):
    with pytest.raises(ValueError, match=r"task: measurement: expected one of (loss|absolute_error), .*; got 'accuracy'"):
        kind.__post_init__(SimpleNamespace(measurement="accuracy"))  # types are checked only here, not where users are


def test_examples_that_are_no_tensors_are_refused():
    with pytest.raises(ValueError, match="examples: the inputs are ndarray, the targets list; expected tensors; give"):
        Examples.__post_init__(SimpleNamespace(x=np.zeros((3, 2)), y=[0, 1, 2]))  # as above


@pytest.mark.parametrize(("side", "name"), [(0, "inputs"), (1, "targets")])
def test_examples_that_are_no_numbers_are_named(side, name):
    values = [torch.randn(4, 3), torch.randn(4, 1)]
    Examples(*values).check_finite("rows")
    values[side][2, 0] = torch.nan
    with pytest.raises(ValueError, match=f"rows: the {name} of 1 of 4 rows are not finite, such as that of row 2; expected"):
        Examples(*values).check_finite("rows")
