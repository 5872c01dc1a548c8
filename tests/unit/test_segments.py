import numpy as np
import pytest
import torch

from tda.segments import (
    document_exposure,
    effective_learning_rates,
    effective_weight_decay,
    make_segments,
    rows_seen,
    segment_ends,
)
from tda.spectral import segment_decay, segment_response
from tda.train import Step, StepResult, trajectory_table


def trajectory(rows: list[list[int]], rates: list[float], scale: float = 1.0):
    return trajectory_table([
        StepResult(Step(number + 1, 0, held, rate), 1.0, scale)
        for number, (held, rate) in enumerate(zip(rows, rates, strict=True))
    ])


def test_equal_steps_divide_evenly_and_unevenly():
    rates = np.ones(60)
    assert segment_ends([10, 20, 30, 40, 50, 60], 3, by="steps", rates=rates, stage_ends=[60]) == [2, 4, 6]
    assert segment_ends([10, 20, 30, 40, 60], 3, by="steps", rates=rates, stage_ends=[60]) == [2, 4, 5]


def test_equal_learning_rate_gives_short_segments_where_it_is_high():
    rates = np.array([4.0] * 10 + [1.0] * 50)
    ends = segment_ends([5, 10, 20, 40, 50, 60], 2, by="learning_rate", rates=rates, stage_ends=[60])
    assert ends == [2, 6]  # 40 of 90 by step 10, 50 by step 20: both are 5 away, the first is taken


def test_stages_are_boundaries_and_longer_stages_are_divided():
    rates = np.ones(60)
    steps = [10, 20, 30, 40, 50, 60]
    assert segment_ends(steps, 3, by="stages", rates=rates, stage_ends=[20, 60]) == [2, 4, 6]
    assert segment_ends(steps, 2, by="stages", rates=rates, stage_ends=[20, 60]) == [2, 6]
    with pytest.raises(ValueError, match="1 segments for 2 training stages"):
        segment_ends(steps, 1, by="stages", rates=rates, stage_ends=[20, 60])
    with pytest.raises(ValueError, match="training stage 0 has no checkpoint"):
        segment_ends(steps, 2, by="stages", rates=rates, stage_ends=[5, 60])


def test_fewer_checkpoints_than_segments_are_refused():
    with pytest.raises(ValueError, match=r"2 checkpoints cannot be divided into 3 segments.*segments.indices"):
        segment_ends([5, 10], 3, by="steps", rates=np.ones(10), stage_ends=[10])


def test_uniform_batches_give_every_document_one_nth():
    rows = [[0, 1], [2, 3], [1, 2], [0, 3]]
    exposure = document_exposure(trajectory(rows, [0.1] * 4), [2, 4], rates=np.full(4, 0.1), num_documents=4)
    np.testing.assert_allclose(exposure, 1 / 4)


def test_exposure_is_the_share_of_the_learning_rate():
    """Against the definition, document by document."""
    random = np.random.default_rng(0)
    rows = [random.choice(7, size=random.integers(1, 4), replace=False).tolist() for _ in range(12)]
    rates = random.uniform(0.1, 1, size=12)
    exposure = document_exposure(trajectory(rows, rates.tolist()), [5, 12], rates=rates, num_documents=7)
    for document in range(7):
        for segment, at in enumerate([range(5), range(5, 12)]):
            received = sum(rates[k] / len(rows[k]) for k in at if document in rows[k])
            assert exposure[document, segment] == pytest.approx(received / sum(rates[k] for k in at))
    np.testing.assert_allclose(exposure.sum(axis=0), 1)


def test_momentum_and_clipping_change_the_rates_of_sgd_alone():
    table = trajectory([[0]] * 2, [0.1, 0.2], scale=0.5)
    np.testing.assert_allclose(effective_learning_rates(table, optimizer="sgd", momentum=0.9), [0.5, 1.0])
    np.testing.assert_allclose(effective_learning_rates(table, optimizer="adamw", momentum=0.9), [0.1, 0.2])


def test_clipping_shortens_gradients_and_not_the_decay_that_is_added_to_them():
    """Against torch: what is left at the end of a change of the weights, and of one of every gradient, where curvature is 0."""
    length, decay, momentum, num_steps, rate = 4.0, 0.2, 0.5, 400, 0.01

    def end(start: float, push: float) -> float:
        """The weight across the gradient; the gradient along the other weight is clipped to a quarter."""
        weights = torch.tensor([0.0, start], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([weights], lr=rate, momentum=momentum, weight_decay=decay)
        for _ in range(num_steps):
            weights.grad = torch.tensor([length, push], dtype=torch.float64)
            torch.nn.utils.clip_grad_norm_([weights], 1.0)
            optimizer.step()
        return weights[1].item()

    table = trajectory([[0]] * num_steps, [rate] * num_steps, scale=1 / length)
    time = effective_learning_rates(table, optimizer="sgd", momentum=momentum).sum()
    w = effective_weight_decay(table, optimizer="sgd", weight_decay=decay)
    flat = torch.zeros(1, dtype=torch.float64)
    assert segment_decay(time, weight_decay=w)(flat).item() == pytest.approx(end(1.0, 0.0), rel=0.01)
    assert segment_response(time, weight_decay=w)(flat).item() == pytest.approx(-end(0.0, 1e-3) / 1e-3, rel=0.01)
    assert effective_weight_decay(table, optimizer="adamw", weight_decay=decay) == decay
    still = trajectory([[0]], [0.0])
    assert effective_weight_decay(still, optimizer="sgd", weight_decay=decay) == decay


def test_segments_carry_steps_rates_and_tokens():
    exposure = np.array([[1.0, 0.0], [0.0, 0.25], [0.0, 0.75]])
    made = make_segments(
        [2, 4, 6], [1, 3], rates=np.array([1.0, 3, 1, 1, 1, 1]), exposure=exposure, tokens=np.array([10, 20, 40])
    )
    assert [segment.checkpoints for segment in made] == [[0], [1, 2]]
    assert [(segment.first_step, segment.last_step, segment.num_steps) for segment in made] == [(1, 2, 2), (3, 6, 4)]
    assert [segment.time for segment in made] == [4.0, 4.0]
    assert [segment.tokens_per_document for segment in made] == [10.0, 35.0]


def test_a_segment_in_which_nothing_was_learned_gives_nobody_anything():
    rows, rates = [[0, 1], [1, 2], [0, 2]], np.array([0.0, 0.0, 0.1])
    exposure = document_exposure(trajectory(rows, rates.tolist()), [2, 3], rates=rates, num_documents=4)
    np.testing.assert_allclose(exposure, [[0, 1 / 2], [0, 0], [0, 1 / 2], [0, 0]])
    made = make_segments([2, 3], [1, 2], rates=rates, exposure=exposure, tokens=np.array([1, 2, 3, 6]))
    assert [segment.time for segment in made] == pytest.approx([0.0, 0.1])
    assert [segment.tokens_per_document for segment in made] == [3.0, 2.0]
    assert rows_seen(exposure, 0, 0, seed=[0]).tolist() == [0, 1, 2, 3]
    assert rows_seen(exposure, 1, 0, seed=[0]).tolist() == [0, 2]
