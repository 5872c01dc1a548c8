"""Replayed training against autograd through all of it at once, finite differences of `torch.optim`, and real retraining."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import tda.replay
from tda.data import Data, Examples
from tda.replay import check_replay, replay, replay_scores
from tda.task import CausalLM, Classification, Regression, Task
from tda.trajectory import Recorder, Run
from tests.helpers import document_loss, random_documents, tiny_gpt2, tiny_llama

NUM_ROWS, NUM_STEPS = 14, 11
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.0, weight_decay=0.0),
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.0),
    "sgd with momentum and decay": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.8, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0),
    "sgd with decay but for biases": lambda parameters: torch.optim.SGD(but_vectors(parameters, 0.1), lr=0.05, momentum=0.8),
    "adamw with decay but for biases": lambda parameters: torch.optim.AdamW(but_vectors(parameters, 0.5), lr=0.02, eps=1e-3),
    "adamw with decay": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.5),
}


def but_vectors(parameters: list[nn.Parameter], decay: float) -> list[dict]:
    """Groups as most training loops have them."""
    matrices, vectors = ([one for one in parameters if (one.ndim > 1) is wide] for wide in (True, False))
    return [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": decay}]


def network(seed: int = 0, *, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 4)).double().eval()


def examples(num_rows: int = NUM_ROWS, *, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    return Examples(x, torch.randint(0, 4, (num_rows,), generator=generator))


def some_batches(num_rows: int = NUM_ROWS, *, size: int = 4, seed: int = 0) -> list[np.ndarray]:
    """Uneven ones; a row may be there twice."""
    random = np.random.default_rng(seed)
    return [random.integers(0, num_rows, size=size + number % 2) for number in range(NUM_STEPS)]


def mean_loss(model: nn.Module, data: Data, rows: np.ndarray, weights: Tensor) -> Tensor:
    """The training loss of a step, written out: the mean over all terms, of losses that are weighted."""
    if isinstance(data, Examples):
        losses = F.cross_entropy(model(data.x[rows]), data.y[rows], reduction="none")
        return (weights[rows] * losses).mean()
    total = sum(weights[row] * document_loss(model, data, row) for row in rows)
    return total / int(data.num_loss_tokens[rows].sum())


def really_train(
    build, make_optimizer, data: Data, batches: list[np.ndarray], weights: np.ndarray | None = None, *, loss=mean_loss
) -> tuple[nn.Module, Run]:
    """A loop as users write it, with a falling learning rate."""
    model = build()
    optimizer = make_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    w = torch.ones(len(data), dtype=torch.float64) if weights is None else torch.from_numpy(weights)
    recorder = Recorder(model, optimizer, num_steps=len(batches), num_checkpoints=3)
    for rows in batches:
        optimizer.zero_grad()
        loss(model, data, rows, w).backward()
        optimizer.step()
        recorder.step(rows)
        scheduler.step()
    return model, recorder.run


def finite_differences(retrain, cost, rows: list[int], num_rows: int, *, h: float = 1e-4) -> Tensor:
    """(query, row): minus the derivative of `cost` (query) after real retraining, by central differences."""
    columns = []
    for row in rows:
        up, down = np.ones(num_rows), np.ones(num_rows)
        up[row] += h
        down[row] -= h
        columns.append((cost(retrain(down)) - cost(retrain(up))) / (2 * h))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def all_costs(task: Task, model: nn.Module, queries: Data) -> Tensor:
    return torch.cat([task.costs(model, queries.batch([row]), weights=torch.ones(1))[1] for row in range(len(queries))])


def unrolled(run: Run, data: Examples, queries: Examples, task: Task) -> Tensor:
    """The slow twin: one graph through all of training, AdamW and SGD written as on paper."""
    w = torch.ones(len(data), dtype=torch.float64, requires_grad=True)
    x = {name: value.clone().requires_grad_() for name, value in run.initial.items()}
    m, v, o = dict.fromkeys(x, 0.0), dict.fromkeys(x, 0.0), run.optimizer
    for t, (rows, rate) in enumerate(zip(run.batches, run.learning_rates.tolist(), strict=True), start=1):
        losses = F.cross_entropy(functional_call(run.model, x, (data.x[rows],)), data.y[rows], reduction="none")
        loss = (w[rows] * losses).mean()
        for (name, value), g in zip(x.items(), torch.autograd.grad(loss, list(x.values()), create_graph=True), strict=True):
            decay = 0.0 if value.ndim == 1 and o.undecayed else o.weight_decay
            if o.kind == "sgd":
                m[name] = o.momentum * m[name] + g + decay * value
                x[name] = value - rate * m[name]
            else:
                m[name] = o.beta1 * m[name] + (1 - o.beta1) * g
                v[name] = o.beta2 * v[name] + (1 - o.beta2) * g**2
                m_hat, v_hat = m[name] / (1 - o.beta1**t), v[name] / (1 - o.beta2**t)
                x[name] = value - rate * (m_hat / (v_hat.sqrt() + o.epsilon) + decay * value)
    class_logits = functional_call(run.model, x, (queries.x,)).log_softmax(dim=1)
    p = class_logits.gather(1, queries.y[:, None])[:, 0].exp()
    costs = -torch.log(p / (1 - p))
    return torch.stack([-torch.autograd.grad(cost, w, retain_graph=True)[0] for cost in costs])


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_scores_are_autograd_through_all_of_training_and_differences_of_retraining(make_optimizer):
    data, queries, task = examples(), examples(3, seed=1), Classification()
    _, run = really_train(network, make_optimizer, data, some_batches())
    scores = torch.from_numpy(replay_scores(run, task, data, queries))
    torch.testing.assert_close(scores, unrolled(run, data, queries, task))

    def retrain(weights):
        return really_train(network, make_optimizer, data, some_batches(), weights)[0]

    differences = finite_differences(retrain, lambda model: all_costs(task, model, queries), [0, 5, 9], len(data))
    # h = 1e-4 leaves a relative error of about h^2 times a third derivative, and rounding of 1e-16 / h
    torch.testing.assert_close(scores[:, [0, 5, 9]], differences, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_replay_is_real_retraining_with_weights(make_optimizer):
    data, weights = examples(), np.random.default_rng(3).uniform(0, 2, size=NUM_ROWS)
    _, run = really_train(network, make_optimizer, data, some_batches())
    retrained, _ = really_train(network, make_optimizer, data, some_batches(), weights)
    got = replay(run, Classification(), data, weights)
    for name, parameter in retrained.named_parameters():
        torch.testing.assert_close(got[name], parameter.detach())
    torch.testing.assert_close(replay(run, Classification(), data), run.checkpoints[-1].weights)
    assert check_replay(run, Classification(), data) < 1e-12


@pytest.mark.parametrize("num_dead", [1, 5], ids=["a dead unit", "nothing but the last bias learns"])
def test_weights_that_never_got_a_gradient_are_not_nan_under_adamw(num_dead):
    """A second moment of 0, whose root has no derivative."""
    data, queries, task = examples(), examples(3, seed=1), Classification()

    def build():
        model = network(activation=nn.ReLU)
        with torch.no_grad():
            model[0].bias[:num_dead] = -100
        return model

    make_optimizer = OPTIMIZERS["adamw"]
    _, run = really_train(build, make_optimizer, data, some_batches())
    assert any((moment == 0).any() for moment in run.checkpoints[-1].second_moments.values())
    scores = torch.from_numpy(replay_scores(run, task, data, queries))
    differences = finite_differences(
        lambda weights: really_train(build, make_optimizer, data, some_batches(), weights)[0],
        lambda model: all_costs(task, model, queries),
        [0, 5, 9],
        len(data),
    )
    torch.testing.assert_close(scores[:, [0, 5, 9]], differences, rtol=1e-5, atol=1e-8)


def half_frozen_gpt2() -> nn.Module:
    """Tied embeddings; the first block's weights do not move."""
    model = tiny_gpt2()
    model.transformer.h[0].requires_grad_(False)
    return model


# Of the largest score; h leaves an error of about h^2. A Llama normalises in float32 whatever its weights are, so that its costs
# are right to 1e-7 and their differences over 2h to about 1e-4: h cannot be as small.
@pytest.mark.parametrize(
    ("build", "h", "tolerance"), [(half_frozen_gpt2, 1e-4, 1e-5), (tiny_llama, 2e-3, 5e-3)], ids=["gpt2", "llama"]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw with decay"])
def test_language_models_with_tied_embeddings_and_uneven_documents(build, h, tolerance, optimizer):
    documents, queries, task = random_documents(6), random_documents(2, seed=9), CausalLM()

    def make_optimizer(parameters):
        made = OPTIMIZERS[optimizer](parameters)
        made.param_groups[0]["lr"] /= 20
        return made

    batches = [rows[:3] for rows in some_batches(6)][:5]
    _, run = really_train(build, make_optimizer, documents, batches)
    scores = torch.from_numpy(replay_scores(run, task, documents, queries))
    differences = finite_differences(
        lambda weights: really_train(build, make_optimizer, documents, batches, weights)[0],
        lambda model: torch.stack([document_loss(model, queries, row).detach() for row in range(len(queries))]),
        [0, 3],
        len(documents),
        h=h,
    )
    torch.testing.assert_close(scores[:, [0, 3]], differences, rtol=tolerance, atol=tolerance * float(scores.abs().max()))


class WithExtras(nn.Module):
    """A buffer, statistics of batches gone by, one layer used twice, a parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 4)
        self.spare = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]), persistent=False)
        self.norm.running_mean += 0.3
        self.norm.running_var += 0.5

    def forward(self, x):
        h = torch.tanh(self.first(self.norm(torch.tanh(self.first(x)))))
        return self.last(h * self.scale)


@pytest.mark.parametrize("optimizer", ["sgd with momentum and decay", "adamw with decay"])
def test_buffers_shared_layers_and_unused_parameters(optimizer):
    data, queries, task = examples(), examples(3, seed=1), Classification("loss")

    def build():
        return WithExtras().double().eval()

    model, run = really_train(build, OPTIMIZERS[optimizer], data, some_batches())
    assert torch.equal(model.spare, torch.ones(2, dtype=torch.float64))  # no gradient, no decay
    assert "spare" not in replay(run, task, data)
    scores = torch.from_numpy(replay_scores(run, task, data, queries))
    differences = finite_differences(
        lambda weights: really_train(build, OPTIMIZERS[optimizer], data, some_batches(), weights)[0],
        lambda trained: all_costs(task, trained, queries),
        [0, 5],
        len(data),
    )
    torch.testing.assert_close(scores[:, [0, 5]], differences, rtol=1e-5, atol=1e-8)


def test_an_operation_that_cannot_be_batched_over_queries():
    """Group norm's second derivatives: the queries are then taken one after another."""
    data, queries, task = examples(), examples(3, seed=1), Classification("loss")

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 4)).double().eval()

    _model, run = really_train(build, OPTIMIZERS["adamw with decay"], data, some_batches())
    scores = torch.from_numpy(replay_scores(run, task, data, queries))
    differences = finite_differences(
        lambda weights: really_train(build, OPTIMIZERS["adamw with decay"], data, some_batches(), weights)[0],
        lambda trained: all_costs(task, trained, queries),
        [0, 5],
        len(data),
    )
    torch.testing.assert_close(scores[:, [0, 5]], differences, rtol=1e-5, atol=1e-8)


def test_sparse_gradients_of_embeddings_are_those_of_dense_ones():
    data = Examples(torch.arange(NUM_ROWS * 3).reshape(NUM_ROWS, 3) % 7, torch.arange(NUM_ROWS) % 4)
    scores = []
    for sparse in (True, False):

        def build(sparse=sparse):
            torch.manual_seed(0)
            return nn.Sequential(nn.Embedding(7, 5, sparse=sparse), nn.Flatten(), nn.Linear(15, 4)).double().eval()

        model, run = really_train(build, OPTIMIZERS["sgd"], data, some_batches())
        scores.append(replay_scores(run, Classification(), data, data))
        assert run.model[0].sparse is model[0].sparse is sparse
    np.testing.assert_array_equal(*scores)


def test_batch_norms_that_learned_statistics_are_named():
    model = WithExtras()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = Recorder(model, optimizer, num_steps=2, num_checkpoints=1)
    for _ in range(2):
        model.train()(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        recorder.step(range(4))
    with pytest.raises(ValueError, match="replay: norm normalised by batches while it was trained"):
        replay(recorder.run, Classification(), examples())


def test_scores_predict_leave_one_out_retraining_of_a_regression():
    """Sign and size, with mini-batches, momentum and decay: the cost really rises when rows that help are left out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(272, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]], dtype=torch.float64)
    y = y + 0.3 * torch.randn(272, 1, generator=generator, dtype=torch.float64)
    data, queries, task = Examples(x[:256], y[:256]), Examples(x[256:], y[256:]), Regression("squared_error")

    def build():
        torch.manual_seed(0)
        return nn.Linear(4, 1).double().eval()

    def squared(model, examples, rows, weights):
        return (weights[rows, None] * (model(examples.x[rows]) - examples.y[rows]).square()).mean()

    random = np.random.default_rng(0)
    batches = [rows for _ in range(6) for rows in random.permutation(256).reshape(-1, 16)]
    make_optimizer = OPTIMIZERS["sgd with momentum and decay"]
    model, run = really_train(build, make_optimizer, data, batches, loss=squared)
    scores = replay_scores(run, task, data, queries)[:, :24]
    base, truth = all_costs(task, model, queries), []
    for row in range(24):
        weights = np.ones(256)
        weights[row] = 0
        left_out, _ = really_train(build, make_optimizer, data, batches, weights, loss=squared)
        truth.append((all_costs(task, left_out, queries) - base).numpy())
    truth = np.array(truth).T
    assert np.corrcoef(scores.ravel(), truth.ravel())[0, 1] > 0.99
    assert (scores * truth).sum() / (scores * scores).sum() == pytest.approx(1, abs=0.1)


@functools.cache
def a_run(optimizer: str = "adamw with decay") -> tuple[Run, Classification, Examples, Examples]:
    data = examples()
    return really_train(network, OPTIMIZERS[optimizer], data, some_batches())[1], Classification(), data, examples(5, seed=1)


@settings(max_examples=12)
@given(
    st.integers(1, NUM_STEPS + 2),
    st.integers(1, 6),
    st.sampled_from([1, 100, 2**20]),
    st.sampled_from(["sgd with momentum", "adamw with decay"]),
)
def test_spacing_and_sizes_of_groups_change_nothing(spacing, queries_at_once, block_elements, optimizer):
    run, task, data, queries = a_run(optimizer)
    expected = replay_scores(run, task, data, queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tda.replay, "BLOCK_ELEMENTS", block_elements)
        got = replay_scores(run, task, data, queries, spacing=spacing, queries_at_once=queries_at_once)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-14)


def test_the_aggregate_is_the_mean_of_the_queries():
    run, task, data, queries = a_run()
    scores = replay_scores(run, task, data, queries)
    np.testing.assert_allclose(
        replay_scores(run, task, data, queries, aggregate=True), scores.mean(axis=0, keepdims=True), atol=1e-14
    )


def test_a_row_that_no_batch_has_scores_zero_and_the_model_is_left_as_it_was():
    run, task, data, queries = a_run()
    more = Examples(torch.cat([data.x, data.x]), torch.cat([data.y, data.y]))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    scores = replay_scores(run, task, more, queries)
    assert (scores[:, NUM_ROWS:] == 0).all()
    torch.testing.assert_close(run.model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_a_run_in_float32_is_differentiated_in_float64():
    data, queries, task = examples(), examples(3, seed=1), Classification()
    narrow = Examples(data.x.float(), data.y)
    _, run = really_train(lambda: network().float(), OPTIMIZERS["adamw with decay"], narrow, some_batches())
    double = dataclasses.replace(run, initial={name: value.double() for name, value in run.initial.items()}, model=network())
    scores = torch.from_numpy(replay_scores(run, task, narrow, Examples(queries.x.float(), queries.y), dtype=torch.float64))
    exact = Examples(narrow.x.double(), narrow.y)
    torch.testing.assert_close(scores, unrolled(double, exact, Examples(queries.x.float().double(), queries.y), task))


def changed(**changes):
    run, task, data, queries = a_run("sgd with momentum")
    return dataclasses.replace(run, **changes), task, data, queries


def test_refusal_of_a_run_without_initial_weights():
    with pytest.raises(ValueError, match="no initial weights; expected those before the first step; record the run"):
        replay_scores(*changed(initial={}))
    partial = {"0.weight": network().state_dict()["0.weight"]}
    with pytest.raises(ValueError, match=r"the initial weights lack 0.bias, 2.weight, 2.bias; expected every"):
        replay_scores(*changed(initial=partial))


def test_refusal_of_steps_without_rows_or_with_rows_of_other_data():
    empty = [np.array([], dtype=np.int64)] * NUM_STEPS
    for batches in (empty, []):
        with pytest.raises(ValueError, match="step 1 has no batch; expected the row numbers"):
            replay_scores(*changed(batches=batches))
    far = [np.array([0, 99])] * NUM_STEPS
    with pytest.raises(ValueError, match="step 1 was taken on rows 0 to 99, the training data has 14; expected the data"):
        replay_scores(*changed(batches=far))


def test_refusal_of_training_mode():
    run, task, data, queries = copy.deepcopy(a_run())
    run.model[1].train()
    with pytest.raises(ValueError, match=r"1 is in training mode; expected a model in eval mode.*call model.eval"):
        replay_scores(run, task, data, queries)


def test_refusal_of_weights_of_another_number_of_rows():
    run, task, data, _ = a_run()
    with pytest.raises(ValueError, match=r"weights of shape \(3,\) for 14 training rows; expected one for each row"):
        replay(run, task, data, np.ones(3))


def test_refusal_of_other_learning_rates():
    run, task, data, queries = changed()
    with pytest.raises(ValueError, match=r"at step 4 .* the same way by another length: learning rates"):
        replay_scores(dataclasses.replace(run, learning_rates=run.learning_rates * 1.1), task, data, queries)


def test_refusal_of_another_order():
    run, task, data, queries = changed()
    with pytest.raises(ValueError, match=r"off by .* expected at most 0.01.* they went another way: batches"):
        replay_scores(dataclasses.replace(run, batches=run.batches[::-1]), task, data, queries)


def test_refusal_of_other_settings_of_the_optimizer():
    run, task, data, queries = changed()
    other = dataclasses.replace(run.optimizer, momentum=0.0)
    with pytest.raises(ValueError, match="the replayed weights are off by"):
        replay_scores(dataclasses.replace(run, optimizer=other), task, data, queries)
    assert replay_scores(dataclasses.replace(run, optimizer=other), task, data, queries, tolerance=10.0).shape == (5, NUM_ROWS)


class Routed(nn.Module):
    """One layer for all examples, and one for those whose first input is large."""

    def __init__(self):
        super().__init__()
        self.every, self.some = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        outputs, large = self.every(x), x[:, 0] > 0
        return outputs.index_add(0, large.nonzero()[:, 0], self.some(x[large])) if large.any() else outputs


@pytest.mark.filterwarnings("ignore:recorder. .* did not move between some checkpoints")
@pytest.mark.parametrize("first", ["large", "small"])
def test_refusal_of_parameters_that_some_steps_skip(first):
    """Those that the first step skips counted as never trained, and scores of the rows that trained them were 0."""
    data = examples()
    large = np.flatnonzero(data.x[:, 0] > 0)
    steps = 2 * [large, np.setdiff1d(np.arange(NUM_ROWS), large)]
    _, run = really_train(lambda: Routed().double().eval(), OPTIMIZERS["sgd"], data, steps if first == "large" else steps[::-1])
    with pytest.raises(ValueError, match=r"replay: some.weight, some.bias had a gradient in some steps only; expected"):
        replay_scores(run, Classification(), data, data)


def test_refusal_of_operations_that_have_no_second_derivative():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.EmbeddingBag(7, 5), nn.Linear(5, 4)).double().eval()

    data = Examples(torch.arange(NUM_ROWS * 3).reshape(NUM_ROWS, 3) % 7, torch.arange(NUM_ROWS) % 4)
    _, run = really_train(build, OPTIMIZERS["sgd"], data, some_batches())
    with pytest.raises(ValueError, match=r"cannot be differentiated twice: .*embedding_bag.*; expected .* such as source"):
        replay_scores(run, Classification(), data, data)


def test_refusal_of_a_run_in_bfloat16_names_it():
    """As `attribute` hands it over, in float32."""
    data = examples()
    narrow = Examples(data.x.bfloat16(), data.y)
    _, run = really_train(lambda: nn.Sequential(*network()).bfloat16().eval(), OPTIMIZERS["sgd"], narrow, some_batches())
    with pytest.raises(ValueError, match="the recorded weights are in bfloat16, whose rounding in every step is not repeated"):
        replay_scores(run.at_least_float32(), Classification(), Examples(narrow.x.float(), data.y), data)


def test_refusal_of_a_run_with_dropout_names_it():
    data = examples()

    def build():
        return nn.Sequential(*network(), nn.Dropout(0.5)).train()

    torch.manual_seed(1)
    _, run = really_train(build, OPTIMIZERS["sgd"], data, some_batches())
    with pytest.raises(ValueError, match=r"the model has dropout, which must have been off \(eval mode\) in training"):
        replay_scores(run, Classification(), data, data)


def test_refusal_of_checkpoints_of_another_model_or_precision():
    run, task, data, queries = changed()
    half = [
        dataclasses.replace(held, weights={name: (10 * value).half() for name, value in held.weights.items()})
        for held in run.checkpoints
    ]
    with pytest.raises(ValueError, match=r"the checkpoint is torch.float16, the initial weights are torch.float64"):
        replay_scores(dataclasses.replace(run, checkpoints=half), task, data, queries)
    other = [dataclasses.replace(held, weights={}) for held in run.checkpoints]
    with pytest.raises(ValueError, match=r"the checkpoint at step 4 has no 0.weight of the replay's shape"):
        replay_scores(dataclasses.replace(run, checkpoints=other), task, data, queries)


def test_refusal_of_derivatives_that_overflow():
    """Regression at a rate far above 2 / curvature: the weights are still numbers, derivatives are products of huge ones."""
    data = Examples(torch.full((4, 1), 30.0), torch.ones(4, 1))

    def squared(model, examples, rows, weights):
        return (model(examples.x[rows]) - examples.y[rows]).square().mean()

    _, run = really_train(lambda: nn.Linear(1, 1).eval(), OPTIMIZERS["sgd"], data, [np.array([0])] * 15, loss=squared)
    with pytest.raises(ValueError, match="the scores of 4 of 4 queries are not finite, the first is 0; expected numbers"):
        replay_scores(run, Regression("squared_error"), data, data)
