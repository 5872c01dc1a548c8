"""The stages one after the other on a toy, in this process: what they hand on, and what they refuse."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from tda.artifacts import Workspace, read_json, write_json, write_table
from tda.config import CURATION_METHODS, Config
from tda.data import load_documents
from tda.dynamics import curvature_rows, load_exposure, load_segments
from tda.factors import load_factors, save_factors
from tda.query import answer
from tda.recorded import load_run
from tda.scoring import load_attribution
from tests.toy import BY_SOURCE, run_stages, toy_config, write_corpus

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Config, Workspace]:
    """A toy run up to the scores; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("toy")
    write_corpus(folder)
    config, workspace = toy_config(folder), Workspace(folder)
    run_stages(config, workspace, "prepare", "train", "segments", "curvature", "gradients", "scores")
    return config, workspace


@pytest.fixture
def toy(done, tmp_path) -> tuple[Config, Workspace]:
    config, workspace = done
    shutil.copytree(workspace.root, tmp_path, dirs_exist_ok=True)
    return config, Workspace(tmp_path)


def test_exposure_is_zero_where_a_document_was_not_trained_on(done):
    _config, workspace = done
    documents = load_documents(workspace.documents)
    exposure = load_exposure(workspace, documents)
    general = np.array(documents.parts) == "general"
    assert len(load_segments(workspace)) == 2
    assert (exposure[general, 1] == 0).all()
    assert (exposure[~general, 0] == 0).all()
    np.testing.assert_allclose(exposure.sum(axis=0), 1)


def test_scores_have_every_method_and_the_per_query_scores_sum_to_the_aggregate(done):
    _config, workspace = done
    table = pl.read_parquet(workspace.scores)
    assert [name for name in table.columns if name.startswith("score_")] == [f"score_{name}" for name in CURATION_METHODS]
    per_query = pl.read_parquet(workspace.query_scores)["scores"].to_numpy()
    tokens = load_documents(workspace.targets, half="score").num_loss_tokens
    np.testing.assert_allclose(per_query @ (tokens / tokens.sum()), table["score_source"].to_numpy(), rtol=1e-4, atol=1e-9)


def test_ekfac_influence_weights_a_document_by_how_often_the_run_drew_it(toy):
    _config, workspace = toy
    trajectory = pl.read_parquet(workspace.trajectory)
    drawn = np.bincount(np.concatenate([rows.to_numpy() for rows in trajectory["documents"]]))
    before = pl.read_parquet(workspace.scores)["score_ekfac_influence"].to_numpy()
    write_table(workspace.trajectory, trajectory.with_columns(pl.col("documents").list.filter(pl.element() != 0)))
    run_stages(toy_config(workspace.root, scores__averaged_influence=False, curation__method="source"), workspace, "scores")
    after = pl.read_parquet(workspace.scores)["score_ekfac_influence"].to_numpy()
    assert set(drawn) == {1, 2} and before[0] != 0 and after[0] == 0
    np.testing.assert_allclose(after[1:], before[1:] * drawn.sum() / drawn[1:].sum(), rtol=1e-6)


def test_scores_without_the_dearest_one(toy):
    config, workspace = toy
    cheaper = toy_config(workspace.root, scores__averaged_influence=False, curation__method="source")
    for name, expected in ((config, list(CURATION_METHODS)), (cheaper, list(CURATION_METHODS[1:]))):
        run_stages(name, workspace, "scores", "curation")
        columns = pl.read_parquet(workspace.scores).columns
        assert [column for column in columns if column.startswith("score_")] == [f"score_{method}" for method in expected]


def test_full_rank_rows_in_float32_give_the_scores_of_unprojected_gradients(toy):
    """The store, its projections and the walk against autograd and explicit gradients, over the whole pipeline."""
    from tda.checkpoints import load_checkpoint
    from tda.scoring import query_blocks
    from tda.source import walk_back
    from tests.helpers import dense_gradient, document_loss

    config, workspace = toy
    config = toy_config(workspace.root, gradients__rank=64, gradients__dtype="float32")
    run_stages(config, workspace, "gradients", "scores")
    documents = load_documents(workspace.documents)
    attribution = load_attribution(config, workspace, documents)
    queries = load_documents(workspace.targets, half="score")
    (query, order), *rest = query_blocks(config, workspace, attribution, queries)
    assert not rest
    layers = attribution.factors[0].layers
    chosen = [0, 7, 31]
    expected = np.zeros((len(order), len(chosen)))
    for dynamics, u in walk_back(query, attribution.dynamics):
        segment = attribution.segments[dynamics.index]
        for checkpoint in segment.checkpoints:
            model = load_checkpoint(workspace, checkpoint)
            for place, row in enumerate(chosen):
                G = dense_gradient(model, layers, document_loss(model, documents, row) / segment.tokens_per_document)
                dots = sum((u[layer.name] * G[layer.name]).sum(dim=(1, 2)) for layer in layers)
                received = attribution.exposure[row, dynamics.index] / len(segment.checkpoints)
                expected[:, place] += received * dots.detach().numpy()
    got = pl.read_parquet(workspace.query_scores)["scores"].to_numpy()[chosen].T[order]
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert read_json(workspace.scoring, stage="scores")["projection_keeps"] == pytest.approx([1, 1], abs=1e-5)


def test_the_rest_of_the_pipeline_and_a_verdict(toy, monkeypatch):
    from tda import retrain

    config, workspace = toy
    asked: list[Path | str] = []
    monkeypatch.setattr(retrain, "adapter_in", lambda place: asked.append(place))
    run_stages(config, workspace, "curation", "retraining", "evaluation", "report")
    assert config.train.model not in asked  # "llama" is no hub id: nothing may be looked up on the network
    manifest = pl.read_parquet(workspace.manifest)
    dropped = int((~manifest["keep"]).sum())
    assert 0 < dropped <= config.curation.drop * len(manifest)
    assert len(pl.read_parquet(workspace.curated)) == len(manifest) - dropped
    runs = pl.read_parquet(workspace.retraining)
    assert runs.group_by("arm").len().sort("arm").rows() == [("all", 2), ("curated", 2), ("random", 2)]
    assert runs["steps"].n_unique() == 1
    assert runs.filter(arm="curated")["num_documents"].to_list() == runs.filter(arm="random")["num_documents"].to_list()
    assert isinstance(read_json(workspace.verdict, stage="evaluation")["accepted"], bool)
    assert "<html" in workspace.report.read_text(encoding="utf-8")


def test_two_runs_and_any_number_of_workers_give_the_same_bytes(toy, tmp_path):
    config, workspace = toy
    again = Workspace(tmp_path / "again")
    again.root.mkdir()
    values = config.model_dump() | {"compute": config.compute.model_dump() | {"workers": 2}}
    (again.root / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    for name in ("prepare", "train", "segments", "curvature", "gradients", "scores"):
        parts = {"curvature": config.segments.indices, "gradients": config.train.checkpoints}.get(name)
        for arguments in [["--index", str(part)] for part in parts] if parts else [[]]:
            subprocess.run([sys.executable, "-m", "tda", name, *arguments], cwd=again.root, check=True)
    for path in ("documents", "exposure", "scores", "query_scores", "segments", "scoring", "trajectory", "training"):
        assert getattr(workspace, path).read_bytes() == getattr(again, path).read_bytes(), path
    for index in range(4):
        assert workspace.gradients(index).read_bytes() == again.gradients(index).read_bytes()


def test_training_that_was_killed_goes_on_and_ends_with_the_same_bytes(toy, tmp_path, monkeypatch):
    import tda.run

    config, workspace = toy
    again = Workspace(tmp_path / "again")
    shutil.copytree(workspace.documents.parent, again.documents.parent)
    save = tda.run.save_checkpoint

    def killed(folder: Path, *args: object, **kwargs: object) -> None:
        save(folder, *args, **kwargs)
        if folder.name == "1":
            raise KeyboardInterrupt

    monkeypatch.setattr(tda.run, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run_stages(config, again, "train")
    assert not again.training.exists()
    monkeypatch.setattr(tda.run, "save_checkpoint", save)
    taken: list[int] = []
    train = tda.run.train
    monkeypatch.setattr(
        tda.run,
        "train",
        lambda model, documents, steps, *a, **k: (taken.append(len(steps)), train(model, documents, steps, *a, **k)),
    )
    run_stages(config, again, "train")
    assert taken[0] < read_json(again.training, stage="train")["num_steps"]
    assert again.training.read_bytes() == workspace.training.read_bytes()
    assert again.trajectory.read_bytes() == workspace.trajectory.read_bytes()
    for index in range(4):
        for name in ("model/model.safetensors", "mean.safetensors"):
            assert (again.checkpoint(index) / name).read_bytes() == (workspace.checkpoint(index) / name).read_bytes()


def test_training_that_was_killed_while_its_checkpoints_took_their_place_starts_again(toy, tmp_path, monkeypatch):
    import tda.run

    config, workspace = toy
    again, move = Workspace(tmp_path / "again"), shutil.move
    shutil.copytree(workspace.documents.parent, again.documents.parent)

    def killed(*args: object) -> None:
        move(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(tda.run.shutil, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        run_stages(config, again, "train")
    monkeypatch.setattr(tda.run.shutil, "move", move)
    run_stages(config, again, "train")
    assert again.training.read_bytes() == workspace.training.read_bytes()
    assert sorted(path.name for path in again.checkpoints.iterdir()) == ["0", "1", "2", "3"]


def test_checkpoints_are_attributed_at_their_mean_weights(toy, tmp_path):
    from safetensors.torch import load_file

    from tda.checkpoints import load_checkpoint, weights_digest

    config, workspace = toy
    parameters = dict(load_checkpoint(workspace, 1).named_parameters())
    for name, value in load_file(workspace.checkpoint(1) / "mean.safetensors").items():
        assert torch.equal(parameters[name], value)
    last = load_file(workspace.checkpoint(1) / "model" / "model.safetensors")
    assert not torch.equal(parameters["model.norm.weight"], last["model.norm.weight"])

    plain = Workspace(tmp_path / "plain")
    shutil.copytree(workspace.documents.parent, plain.documents.parent)
    run_stages(config.model_copy(update={"train": config.train.model_copy(update={"attribute_at": "last"})}), plain, "train")
    assert not (plain.checkpoint(1) / "mean.safetensors").exists()
    assert torch.equal(dict(load_checkpoint(plain, 1).named_parameters())["model.norm.weight"], last["model.norm.weight"])
    assert weights_digest(plain.checkpoint(1)) != weights_digest(workspace.checkpoint(1))


def test_new_documents_are_appended_without_computing_old_ones(toy, monkeypatch):
    import tda.gradient_log

    config, workspace = toy
    documents = load_documents(workspace.documents)
    tda.gradient_log.log_rows(config, workspace, documents, checkpoint=3)
    batches: list[list[int]] = []
    gradient_rows = tda.gradient_log.gradient_rows

    def counted(model, layers, batch, **kwargs):
        batches.append(batch.rows)
        return gradient_rows(model, layers, batch, **kwargs)

    monkeypatch.setattr(tda.gradient_log, "gradient_rows", counted)
    grown = documents.select([*range(len(documents)), 0])
    grown.ids[-1], grown.content_hashes[-1] = "new", "new-hash"
    manifest = tda.gradient_log.log_rows(config, workspace, grown, checkpoint=3)
    assert batches == [[len(documents)]]
    assert manifest["rows"] == len(documents) + 1


REFUSED: dict[str, tuple[Callable[[Workspace], object], str, str]] = {
    "missing checkpoint": (lambda w: shutil.rmtree(w.checkpoint(3)), "gradients", "run `dvc repro train`"),
    "truncated checkpoint": (
        lambda w: (w.checkpoint(3) / "model" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00"),
        "gradients",
        "no causal language model could be loaded",
    ),
    "no optimizer state": (
        lambda w: (w.checkpoint(3) / "optimizer.safetensors").unlink(),
        "curvature",
        r"second moments.*curvature\.adam to none.*\.44 to \.17",
    ),
    "exposures of other documents": (
        lambda w: write_table(w.exposure, pl.read_parquet(w.exposure).reverse()),
        "scores",
        "is of other documents",
    ),
}


@pytest.mark.parametrize(("spoil", "stage", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(toy, spoil, stage, message):
    config, workspace = toy
    spoil(workspace)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_stages(config, workspace, stage)


def test_a_checkpoint_of_another_architecture_is_refused(toy):
    from tda.model import build_model

    config, workspace = toy
    shape = config.train.architecture.model_copy(update={"num_layers": 1})
    build_model(shape, vocabulary=300, context=24, seed=0).save_pretrained(workspace.checkpoint(3) / "model")
    with pytest.raises(ValueError, match="a checkpoint of another architecture than the run"):
        run_stages(config, workspace, "gradients")


def test_a_store_made_with_other_weights_is_refused(toy):
    config, workspace = toy
    shutil.copy(workspace.checkpoint(2) / "mean.safetensors", workspace.checkpoint(3) / "mean.safetensors")
    with pytest.raises(ValueError, match="rows made with other weights"):
        run_stages(config, workspace, "scores")


def test_more_segments_than_checkpoints_are_refused(toy):
    """As with `train.run`, whose checkpoints are counted only here."""
    config, workspace = toy
    config = config.model_copy(update={"segments": config.segments.model_copy(update={"indices": [0, 1, 2, 3, 4]})})
    with pytest.raises(ValueError, match="4 checkpoints cannot be divided into 5 segments"):
        run_stages(config, workspace, "segments")


def test_projected_space_scores_agree_with_full_space_where_the_rank_is_full(toy):
    """Factors fitted in projected space: at full rank the projection is a rotation, and scores agree up to sampled labels."""
    _config, workspace = toy
    full = pl.read_parquet(workspace.scores)["score_source"].to_numpy()
    config = toy_config(
        workspace.root,
        curvature__space="projected",
        gradients__projection="random",
        gradients__rank=64,
        gradients__dtype="float32",
    )
    run_stages(config, workspace, "curvature", "gradients", "scores")
    projected = pl.read_parquet(workspace.scores)["score_source"].to_numpy()
    assert np.corrcoef(full, projected)[0, 1] > 0.9


def test_curvature_from_the_stored_rows(toy, monkeypatch):
    """The factors are those of the rows of the segment's documents at its checkpoints, worked out again here."""
    from tda.checkpoints import load_checkpoint
    from tda.gradients import gradient_rows
    from tda.row_curvature import row_curvature
    from tda.task import CausalLM

    _config, workspace = toy
    settings = {"gradients__projection": "random", "gradients__rank": 3, "gradients__dtype": "float32"}
    config = toy_config(workspace.root, curvature__space="rows", curvature__num_documents=20, **settings)
    run_stages(config, workspace, "curvature", "gradients", "scores")
    scores = workspace.scores.read_bytes()
    run_stages(config, workspace, "scores")
    assert workspace.scores.read_bytes() == scores  # with factors that were just fitted, and with those that were kept
    held = load_factors(workspace.curvature(0))
    assert not held.plain  # no pass has fitted anything
    documents = load_documents(workspace.documents)
    attribution = load_attribution(config, workspace, documents)
    segment = attribution.segments[0]
    chosen = curvature_rows(config.curvature, attribution.exposure, 0)
    assert len(chosen) == 20
    rows = torch.cat([
        gradient_rows(
            load_checkpoint(workspace, checkpoint),
            held.layers,
            documents.batch(chosen.tolist()),
            task=CausalLM(),
            projections=held.projections,
        )[0]
        for checkpoint in segment.checkpoints
    ])
    shapes = {name: (sides.P_o.shape[1], sides.P_i.shape[1]) for name, sides in held.projections.items()}
    expected = row_curvature(lambda: [rows], held.layers, shapes, weight=1 / segment.tokens_per_document)
    for name, factors in attribution.factors[0].plain.items():
        torch.testing.assert_close(factors.Lambda, expected[name].Lambda, rtol=1e-3, atol=1e-3 * float(factors.Lambda.max()))
    values = pl.read_parquet(workspace.scores)["score_source"].to_numpy()
    assert np.isfinite(values).all()
    assert values.std() > 0
    for path in workspace.store.glob("curvature_*"):
        path.unlink()
    made = []

    def slow(*arguments: object, **settings: object) -> dict:
        made.append(row_curvature(*arguments, **settings))
        time.sleep(0.2)
        return made[-1]

    monkeypatch.setattr("tda.scoring.row_curvature", slow)
    with ThreadPoolExecutor(2) as threads:  # two queries at once
        both = [threads.submit(load_attribution, config, workspace, documents) for _ in range(2)]
    assert len(made) == len(attribution.segments)
    for again in both:
        for name, factors in again.result().factors[0].plain.items():
            assert torch.equal(factors.Lambda, attribution.factors[0].plain[name].Lambda)
    monkeypatch.delattr("tda.scoring.row_curvature")  # a query finds what `scores` has fitted
    assert answer("The list of a set", config=config, workspace=workspace)["helped"]
    assert held.P
    save_factors(workspace.curvature(0), replace(held, P={}))  # as `curvature` does after curvature.adam was set to none
    assert not load_attribution(config, workspace, documents).factors[0].P


@pytest.mark.parametrize("adam", ["none", "symmetric"])
def test_other_forms_of_the_preconditioner_run(toy, adam):
    _config, workspace = toy
    config = toy_config(workspace.root, curvature__adam=adam)
    run_stages(config, workspace, "curvature", "gradients", "scores")
    values = pl.read_parquet(workspace.scores)["score_source"].to_numpy()
    assert np.isfinite(values).all()
    assert values.std() > 0


def test_a_run_of_sgd_needs_no_optimizer_state(tmp_path):
    write_corpus(tmp_path)
    config = toy_config(tmp_path, train__optimizer="sgd", train__learning_rate=0.3)
    workspace = Workspace(tmp_path)
    run_stages(config, workspace, "prepare", "train", "segments", "curvature", "gradients", "scores")
    assert read_json(workspace.training, stage="train")["momentum"] == 0.9
    trajectory = pl.read_parquet(workspace.trajectory)
    assert trajectory["gradient_scale"].min() < 0.9  # clipping shortens steps, but not their weight decay
    decayed = trajectory["learning_rate"] * 0.1
    for held in load_attribution(config, workspace, load_documents(workspace.documents)).dynamics:
        segment = load_segments(workspace)[held.index]
        expected = decayed[segment.first_step - 1 : segment.last_step].sum() / (1 - 0.9)
        assert held.time * held.weight_decay == pytest.approx(expected)
    run = load_run(workspace, needs_moments=False)
    assert run.learning_rates.sum() * run.optimizer.weight_decay == pytest.approx(decayed.sum())
    assert load_segments(workspace)[0].mean_learning_rate > 1  # 0.3 with warm-up, over 1 - 0.9


def test_query_answers_from_the_store(done):
    from tda.query import answer, render

    config, workspace = done
    found = answer("The boat meets the tide.", config=config, workspace=workspace, top=3)
    assert [told["rank"] for told in found["helped"]] == [1, 2, 3]
    assert found["helped"][0]["score"] >= found["helped"][1]["score"] >= found["hurt"][0]["score"]
    assert found["helped"][0]["doc_id"] in render(found)
    with pytest.raises(ValueError, match="the text is empty"):
        answer("  ", config=config, workspace=workspace)


@pytest.mark.parametrize("changes", [{}, BY_SOURCE])
def test_query_answers_the_same_through_sketches(done, monkeypatch, changes):
    """In a large store: all parts of a long text at once, rows found by sketches, and scored exactly."""
    from tda import top_documents
    from tda.query import answer

    _config, workspace = done
    config, text = toy_config(workspace.root, **changes), "The boat meets the tide. " * 40
    exact = answer(text, config=config, workspace=workspace, top=5)
    monkeypatch.setattr(top_documents, "SKETCHED_BYTES", 0)
    for sketch in workspace.store.glob("*.sketch"):
        sketch.unlink()
    found = answer(text, config=config, workspace=workspace, top=5)
    for side in ("helped", "hurt"):
        assert [told["doc_id"] for told in found[side]] == [told["doc_id"] for told in exact[side]]
        scores = [[told["score"] for told in answered[side]] for answered in (found, exact)]
        np.testing.assert_allclose(*scores, rtol=1e-4)
    num = sum(len(segment.checkpoints) for segment in load_segments(workspace)) if changes else 1
    assert len(list(workspace.store.glob("*.sketch"))) == num


def test_a_query_is_answered_by_averaged_influence_of_full_gradients(done, monkeypatch):
    from tda import top_documents
    from tda.averaged_influence import row_scores
    from tda.data import load_documents
    from tda.query import answer
    from tda.target_influence import ANSWER, mean_place, mean_response

    config, workspace = done
    documents, targets = load_documents(workspace.documents), load_documents(workspace.targets, half="score")
    place = mean_place(config, workspace, documents, targets.select([0]), ANSWER)
    expected = dict(zip(documents.ids, row_scores(place, mean_response(place))[0], strict=True))
    monkeypatch.setattr("tda.query._as_documents", lambda *_, **__: targets.select([0]))
    found = answer("any", config=config, workspace=workspace, top=5)
    best = sorted(expected, key=expected.get)
    assert [told["doc_id"] for told in found["helped"]] == best[:-6:-1]
    assert [told["doc_id"] for told in found["hurt"]] == best[:5]
    monkeypatch.setattr(top_documents, "CANDIDATES", 8)
    for answered in (found, answer("any", config=config, workspace=workspace, top=5)):
        for told in (*answered["helped"], *answered["hurt"]):
            assert told["score"] == pytest.approx(expected[told["doc_id"]], rel=1e-3)


def test_scores_are_those_of_a_query_that_is_a_target(done):
    """By SOURCE, `query` on a target's own text gives that target's column of the stored scores."""
    from tda.query import answer

    _config, workspace = done
    config = toy_config(workspace.root, **BY_SOURCE)
    targets = pl.read_parquet(workspace.targets).filter(half="score")
    text, target_id = targets["text"][0], targets["id"][0]
    place = read_json(workspace.scoring, stage="scores")["query_ids"].index(target_id)
    table = pl.read_parquet(workspace.query_scores)
    by_id = dict(zip(table["doc_id"], table["scores"].to_numpy()[:, place], strict=True))
    found = answer(text, config=config, workspace=workspace, top=5)
    tokens = len(targets["tokens"][0]) - 1
    for told in found["helped"]:
        # The trained tokenizer closes a document with an end token; a query has none, and one predicted token fewer.
        assert abs(told["score"] * (tokens - 1) / tokens - by_id[told["doc_id"]]) < 0.5 * abs(by_id[told["doc_id"]])


def test_torch_threads_stay_one(done):
    assert torch.get_num_threads() == 1


def test_a_run_that_diverges_says_so(tmp_path):
    write_corpus(tmp_path)
    config, workspace = toy_config(tmp_path, train__learning_rate=1e18, train__max_gradient_norm=0.0), Workspace(tmp_path)
    run_stages(config, workspace, "prepare")
    with pytest.raises(ValueError, match=r"the loss of step \d+ is (nan|inf)"):
        run_stages(config, workspace, "train")
    assert not workspace.training.exists()


def test_a_killed_retraining_goes_on_only_with_models_that_were_measured_on_these_targets(toy, monkeypatch):
    config, workspace = toy
    run_stages(config, workspace, "curation")
    monkeypatch.setattr("tda.retrain.remove", lambda path: None)  # a kill leaves what is finished
    run_stages(config, workspace, "retraining")
    before = pl.read_parquet(workspace.retraining)
    targets = pl.read_parquet(workspace.targets)
    write_table(workspace.targets, targets.with_columns(half=targets["half"].replace({"score": "verdict", "verdict": "score"})))
    run_stages(config, workspace, "retraining")
    after = pl.read_parquet(workspace.retraining)
    assert after["train_loss"].equals(before["train_loss"])
    assert (after["target_loss"] != before["target_loss"]).all()


def test_an_adopted_decision_of_other_documents_is_refused(toy):
    config, workspace = toy
    run_stages(config, workspace, "curation")
    table = pl.read_parquet(workspace.manifest)
    write_table(workspace.manifest, table.head(10))
    with pytest.raises(ValueError, match="decides on other documents"):
        run_stages(config, workspace, "retraining")


def test_write_json_is_the_same_bytes_for_equal_values(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5]})
    write_json(tmp_path / "b.json", {"a": [1.5], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("asked_values", [1, 1 << 28])
def test_scores_are_the_same_however_few_queries_are_in_memory_at_once(toy, monkeypatch, asked_values):
    config, workspace = toy
    expected, per_query = pl.read_parquet(workspace.scores), pl.read_parquet(workspace.query_scores)
    kept = read_json(workspace.scoring, stage="scores")["projection_keeps"]
    monkeypatch.setattr("tda.scoring.QUERY_VALUES", 1)
    monkeypatch.setattr("tda.scoring.ROW_QUERY_VALUES", asked_values)
    run_stages(config, workspace, "scores")
    scores = pl.read_parquet(workspace.scores)
    for name in (name for name in scores.columns if name.startswith("score_")):
        np.testing.assert_allclose(scores[name], expected[name], rtol=1e-3, atol=1e-4 * expected[name].abs().max())
    found = pl.read_parquet(workspace.query_scores)["scores"].to_numpy()
    np.testing.assert_allclose(found, per_query["scores"].to_numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(read_json(workspace.scoring, stage="scores")["projection_keeps"], kept, rtol=1e-4)
