import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tda.data import batches
from tda.ekfac import (
    EKFAC,
    MOST_STRIPS,
    SMALLEST_STRIP,
    Covariances,
    add_lower_products,
    complete_from_lower,
    corrected_eigenvalues,
    covariances,
    eigenbasis,
)
from tda.model import tracked_layers
from tda.preconditioner import LayerCurvature, adam_preconditioner, plain, scalar, scaled_factors
from tda.projection import random_projections
from tda.spectral import damped_inverse, segment_decay, segment_response
from tda.task import CausalLM
from tests.helpers import CONTEXT, dense_fisher, random_documents, tiny_gpt2, tiny_llama
from tests.unit.test_capture import doubled

torch.manual_seed(0)


def some_factors(d_out: int = 4, d_in: int = 5, *, seed: int = 0) -> EKFAC:
    generator = torch.Generator().manual_seed(seed)

    def orthogonal(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]

    return EKFAC(orthogonal(d_in), orthogonal(d_out), torch.rand(d_out, d_in, generator=generator, dtype=torch.float64) + 0.1)


def dense(factors: EKFAC) -> torch.Tensor:
    """The curvature as a matrix on flattened (d_out, d_in) gradients."""
    Q = torch.kron(factors.Q_S, factors.Q_A)
    return Q @ torch.diag(factors.Lambda.flatten()) @ Q.T


def test_apply_is_the_matrix_function():
    factors = some_factors()
    G = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = torch.linalg.solve(dense(factors) + 0.3 * torch.eye(20, dtype=torch.float64), G.flatten(1).T).T.view_as(G)
    torch.testing.assert_close(factors.apply(damped_inverse(0.3), G), expected)
    expected = (torch.linalg.matrix_exp(-2 * dense(factors)) @ G.flatten(1).T).T.view_as(G)
    torch.testing.assert_close(factors.apply(segment_decay(2.0), G), expected)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_eigenvalues_are_the_diagonal_of_the_gauss_newton_matrix(build):
    """Sampled labels give, on average, the Gauss-Newton matrix of the training loss, whose scale is that of the loss."""
    model, documents = build(), random_documents(3)
    layers = tracked_layers(model, r".*(k_proj|down_proj|mlp\.c_proj)")
    weight = 1 / float(documents.num_loss_tokens.mean())  # a mean over tokens
    generator = torch.Generator().manual_seed(0)
    batch = documents.batch([0, 1, 2])
    basis = eigenbasis(covariances(model, layers, [batch] * 20, task=CausalLM(), generator=generator), layers)
    rounds = 300
    draws = []
    for _ in range(rounds):
        sums, count = corrected_eigenvalues(
            model,
            layers,
            [batch],
            task=CausalLM(),
            basis=basis,
            generator=generator,
        )
        draws.append({name: weight * Lambda / count for name, Lambda in sums.items()})
    fisher = dense_fisher(model, layers, documents, weight=weight)
    for layer in layers:
        Q_A, Q_S = basis[layer.name]
        Q = torch.kron(Q_S, Q_A)
        expected = (Q.T @ fisher[layer.name] @ Q).diagonal().view(layer.d_out, layer.d_in)
        stacked = torch.stack([draw[layer.name] for draw in draws])
        standard_error = stacked.std(dim=0) / math.sqrt(rounds)
        z = (stacked.mean(dim=0) - expected) / (standard_error + 1e-12)
        # Without the weight the ratio would be 7; normalised per token, 1/7. The z of a right estimate has mean square 1.
        assert z.square().mean() < 2
        traces = stacked.sum(dim=(1, 2))
        assert abs(traces.mean() - expected.sum()) < 4 * traces.std() / math.sqrt(rounds)
        assert traces.std() / math.sqrt(rounds) < 0.15 * expected.sum()  # so that a wrong scale would be seen


def test_covariances_merge_and_do_not_depend_on_batches():
    model, documents = tiny_llama(), random_documents(6)
    layers = tracked_layers(model)

    def fit(batch_list):
        return covariances(model, layers, batch_list, task=CausalLM(), generator=torch.Generator().manual_seed(0))

    whole = fit(list(batches(documents, batch_tokens=24)))
    single = [fit([documents.batch([row])]) for row in range(6)]
    merged = single[0]
    for part in single[1:]:
        merged = merged.add_(part)
    assert merged.count == whole.count == int((documents.lengths - 1).sum())
    for name, A in whole.A.items():  # inputs do not depend on the labels; pseudo-gradients of sampled labels do
        torch.testing.assert_close(A, merged.A[name])


@pytest.mark.parametrize("d", [1, 5, SMALLEST_STRIP * 2 - 1, SMALLEST_STRIP * 2, 300, SMALLEST_STRIP * (MOST_STRIPS + 2) + 3])
def test_products_of_the_lower_triangle_make_the_whole_product(d):
    generator = torch.Generator().manual_seed(d)
    total = torch.zeros(d, d, dtype=torch.float64)
    parts = [torch.randn(7, d, dtype=torch.float64, generator=generator) for _ in range(2)]
    for rows in parts:
        add_lower_products(total, rows)
    complete_from_lower(total)
    torch.testing.assert_close(total, sum(rows.T @ rows for rows in parts))
    assert torch.equal(total, total.T)


def test_a_wide_covariance_takes_little_more_than_half_of_its_operations():
    rows = torch.zeros(4, SMALLEST_STRIP * MOST_STRIPS)
    in_place = {torch.ops.aten.addmm_: lambda _total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        add_lower_products(torch.zeros(rows.shape[1], rows.shape[1]), rows)
    assert counter.get_total_flops() == 2 * 4 * rows.shape[1] ** 2 * (MOST_STRIPS + 1) // (2 * MOST_STRIPS)


def test_projected_covariances_are_projections_of_full_ones():
    model, documents = tiny_gpt2(), random_documents(4)
    layers = tracked_layers(model)
    projections = doubled(random_projections(layers, rank=3, seed=0))

    def fit(chosen):
        held = [documents.batch(range(4))]
        return covariances(model, layers, held, task=CausalLM(), generator=torch.Generator().manual_seed(0), projections=chosen)

    full, projected = fit(None), fit(projections)
    for layer in layers:
        P = projections[layer.name]
        torch.testing.assert_close(projected.A[layer.group], P.P_i.T @ full.A[layer.group] @ P.P_i)
        torch.testing.assert_close(projected.S[layer.name], P.P_o.T @ full.S[layer.name] @ P.P_o)


def test_covariances_that_are_not_finite_are_refused():
    layers = tracked_layers(tiny_llama(), r"model\.layers\.0\.mlp\.down_proj")
    broken = Covariances({layers[0].name: torch.full((12, 12), torch.nan)}, {layers[0].name: torch.eye(8)}, 1)
    with pytest.raises(ValueError, match="not finite; likely the checkpoint has diverged"):
        eigenbasis(broken, layers)


def preconditioned_dense(factors: EKFAC, P: torch.Tensor) -> torch.Tensor:
    """P H of a fixed diagonal P, where P^(1/2) H P^(1/2) is the EK-FAC `factors`."""
    root = P.flatten().sqrt()
    return root[:, None] * dense(factors) / root


def test_preconditioned_segment_equals_the_dense_matrix_functions():
    """u = ((1 - exp(-t (P H + w))) (P H + w)^-1 P)^T q and q' = exp(-t (P H + w))^T q, for any diagonal P."""
    factors = some_factors()
    P = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.2
    q = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    time, w = 1.7, 0.05
    rate = preconditioned_dense(factors, P) + w * torch.eye(20, dtype=torch.float64)
    decay = torch.linalg.matrix_exp(-time * rate)
    response = (torch.eye(20, dtype=torch.float64) - decay) @ torch.linalg.inv(rate) @ torch.diag(P.flatten())
    layer = LayerCurvature(factors, P.sqrt())
    torch.testing.assert_close(layer.respond(q, time=time, weight_decay=w).flatten(), response.T @ q.flatten())
    torch.testing.assert_close(layer.decay(q, time=time, weight_decay=w).flatten(), decay.T @ q.flatten())


def test_scalar_preconditioner_is_the_symmetric_form_of_a_constant_P():
    factors = some_factors()
    P = torch.full((4, 5), 3.0, dtype=torch.float64)
    q = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    symmetric = LayerCurvature(EKFAC(factors.Q_A, factors.Q_S, 3 * factors.Lambda), P.sqrt())
    for method in ("respond", "decay"):
        torch.testing.assert_close(
            getattr(scalar(factors, P), method)(q, time=0.8, weight_decay=0.1),
            getattr(symmetric, method)(q, time=0.8, weight_decay=0.1),
        )


def test_limits_of_a_segment():
    factors = some_factors()
    q = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    short = plain(factors).respond(q, time=1e-9, weight_decay=0.0)
    torch.testing.assert_close(short, 1e-9 * q)  # eta K -> 0: the gradient dot product times eta K
    long = plain(factors).respond(q, time=1e9, weight_decay=0.0)
    undamped = torch.linalg.solve(dense(factors), q.flatten()).view_as(q)  # eta K -> infinity: influence functions
    torch.testing.assert_close(long, undamped)


def test_spectral_limits_and_refusals():
    s = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 50.0], dtype=torch.float64)
    response = segment_response(2.0)(s)
    torch.testing.assert_close(response[:2], torch.tensor([2.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(response[2:], (1 - torch.exp(-2 * s[2:])) / s[2:])
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        damped_inverse(0.0)


def test_adam_preconditioner_is_the_update_per_unit_of_gradient():
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.01, betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0)
    g = torch.tensor([0.5, -3.0], dtype=torch.float64)
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = g.clone()
        optimizer.step()
    state = optimizer.state[weight]
    P = adam_preconditioner(state["exp_avg_sq"], step=3, beta2=0.9, epsilon=1e-3)
    torch.testing.assert_close(before - weight.detach(), 0.01 * P * g)


@pytest.mark.parametrize("length", [2, 5, 8, 9, CONTEXT])  # from 9 on gradients are rotated, on sides whose other side is 8
def test_scaled_factors_with_unit_scale_are_the_plain_ones(length):
    model, documents = tiny_llama(), random_documents(4)
    documents = replace(documents, tokens=[np.resize(tokens, length) for tokens in documents.tokens])
    layers = tracked_layers(model)
    batch = documents.batch(range(4))
    basis = eigenbasis(covariances(model, layers, [batch], task=CausalLM(), generator=torch.Generator().manual_seed(0)), layers)
    ones = {layer.name: torch.ones(layer.d_out, layer.d_in, dtype=torch.float64) for layer in layers}
    expected, _ = corrected_eigenvalues(
        model, layers, [batch], task=CausalLM(), basis=basis, generator=torch.Generator().manual_seed(1)
    )
    _, Lambda = scaled_factors(
        model,
        layers,
        [batch],
        task=CausalLM(),
        root_P=ones,
        basis=basis,
        generator=torch.Generator().manual_seed(1),
    )
    for name, values in Lambda.items():
        torch.testing.assert_close(values, expected[name])
