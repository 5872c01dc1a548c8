"""Gauss-Newton products, solvers, and what methods make of them, against explicit matrices in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from tda.attribute import attribute
from tda.data import Examples, batches
from tda.ekfac import EKFAC
from tda.fitted import Fitted, Settings
from tda.ggn import gauss_newton_product, pack, queries_at_once, unpack
from tda.iterative import block_krylov, conjugate_gradients, descend, largest_eigenvalue
from tda.methods import _solved_influence
from tda.model import Layer, layer_matrix, layer_parameters, linear_modules, tracked_layers
from tda.preconditioner import DiagonalCurvature, scalar
from tda.segments import Segment
from tda.solve import DampedCurvature, respond
from tda.task import CausalLM, Classification
from tda.trajectory import averaged
from tda.trak import CountSketch, features, trak_scores
from tests.helpers import random_documents, tiny_gpt2, tiny_llama
from tests.unit.test_attribute import gradient, setting
from tests.unit.test_ekfac import dense, some_factors

SINGLE = {"rtol": 1e-4, "atol": 1e-5}  # transformers' Llama normalises in float32


def dense_ggn(model, layers, data, task, *, weight: float) -> torch.Tensor:
    """The mean over rows of w J^T H J over all layers together, an output and a term at a time."""
    total = 0.0
    for row in range(len(data)):
        batch = data.batch([row])
        outputs = task.outputs(model, batch)
        J = torch.stack([gradient(model, layers, value) for value in outputs.flatten()])
        H = torch.autograd.functional.hessian(lambda z, batch=batch: task.output_losses(z, batch).sum(), outputs.detach())
        total = total + weight * J.T @ H.reshape(len(J), len(J)) @ J / len(data)
    return total


def model_of(kind: str):
    if kind in ("llama", "gpt2"):
        return tiny_llama() if kind == "llama" else tiny_gpt2(), CausalLM(), random_documents(3)
    run, task, train, _queries = setting(kind)
    return run.at(-1), task, train.select(range(5))


PATTERNS = {"llama": r".*layers\.1.*(v_proj|down_proj|q_proj)", "gpt2": r".*h\.1.*(c_attn|mlp.c_fc)"}


@pytest.mark.parametrize("kind", ["classification", "regression", "conv", "llama", "gpt2"])
def test_gauss_newton_products_are_those_of_the_dense_matrix(kind):
    model, task, data = model_of(kind)
    layers = tracked_layers(model, PATTERNS.get(kind, ".*"), probe=lambda model: task.losses(model, data.batch([0])))
    G = dense_ggn(model, layers, data, task, weight=0.3)
    v = torch.randn(2, len(G), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for batch_tokens in (3, 99):
        held = list(batches(data, batch_tokens=batch_tokens))
        product = gauss_newton_product(model, layers, held, task=task, weight=0.3)
        torch.testing.assert_close(product(v), v @ G, **(SINGLE if kind == "llama" else {}))


@pytest.mark.parametrize("kind", ["classification", "regression", "conv", "llama", "gpt2"])
def test_products_in_forward_mode_or_by_going_back_twice_are_the_same(kind, monkeypatch):
    model, task, data = model_of(kind)
    layers = tracked_layers(model, PATTERNS.get(kind, ".*"), probe=lambda model: task.losses(model, data.batch([0])))
    held = list(batches(data, batch_tokens=3))
    v = torch.randn(2, sum(layer.d_out * layer.d_in for layer in layers), dtype=torch.float64)
    expected = gauss_newton_product(model, layers, held, task=task, weight=0.3)(v)
    monkeypatch.setattr("tda.ggn.BACK_TWICE_ON", ())
    torch.testing.assert_close(
        gauss_newton_product(model, layers, held, task=task, weight=0.3)(v), expected, **(SINGLE if kind == "llama" else {})
    )

    def refused(*_arguments):
        raise NotImplementedError("Trying to use forward AD with an operation that does not support it")

    monkeypatch.setattr("tda.ggn.jvp", refused)
    product = gauss_newton_product(model, layers, held, task=task, weight=0.3)
    for _ in range(2):
        assert torch.equal(product(v), expected)


def test_a_device_without_memory_is_not_tried_the_other_way(monkeypatch):
    model, task, data = model_of("classification")
    layers, asked = tracked_layers(model, probe=lambda model: task.losses(model, data.batch([0]))), []

    def full(*_arguments):
        asked.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tda.ggn.BACK_TWICE_ON", ())
    monkeypatch.setattr("tda.ggn.jvp", full)
    product = gauss_newton_product(model, layers, list(batches(data, batch_tokens=99)), task=task, weight=1.0)
    v = torch.ones(1, sum(layer.d_out * layer.d_in for layer in layers), dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            product(v)
    assert len(asked) == 2  # forward derivatives, both times


class OldStyle(torch.autograd.Function):
    """A function that `torch.func` refuses, as some models have them; it can be differentiated twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class OnceOnly(torch.autograd.Function):
    """A function that has forward derivatives and cannot be differentiated twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * x.cos()


class Bent(nn.Module):
    """Two layers with a function between them; the others are used only if an input is large."""

    def __init__(self, bend):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third, self.bend = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3), bend

    def forward(self, x):
        h = self.bend(self.first(x))
        return self.second(h) + self.third(h) if x.max() > 1 else self.second(h)


@pytest.mark.parametrize("first_way", ["forward", "back twice"])
@pytest.mark.parametrize("bend", [OldStyle.apply, OnceOnly.apply], ids=["torch.func refuses", "once differentiable"])
def test_a_function_that_one_way_refuses_takes_the_other(bend, first_way, monkeypatch):
    monkeypatch.setattr("tda.ggn.BACK_TWICE_ON", ("cpu",) if first_way == "back twice" else ())
    models = [Bent(one).double().eval() for one in (bend, torch.sin)]
    data = Examples(1 + torch.rand(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,)))
    products = []
    for model in models:
        layers = tracked_layers(model, probe=lambda model: model(data.x))
        product = gauss_newton_product(model, layers, [data.batch(range(6))], task=Classification(), weight=1.0)
        products.append(product(torch.eye(54, dtype=torch.float64)))
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("ways", [("cpu",), ()], ids=["back twice", "forward"])
def test_a_layer_that_a_batch_does_not_use_has_no_curvature_there(ways, monkeypatch):
    monkeypatch.setattr("tda.ggn.BACK_TWICE_ON", ways)
    model = Bent(OldStyle.apply if ways else torch.sin).double().eval()
    data = Examples(torch.tensor([[2.0], [0.5]], dtype=torch.float64) * torch.ones(2, 5), torch.tensor([0, 2]))
    layers = tracked_layers(model, probe=lambda model: model(data.x))
    product = gauss_newton_product(model, layers, list(batches(data, batch_tokens=1)), task=Classification(), weight=1.0)
    total = 0.0
    for row in range(2):
        batch = data.batch([row])
        plain = Bent(torch.sin).double().eval()
        outputs = plain(batch.x)
        J = torch.stack([
            pack(
                {layer.name: layer_matrix(plain.get_submodule(layer.name), *_gradients(plain, layer, z)) for layer in layers},
                layers,
            )
            for z in outputs[0]
        ])
        p = outputs[0].softmax(dim=0).detach()
        total = total + J.T @ (p.diag() - p[:, None] * p) @ J / 2
    torch.testing.assert_close(product(torch.eye(54, dtype=torch.float64)), total)


def _gradients(model, layer, value):
    module = model.get_submodule(layer.name)
    return torch.autograd.grad(value, [module.weight, module.bias], retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("kind", ["classification", "regression", "conv", "llama"])
def test_outputs_are_what_the_losses_are_made_of(kind):
    model, task, data = model_of(kind)
    batch = data.batch(range(len(data)))
    outputs = task.outputs(model, batch).detach().requires_grad_()
    losses = task.output_losses(outputs, batch)
    owner = np.repeat(np.arange(len(data)), batch.sizes)
    for row, loss in enumerate(task.losses(model, batch)[1]):
        torch.testing.assert_close(losses[torch.from_numpy(owner == row)].sum(), loss, check_dtype=False)
    responses, slopes = task.responses(outputs, batch)
    (by_outputs,) = torch.autograd.grad(losses.sum(), outputs, retain_graph=True)
    (through_responses,) = torch.autograd.grad((responses * slopes.detach()).sum(), outputs)
    torch.testing.assert_close(through_responses, by_outputs)


def test_rows_and_matrices_are_two_views():
    model, layers = tiny_gpt2(), tracked_layers(tiny_gpt2())
    modules = linear_modules(model)
    matrices = {layer.name: torch.randn(2, layer.d_out, layer.d_in) for layer in layers}
    again = unpack(pack(matrices, layers), layers)
    for layer in layers:
        assert torch.equal(again[layer.name], matrices[layer.name])
        module = modules[layer.name]
        held = layer_parameters(module, layer_matrix(module, module.weight, module.bias))
        assert torch.equal(held["weight"], module.weight)
        assert torch.equal(held["bias"], module.bias)
    assert queries_at_once(layers, positions=1, values=1) == 1
    assert queries_at_once(layers, positions=1, values=10 * pack(matrices, layers).shape[1]) == 10


def system(size: int = 8, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A positive matrix, another near it, and two right sides, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    A = root @ root.T / size + 0.2 * torch.eye(size, dtype=torch.float64)
    near = A + 0.1 * torch.diag(torch.rand(size, generator=generator, dtype=torch.float64))
    b = torch.randn(2, size, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    return A, near, b


@pytest.mark.parametrize("iterations", [8, 40])
def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_eigenvalues(iterations):
    A, near, b = system()
    found = conjugate_gradients(lambda v: v @ A, b, precondition=lambda v: torch.linalg.solve(near, v.T).T, iterations=iterations)
    torch.testing.assert_close(found, torch.linalg.solve(A, b.T).T)
    started = conjugate_gradients(lambda v: v @ A, b, precondition=lambda v: v / 2, iterations=0)
    assert torch.equal(started, b / 2)


def test_every_step_of_conjugate_gradients_is_nearer():
    A, _, b = system()
    solution = torch.linalg.solve(A, b.T).T
    errors = []
    for iterations in range(8):
        e = conjugate_gradients(lambda v: v @ A, b, precondition=lambda v: v, iterations=iterations)[0] - solution[0]
        errors.append(float(e @ A @ e))
    assert errors == sorted(errors, reverse=True)


def test_descending_is_the_neumann_series():
    A, near, b = system()
    scale = 2 * torch.linalg.eigvalsh(A).max()
    found = descend(lambda _: lambda v: v @ A, b, precondition=lambda v: v / scale, iterations=5)
    shrink = torch.eye(8, dtype=torch.float64) - A / scale
    series = sum(torch.linalg.matrix_power(shrink, power) for power in range(6)) / scale
    torch.testing.assert_close(found, b @ series)
    solved = descend(
        lambda _: lambda v: v @ A,
        b,
        precondition=lambda v: torch.linalg.solve(near, v.T).T,
        iterations=400,
        step_size=0.1,
        momentum=0.9,
        halve_every=200,
    )
    torch.testing.assert_close(solved, torch.linalg.solve(A, b.T).T)
    with pytest.raises(ValueError, match="5000 stochastic iterations have diverged"):
        descend(lambda _: lambda v: v @ A, b, precondition=lambda v: v * 5, iterations=5000)


def test_power_iteration_finds_the_largest_eigenvalue():
    A, _, b = system()
    found = largest_eigenvalue(lambda v: v @ A, b, iterations=200, generator=torch.Generator().manual_seed(0))
    assert found == pytest.approx(torch.linalg.eigvalsh(A).max().item())


def rows_of(held: Fitted, checkpoint: int) -> torch.Tensor:
    """(row, value) gradients of every training row's loss."""
    model = held.model(checkpoint)
    return torch.stack([
        gradient(model, held.layers, held.task.losses(model, held.train.batch([row]))[0]) for row in range(len(held.train))
    ])


def segment_ggn(held: Fitted, segment: Segment, checkpoints: list[int]) -> torch.Tensor:
    """The dense matrix on the rows that the segment saw, averaged over checkpoints."""
    seen = held.train.select(np.flatnonzero(held.exposure[:, segment.index]))
    models = [held.model(checkpoint) for checkpoint in checkpoints]
    weight = 1 / segment.tokens_per_document
    return sum(dense_ggn(model, held.layers, seen, held.task, weight=weight) for model in models) / len(models)


@pytest.mark.parametrize("method", ["cg", "astra", "lissa"])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_solved_influence_is_the_inverse_of_the_dense_matrix(kind, method):
    run, task, train, queries = setting(kind)
    chosen = {"num_segments": 2, "solver_damping": 3.0, "iterations": {"cg": 40, "astra": 200, "lissa": 600}[method]}
    held = Fitted(run, task, train, queries, Settings.of(**chosen))
    G = segment_ggn(held, held.segments[-1], [3])
    matrix = G + 3.0 * torch.eye(len(G), dtype=torch.float64)
    expected = (
        pack(held.query_gradients, held.layers) @ torch.linalg.solve(matrix, rows_of(held, 3).T) * torch.from_numpy(held.shares)
    )
    scores = attribute(method, run, task, train, queries, **chosen)
    # two hundred of ASTRA's shrinking steps come as near as 1%
    tolerance = {"rtol": 0, "atol": 1e-2 * expected.abs().max().item()} if method == "astra" else {}
    torch.testing.assert_close(torch.from_numpy(scores.values), expected, **tolerance)


@pytest.mark.parametrize("solver", [conjugate_gradients, block_krylov])
def test_queries_of_any_size_or_none_are_solved_beside_others(solver):
    """As of queries that are predicted surely, or whose cost is flat: the squares of such gradients are 0 in float32."""
    layer, factors = Layer("a", 5, 4, True, "a"), some_factors(4, 5, seed=0)
    root = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    G, q = root @ root.T / 20, torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    q[1], q[2] = 0, 1e-25 * q[0]
    approximation = EKFAC(factors.Q_A.float(), factors.Q_S.float(), factors.Lambda.float())
    curvature = DampedCurvature([layer], {"a": approximation}, torch.ones(20), {"a": 0.1})
    steps = {"iterations": 60} if solver is conjugate_gradients else {"rounds": 12}

    def solve(curvature, b):
        return solver(curvature.times(lambda v: v @ G), b, precondition=curvature.approximate_inverse, **steps)

    found = respond({"a": q.reshape(4, 4, 5)}, curvature, solve, queries_at_once=4)["a"].flatten(1)
    expected = torch.linalg.solve(G + 0.1 * torch.eye(20), q[[0, 3]].T).T
    torch.testing.assert_close(found[[0, 3]], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[2], 1e-25 * found[0], rtol=1e-3, atol=1e-28)
    assert not found[1].any()


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.05 / (1 - 0.5)), ("adamw", 0.01)])
def test_solvers_start_from_ekfac_with_the_damping_that_training_implies(optimizer, rate):
    run, task, train, queries = setting("classification", optimizer)
    held = Fitted(run, task, train, queries, Settings(num_segments=2))
    factors = held.segment_factors(held.segments[-1], [3]).plain
    P = held.preconditioner([3]) if optimizer == "adamw" else dict.fromkeys(factors, torch.ones(1))

    def damping(name: str) -> float:
        return 1 / (6 * rate * P[name].median().item())  # two segments of six steps each

    response = {
        layer.name: torch.linalg.solve(
            dense(factors[layer.name]) + damping(layer.name) * torch.eye(layer.d_out * layer.d_in, dtype=torch.float64),
            held.query_gradients[layer.name].flatten(1).T,
        ).T
        for layer in held.layers
    }
    expected = (
        torch.cat([response[layer.name] for layer in held.layers], dim=1) @ rows_of(held, 3).T * torch.from_numpy(held.shares)
    )
    started = _solved_influence(held, lambda curvature, b: curvature.approximate_inverse(b))
    torch.testing.assert_close(torch.from_numpy(started), expected)


@pytest.mark.parametrize(
    ("optimizer", "adam"), [("sgd", "scalar"), ("adamw", "scalar"), ("adamw", "symmetric"), ("adamw", "none")]
)
def test_solved_source_is_source_with_dense_responses(optimizer, adam):
    """Two segments of two checkpoints: P^(1/2) (P^(1/2) G P^(1/2) + w + 1/time)^-1 P^(1/2) in each, EK-FAC's decay between."""
    run, task, train, queries = setting("classification", optimizer)
    chosen = {"num_segments": 2, "adam": adam, "iterations": 60}
    held = Fitted(run, task, train, queries, Settings.of(**chosen))
    q, expected = held.query_gradients, 0.0
    for segment, dynamics in reversed(list(zip(held.segments, held.dynamics, strict=True))):
        roots = {name: one.root_P.expand_as(one.M.Lambda) for name, one in dynamics.curvature.items()}
        root = torch.diag(pack(roots, held.layers))
        rate = run.optimizer.weight_decay + 1 / dynamics.time
        M = root @ segment_ggn(held, segment, segment.checkpoints) @ root + rate * torch.eye(len(root), dtype=torch.float64)
        response = pack(q, held.layers) @ root @ torch.linalg.solve(M, root)
        mean = sum(rows_of(held, checkpoint) for checkpoint in segment.checkpoints) / len(segment.checkpoints)
        expected = expected + response @ mean.T * torch.from_numpy(held.exposure[:, segment.index])
        q = dynamics.decay(q)
    scores = attribute("source_cg", run, task, train, queries, **chosen)
    torch.testing.assert_close(torch.from_numpy(scores.values), expected, rtol=1e-5, atol=1e-7)


def test_solved_source_refuses_the_diagonal_form():
    run, task, train, queries = setting("classification", "adamw")
    with pytest.raises(ValueError, match="source_cg: adam is diagonal, a form with no symmetric matrix"):
        attribute("source_cg", run, task, train, queries, num_segments=2, adam="diagonal")


def test_the_diagonal_hybrid_is_that_of_dense_matrices():
    H, generator = some_factors(), torch.Generator().manual_seed(1)
    P = torch.rand(4, 5, generator=generator, dtype=torch.float64) + 0.5
    q = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    matrix, held = dense(H), DiagonalCurvature(H, P)
    kept = torch.diag(torch.exp(-0.7 * (P.flatten() * matrix.diagonal() + 0.05)))
    torch.testing.assert_close(held.decay(q, time=0.7, weight_decay=0.05).flatten(1), q.flatten(1) @ kept)
    response = torch.linalg.solve(matrix, (torch.eye(20, dtype=torch.float64) - kept) @ q.flatten(1).T).T
    found = held.respond(q, time=0.7, weight_decay=0.05).flatten(1)
    torch.testing.assert_close(found, response, rtol=1e-5, atol=1e-6)  # its damping is 1e-8 of the mean eigenvalue


def test_the_diagonal_hybrid_is_exact_where_the_matrix_is_diagonal():
    eye = torch.eye(3, dtype=torch.float64)
    Lambda = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    P = torch.full((3, 3), 0.4, dtype=torch.float64)
    q = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hybrid, symmetric = DiagonalCurvature(EKFAC(eye, eye, Lambda), P), scalar(EKFAC(eye, eye, Lambda), P)
    arguments = {"time": 2.0, "weight_decay": 0.0}
    torch.testing.assert_close(hybrid.respond(q, **arguments), symmetric.respond(q, **arguments), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(hybrid.decay(q, **arguments), symmetric.decay(q, **arguments))


def test_averaged_checkpoints_are_the_mean_of_weights():
    run, task, train, queries = setting("classification", "adamw")
    mean = averaged(run, [[0, 1], [2, 3]])
    assert [checkpoint.step for checkpoint in mean.checkpoints] == [6, 12]
    for name, value in mean.checkpoints[1].weights.items():
        torch.testing.assert_close(value, (run.checkpoints[2].weights[name] + run.checkpoints[3].weights[name]) / 2)
    for name, value in mean.checkpoints[0].second_moments.items():
        each = [run.checkpoints[index].second_moments[name] / (1 - 0.999 ** (3 * index + 3)) for index in (0, 1)]
        torch.testing.assert_close(value / (1 - 0.999**6), sum(each) / 2)
    alone = {"num_segments": 4}  # with one checkpoint per segment there is nothing to average
    slow = attribute("source", run, task, train, queries, **alone).values
    torch.testing.assert_close(
        torch.from_numpy(attribute("fast_source", run, task, train, queries, **alone).values), torch.from_numpy(slow)
    )


def test_fast_source_is_source_at_the_averages():
    """Nothing but the averages' factors and gradients enters, and the queries' at the true end of the run."""
    run, task, train, queries = setting("regression")
    held = Fitted(run, task, train, queries, Settings(num_segments=2))
    fast = Fitted(averaged(run, [[0, 1], [2, 3]]), task, train, queries, Settings(num_segments=2))
    q, expected = held.query_gradients, 0.0
    for index in (1, 0):
        response = pack(fast.dynamics[index].respond(q), held.layers)
        expected = expected + response @ rows_of(fast, index).T * torch.from_numpy(held.exposure[:, index])
        q = fast.dynamics[index].decay(q)
    scores = attribute("fast_source", run, task, train, queries, num_segments=2)
    torch.testing.assert_close(torch.from_numpy(scores.values), expected)


def test_a_sketch_is_a_linear_map_that_keeps_dot_products_on_average():
    some = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = [CountSketch.draw(40, size=16, seed=seed, like=torch.zeros(0, dtype=torch.float64)) for seed in range(3000)]
    P = draws[0].apply(torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(draws[0].apply(some), some @ P)
    assert ((P != 0).sum(dim=1) == 1).all()
    dots = torch.stack([(projected := sketch.apply(some))[0] @ projected[1] for sketch in draws])
    assert abs(dots.mean() - some[0] @ some[1]) < 4 * dots.std() / len(dots) ** 0.5


@pytest.mark.parametrize("kind", ["classification", "regression", "lm"])
def test_trak_is_the_paper_with_dense_matrices(kind):
    run, task, train, queries = setting(kind)
    chosen = {"num_segments": 2, "projection_size": 6}
    held = Fitted(run, task, train, queries, Settings.of(**chosen))
    model, q = run.at(-1), pack(held.query_gradients, held.layers)
    P = CountSketch.draw(q.shape[1], size=6, seed=0, like=q).apply(torch.eye(q.shape[1], dtype=q.dtype))
    Phi, Q = [], []
    for row in range(12):
        batch = train.batch([row])
        outputs = task.outputs(model, batch)
        if kind == "regression":
            f, slope = outputs, 2 * (outputs - batch.y)
        else:
            targets = batch.y if kind == "classification" else batch.tokens[0, 1:]
            p = outputs.softmax(dim=1).gather(1, targets[:, None])
            f, slope = (p / (1 - p)).log(), -(1 - p)
        Phi.append(P.T.to(q.dtype) @ gradient(model, held.layers, f.sum()))
        Q.append(slope.mean().detach())
    Phi, Q = torch.stack(Phi).double(), torch.stack(Q).double()
    expected = q.double() @ P.double() @ torch.linalg.inv(Phi.T @ Phi) @ Phi.T * Q
    scores = attribute("trak", run, task, train, queries, **chosen)
    tolerance = {"rtol": 1e-3, "atol": 1e-3 * expected.abs().max().item()} if kind == "lm" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(torch.from_numpy(scores.values), expected, **tolerance)


def test_trak_is_exact_on_a_linear_model_of_few_weights():
    """Without a projection, on a linear regression at its optimum: the Newton step of leaving a row out, but for its leverage."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(3, generator=generator, dtype=torch.float64) + torch.randn(30, generator=generator, dtype=torch.float64)
    w = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    query = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    scores = trak_scores(query, x, x @ w - y)
    leverage = (x @ torch.linalg.inv(x.T @ x) * x).sum(dim=1)
    for row in range(30):
        keep = torch.arange(30) != row
        without = torch.linalg.lstsq(x[keep], y[keep, None]).solution[:, 0]
        torch.testing.assert_close(query @ (without - w) * (1 - leverage[row]), scores[:, row], rtol=1e-5, atol=1e-7)


def test_features_do_not_depend_on_the_batch():
    model, documents = tiny_gpt2(), random_documents(4)
    layers = tracked_layers(model)
    sketch = CountSketch.draw(
        sum(layer.d_in * layer.d_out for layer in layers), size=5, seed=0, like=torch.zeros(0, dtype=torch.float64)
    )
    together = features(model, layers, documents.batch(range(4)), task=CausalLM(), sketch=sketch)
    for row in range(4):
        alone = features(model, layers, documents.batch([row]), task=CausalLM(), sketch=sketch)
        torch.testing.assert_close(together[0][row : row + 1], alone[0])
        torch.testing.assert_close(together[1][row : row + 1], alone[1])


def test_products_refuse_a_model_in_training_mode():
    model = nn.Linear(2, 2)
    data = Examples(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    layers = tracked_layers(model, probe=lambda model: model(data.x))
    with pytest.raises(ValueError, match="training mode"):
        gauss_newton_product(model, layers, [data.batch([0])], task=Classification(), weight=1.0)
