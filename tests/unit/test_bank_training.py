"""Stacked training against one model at a time, and one model against torch's own optimizers written out."""

import numpy as np
import pytest
import torch

from tda import bank_training
from tda.bank_training import (
    Job,
    initial_model,
    measure,
    measure_stack,
    models_at_once,
    outcomes,
    recipe_optimizer,
    schedule,
    train_one,
    train_run,
    train_stack,
)
from tests.banks import data_for, recipe

ADAMW = {"optimizer": "adamw", "lr": 0.01, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "batch": 4, "epochs": 3}
PLAIN_SGD = {"optimizer": "sgd", "lr": 0.05, "batch": 8, "epochs": 2}
RECIPES = [
    recipe(),
    recipe(training=ADAMW, model__activation="gelu", measurement="loss"),
    recipe(training=PLAIN_SGD, model__activation="relu", measurement="log_probability"),
    recipe(loss="squared_error", measurement="absolute_error", model__dims=[3, 6, 1]),
    recipe(loss="squared_error", measurement="squared_error", model={"kind": "mlp", "dims": [3, 2]}, training=ADAMW),
]
SAME = 1e-4  # float32 rounding over some 20 steps; measured 2e-6, and .03 if one step is missed


@pytest.mark.parametrize("made", RECIPES)
def test_a_stack_is_its_models(made):
    """With unequal numbers of rows, so that the models take different numbers of steps."""
    data = data_for(made)
    train, queries = data.train(made), data.queries(made)
    jobs = [Job(np.arange(size), (2, 0, size)) for size in (21, 10, 3, 14)]
    values, correct = measure_stack(train_stack(jobs, made, train), made, queries)
    for place, job in enumerate(jobs):
        model = initial_model(made, job.seed)
        steps = schedule(job.rows, made.training, job.seed)
        train_one(model, train, steps, made, optimizer=recipe_optimizer(model, made.training))
        assert np.allclose(values[place], measure(model, made, queries), atol=SAME)
        if made.loss == "cross_entropy":
            predicted = model(queries.x).argmax(dim=1)
            assert correct[place].tolist() == (predicted == queries.y).tolist()
        else:
            assert np.isnan(correct[place]).all()


@pytest.mark.parametrize("made", RECIPES[:2])
def test_large_models_are_trained_one_by_one_and_end_the_same(made, monkeypatch):
    data = data_for(made)
    jobs = [Job(np.arange(12), (2, 0, number)) for number in range(2)]
    train, queries = data.train(made), data.queries(made)
    assert models_at_once(made) > 1
    stacked = outcomes(jobs, made, train=train, queries=queries)
    monkeypatch.setattr(bank_training, "STACK_PARAMETERS", 1)
    assert models_at_once(made) == 1
    for ours, theirs in zip(outcomes(jobs, made, train=train, queries=queries), stacked, strict=True):
        assert np.allclose(ours, theirs, atol=SAME)


@pytest.mark.parametrize("made", RECIPES)
def test_measurements_by_hand(made):
    data = data_for(made)
    queries = data.queries(made)
    model = initial_model(made, (1, 2, 3)).double()
    values = measure(model.float(), made, queries)
    outputs = model.double()(queries.x.double()).detach().numpy()
    if made.loss == "cross_entropy":
        p = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
        p = p[np.arange(len(p)), queries.y]
        expected = {"margin": np.log(p / (1 - p)), "loss": -np.log(p), "log_probability": np.log(p)}[made.measurement]
    else:
        errors = outputs - queries.y.numpy().reshape(outputs.shape)
        expected = (abs(errors) if made.measurement == "absolute_error" else errors**2).sum(axis=1)
    assert np.allclose(values, expected, atol=1e-5)


def test_every_epoch_takes_every_row_once_in_another_order():
    made = recipe()
    rows = np.array([3, 5, 8, 9, 11, 12, 20, 2, 1])
    steps = schedule(rows, made.training, (1, 0, 0))
    assert [len(step) for step in steps] == [4, 4, 1] * 3  # the last batch is short
    epochs = [np.concatenate(steps[start : start + 3]).tolist() for start in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(rows) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_of_different_kinds_share_nothing():
    made = recipe()
    seeds = [(1, 0, 0), (1, 0, 1), (2, 0, 0), (1, 1, 0)]
    weights = {initial_model(made, seed)[0].weight.sum().item() for seed in seeds}
    orders = {tuple(schedule(np.arange(9), made.training, seed)[0]) for seed in seeds}
    assert len(weights) == len(orders) == len(seeds)
    before = torch.get_rng_state()
    initial_model(made, (1, 0, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_a_recorded_run_can_be_replayed():
    """From its initial weights, batches and rates, by the equations of AdamW written out."""
    made = recipe(training=ADAMW)
    data = data_for(made).train(made)
    run = train_run(data, made, rows=np.arange(21), seed=(1, 0, 0), num_checkpoints=4)
    assert [checkpoint.step for checkpoint in run.checkpoints] == [4, 9, 14, 18]
    model = initial_model(made, (1, 0, 0))
    theta = {name: value.clone().double() for name, value in run.initial.items()}
    m = {name: torch.zeros_like(value) for name, value in theta.items()}
    v = {name: torch.zeros_like(value) for name, value in theta.items()}
    model.double()
    for step, (rows, rate) in enumerate(zip(run.batches, run.learning_rates, strict=True), start=1):
        model.load_state_dict(theta)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(data.x[rows].double()), data.y[rows]).backward()
        for name, parameter in model.named_parameters():
            g = parameter.grad
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            update = m[name] / (1 - 0.8**step) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-6)
            theta[name] = theta[name] - rate * 0.1 * theta[name] - rate * update
    for name, value in run.checkpoints[-1].weights.items():
        torch.testing.assert_close(value.double(), theta[name], atol=SAME, rtol=0)
        torch.testing.assert_close(run.checkpoints[-1].second_moments[name].double(), v[name], atol=SAME, rtol=0)


def test_fewer_steps_than_checkpoints():
    made = recipe(training={"optimizer": "sgd", "lr": 0.1, "batch": 32, "epochs": 2})
    run = train_run(data_for(made).train(made), made, rows=np.arange(21), seed=(1, 0, 0), num_checkpoints=6)
    assert [checkpoint.step for checkpoint in run.checkpoints] == [1, 2]


@pytest.mark.parametrize("together", [True, False])
def test_a_training_that_diverges_says_so(together, monkeypatch):
    made = recipe(loss="squared_error", measurement="absolute_error", model__dims=[3, 8, 1], training__lr=1e6)
    if not together:
        monkeypatch.setattr(bank_training, "STACK_PARAMETERS", 1)
    data = data_for(made)
    with pytest.raises(ValueError, match=r"recipe.training: step \d+: the loss is not finite at learning rate 1e\+06"):
        outcomes([Job(np.arange(21), (2, 0, 0))], made, train=data.train(made), queries=data.queries(made))
