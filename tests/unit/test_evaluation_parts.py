"""Small parts of the evaluations: files of runs, what work takes, tables, plots, names of methods."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flows.deps import imports
from tda.bank_scores import TRAINING_CODE
from tda.bank_training import initial_model, train_run
from tda.builtin_bank import NUM_QUERIES, NUM_ROWS, SOURCES, _tabulated
from tda.data import Examples
from tda.evaluate_mislabelled import found, read_bad_rows
from tda.evaluation_plots import folded, plot_curves, plot_lds
from tda.run_files import load_run, save_run
from tda.task import CausalLM, Classification
from tda.text_table import text_table
from tda.usage import measured
from tda.variants import parse_variant
from tests.banks import data_for, fake_bank, recipe
from tests.helpers import random_documents

ADAMW = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "batch": 4, "epochs": 3}
EXAMPLES = (Classification(), Examples(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)))


@pytest.mark.parametrize("changes", [{}, {"training": ADAMW}])
def test_a_run_is_written_and_read(tmp_path, changes):
    made = recipe(**changes)
    run = train_run(data_for(made).train(made), made, rows=np.arange(21), seed=(1, 0, 0), num_checkpoints=3)
    run = replace(run, optimizer=replace(run.optimizer, undecayed=("0.bias",)))
    save_run(tmp_path / "run", run, cpu_seconds=1.5)
    again = load_run(tmp_path / "run", initial_model(made, (9, 9, 9)))
    assert again.optimizer == run.optimizer
    assert np.array_equal(again.learning_rates, run.learning_rates)
    assert all(map(np.array_equal, again.batches, run.batches))
    for ours, theirs in zip(again.checkpoints, run.checkpoints, strict=True):
        assert ours.step == theirs.step
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=0)
        torch.testing.assert_close(ours.second_moments, theirs.second_moments, rtol=0, atol=0)
    torch.testing.assert_close(again.initial, run.initial, rtol=0, atol=0)


def test_a_run_of_tied_weights_is_written_and_read(tmp_path):
    from tests.helpers import tiny_llama

    model = tiny_llama()
    made = recipe(training=ADAMW)
    base = train_run(data_for(made).train(made), made, rows=np.arange(21), seed=(1, 0, 0), num_checkpoints=1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint = type(base.checkpoints[0])(base.checkpoints[0].step, weights, base.checkpoints[0].second_moments)
    run = type(base)(model, [checkpoint], base.learning_rates, base.batches, base.optimizer, {})
    save_run(tmp_path / "run", run)
    again = load_run(tmp_path / "run", tiny_llama(seed=1)).at(0)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_peak_is_that_of_the_block():
    with measured():
        np.ones(30_000_000)
    with measured() as small:
        pass
    with measured() as large:
        values = np.ones(10_000_000)
        del values
    assert large.peak_rise_mib == pytest.approx(76, abs=15)  # 10 million of 8 bytes; what a page or an allocator adds
    assert small.peak_rise_mib < 15
    assert large.peak_mib > large.peak_rise_mib
    assert large.cpu_seconds > 0


def test_a_table():
    assert text_table(["name", "n"], [["a", "1"], ["long name", "12"]]) == (
        "name        n\n---------  --\na           1\nlong name  12"
    )


def test_a_variant_of_a_method():
    variant = parse_variant("source:num_segments=2:damping=0.5:adam=symmetric")
    assert (variant.method, variant.settings) == ("source", {"num_segments": 2, "damping": 0.5, "adam": "symmetric"})
    assert parse_variant("random").settings == {}
    assert parse_variant("source:damping=1:layers=3").settings == {"damping": 1.0, "layers": "3"}
    assert variant.parts(*EXAMPLES) == []


def test_what_a_variant_is_put_together_from():
    both = parse_variant("surrogate+tracin:num_segments=2")
    assert both.parts(*EXAMPLES) == [parse_variant("surrogate:num_segments=2"), parse_variant("tracin:num_segments=2")]
    assert parse_variant("tracin+surrogate:damping=1").parts(*EXAMPLES)[0] == parse_variant("tracin:damping=1")
    corrected = parse_variant("datamodel:retrainings=6:rounds=2")
    prior, retrainings = corrected.parts(*EXAMPLES)
    assert prior == parse_variant("surrogate+averaged_influence:rounds=2")
    assert (retrainings.method, retrainings.settings) == ("retrainings", {"retrainings": 6, "rounds": 2})
    assert corrected.parts(CausalLM(), random_documents(2))[0] == parse_variant("averaged_influence:rounds=2")
    assert parse_variant("datamodel:prior=source").parts(*EXAMPLES)[0] == parse_variant("source")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sauce", "--methods: unknown method 'sauce'; known are gradient_dot"),
        ("source+sauce", "--methods: unknown method 'sauce'; known are gradient_dot.* and any of them joined by +"),
        ("source+", "--methods: unknown method ''; known are gradient_dot"),
        ("source:adam", "--methods: source:adam: expected METHOD:SETTING=VALUE; got 'adam'"),
        ("datamodel:prior=sauce", "--methods: datamodel:prior=sauce: prior: unknown method 'sauce'; known are gradient_dot"),
        ("source:segments=3", "unknown settings segments; known are num_segments"),
        (
            "ekfac_influence:damping=abc",
            "--methods: ekfac_influence:damping=abc: damping: input should be a valid number, .*; got 'abc'",
        ),
        ("ekfac_influence:damping=nan", "damping: input should be greater than 0; got 'nan'"),
        ("source:num_segments=2.5", "num_segments: input should be a valid integer, .*; got '2.5'"),
        ("source:num_segments=", "num_segments: input should be a valid integer, .*; got ''"),
        ("source:adam=yes", "adam: input should be 'scalar', 'symmetric', 'diagonal' or 'none'; got 'yes'"),
    ],
)
def test_an_unknown_method_or_setting_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_variant(text)


def test_recall_of_bad_rows():
    suspicion = np.array([5.0, 1, 4, 0, 3, 2, -1, -2, -3, -4])
    bad = np.isin(np.arange(10), [0, 1])
    result = found(suspicion, bad)
    assert result["recall_at"] == {"10%": 0.5, "20%": 0.5, "40%": 0.5}
    pairs = [(suspicion[i] > suspicion[j]) for i in (0, 1) for j in range(2, 10)]
    assert result["auc"] == pytest.approx(np.mean(pairs))
    assert (result["recall"][0], result["recall"][-1]) == (0, 1)
    assert found(np.where(bad, 1.0, 0.0), bad)["recall_at"]["20%"] == 1


def test_bad_rows_of_a_file(tmp_path):
    data = fake_bank().data
    path = tmp_path / "bad.txt"
    path.write_text("3\n20\n")
    assert np.flatnonzero(read_bad_rows(path, data)).tolist() == [3, 20]
    for text, message in [("21", "expected row numbers from 0 to 20; got 21"), ("x 3", "got x"), ("", "0 of 21 rows are bad")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_bad_rows(path, data)
    with pytest.raises(ValueError, match=r"the bank does not say which rows are bad .*; give --bad FILE"):
        read_bad_rows(None, data)


def lds_result(num_seeds: int = 2) -> dict:
    value = {"mean": 0.4, "low": 0.3, "high": 0.5}
    ensemble = value if num_seeds > 1 else None
    return {
        "bank": {"name": "a bank", "queries": 5, "subsets": 8, "repeats": 2},
        "ceiling": 0.9 if num_seeds > 1 else None,
        "seeds": list(range(num_seeds)),
        "methods": {"one": {"single": value, "ensemble": ensemble}, "two": {"single": value, "ensemble": ensemble}},
    }


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plots_are_the_same_bytes_twice(tmp_path, suffix):
    start = b"\x89PNG" if suffix == ".png" else b"<?xml"
    curves = {
        "one": {"x": [0, 1], "mean": [0.0, 0.5], "low": [0.0, 0.4], "high": [0.0, 0.6]},
        "random": {"x": [0, 1], "mean": [0, 1]},
    }
    words = {"title": "t", "subtitle": "s", "x_label": "x", "y_label": "y", "baselines": ["random", "absent"], "percent": True}
    for name in ("a", "b"):
        plot_lds(lds_result(), tmp_path / f"lds-{name}{suffix}")
        plot_curves(curves, tmp_path / f"curves-{name}{suffix}", **words)
    for kind in ("lds", "curves"):
        first = (tmp_path / f"{kind}-a{suffix}").read_bytes()
        assert first.startswith(start)
        assert first == (tmp_path / f"{kind}-b{suffix}").read_bytes()


def test_a_plot_of_one_run_without_a_ceiling(tmp_path):
    plot_lds(lds_result(1), tmp_path / "lds.png")
    assert (tmp_path / "lds.png").stat().st_size > 5000


def test_a_plot_folds_long_names(tmp_path):
    """Unfolded they leave no room for the plot, of which matplotlib warns."""
    name = "averaged_influence:counterfactual_end=0.5:damping_scale=4.0:rounds=3:solver_terms=8192"
    lines = ["averaged_influence", ":counterfactual_end=0.5", ":damping_scale=4.0:rounds=3", ":solver_terms=8192"]
    assert folded(name).split("\n") == lines
    assert folded("surrogate+averaged_influence") == "surrogate+averaged_influence"
    result = lds_result()
    result["methods"][name] = result["methods"]["one"]
    plot_lds(result, tmp_path / "lds.png")


def test_the_builtin_rows():
    random = np.random.default_rng(0)
    vocabulary = np.array([f"{a}{b}" for a in "abcdefghijklmnop" for b in "abcdefghijklmnop"])
    texts = [(source, f"{source}.name\n\n{' '.join(random.choice(vocabulary, 30))}") for source in SOURCES for _ in range(140)]
    tables = _tabulated(texts, np.random.default_rng(1))
    assert tables["x_train"].shape == (NUM_ROWS, 128)
    assert tables["x_query"].shape == (NUM_QUERIES, 128)
    assert np.bincount(np.concatenate([tables["y_query"], tables["y_train"]])[: NUM_ROWS + NUM_QUERIES]).shape == (6,)
    assert tables["flipped"].sum() == NUM_ROWS // 10
    again = _tabulated(texts, np.random.default_rng(1))
    assert all(np.array_equal(tables[name], again[name]) for name in tables)


def test_a_run_is_kept_under_the_code_that_its_numbers_depend_on():
    package, names = Path(__file__).parents[2] / "tda", {Path(name).stem for name in TRAINING_CODE}
    others = set().union(*(imports(package / name) for name in TRAINING_CODE)) - names
    assert others == {"artifacts", "model", "packing", "recipe"}  # reading, layers, the pipeline's batches: no numbers of a run
