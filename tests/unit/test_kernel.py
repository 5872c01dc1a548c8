"""Tangent kernels and the machines in them, against autograd and real refitting; block Krylov; averaged weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tda.attribute import attribute
from tda.averaged_influence import around
from tda.data import Examples
from tda.fitted import Fitted, Settings
from tda.ggn import pack
from tda.iterative import block_krylov
from tda.kernel import rank_one_roots, tangent_kernel
from tda.kernel_machine import TOLERANCE, RowCurvature, SoftmaxCurvature, SoftmaxMachine, SquaresMachine
from tda.methods import prior_of
from tda.surrogate import memory_needed, path_kernel, retrained_effects
from tda.task import CausalLM, Classification, Regression
from tda.trajectory import at_mean
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


def uneven(num_rows: int) -> torch.Tensor:
    """Weights of rows, with a mean of 1."""
    c = torch.rand(num_rows, generator=torch.Generator().manual_seed(8), dtype=torch.float64) + 0.2
    return c / c.mean()


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


@pytest.mark.parametrize(("c", "tolerance"), [(torch.ones(10, dtype=torch.float64), TOLERANCE), (uneven(10), TOLERANCE / 10)])
def test_machines_are_the_minimum_of_what_they_say(monkeypatch, c, tolerance):
    """Weighted rows stop a little farther off; with shorter last steps they come nearer."""
    monkeypatch.setattr("tda.kernel_machine.TOLERANCE", tolerance)
    K, ridge = kernel(14, rank=5), 0.3
    y = torch.arange(10) % 3
    alpha = SoftmaxMachine(3).fit(K[:10, :10], y, c, ridge=ridge)
    expected = minimised(K[:10, :10], lambda f: (c * F.cross_entropy(f, y, reduction="none")).mean(), 3, ridge)
    torch.testing.assert_close(K[:10].T @ alpha, K[:10].T @ expected, atol=2e-3, rtol=0)  # stops where a step is below 1e-3
    values = torch.randn(10, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha = SquaresMachine().fit(K[:10, :10], values, c, ridge=ridge)
    expected = minimised(K[:10, :10], lambda f: (c @ (f - values).square()).sum() / 10, 2, ridge)
    torch.testing.assert_close(K[:10].T @ alpha, K[:10].T @ expected, atol=1e-6, rtol=1e-6)


def dense_hessians(f: torch.Tensor, c: torch.Tensor, *, trace: bool) -> torch.Tensor:
    """(output, row, output, row): the Hessian of the weighted cross-entropies in the outputs; or its trace in every direction."""
    H = torch.zeros(f.shape[1], len(f), f.shape[1], len(f), dtype=f.dtype)
    for row, p in enumerate(f.softmax(dim=1)):
        of_row = c[row] * (torch.diag(p) - torch.outer(p, p))
        H[:, row, :, row] = of_row.trace() * torch.eye(len(p), dtype=f.dtype) if trace else of_row
    return H


def dense_solve(K_S: torch.Tensor, H: torch.Tensor, n_ridge: float, b: torch.Tensor) -> torch.Tensor:
    """(K + n_ridge H^-1)^-1 b as (n_ridge I + H K)^-1 H b, for an H that has no inverse."""
    size, outputs = H.shape[0] * H.shape[1], H.shape[0]
    H = H.reshape(size, size)
    A = n_ridge * torch.eye(size, dtype=K_S.dtype) + H @ torch.kron(torch.eye(outputs, dtype=K_S.dtype), K_S)
    return torch.linalg.solve(A, H @ b.reshape(size, -1)).view_as(b)


@settings(max_examples=20)
@given(st.integers(2, 5), st.integers(1, 9), st.floats(0.1, 30.0), st.integers(0, 10_000))
def test_curvatures_of_the_softmax_solve_as_dense_matrices_do(num_classes, num_rows, confidence, seed):
    """Also of rows that are all but certain, whose Hessian is nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    K_S = kernel(num_rows, rank=4, seed=seed)
    f = confidence * torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)
    b = torch.randn(num_classes, num_rows, 3, generator=generator, dtype=torch.float64)
    c = uneven(num_rows)
    exact = SoftmaxCurvature(K_S, f, c, ridge=0.2).by_hessian(b)
    expected = dense_solve(K_S, dense_hessians(f, c, trace=False), num_rows * 0.2, b)
    torch.testing.assert_close(exact, expected, atol=1e-6, rtol=1e-5)
    by_trace = RowCurvature(K_S, c * (1 - f.softmax(dim=1).square().sum(dim=1)), ridge=0.2)
    expected = dense_solve(K_S, dense_hessians(f, c, trace=True), num_rows * 0.2, b)
    torch.testing.assert_close(by_trace.solve(b), expected, atol=1e-6, rtol=1e-5)


def test_what_the_rows_know_of_a_point_is_its_quadratic_form():
    K, w = kernel(9, rank=4), torch.rand(6, dtype=torch.float64) + 0.1
    curvature = RowCurvature(K[:6, :6], w, ridge=0.2)
    expected = torch.diagonal(K[6:, :6] @ torch.linalg.inv(K[:6, :6] + torch.diag(6 * 0.2 / w)) @ K[:6, 6:])
    torch.testing.assert_close(curvature.explained(K[:6, 6:]), expected)


def test_adding_a_row_moves_a_squared_machine_by_exactly_what_is_said():
    """The sum over rows is kept at n: a machine on n + 1 rows with the ridge n/(n + 1)."""
    K, y, ridge = kernel(9, rank=4), torch.randn(9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), 0.2
    z, q, c, machine = 6, [7, 8], uneven(9), SquaresMachine()
    alpha = machine.fit(K[:6, :6], y[:6], c[:6], ridge=ridge)
    curvature = machine.curvature(K[:6, :6], K[:6, :6] @ alpha, c[:6], ridge=ridge)
    r, w = machine.response(K[[z], :6] @ alpha, y[[z]], c[[z]])
    k = (K[q, z] - K[q, :6] @ curvature.solve(K[:6, z][None, :, None])[0, :, 0]) / (6 * ridge)
    along = (K[z, z] - curvature.explained(K[:6, [z]])) / (6 * ridge)
    larger = [*range(6), z]
    refitted = machine.fit(K[larger][:, larger], y[larger], c[larger], ridge=ridge * 6 / 7)
    torch.testing.assert_close(K[q, :6] @ alpha + k[:, None] * r / (1 + w * along), K[q][:, larger] @ refitted)


def test_adding_a_row_moves_a_softmax_machine_nearly_by_what_is_said():
    K, ridge, q, c = kernel(40, rank=6, seed=3), 0.5, [36, 37, 38, 39], uneven(40)
    y = torch.arange(40) % 3
    alpha = SoftmaxMachine(3).fit(K[:30, :30], y[:30], c[:30], ridge=ridge)
    f = K[:30, :30] @ alpha
    curvature = SoftmaxCurvature(K[:30, :30], f, c[:30], ridge=ridge)
    said, real = [], []
    for z in range(30, 36):
        r, w = SoftmaxMachine(3).response(K[[z], :30] @ alpha, y[[z]], c[[z]])
        known = curvature.by_hessian(K[:30, z][None, :, None] * r.T[:, None])[:, :, 0]  # (output, row)
        along = (K[z, z] - curvature.explained(K[:30, [z]])) / (30 * ridge)
        said.append((K[q, z][:, None] * r - K[q, :30] @ known.T) / (30 * ridge) / (1 + w * along))
        larger = [*range(30), z]
        refitted = SoftmaxMachine(3).fit(K[larger][:, larger], y[larger], c[larger], ridge=ridge * 30 / 31)
        real.append(K[q][:, larger] @ refitted - K[q, :30] @ alpha)
    said, real = torch.stack(said).flatten(), torch.stack(real).flatten()
    assert torch.corrcoef(torch.stack([said, real]))[0, 1] > 0.99  # one Newton step, along the residual
    assert 0.8 < (said @ real) / (real @ real) < 1.25


@pytest.mark.parametrize("draws", [[1] * 12, [2, 2, 5, 1, 1, 1, 0, 3, 2, 1, 0, 8]])
def test_surrogate_scores_are_the_mean_effect_of_adding_a_row_to_halves(draws):
    """A row counts as often as it was drawn; the halves are of the rows that were."""
    held, task, machine = fitted("regression"), Regression("squared_error"), SquaresMachine()
    K, draws = kernel(15, rank=5, seed=4), torch.tensor(draws, dtype=torch.float64)
    scores = retrained_effects(
        K, held.train, held.queries, task=task, machine=machine, shares=draws / draws.sum(), ridge=0.4, splits=3, seed=7
    )
    random, expected, slopes, effects = np.random.default_rng(7), np.zeros((3, 12)), [], []
    seen = np.flatnonzero(draws)
    n = len(seen) // 2
    for _ in range(3):
        order = seen[random.permutation(2 * n)]
        for inside, outside in ((order[:n], order[n:]), (order[n:], order[:n])):
            c = draws / draws[inside].mean()
            before = K[12:, inside] @ machine.fit(K[inside][:, inside], held.train.y[inside], c[inside], ridge=0.4)
            slopes.append(2 * (before - held.queries.y))
            for z in outside:
                larger = [*inside, z]
                ridge = 0.4 * n / (n + 1)
                after = K[12:, larger] @ machine.fit(K[larger][:, larger], held.train.y[larger], c[larger], ridge=ridge)
                effects.append((z, after - before))
    mean_slope = torch.stack(slopes).mean(dim=0)
    for z, moved in effects:
        expected[:, z] -= (mean_slope * moved).sum(dim=1).numpy() / 3
    torch.testing.assert_close(torch.from_numpy(scores), torch.from_numpy(expected))


def test_surrogate_scores_of_a_classifier_are_those_of_dense_matrices(monkeypatch):
    """One split; the mean of what the Hessian and its trace say, over one plus the row's leverage."""
    monkeypatch.setattr("tda.surrogate.QUERIES_AT_ONCE", 2)  # of three
    held, K, ridge = fitted("classification"), kernel(15, rank=5, seed=5), 0.4
    num_classes = int(held.train.y.max()) + 1
    scores = retrained_effects(
        K,
        held.train,
        held.queries,
        task=Classification("loss"),
        machine=SoftmaxMachine(num_classes),
        shares=torch.full((12,), 1 / 12),
        ridge=ridge,
        splits=1,
        seed=3,
    )
    order = np.random.default_rng(3).permutation(12)
    halves = [(order[:6], order[6:]), (order[6:], order[:6])]
    c = torch.ones(6, dtype=torch.float64)
    alphas = [SoftmaxMachine(num_classes).fit(K[S][:, S], held.train.y[S], c, ridge=ridge) for S, _ in halves]
    onehot = F.one_hot(held.queries.y, num_classes)
    slopes = sum((K[12:, S] @ alpha).softmax(dim=1) - onehot for (S, _), alpha in zip(halves, alphas, strict=True)) / 2
    expected = np.zeros((3, 12))
    for (S, outside), alpha in zip(halves, alphas, strict=True):
        f = K[S][:, S] @ alpha
        exact, trace = (dense_hessians(f, c, trace=trace) for trace in (False, True))
        for z in outside:
            r, w = SoftmaxMachine(3).response(K[[z]][:, S] @ alpha, held.train.y[[z]], c[:1])
            known = K[S, z][None, :, None] * torch.eye(num_classes, dtype=torch.float64)[:, None]
            by_trace = dense_solve(K[S][:, S], trace, 6 * ridge, known)
            solved = (dense_solve(K[S][:, S], exact, 6 * ridge, known) + by_trace) / 2  # (output, row, output of z)
            along = (K[z, z] - K[z, S] @ by_trace[0, :, 0]) / (6 * ridge)
            for query in range(3):
                k = K[12 + query, z] * torch.eye(num_classes) - torch.einsum("s,osp->op", K[12 + query, S], solved)
                expected[query, z] = -(slopes[query] @ k @ r[0] / (6 * ridge) / (1 + w[0] * along))
    torch.testing.assert_close(torch.from_numpy(scores), torch.from_numpy(expected))


@pytest.mark.parametrize(("end", "seen"), [(0.5, [0, 1]), (1.0, [0, 1, 2, 3]), (0.1, [0])])
def test_the_path_kernel_goes_as_far_as_the_counterfactual_would(end, seen):
    held = fitted("classification", counterfactual_end=end)
    assert [checkpoint.step for checkpoint in held.run.checkpoints] == [3, 6, 9, 12]
    points = Examples(torch.cat([held.train.x, held.queries.x]), torch.cat([held.train.y, held.queries.y]))
    kernels = [tangent_kernel(held.model(index), held.layers, points, task=held.task, batch_size=256)[0] for index in range(4)]
    weights = held.rates.reshape(4, 3).sum(axis=1)
    expected = sum(weights[index] * kernels[index] for index in seen) / weights[seen].sum()
    torch.testing.assert_close(path_kernel(held), expected)


def test_a_counterfactual_end_outside_the_run_is_refused():
    for end in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"counterfactual_end: input should be .*; got {end}"):
            Settings.of(counterfactual_end=end)


def test_surrogate_refuses_another_loss_and_datamodel_goes_without_it():
    class Weighted(Classification):
        def output_losses(self, outputs, batch):
            return (1 + batch.y) * super().output_losses(outputs, batch)

    run, _task, train, queries = setting("classification")
    with pytest.raises(ValueError, match="surrogate: needs Classification or Regression on four examples or more; got Weighted"):
        attribute("surrogate", run, Weighted(), train, queries)
    assert prior_of(Weighted(), train) == "averaged_influence"


def test_surrogate_refuses_documents():
    run, task, train, queries = setting("lm")
    with pytest.raises(ValueError, match="surrogate: needs Classification or Regression on four examples or more; got CausalLM"):
        attribute("surrogate", run, task, train, queries)


def test_surrogate_refuses_more_rows_than_memory_takes(monkeypatch):
    held = fitted("classification")
    needed = memory_needed(held, 3)
    layers = (5 + 3 * 6) + (6 + 3 * 5) + (6 + 3 * 3)  # inputs, with the 1 of a bias, and three pseudo-gradients of the outputs
    assert needed == 8 * (3 * 15**2 + 15 * layers + 6 * 6**2)
    monkeypatch.setattr("tda.surrogate.free_memory", lambda _device: needed - 1)
    with pytest.raises(ValueError, match=r"surrogate: 12 rows, 3 queries and 3 outputs need about .* of memory, .* are free"):
        attribute("surrogate", held.run, held.task, held.train, held.queries)


@settings(max_examples=25)
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


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_a_single_row_is_solved_in_its_krylov_space(rounds):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    A, b = root @ root.T + torch.eye(9, dtype=torch.float64), torch.randn(1, 9, generator=generator, dtype=torch.float64)
    space, near = [], A.diagonal()
    for _ in range(rounds):
        space.append((space[-1] @ A if space else b) / near)
    K = torch.cat(space)
    expected = torch.linalg.solve(K @ A @ K.T, K @ b.T).T @ K
    given = {"precondition": lambda v: v / near, "rounds": rounds}
    torch.testing.assert_close(block_krylov(lambda v: v @ A, b, **given), expected)
    torch.testing.assert_close(block_krylov(lambda v: v @ A, torch.cat([b, b]), **given), torch.cat([expected, expected]))


def test_block_krylov_is_exact_at_once_with_the_inverse_and_copes_with_equal_queries():
    A = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    b = torch.ones(3, 5, dtype=torch.float64)
    x = block_krylov(lambda v: v @ A, b, precondition=lambda v: v / A.diagonal(), rounds=3)
    torch.testing.assert_close(x, b / A.diagonal())


def test_no_damping_at_all_is_refused():
    held = fitted("classification")
    run = replace(held.run, optimizer=replace(held.run.optimizer, weight_decay=0.0))
    with pytest.raises(ValueError, match="averaged_influence: damping_scale is 0 and the run has no weight decay, so that"):
        attribute("averaged_influence", run, held.task, held.train, held.queries, damping_scale=0)


def test_a_diverged_run_is_named():
    held = fitted("classification")
    first, *rest = held.run.checkpoints
    weights = {name: torch.full_like(value, 1e300) for name, value in first.weights.items()}
    run = replace(held.run, checkpoints=[replace(first, weights=weights), *rest])
    with pytest.raises(ValueError, match=r"surrogate: gradients of the network's outputs are not finite.*diverged run"):
        attribute("surrogate", run, held.task, held.train, held.queries)


def test_averaged_influence_without_curvature_is_a_dot_product_at_the_mean_weights():
    """With an overwhelming damping the response is the query itself, over the damping."""
    held = fitted("classification")
    scores = attribute("averaged_influence", held.run, held.task, held.train, held.queries, damping_scale=1e9)
    model = held.model(-1)
    stretches = around([checkpoint.step for checkpoint in held.run.checkpoints], 0.5)
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


def test_queries_that_are_too_large_to_be_held_together_are_solved_apart(monkeypatch):
    run, task, train, queries = setting("classification")
    alone = [attribute("averaged_influence", run, task, train, queries.select([query])).values[0] for query in range(3)]
    together = attribute("averaged_influence", run, task, train, queries).values
    monkeypatch.setattr("tda.averaged_influence.BLOCK_VALUES", 1)
    apart = attribute("averaged_influence", run, task, train, queries).values
    np.testing.assert_allclose(apart, np.stack(alone))
    assert not np.allclose(apart, together, rtol=1e-6)  # three rounds do not reach the end: what others add is seen


@pytest.mark.parametrize("method", ["averaged_influence", "fast_source", "source", "surrogate+averaged_influence"])
def test_methods_that_average_the_trajectory_take_mean_weights_too(method):
    held = fitted("classification")
    scores = attribute(method, held.run, held.task, held.train, held.queries, weights="mean").values
    assert np.isfinite(scores).all()
    assert scores.std() > 0


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
    plain = replace(run, checkpoints=[replace(checkpoint, mean_weights={}) for checkpoint in run.checkpoints])
    with pytest.raises(ValueError, match="no mean weights; record the run with a Recorder"):
        plain.at(0, mean=True)


@pytest.mark.parametrize(("end", "expected"), [(0.5, [2, 3]), (1.0, [4, 5]), (0.1, [0, 1]), (0.7, [3, 4])])
def test_the_stretches_around_the_counterfactual_end(end, expected):
    assert around([2, 4, 6, 8, 10, 12], end) == expected


def test_a_language_model_has_no_kernel_of_examples():
    model, documents = tiny_llama(), random_documents(4)
    held = Fitted(*setting("lm"), Settings(num_segments=2))
    with pytest.raises(ValueError, match=r"tangent kernel: \d+ predictions for 4 examples"):
        tangent_kernel(model, held.layers, documents, task=CausalLM(), batch_size=4)
