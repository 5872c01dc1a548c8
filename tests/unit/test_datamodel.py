"""Datamodels with a prior, against the same Bayesian regression in dense matrices and against real retraining."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch import nn

from tda.attribute import attribute
from tda.bank_training import Job, initial_model, recipe_optimizer, retrained_by_recipe, schedule, train_one
from tda.counterfactual import AVERAGED, make_optimizer, query_costs, retrained, schedule_without
from tda.data import Examples
from tda.datamodel import DEVIATIONS, SPREADS, half_signs, posterior
from tda.make_bank import half_subsets
from tda.task import Classification
from tda.trajectory import Optimizer, Recorder
from tests.banks import data_for, recipe
from tests.unit.test_attribute import setting


def known(num_pairs: int, *, num_rows: int = 12, noise: float = 0.3, seed: int = 0):
    """True effects, a prior that tells them in part, and differences that they make."""
    random = np.random.default_rng(seed)
    truth = random.standard_t(3, size=(4, num_rows))
    prior = 2 * (truth + random.normal(size=truth.shape) * np.abs(truth) ** 0.5)
    signs = half_signs(num_rows, num_pairs, seed=seed)
    differences = -signs @ truth.T / 2
    return truth, prior, signs, differences + noise * differences.std(axis=0) * random.normal(size=differences.shape)


def dense_posterior(prior: np.ndarray, signs: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """The hyperparameters by trying all on the differences' density, then the conditional mean of jointly normal numbers."""
    X, num_pairs = -signs / 2, len(signs)
    units, means, of_rows = [], [], []
    for m, d in zip(prior, differences.T, strict=True):
        units.append((d**2).mean() ** 0.5)
        means.append(m / ((X @ m) ** 2).mean() ** 0.5)
        of_rows.append(np.diag(4 * abs(m) / abs(m).sum()))

    def covariance(query: int, deviation: float, spread: float) -> np.ndarray:
        return deviation * np.outer(means[query], means[query]) + spread * of_rows[query]

    best = (-np.inf,)
    for spread, deviation in itertools.product(SPREADS, DEVIATIONS):
        V = [np.eye(num_pairs) + X @ covariance(query, deviation, spread) @ X.T for query in range(len(prior))]
        root = [np.linalg.cholesky(np.linalg.inv(each)).T for each in V]
        f = np.concatenate([R @ X @ mean for R, mean in zip(root, means, strict=True)])
        d = np.concatenate([R @ held / unit for R, held, unit in zip(root, differences.T, units, strict=True)])
        slope = max(0.0, f @ d / (f @ f))
        noise = ((d - slope * f) ** 2).mean()
        density = sum(
            multivariate_normal.logpdf(held / unit, slope * X @ mean, noise * each)
            for held, unit, mean, each in zip(differences.T, units, means, V, strict=True)
        )
        best = max(best, (density, spread, deviation, slope))
    _density, spread, deviation, slope = best
    scores = []
    for query, (d, unit, mean) in enumerate(zip(differences.T, units, means, strict=True)):
        C = covariance(query, deviation, spread)
        gain = C @ X.T @ np.linalg.inv(np.eye(num_pairs) + X @ C @ X.T)
        scores.append(unit * (slope * mean + gain @ (d / unit - slope * X @ mean)))
    return np.array(scores)


@pytest.mark.parametrize(("num_pairs", "noise"), [(3, 0.5), (8, 0.1), (30, 2.0)])
def test_the_posterior_is_that_of_dense_matrices(num_pairs, noise):
    _truth, prior, signs, differences = known(num_pairs, noise=noise)
    found = posterior(prior, signs, differences)
    np.testing.assert_allclose(found, dense_posterior(prior, signs, differences), rtol=1e-7, atol=1e-9)


def test_more_retrainings_lead_from_the_prior_to_the_truth():
    """But for what all rows have in common, which halves do not show."""
    errors = []
    for num_pairs in (2, 12, 60, 400):
        found = []
        for seed in range(10):
            truth, prior, signs, differences = known(num_pairs, seed=seed)
            error = posterior(prior, signs, differences) - truth
            found.append(abs(error - error.mean(axis=1, keepdims=True)).mean() / abs(truth).mean())
        errors.append(np.mean(found))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.08


def test_a_prior_that_knows_nothing_is_not_followed():
    """Its slope is near 0, whatever its size."""
    truth, _prior, signs, differences = known(200)
    prior = 1e3 * np.random.default_rng(1).normal(size=truth.shape)
    correlations = [
        np.corrcoef(found, true)[0, 1] for found, true in zip(posterior(prior, signs, differences), truth, strict=True)
    ]
    assert min(correlations) > 0.8


@given(scale=st.floats(1e-4, 1e4), unit=st.floats(1e-4, 1e4), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_the_prior_has_no_unit_and_the_scores_have_that_of_the_costs(scale, unit, seed):
    _truth, prior, signs, differences = known(6, seed=seed)
    first = posterior(prior, signs, differences)
    scales = np.array([scale, 1, 1, 1])[:, None]
    np.testing.assert_allclose(posterior(prior * scales, signs, unit * differences), unit * first, rtol=1e-6, atol=1e-9 * unit)
    order = np.random.default_rng(seed).permutation(prior.shape[1])
    np.testing.assert_allclose(posterior(prior[:, order], signs[:, order], differences), first[:, order], rtol=1e-6, atol=1e-9)


def test_queries_of_which_nothing_is_expected_or_learned_keep_their_prior():
    _truth, prior, signs, differences = known(5)
    prior[1], differences[:, 2] = 0, 0
    found = posterior(prior, signs, differences)
    assert np.array_equal(found[1:3], prior[1:3])
    assert np.isfinite(found).all()
    assert np.array_equal(posterior(prior * 0, signs, differences), prior * 0)


def test_halves_are_halves():
    signs = half_signs(7, 40, seed=3)
    assert set(signs.sum(axis=1)) == {-1}
    assert abs(signs.mean(axis=0) + 1 / 7).max() < 0.5
    assert not np.array_equal(signs, half_signs(7, 40, seed=4))
    assert not np.array_equal(signs > 0, half_subsets(7, 40, seed=3))  # a bank of that seed is not learned from


def test_a_retraining_takes_as_many_epochs_at_the_rates_of_the_run():
    run = setting("classification")[0]  # twelve steps of four of twelve rows: four epochs
    run = replace(run, learning_rates=np.arange(12) / 100)
    rows = np.array([0, 2, 3, 7, 8, 11])
    steps, rates = schedule_without(run, rows, seed=5)
    assert [len(step) for step in steps] == [4, 2] * 4
    epochs = [np.concatenate(steps[at : at + 2]) for at in range(0, 8, 2)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    np.testing.assert_allclose(rates, [0, 0.01, 0.03, 0.04, 0.06, 0.07, 0.09, 0.1])
    part = replace(run, batches=[np.array([0, 1, 2, 3])] * 12)  # of the others the run knows nothing
    steps, _rates = schedule_without(part, rows, seed=5)
    assert [sorted(step) for step in steps] == [[0, 2, 3]] * 12


@pytest.mark.parametrize(("kind", "optimizer"), [("classification", "sgd"), ("classification", "adamw"), ("lm", "adamw")])
def test_a_retraining_is_a_training_loop_written_out(kind, optimizer):
    run, task, train, queries = setting(kind, optimizer)
    rows = np.array([1, 4, 5, 6, 9, 10])
    (model,) = retrained(run, task, train, [(rows, 7)])
    expected = copy.deepcopy(run.model)
    expected.load_state_dict(run.initial)
    steps, rates = schedule_without(run, rows, seed=7)
    made = {
        "sgd": lambda: torch.optim.SGD(expected.parameters(), lr=1, momentum=0.5, weight_decay=0.01),
        "adamw": lambda: torch.optim.AdamW(expected.parameters(), lr=1, weight_decay=0.1),
    }[optimizer]()
    kept = []
    for step, rate in zip(steps, rates, strict=True):
        batch = train.batch(step.tolist())
        made.param_groups[0]["lr"] = rate
        made.zero_grad()
        (task.losses(expected, batch)[0] / batch.sizes.sum()).backward()
        made.step()
        kept.append([parameter.detach().clone() for parameter in expected.parameters()])
    last = kept[-round(AVERAGED * len(steps)) :]
    assert len(last) == 2
    for parameter, *values in zip(model.parameters(), *last, strict=True):
        torch.testing.assert_close(parameter, sum(values) / 2)
    costs = [task.costs(model, batch := queries.batch([row]), weights=1 / batch.sizes)[0].item() for row in range(3)]
    np.testing.assert_allclose(query_costs(model, task, queries), costs, rtol=1e-6)


@pytest.mark.parametrize("together", [True, False])
def test_a_banks_retrainings_start_from_their_seed_and_end_at_the_mean_of_their_last_weights(together, monkeypatch):
    made = recipe()
    data = data_for(made).train(made)
    if not together:
        monkeypatch.setattr("tda.bank_training.STACK_PARAMETERS", 1)
    trainings = [(np.arange(10), 3), (np.arange(10, 21), 3), (np.arange(11), 4)]
    models = list(retrained_by_recipe(trainings, made, data))
    for (rows, seed), model in zip(trainings[:2], models[:2], strict=True):
        job = Job(rows, (5, seed, 0))
        expected, kept = initial_model(made, job.seed), []
        train_one(
            expected,
            data,
            schedule(rows, made.training, job.seed),
            made,
            optimizer=recipe_optimizer(expected, made.training),
            after=lambda _rows, expected=expected, kept=kept: kept.append([p.detach().clone() for p in expected.parameters()]),
        )
        assert len(kept) == 9
        for parameter, *values in zip(model.parameters(), *kept[-3:], strict=True):
            torch.testing.assert_close(parameter, sum(values) / 3, rtol=1e-4, atol=1e-4)
    assert not torch.equal(models[0][0].weight, models[2][0].weight)


def linear_run(train: Examples, task: Classification, steps: int = 20):
    torch.manual_seed(3)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    recorder = Recorder(model, optimizer, num_steps=steps, num_checkpoints=3)
    for step in range(steps):
        rows = np.random.default_rng(step).choice(len(train), 8, replace=False)
        total, _losses = task.losses(model, train.batch(rows.tolist()))
        optimizer.zero_grad()
        (total / 8).backward()
        optimizer.step()
        recorder.step(rows)
    return recorder.run


def test_it_foretells_other_retrainings_better_than_its_prior():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(34, 4, generator=generator), torch.randn(34, generator=generator)
    y = ((x[:, 0] + 0.7 * noise > 0.4).long() + (x[:, 1] > 0).long()).clamp(max=2)
    task, train, queries = Classification(), Examples(x[:24], y[:24]), Examples(x[24:], y[24:])
    run = linear_run(train, task)
    signs = half_signs(24, 60, seed=99)
    trainings = [(np.flatnonzero(pair > 0), 1000 + place) for place, pair in enumerate(signs)]
    costs = np.stack([query_costs(model, task, queries) for model in retrained(run, task, train, trainings)])

    def told(method: str, **chosen: object) -> float:
        predicted = -signs @ attribute(method, run, task, train, queries, **chosen).values.T
        return np.mean([np.corrcoef(predicted[:, query], costs[:, query])[0, 1] for query in range(len(queries))])

    prior = told("gradient_dot")
    few, many = (told("datamodel", prior="gradient_dot", retrainings=number) for number in (20, 200))
    assert prior < few < many
    assert many > 0.95


def test_a_function_that_trains_is_used_where_one_is_given():
    run, task, train, queries = setting("classification")
    asked = []

    def retrain(trainings):
        asked.extend(trainings)
        yield from retrained(run, task, train, trainings)

    chosen = {"retrainings": 6, "prior": "gradient_dot"}
    given_ = attribute("datamodel", run, task, train, queries, retrain=retrain, **chosen).values
    assert np.array_equal(given_, attribute("datamodel", run, task, train, queries, **chosen).values)
    assert [seed for _rows, seed in asked[0::2]] == [seed for _rows, seed in asked[1::2]]  # a pair has one start
    assert len({seed for _rows, seed in asked}) == 3
    for (first, _), (second, _) in zip(asked[0::2], asked[1::2], strict=True):
        assert sorted([*first, *second]) == list(range(12))


@pytest.mark.parametrize(
    "part", [nn.Dropout(0.1), nn.GRU(3, 3, num_layers=2, dropout=0.1), nn.MultiheadAttention(4, 2, dropout=0.1)]
)
def test_dropout_that_retraining_leaves_off_is_told_of(part):
    run, task, train, _queries = setting("classification")
    model = nn.Sequential(*run.model)
    next(retrained(replace(run, model=model), task, train, [(np.arange(12), 0)]))  # says nothing, or the test fails
    model[1].part = part
    initial = run.initial | {f"1.part.{name}": value for name, value in part.state_dict().items()}
    with pytest.warns(UserWarning, match="retraining: the model has dropout, and retrainings are without; if the run was"):
        next(retrained(replace(run, model=model, initial=initial), task, train, [(np.arange(12), 0)]))


def test_refusals():
    run, task, train, queries = setting("classification")
    with pytest.raises(ValueError, match=r"datamodel: 1 retrainings on halves of 12 rows; expected at least 2"):
        attribute("datamodel", run, task, train, queries, retrainings=1, prior="gradient_dot")
    with pytest.raises(ValueError, match=r"attribute: prior: unknown method 'nothing'"):
        attribute("datamodel", run, task, train, queries, prior="nothing")
    with pytest.raises(ValueError, match=r"attribute: prior: 'source\+datamodel'; expected another method"):
        attribute("datamodel", run, task, train, queries, prior="source+datamodel")
    with pytest.raises(ValueError, match=r"retrain gave 1 models for 4 trainings"):
        attribute("datamodel", run, task, train, queries, retrainings=4, retrain=lambda trainings: [run.at(-1)])
    with pytest.raises(ValueError, match=r"no initial weights.*a Recorder made before the first step.*retrain"):
        attribute("datamodel", replace(run, initial={}), task, train, queries, retrainings=4)
    with pytest.raises(ValueError, match=r"retraining: step \d+: the loss is not finite at learning rate 1e\+200"):
        attribute("datamodel", replace(run, learning_rates=np.full(12, 1e200)), task, train, queries, prior="gradient_dot")

    normed = replace(run, model=nn.Sequential(run.model, nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match=r"normalises by batches.*hand over `retrain`"):
        next(retrained(normed, task, train, [(np.arange(6), 0)]))

    def broken(trainings):
        for _training in trainings:
            model = run.at(-1)
            model[0].weight.data.fill_(torch.nan)
            yield model

    with pytest.raises(ValueError, match=r"4 of 4 retrainings give costs that are not finite"):
        attribute("datamodel", run, task, train, queries, retrainings=4, prior="gradient_dot", retrain=broken)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_retraining_decays_what_the_run_decayed(kind):
    model = nn.Linear(2, 3)
    groups = make_optimizer(model, Optimizer(kind, weight_decay=0.5, undecayed=("bias",))).param_groups
    assert [(group["params"], group["weight_decay"]) for group in groups] == [([model.weight], 0.5), ([model.bias], 0.0)]
