"""SOURCE against dense matrices, unrolled gradient descent and real retraining, where its assumptions hold."""

import numpy as np
import pytest
import torch

from tda.data import batches
from tda.ekfac import EKFAC
from tda.gradients import gradient_rows, project_queries, query_gradients
from tda.model import tracked_layers
from tda.preconditioner import LayerCurvature, plain
from tda.projection import Projection
from tda.scores import source_values
from tda.segments import Segment
from tda.source import SegmentDynamics, walk_back
from tda.task import CausalLM
from tests.helpers import random_documents, tiny_gpt2, tiny_llama
from tests.unit.test_ekfac import dense, preconditioned_dense, some_factors


def segment(index: int, checkpoints: list[int], *, time: float, tokens: float = 1.0) -> Segment:
    return Segment(index, checkpoints, 1, 10, 10, time / 10, tokens)


def test_pipeline_equals_dense_matrices_on_a_language_model():
    """Three checkpoints, two segments, AdamW-like P and weight decay, full-rank rows: the same numbers from explicit matrices."""
    documents, queries = random_documents(6), random_documents(3, seed=9)
    models = [tiny_llama(seed=seed) for seed in range(3)]
    layers = tracked_layers(models[0], r".*(q_proj|up_proj|down_proj)")
    generator = torch.Generator().manual_seed(0)
    curvature, held = [], [segment(0, [0], time=0.7, tokens=5.0), segment(1, [1, 2], time=1.3, tokens=4.0)]
    for index in range(2):
        by_layer = {}
        for number, layer in enumerate(layers):
            factors = some_factors(layer.d_out, layer.d_in, seed=10 * index + number)
            P = torch.rand(layer.d_out, layer.d_in, generator=generator, dtype=torch.float64) + 0.5
            by_layer[layer.name] = LayerCurvature(factors, P.sqrt())
        curvature.append(by_layer)
    w = 0.05
    dynamics = [SegmentDynamics(index, curvature[index], held[index].time, w) for index in range(2)]
    eye = {
        layer.name: Projection(torch.eye(layer.d_in, dtype=torch.float64), torch.eye(layer.d_out, dtype=torch.float64))
        for layer in layers
    }
    rows = []
    for model in models:
        by_row = {}
        for batch in batches(documents, batch_tokens=24):
            vectors, _ = gradient_rows(model, layers, batch, task=CausalLM(), projections=eye)
            by_row |= dict(zip(batch.rows, vectors, strict=True))
        rows.append(torch.stack([by_row[row] for row in range(6)]))
    query, order = query_gradients(models[-1], layers, batches(queries, batch_tokens=24), task=CausalLM())
    exposure = np.random.default_rng(0).dirichlet(np.ones(6), size=2).T
    values = source_values(
        query,
        dynamics,
        held,
        exposure=exposure,
        dot=lambda checkpoint, u: (rows[checkpoint] @ project_queries(u, layers, eye).T).numpy(),
    )

    expected = torch.zeros(len(order), 6, dtype=torch.float64)
    start = 0
    for layer in layers:
        size = layer.d_in * layer.d_out
        eye_block = torch.eye(size, dtype=torch.float64)
        q = query[layer.name].flatten(1)
        for index in (1, 0):
            factors = curvature[index][layer.name]
            P = factors.root_P.square()
            rate = preconditioned_dense(factors.M, P) + w * eye_block
            S = torch.linalg.matrix_exp(-held[index].time * rate)
            response = (eye_block - S) @ torch.linalg.inv(rate) @ torch.diag(P.flatten())
            for checkpoint in held[index].checkpoints:
                g = rows[checkpoint][:, start : start + size] / held[index].tokens_per_document
                moved = response @ g.T * torch.from_numpy(exposure[:, index]) / len(held[index].checkpoints)
                expected += q @ moved
            q = q @ S
        start += size
    torch.testing.assert_close(torch.from_numpy(values), expected)


def regression(seed: int = 0, *, n: int = 256, d: int = 10, spread: float = 2.0):
    """Rotated, ill-conditioned inputs and noisy answers."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.normal(size=(d, d)))[0]
    x = random.normal(size=(n, d)) * np.logspace(0, -spread / 2, d) @ rotation
    return x, x @ random.normal(size=d) + 0.5 * random.normal(size=n)


def exact_factors(x: np.ndarray) -> EKFAC:
    """The Hessian of the mean of half squared errors, E[x x^T]: one output, so that EK-FAC is exact."""
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    return EKFAC(torch.from_numpy(vectors), torch.ones(1, 1, dtype=torch.float64), torch.from_numpy(values)[None])


def source_on_regression(x, y, weights, times, *, query) -> np.ndarray:
    """SOURCE of every row: one list of weight vectors (checkpoints) per segment."""
    factors = plain(exact_factors(x))
    dynamics = [SegmentDynamics(index, {"w": factors}, time, 0.0) for index, time in enumerate(times)]
    total = np.zeros(len(x))
    for part, u in walk_back({"w": torch.from_numpy(query)[None, None]}, dynamics):
        for w in weights[part.index]:
            gradients = (x @ w - y)[:, None] * x
            total += gradients @ u["w"].numpy().ravel() / len(weights[part.index]) / len(x)
    return total


def test_error_against_unrolled_gradient_descent_halves_with_the_learning_rate():
    x, y = regression(n=40, d=5)
    H, query = x.T @ x / len(x), np.ones(5)
    errors = []
    for rate in (0.2, 0.1, 0.05):
        w, path = np.zeros(5), []
        for _ in range(round(8 / rate)):
            path.append(w)
            w = w - rate * x.T @ (x @ w - y) / len(x)
        unrolled, carried = np.zeros(len(x)), query.copy()
        for at in reversed(path):  # d w_T / d epsilon by the chain rule, backwards
            unrolled += ((x @ at - y)[:, None] * x) @ carried * rate / len(x)
            carried = carried - rate * H @ carried
        source = source_on_regression(x, y, [[at] for at in path], [rate] * len(path), query=query)
        errors.append(np.abs(source - unrolled).max() / np.abs(unrolled).max())
    assert errors[2] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_scores_predict_real_leave_one_out_retraining():
    """C = 6, L = 3, momentum, mini-batches: correlation and scale against retraining without each document, over 5 seeds."""
    x, y = regression()
    x_query, y_query = regression(seed=1, n=20)
    rate, beta, size, epochs = 0.05, 0.9, 16, 12
    removed = np.arange(24)

    def run(seed: int):
        """All leave-one-out models at once (a column each, column 0 on all data): weight 0 for the removed row, steps kept."""
        keep = np.ones((len(x), 1 + len(removed)))
        keep[removed, 1 + np.arange(len(removed))] = 0
        w, velocity, path = np.zeros((10, keep.shape[1])), 0.0, []
        random = np.random.default_rng(seed)
        for _ in range(epochs):
            for at in random.permutation(len(x)).reshape(-1, size):
                velocity = beta * velocity + x[at].T @ (keep[at] * (x[at] @ w - y[at, None])) / size
                w = w - rate * velocity
                path.append(w[:, 0])
        return w, path

    differences, scores = [], []
    for seed in range(5):
        w, path = run(seed)
        losses = 0.5 * (x_query @ w - y_query[:, None]) ** 2
        differences.append(losses[:, 1:] - losses[:, :1])
        num_steps = len(path)
        checkpoints = [path[round((index + 1) * num_steps / 6) - 1] for index in range(6)]
        time = rate / (1 - beta) * num_steps / 3
        per_query = [
            source_on_regression(
                x,
                y,
                [checkpoints[0:2], checkpoints[2:4], checkpoints[4:6]],
                [time] * 3,
                query=(xq @ path[-1] - yq) * xq,
            )[removed]
            for xq, yq in zip(x_query, y_query, strict=True)
        ]
        scores.append(np.array(per_query))
    true, predicted = np.mean(differences, axis=0).ravel(), np.mean(scores, axis=0).ravel()
    assert np.corrcoef(true, predicted)[0, 1] > 0.97
    slope = (true @ predicted) / (predicted @ predicted)
    assert 0.8 < slope < 1.25  # sign, 1/N and the momentum rule; without 1/(1 - beta) the slope is above 2


def test_dividing_a_segment_of_equal_factors_changes_nothing():
    factors = plain(some_factors())
    query = {"w": torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}

    def total(times):
        parts = [SegmentDynamics(index, {"w": factors}, time, 0.02) for index, time in enumerate(times)]
        return sum(u["w"] for _, u in walk_back(query, parts))

    torch.testing.assert_close(total([0.5, 1.5]), total([2.0]))
    torch.testing.assert_close(total([0.4, 0.7, 0.9]), total([2.0]))


def test_project_queries_has_the_layout_of_rows():
    documents, model = random_documents(3), tiny_gpt2()  # transformers' Llama normalises in float32
    layers = tracked_layers(model)
    eye = {
        layer.name: Projection(torch.eye(layer.d_in, dtype=torch.float64), torch.eye(layer.d_out, dtype=torch.float64))
        for layer in layers
    }
    query, order = query_gradients(model, layers, batches(documents, batch_tokens=99), task=CausalLM())
    rows, _ = gradient_rows(model, layers, next(batches(documents, batch_tokens=99)), task=CausalLM(), projections=eye)
    tokens = torch.from_numpy(documents.num_loss_tokens[order])
    torch.testing.assert_close(project_queries(query, layers, eye) * tokens[:, None], rows)


def test_dense_factors_are_what_apply_uses():
    factors = some_factors()
    torch.testing.assert_close(dense(factors), preconditioned_dense(factors, torch.ones(4, 5, dtype=torch.float64)))
