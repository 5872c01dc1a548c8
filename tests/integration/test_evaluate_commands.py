"""`tda evaluate ...` on tiny banks: what it prints and writes, what it keeps, what it refuses."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from tda import builtin_bank, cli
from tda.attribute import attribute
from tda.bank import load_bank, save_bank
from tda.bank_data import BankData
from tda.bank_help import EXAMPLE
from tda.bank_scores import RunStore
from tda.bank_training import retrained_by_recipe, train_run
from tda.corpus import Text
from tda.evaluate_removal import random_orders
from tda.fitted import Fitted, Settings
from tda.lds import lds_by_query
from tda.make_bank import make_bank
from tda.self_influence import self_scores
from tests.banks import data_for, fake_bank, recipe

CLASSES = {"training": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.5, "batch": 8, "epochs": 8}}
VALUES = {"loss": "squared_error", "measurement": "absolute_error", "model__dims": [3, 8, 1]}


def npz(**arrays: np.ndarray) -> bytes:
    file = BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """A bank of three classes, a tenth of its labels wrong."""
    made = recipe(**CLASSES)
    data = data_for(made, num_rows=60, num_queries=8)
    flipped = np.arange(60) % 10 == 0
    y = np.where(flipped, (data.y_train + 1) % 3, data.y_train).astype(np.uint8)
    data = BankData(data.x_train, data.x_query, y, data.y_query, extras={"flipped": flipped})
    out = tmp_path_factory.mktemp("classes") / "classes.npz"
    make_bank(data, made, num_subsets=20, repeats=3, seed=0, out=out, workers=1)
    return out


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> Path:
    made = recipe(**VALUES)
    out = tmp_path_factory.mktemp("values") / "values.npz"
    make_bank(data_for(made, num_rows=30), made, num_subsets=12, repeats=2, seed=0, out=out, workers=1)
    return out


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TDA_WORKERS", "1")
    return tmp_path


def test_lds(classes, folder, capsys):
    arguments = ["evaluate", "lds", "--bank", str(classes), "--seeds", "2", "--json", "out/result.json"]
    assert cli.main(arguments) == cli.OK
    printed = capsys.readouterr().out
    for words in (
        "noise ceiling 0.",
        "single run",
        "mean of 2 runs",
        "minus ekfac_influence",
        "minus source",
        "CPU s",
        "peak MiB",
    ):
        assert words in printed
    result = json.loads((folder / "out" / "result.json").read_text())
    assert set(result["methods"]) == {  # bm25 needs tokens
        "random",
        "gradient_dot",
        "ekfac_influence",
        "source",
        "surrogate",
        "averaged_influence",
        "surrogate+averaged_influence",
        "datamodel",
    }
    together = result["methods"]["surrogate+averaged_influence"]
    members = [result["methods"][name] for name in ("surrogate", "averaged_influence")]
    assert together["cpu_seconds"] == pytest.approx(sum(member["cpu_seconds"] for member in members))
    assert result["methods"]["datamodel"]["cpu_seconds"] > together["cpu_seconds"]
    assert together["peak_mib"] == max(member["peak_mib"] for member in members)
    source, ekfac = result["methods"]["source"], result["methods"]["ekfac_influence"]
    assert source["single"]["mean"] == pytest.approx(np.mean(source["single"]["by_seed"]))
    assert source["single"]["low"] < source["single"]["mean"] < source["single"]["high"]
    difference = result["differences"]["ekfac_influence"]["source"]
    for kind in ("single", "ensemble"):
        pairs = np.array(source[kind]["by_query"]) - np.array(ekfac[kind]["by_query"])
        assert difference[kind]["mean"] == pytest.approx(pairs.mean())
    assert source["single"]["mean"] > result["methods"]["random"]["single"]["mean"] + 0.2
    assert (folder / "out" / "result.png").read_bytes().startswith(b"\x89PNG")

    kept = {path: path.stat().st_mtime_ns for path in (folder / "data" / "evaluate").rglob("*.npy")}
    assert len(kept) == 7 * 2
    assert cli.main(arguments) == cli.OK  # nothing is worked out twice
    assert {path: path.stat().st_mtime_ns for path in (folder / "data" / "evaluate").rglob("*.npy")} == kept
    assert json.loads((folder / "out" / "result.json").read_text()) == result


@pytest.mark.parametrize("method", ["gradient_dot", "datamodel"])
def test_lds_is_that_of_the_scores_of_attribute(classes, folder, method):
    arguments = ["--bank", str(classes), "--seeds", "2", "--methods", f"{method}:retrainings=10", "--json", "r.json"]
    assert cli.main(["evaluate", "lds", *arguments]) == cli.OK
    bank = load_bank(classes)
    store = RunStore(bank.data, bank.recipe, folder / "data" / "evaluate")
    train, queries = bank.data.train(bank.recipe), bank.data.queries(bank.recipe)
    scores = [
        attribute(
            method,
            store.run(seed),
            bank.recipe.task,
            train,
            queries,
            retrain=lambda trainings: retrained_by_recipe(trainings, bank.recipe, train),
            seed=1000 * seed,
            retrainings=10,
        ).values
        for seed in (0, 1)
    ]
    result = json.loads((folder / "r.json").read_text())["methods"][f"{method}:retrainings=10"]
    by_query = [lds_by_query(run, bank.masks, bank.costs) for run in scores]
    assert np.allclose(result["single"]["by_query"], np.mean(by_query, axis=0))
    assert np.allclose(result["ensemble"]["by_query"], lds_by_query(scores[0] + scores[1], bank.masks, bank.costs))


def test_lds_of_one_run_by_other_settings(values, folder, capsys):
    methods = "source:num_segments=1,source:num_segments=2"
    assert cli.main(["evaluate", "lds", "--bank", str(values), "--seeds", "1", "--methods", methods, "--plot", "p.svg"]) == cli.OK
    assert "minus source:num_segments=1" in capsys.readouterr().out
    result = json.loads((folder / "data" / "evaluate" / "values-lds.json").read_text())
    assert result["methods"]["source:num_segments=2"]["ensemble"] is None
    assert (folder / "p.svg").exists()


def test_removal_of_classified_queries(classes, folder, capsys):
    arguments = ["evaluate", "removal", "--bank", str(classes), "--runs", "2", "--queries", "4", "--remove", "2,12,12"]
    assert cli.main([*arguments, "--methods", "source", "--json", "r.json"]) == cli.OK
    printed = capsys.readouterr().out
    for words in ("share flipped", "rise in cost (-margin)", "12 removed", "random, same class"):
        assert words in printed
    result = json.loads((folder / "r.json").read_text())
    assert result["counts"] == [2, 12]
    assert len(result["queries"]) == 4
    rise = {label: [at["mean"] for at in method["cost_rise"]] for label, method in result["methods"].items()}
    assert rise["source"][1] > rise["source"][0] > 0
    assert rise["source"][1] > rise["random, same class"][1]
    assert all(0 <= at["mean"] <= 1 for at in result["methods"]["source"]["flipped"])
    assert (folder / "r.png").exists()


def test_removal_without_classes_and_for_all_queries_together(values, folder, capsys):
    arguments = ["evaluate", "removal", "--bank", str(values), "--runs", "1", "--remove", "3", "--methods", "ekfac_influence"]
    assert cli.main([*arguments, "--json", "apart.json"]) == cli.OK
    printed = capsys.readouterr().out
    assert "random rows" in printed
    assert "flipped" not in printed
    assert json.loads((folder / "apart.json").read_text())["methods"]["ekfac_influence"]["flipped"] is None
    assert cli.main([*arguments, "--together", "--json", "together.json"]) == cli.OK
    assert "for all queries together" in capsys.readouterr().out


def test_random_rows_are_of_the_query_own_class():
    bank = fake_bank()
    from tda.evaluate_removal import Removal

    orders = random_orders(bank, np.array([0, 3]), Removal(counts=(2,)))
    for query, order in zip((0, 3), orders, strict=True):
        same = bank.data.y_train[order] == bank.data.y_query[query]
        assert sorted(order) == list(range(21))
        assert not same[same.sum() :].any()


def test_the_control_of_classified_queries_together_is_of_any_class(classes, folder, capsys):
    arguments = ["evaluate", "removal", "--bank", str(classes), "--runs", "1", "--queries", "2", "--remove", "2", "--seeds", "1"]
    assert cli.main([*arguments, "--together", "--methods", "gradient_dot", "--json", "r.json"]) == cli.OK
    assert "same class" not in capsys.readouterr().out
    result = json.loads((folder / "r.json").read_text())
    assert (result["control"], list(result["methods"])) == ("random rows", ["gradient_dot", "random rows"])


def test_mislabelled(classes, folder, capsys):
    arguments = ["evaluate", "mislabelled", "--bank", str(classes), "--seeds", "2", "--work", "w"]
    for by, words in (("self", "by self-influence"), ("queries", "by harm to the queries")):
        assert cli.main([*arguments, "--by", by]) == cli.OK
        assert words in capsys.readouterr().out
        result = json.loads((folder / "w" / f"{classes.stem}-mislabelled-by-{by}.json").read_text())
        assert set(result["methods"]) == {"ekfac_influence", "source", "training loss", "random"}
        assert result["bad"] == 6
        if by == "self":
            assert result["methods"]["source"]["auc"] > 0.8
    (folder / "bad.txt").write_text("1 2 3")
    assert cli.main([*arguments, "--bad", "bad.txt"]) == cli.OK
    assert "3 of 60 rows are bad" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["gradient_dot", "tracin", "ekfac_influence", "source"])
def test_self_influence_is_the_diagonal(method, monkeypatch):
    monkeypatch.setattr("tda.self_influence.ROWS_AT_ONCE", 8)
    made = recipe(**CLASSES)
    train = data_for(made).train(made)
    run = train_run(train, made, rows=np.arange(21), seed=(1, 0, 0), num_checkpoints=3)
    ours = self_scores(method, Fitted(run, made.task, train, train, Settings()))
    full = attribute(method, run, made.task, train, train).values
    assert np.allclose(ours, np.diagonal(full), rtol=1e-4, atol=1e-6 * abs(full).max())


def test_self_influence_of_other_methods_is_not_known(classes, capsys):
    arguments = ["--bank", str(classes), "--methods", "random", "--seeds", "1", "--by", "self"]
    assert cli.main(["evaluate", "mislabelled", *arguments]) == cli.FAILED
    assert "self-influence: not known of random; known of gradient_dot" in capsys.readouterr().err


def test_a_bank_from_rows_and_a_recipe(folder, capsys):
    made = recipe(**CLASSES)
    data = data_for(made)
    np.savez(
        "rows.npz",
        x_train=data.x_train,
        y_train=data.y_train,
        x_query=data.x_query,
        y_query=data.y_query,
        recipe=np.array(made.to_json()),
        train_domain=np.zeros(21, np.uint8),
    )
    assert cli.main(["evaluate", "bank", "rows.npz", "bank.npz", "--subsets", "5", "--repeats", "2"]) == cli.OK
    assert "next     tda evaluate lds --bank bank.npz" in capsys.readouterr().out
    bank = load_bank(folder / "bank.npz")
    assert bank.measurements.shape == (5, 2, 5)
    assert bank.data.extras["train_domain"].shape == (21,)
    np.savez("less.npz", x_train=data.x_train)
    assert cli.main(["evaluate", "bank", "less.npz", "bank.npz"]) == cli.FAILED
    assert "less.npz: x_query, recipe missing; expected x_train" in capsys.readouterr().err
    assert cli.main(["evaluate", "bank", "none.npz", "bank.npz"]) == cli.FAILED
    assert "none.npz: no such file" in capsys.readouterr().err


def test_the_example_of_the_help_makes_a_bank(folder, capsys):
    random = np.random.default_rng(0)
    sizes = {"x_train": (30, 20), "x_query": (4, 20)}
    arrays = {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    arrays |= {"y_train": random.integers(0, 3, 30), "y_query": random.integers(0, 3, 4)}
    np.savez("rows.npz", **arrays, recipe=EXAMPLE)
    assert cli.main(["evaluate", "bank", "rows.npz", "bank.npz", "--subsets", "3", "--repeats", "1"]) == cli.OK
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "bank", "--help"])
    assert EXAMPLE in capsys.readouterr().out


def test_a_finished_bank_of_other_data_is_not_overwritten(folder, capsys):
    made = recipe(**CLASSES)
    data = data_for(made)
    rows = {"x_train": data.x_train, "y_train": data.y_train, "x_query": data.x_query, "y_query": data.y_query}
    np.savez("rows.npz", **rows, recipe=made.to_json())
    np.savez("others.npz", **rows | {"x_train": data.x_train + 1}, recipe=made.to_json())
    np.savez("flipped.npz", **rows, flipped=np.arange(2), recipe=made.to_json())
    np.savez("recipe.npz", **rows, recipe=recipe(**CLASSES, measurement="loss").to_json())
    usual = ["--subsets", "4", "--repeats", "2"]
    assert cli.main(["evaluate", "bank", "rows.npz", "bank.npz", *usual]) == cli.OK
    before = (folder / "bank.npz").read_bytes()
    for name, settings in (
        ("others", usual),
        ("flipped", usual),
        ("recipe", usual),
        ("rows", ["--subsets", "5", "--repeats", "2"]),
        ("rows", ["--subsets", "4", "--repeats", "1"]),
        ("rows", [*usual, "--seed", "1"]),
    ):
        assert cli.main(["evaluate", "bank", f"{name}.npz", "bank.npz", *settings]) == cli.FAILED
        error = capsys.readouterr().err
        assert "bank.npz: is another bank (4 subsets x 2 repeats of 21 rows), of other data, recipe or settings" in error
        assert "give another name for the new one, or remove bank.npz" in error
        assert (folder / "bank.npz").read_bytes() == before
    assert cli.main(["evaluate", "bank", "rows.npz", "bank.npz", *usual]) == cli.OK
    assert (folder / "bank.npz").read_bytes() == before
    assert cli.main(["evaluate", "bank", "rows.npz", "rows.npz", *usual]) == cli.FAILED
    assert "rows.npz: is no bank, and would be overwritten; give another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"garbage", "not an .npz file"),
        (npy(np.zeros(3)), "not an .npz file"),
        (npz(x_train=np.array([object()])), "x_train is not an array of numbers or text"),
        (npz(x_train=np.zeros(1000))[:500], "not an .npz file"),
    ],
    ids=["garbage", "npy", "objects", "truncated"],
)
def test_data_that_are_no_arrays_are_refused_in_our_words(folder, content, reason, capsys):
    (folder / "rows.npz").write_bytes(content)
    assert cli.main(["evaluate", "bank", "rows.npz", "bank.npz"]) == cli.FAILED
    error = capsys.readouterr().err
    assert f"tda evaluate: rows.npz: {reason}; expected an .npz file of the arrays x_train, y_train, x_query," in error
    assert "Traceback" not in error
    assert cli.main(["evaluate", "lds", "--bank", "rows.npz"]) == cli.FAILED
    assert f"rows.npz: not a bank: {reason}; expected an .npz file of plain arrays" in capsys.readouterr().err


def test_wrong_data_are_named_by_their_own_file(folder, capsys):
    made = recipe(**CLASSES)
    data = data_for(made)
    x = np.zeros((21, 6), np.float32)
    np.savez("rows.npz", x_train=x, y_train=data.y_train, x_query=x[:5], y_query=data.y_query, recipe=made.to_json())
    assert cli.main(["evaluate", "bank", "rows.npz", "bank.npz"]) == cli.FAILED
    assert "tda evaluate: rows.npz: x_train has 6 features; expected 3" in capsys.readouterr().err


def test_without_a_bank_a_small_one_is_made_once(folder, capsys, monkeypatch):
    random = np.random.default_rng(0)
    vocabulary = np.array([f"{a}{b}" for a in "abcdefghijkl" for b in "abcdefghijkl"])
    texts = [
        Text(source, str(number), f"name\n\n{' '.join(random.choice(vocabulary[place * 20 :], 30))}")
        for place, source in enumerate(builtin_bank.SOURCES)
        for number in range(130)
    ]
    monkeypatch.setattr(builtin_bank, "python_texts", lambda workers: texts)
    monkeypatch.setattr(builtin_bank, "NUM_SUBSETS", 4)
    monkeypatch.setattr(builtin_bank, "REPEATS", 1)
    arguments = ["evaluate", "lds", "--seeds", "1", "--methods", "gradient_dot"]
    assert cli.main(arguments) == cli.OK
    assert "data/evaluate/builtin.npz   (built in; made now: a few minutes, once)" in capsys.readouterr().out
    assert load_bank(folder / "data" / "evaluate" / "builtin.npz").data.flipped.sum() == 72
    assert not (folder / "data" / "evaluate" / "builtin.npz.runs").exists()
    assert cli.main(arguments) == cli.OK
    assert "made before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lds", "--bank", "none.npz"], "tda evaluate: none.npz: no such bank"),
        (["lds", "--bank", "BANK", "--methods", "sauce"], "--methods: unknown method 'sauce'"),
        (["lds", "--bank", "BANK", "--methods", "bm25", "--seeds", "1"], "bm25: the data have no tokens"),
        (["removal", "--bank", "BANK", "--remove", "30"], "--remove: 30; expected numbers of rows from 1 to 29"),
        (["mislabelled", "--bank", "BANK"], "the bank does not say which rows are bad"),
        (["lds", "--bank", "BANK", "--json", "/proc/none/x.json"], "/proc/none"),
    ],
)
def test_what_is_refused(values, arguments, message, capsys):
    arguments = [str(values) if word == "BANK" else word for word in arguments]
    assert cli.main(["evaluate", *arguments]) == cli.FAILED
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_query_that_is_never_right_is_refused(tmp_path, capsys):
    bank = fake_bank(recipe(training={"optimizer": "sgd", "lr": 1e-9, "batch": 8, "epochs": 1}))
    y = bank.data.y_query.copy()
    y[:] = 2
    data = BankData(bank.data.x_train, np.zeros_like(bank.data.x_query), bank.data.y_train, y)
    save_bank(tmp_path / "bank.npz", type(bank)(bank.masks, bank.measurements, bank.full_runs, data, bank.recipe))
    assert cli.main(["evaluate", "removal", "--bank", "bank.npz", "--remove", "2"]) == cli.FAILED
    assert "no query is classified rightly in all of 5 runs on all rows" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lds", "removal", "mislabelled", "bank"])
def test_every_kind_has_help_with_an_example(kind, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", kind, "--help"])
    assert stop.value.code == cli.OK
    text = capsys.readouterr().out
    assert f"example:\n  tda evaluate {kind}" in text
    assert "exit codes:" in text


@pytest.mark.parametrize(
    "arguments", [[], ["lsd"], ["lds", "--seeds", "0"], ["lds", "--plot", "p.gif"], ["removal", "--remove", "1,x"], ["bank"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", *arguments])
    assert stop.value.code == cli.USAGE
    assert "usage: tda evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["removal", "--remove", "a"], "--remove: expected whole numbers from 1, separated by commas, as 10,50; got a"),
        (["removal", "--remove", "5,0"], "--remove: expected whole numbers from 1, separated by commas, as 10,50; got 5,0"),
        (["lds", "--seeds", "two"], "--seeds: expected a whole number from 1; got two"),
        (["bank", "in", "out", "--seed", "-1"], "--seed: expected a whole number from 0 to 1000000000; got -1"),
        (["bank", "in", "out", "--seed", f"{2**63}"], f"--seed: expected a whole number from 0 to 1000000000; got {2**63}"),
    ],
)
def test_a_wrong_number_is_said_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", *arguments])
    assert message in capsys.readouterr().err
