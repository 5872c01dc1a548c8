"""Tangent kernels and the machines in them, against autograd and real refitting; block Krylov; averaged weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tda.attribute import attribute
from tda.averaged_influence import around
from tda.fitted import Fitted, Settings
from tda.ggn import pack
from tda.iterative import block_krylov
from tda.kernel import rank_one_roots, tangent_kernel
from tda.kernel_machine import fit_softmax, fit_squares, softmax_response, square_response
from tda.surrogate import retrained_effects
from tda.task import CausalLM, Regression
from tda.trajectory import at_mean, averaged
from tests.helpers import dense_gradient, random_documents, tiny_llama
from tests.unit.test_attribute import setting


def fitted(kind: str, optimizer: str = "sgd", **chosen: object) -> Fitted:
    run, task, train, queries = setting(kind, optimizer)
    return Fitted(run, task, train, queries, Settings(num_segments=2, **chosen))


@pytest.mark.parametrize("kind", ["classification", "regression", "conv"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_kernel_is_that_of_autograd(kind, scaled):
    held = fitted(kind, "adamw")
    model, data = held.model(-1), held.train
    roots = {name: rank_one_roots(v) for name, v in held.second_moments(3).items()} if scaled else None
    K, outputs = tangent_kernel(model, held.layers, data, task=held.task, batch_size=5, roots=roots)
    torch.testing.assert_close(outputs, model(data.x).detach())
    jacobian = []
    for row in range(len(data)):
        of_outputs = []
        for output in model(data.x[row : row + 1])[0]:
            gradients = dense_gradient(model, held.layers, output)
            if scaled:
                gradients = {name: roots[name][0][:, None] * G * roots[name][1] for name, G in gradients.items()}
            of_outputs.append(torch.cat([G.flatten() for G in gradients.values()]))
        jacobian.append(torch.stack(of_outputs))
    J = torch.stack(jacobian)
    torch.testing.assert_close(K, torch.einsum("nkp,mkp->nm", J, J) / J.shape[1])


def test_rank_one_roots_are_exact_for_an_outer_product():
    u, w = torch.rand(4, dtype=torch.float64) + 0.1, torch.rand(3, dtype=torch.float64) + 0.1
    rows, columns = rank_one_roots(torch.outer(u, w))
    torch.testing.assert_close(torch.outer(rows, columns).square(), torch.outer(u, w).rsqrt())


def kernel(num_points: int, *, rank: int, seed: int = 0) -> torch.Tensor:
    phi = torch.randn(num_points, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return phi @ phi.T + 0.1 * torch.eye(num_points, dtype=torch.float64)


def minimised(K: torch.Tensor, loss, outputs: int, ridge: float) -> torch.Tensor:
    """Coefficients of the machine by a general minimiser."""
    alpha = torch.zeros(len(K), outputs, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [alpha], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        f = K @ alpha
        value = loss(f) + ridge / 2 * (alpha * f).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return alpha.detach()


def test_machines_are_the_minimum_of_what_they_say():
    K, ridge = kernel(14, rank=5), 0.3
    y = torch.arange(10) % 3
    machine = fit_softmax(K[:10, :10], y, K[:10], ridge=ridge, num_classes=3)
    alpha = minimised(K[:10, :10], lambda f: F.cross_entropy(f, y), 3, ridge)
    torch.testing.assert_close(machine.predictions, K[:10].T @ alpha, atol=2e-3, rtol=0)  # stops where a step is below 1e-3
    values = torch.randn(10, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    machine = fit_squares(K[:10, :10], values, K[:10], ridge=ridge)
    alpha = minimised(K[:10, :10], lambda f: (f - values).square().sum() / 10, 2, ridge)
    torch.testing.assert_close(machine.predictions, K[:10].T @ alpha, atol=1e-6, rtol=1e-6)


def test_adding_a_row_moves_a_squared_machine_by_exactly_what_is_said():
    """The sum over rows is kept at n: a machine on n + 1 rows with the ridge n/(n + 1)."""
    K, y, ridge = kernel(9, rank=4), torch.randn(9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), 0.2
    inside, z, q = list(range(6)), 6, slice(1, 3)
    machine = fit_squares(K[:6, :6], y[:6], K[:6, [z, 7, 8]], ridge=ridge)
    r, w = square_response(machine.predictions[:1], y[[z]])
    k = machine.posterior(K[[7, 8]][:, [z]], q, slice(0, 1))
    along = machine.posterior_diagonal(K.diagonal()[[z]], slice(0, 1))
    larger = [*inside, z]
    refitted = fit_squares(K[larger][:, larger], y[larger], K[larger][:, [7, 8]], ridge=ridge * 6 / 7)
    torch.testing.assert_close(machine.predictions[q] + k @ (r / (1 + w * along)[:, None]), refitted.predictions)


def test_adding_a_row_moves_a_softmax_machine_nearly_by_what_is_said():
    K, ridge = kernel(40, rank=6, seed=3), 0.5
    y = torch.arange(40) % 3
    said, real = [], []
    for z in range(30, 36):
        points = [z, 36, 37, 38, 39]
        machine = fit_softmax(K[:30, :30], y[:30], K[:30, points], ridge=ridge, num_classes=3)
        r, w = softmax_response(machine.predictions[:1], y[[z]])
        k = machine.posterior(K[36:][:, [z]], slice(1, 5), slice(0, 1))
        said.append(k @ (r / (1 + w * machine.posterior_diagonal(K.diagonal()[[z]], slice(0, 1)))[:, None]))
        larger = [*range(30), z]
        refitted = fit_softmax(K[larger][:, larger], y[larger], K[larger][:, points[1:]], ridge=ridge * 30 / 31, num_classes=3)
        real.append(refitted.predictions - machine.predictions[1:])
    said, real = torch.stack(said).flatten(), torch.stack(real).flatten()
    assert torch.corrcoef(torch.stack([said, real]))[0, 1] > 0.97  # .99: one Newton step, a scalar for each Hessian
    assert 0.7 < (said @ real) / (real @ real) < 1.3


def test_surrogate_scores_are_the_mean_effect_of_adding_a_row_to_halves():
    held = fitted("regression")
    K = kernel(15, rank=5, seed=4)
    scores = retrained_effects(
        K, held.train, held.queries, task=Regression("squared_error"), num_outputs=2, ridge=0.4, splits=3, seed=7
    )
    random, expected, slopes, effects = np.random.default_rng(7), np.zeros((3, 12)), [], []
    for _ in range(3):
        order = random.permutation(12)
        for inside, outside in ((order[:6], order[6:]), (order[6:], order[:6])):
            before = fit_squares(K[inside][:, inside], held.train.y[inside], K[inside][:, 12:], ridge=0.4).predictions
            slopes.append(2 * (before - held.queries.y))
            for z in outside:
                larger = [*inside, z]
                after = fit_squares(K[larger][:, larger], held.train.y[larger], K[larger][:, 12:], ridge=0.4 * 6 / 7).predictions
                effects.append((z, after - before))
    mean_slope = torch.stack(slopes).mean(dim=0)
    for z, moved in effects:
        expected[:, z] -= (mean_slope * moved).sum(dim=1).numpy() / 3
    torch.testing.assert_close(torch.from_numpy(scores), torch.from_numpy(expected))


def test_surrogate_refuses_documents():
    run, task, train, queries = setting("lm")
    with pytest.raises(ValueError, match="surrogate: needs Classification or Regression on four examples or more; got CausalLM"):
        attribute("surrogate", run, task, train, queries)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 12), st.integers(0, 10_000))
def test_block_krylov_solves_when_its_space_is_whole(num_queries, size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    A = root @ root.T + torch.eye(size, dtype=torch.float64)
    b = torch.randn(num_queries, size, generator=generator, dtype=torch.float64)
    x = block_krylov(lambda v: v @ A, b, precondition=lambda v: v / A.diagonal(), rounds=size)
    expected = torch.linalg.solve(A, b.T).T
    error = (x - expected) @ A * (x - expected)  # in the norm that Galerkin minimises
    assert error.sum() < 1e-4 * (expected @ A * expected).sum()


def test_block_krylov_is_exact_at_once_with_the_inverse_and_copes_with_equal_queries():
    A = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    b = torch.ones(3, 5, dtype=torch.float64)
    x = block_krylov(lambda v: v @ A, b, precondition=lambda v: v / A.diagonal(), rounds=3)
    torch.testing.assert_close(x, b / A.diagonal())


def test_averaged_influence_without_curvature_is_a_dot_product_at_the_mean_weights():
    """With an overwhelming damping the response is the query itself, over the damping."""
    held = fitted("classification")
    scores = attribute("averaged_influence", held.run, held.task, held.train, held.queries, damping_scale=1e9)
    model = held.model(-1)
    stretches = around(held.run, 0.5)
    mean = {
        name: sum(held.run.checkpoints[index].mean_weights[name] for index in stretches) / len(stretches)
        for name in held.run.checkpoints[0].mean_weights
    }
    model.load_state_dict(mean)
    costs = [held.task.costs(model, held.queries.batch([row]), weights=torch.ones(1))[0] for row in range(3)]
    losses = [held.task.losses(model, held.train.batch([row]))[0] for row in range(12)]
    q, g = ([pack(dense_gradient(model, held.layers, each), held.layers) for each in them] for them in (costs, losses))
    dots = torch.stack(q) @ torch.stack(g).T
    expected = dots.numpy() * held.exposure.mean(axis=1) * float(held.rates.sum()) / 1e9
    np.testing.assert_allclose(scores.values, expected, rtol=1e-5)


def test_mean_weights_are_those_of_the_steps_between_checkpoints():
    run, *_ = setting("classification", "adamw")
    one = at_mean(run, [1, 2])
    assert [checkpoint.step for checkpoint in one.checkpoints] == [12]
    for name, value in one.checkpoints[0].weights.items():
        torch.testing.assert_close(value, (run.checkpoints[1].mean_weights[name] + run.checkpoints[2].mean_weights[name]) / 2)
    corrected = {
        name: sum(run.checkpoints[index].second_moments[name] / (1 - 0.999 ** run.checkpoints[index].step) for index in (1, 2))
        / 2
        for name in run.checkpoints[0].second_moments
    }
    for name, value in one.checkpoints[0].second_moments.items():
        torch.testing.assert_close(value / (1 - 0.999**12), corrected[name])
    with pytest.raises(ValueError, match="no mean weights; record the run with a Recorder"):
        averaged(run, [[0], [1], [2], [3]]).at(0, mean=True)


@pytest.mark.parametrize(("end", "expected"), [(0.5, [2, 3]), (1.0, [4, 5]), (0.1, [0, 1]), (0.7, [3, 4])])
def test_the_stretches_around_the_counterfactual_end(end, expected):
    from dataclasses import replace

    run, *_ = setting("classification")
    six = replace(run, checkpoints=[replace(run.checkpoints[0], step=2 * (index + 1)) for index in range(6)])
    assert around(six, end) == expected
    with pytest.raises(ValueError, match=r"counterfactual_end is 0\.0; expected a part of the run"):
        around(six, 0.0)


def test_a_language_model_has_no_kernel_of_examples():
    model, documents = tiny_llama(), random_documents(4)
    held = Fitted(*setting("lm"), Settings(num_segments=2))
    with pytest.raises(ValueError, match=r"tangent kernel: \d+ predictions for 4 examples"):
        tangent_kernel(model, held.layers, documents, task=CausalLM(), batch_size=4)
