"""The plan of a run: what it expects of corpus and training, bytes against what the stages write, and its arithmetic."""

import gzip
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tda import costs, stages
from tda.artifacts import Workspace, read_json, read_table
from tda.calibration import PASSES, Machine, Startup, calibrate, given
from tda.cli import FAILED, OK, USAGE, main
from tda.config import Config
from tda.data import load_documents
from tda.dynamics import load_exposure, load_segments
from tda.estimates import estimates, expected_run
from tda.expected_corpus import Corpus, expected_corpus
from tda.model_sample import Sample, sample_model, sample_of
from tda.plan import cache_bytes, clock, make_plan, render, size, warnings
from tests.toy import toy_config, toy_values, write_corpus

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Config, Workspace, Corpus, Corpus]:
    """A toy run up to the gradients, with the corpus as it was expected before and is known after."""
    folder = tmp_path_factory.mktemp("toy")
    write_corpus(folder)
    config, workspace = toy_config(folder), Workspace(folder)
    before = expected_corpus(config.prepare, workspace, model="llama")
    for stage in (stages.prepare, stages.train, stages.segments):
        stage(config, workspace)
    for part in config.segments.indices:
        stages.curvature(config, workspace, part)
    for part in config.train.checkpoints:
        stages.gradients(config, workspace, part)
    return config, workspace, before, expected_corpus(config.prepare, workspace, model="llama")


def machine(**changes: object) -> Machine:
    """One of round numbers, with two workers."""
    startups = {name: Startup(1.0, 10**8) for name in ("tables", "torch", "model", "store", "statistics", "rows")}
    held = Machine(
        name="a machine",
        workers=2,
        rates=dict.fromkeys((*PASSES, "eigh", "algebra"), 1e9),
        slowdown=1.0,
        alone=1.0,
        cores=2.0,
        disk=1e9,
        stored=1e8,
        scanned=1e9,
        load=0.0,
        save=0.0,
        load_bytes=10**9,
        words=0.0,
        startups=startups,
        fork=0.0,
        worker_bytes=10**7,
        free_memory=10**12,
        free_disk=10**12,
    )
    return replace(held, **changes)


@pytest.fixture(scope="module")
def planned(done) -> tuple[Config, Corpus, object, Sample]:
    config, _workspace, _before, corpus = done
    return (
        config,
        corpus,
        expected_run(config, corpus.documents),
        sample_of(config, corpus.documents, vocabulary=corpus.vocabulary),
    )


def by_stage(planned, held: Machine) -> dict:
    return {one.stage: one for one in estimates(*planned, held)}


def test_a_corpus_is_expected_as_it_then_is(done):
    config, _workspace, before, after = done
    assert before.origin == "estimated from all 60 rows"
    assert "as it is now" in after.origin
    assert before.vocabulary == after.vocabulary
    assert len(before.documents) == pytest.approx(len(after.documents), rel=0.15)
    assert before.documents.lengths.mean() == pytest.approx(after.documents.lengths.mean(), rel=0.1)
    assert before.documents.parts.count("general") == pytest.approx(after.documents.parts.count("general"), rel=0.25)
    assert len(before.scored) + len(before.unseen) == config.prepare.num_targets


def test_a_prepared_corpus_that_lacks_a_file_says_which_stage_makes_it(done, tmp_path):
    config, workspace, *_corpora = done
    there = Workspace(tmp_path)
    shutil.copytree(workspace.documents.parent, there.documents.parent)
    there.preparation.unlink()
    with pytest.raises(FileNotFoundError, match=r"prepare\.json is missing; stage prepare makes it"):
        expected_corpus(config.prepare, there, model="llama")


def test_a_sample_stands_for_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tda.expected_corpus.SAMPLE", 100)
    write_corpus(tmp_path, num_documents=1000)
    config = toy_config(tmp_path, prepare__context=256)  # so that no document has several rows
    found = expected_corpus(config.prepare, Workspace(tmp_path), model="llama")
    assert re.fullmatch(r"estimated from the first 100 of about (99\d|100\d) rows", found.origin)
    assert len(found.documents) == pytest.approx(1000 - config.prepare.num_heldout, rel=0.05)


def test_held_out_documents_without_a_general_part_are_of_all(tmp_path):
    write_corpus(tmp_path, num_documents=120)
    stages_of_one = [{"part": "all", "epochs": 1}]
    changes = {"prepare__general_sources": [], "prepare__num_heldout": 40, "train__stages": stages_of_one}
    config = toy_config(tmp_path, prepare__context=256, **changes)  # so that no document has several rows
    workspace = Workspace(tmp_path)
    before = expected_corpus(config.prepare, workspace, model="llama")
    stages.prepare(config, workspace)
    after = load_documents(workspace.documents)
    assert len(before.heldout) == 40
    assert len(before.documents) == len(after) == 80


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_not_lines(tmp_path, monkeypatch, packed):
    monkeypatch.setattr("tda.expected_corpus.SAMPLE", 200)
    random = np.random.default_rng(0)
    lines = [[" ".join(random.choice(list("abcdefgh"), 5)) for _ in range(8)] for _ in range(1000)]
    data = "text\n" + "".join('"' + "\n".join(one) + '"\n' for one in lines)
    path = tmp_path / ("rows.csv.gz" if packed else "rows.csv")
    path.write_bytes(gzip.compress(data.encode()) if packed else data.encode())
    fields = {
        "prepare__documents": str(path),
        "prepare__text_field": "text",
        "prepare__source_field": "",
        "prepare__id_field": "",
    }
    write_corpus(tmp_path)
    config = toy_config(tmp_path, prepare__general_sources=[], **fields)
    found = expected_corpus(config.prepare, Workspace(tmp_path), model="llama")
    number = re.fullmatch(r"estimated from the first 200 of about (\d+) rows", found.origin).group(1)
    assert int(number) == pytest.approx(1000, rel=0.1)  # the beginning of a packed file is packed a little worse than the rest


def test_what_prepare_refuses_is_refused_in_its_words(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    (tmp_path / "wide.jsonl").write_bytes((tmp_path / "documents.jsonl").read_text().encode("utf-16"))
    wrong = [
        {"prepare__documents": str(tmp_path / "wide.jsonl")},
        {"prepare__targets": str(tmp_path / "nowhere.jsonl")},
        {"prepare__targets": str(tmp_path / "wide.jsonl")},
        {"prepare__id_field": "name"},
    ]
    for changes in wrong:
        config = toy_config(tmp_path, **changes)
        with pytest.raises((ValueError, FileNotFoundError)) as by_prepare:
            stages.prepare(config, Workspace(tmp_path))
        with pytest.raises(by_prepare.type) as by_plan:
            expected_corpus(config.prepare, Workspace(tmp_path), model="llama")
        assert str(by_plan.value) == str(by_prepare.value)
    monkeypatch.setattr("tda.expected_corpus.SAMPLE", 20)
    with pytest.raises(ValueError, match=r"prepare.documents: 20 of 20 rows of .*wide.jsonl are malformed.*not UTF-8: 1"):
        expected_corpus(toy_config(tmp_path, **wrong[0]).prepare, Workspace(tmp_path), model="llama")


def test_documents_that_are_all_too_short_are_refused(tmp_path):
    write_corpus(tmp_path)
    config = toy_config(tmp_path, prepare__min_characters=10_000)
    with pytest.raises(ValueError, match=r"none of the 60 documents read from .* has 10000 characters or more; lower"):
        expected_corpus(config.prepare, Workspace(tmp_path), model="llama")


def test_a_run_is_expected_as_it_then_is(done):
    config, workspace, _before, corpus = done
    run = expected_run(config, corpus.documents)
    trajectory = read_table(workspace.trajectory, stage="train")
    assert [step.rows for step in run.steps] == trajectory["documents"].to_list()
    held = load_segments(workspace)
    assert run.checkpoints == [len(segment.checkpoints) for segment in held]
    exposure = load_exposure(workspace, load_documents(workspace.documents))
    for index, seen in enumerate(run.seen):
        np.testing.assert_array_equal(seen, np.flatnonzero(exposure[:, index]))


def test_the_sample_has_the_shapes_of_the_model(done, planned):
    config, workspace, _before, corpus = done
    model, whole = sample_model(config, vocabulary=corpus.vocabulary, blocks=1)
    assert len(costs.shapes_of(model).attention) == 1
    assert whole == planned[3].whole
    assert whole.parameters == read_json(workspace.training, stage="train")["num_parameters"]


def test_bytes_on_disk_are_those_of_the_files(done, planned):
    config, workspace, _before, corpus = done
    model = planned[3].whole
    tensors = 0
    for name in ("model/model.safetensors", "mean.safetensors", "optimizer.safetensors"):
        with safe_open(workspace.checkpoint(0) / name, "pt") as file:
            tensors += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118  not a dict
    steps = len(list(model.matrices)) * 4  # AdamW counts its steps beside every parameter
    assert tensors == pytest.approx(costs.checkpoint_bytes(model, copies=4), abs=2 * steps + 200)
    with safe_open(workspace.curvature(0), "pt") as file:
        tensors = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118  not a dict
    assert tensors == costs.factor_bytes(model, adam=config.curvature.adam)
    stored = [path for path in workspace.store.rglob("data/*") if path.is_file()]
    row = costs.row_bytes(model, rank=config.gradients.rank, dtype=config.gradients.dtype)
    expected = len(config.train.checkpoints) * len(corpus.documents) * row
    assert sum(path.stat().st_size for path in stored) == pytest.approx(expected, rel=0.25)  # so few rows: tables' own bytes show


def test_work_takes_as_long_as_the_rate_says(planned):
    slow, fast = by_stage(planned, machine()), by_stage(planned, machine(rates=dict.fromkeys(machine().rates, 2e9)))
    for stage in ("train", "curvature", "gradients", "scores", "retraining"):
        fixed = slow[stage].work["start"]
        for kind in set(slow[stage].work) - {"start", "checkpoints", "store", "rows", "read", "words", "workers"}:
            assert fast[stage].work[kind] == pytest.approx(slow[stage].work[kind] / 2)
        assert slow[stage].cpu_seconds > fast[stage].cpu_seconds > fixed


def test_training_is_the_counted_operations(planned):
    config, corpus, run, sample = planned
    documents = corpus.documents
    flops = sum(
        costs.training_step(sample.whole, costs.load_of([step.rows], documents.lengths, documents.num_loss_tokens))
        for step in run.steps
    )
    stages_made = by_stage(planned, machine())
    assert stages_made["train"].work["steps"] == pytest.approx(flops / 1e9)
    number = 3 * len(config.retraining.seeds)
    assert stages_made["retraining"].work["steps"] == pytest.approx(number * flops / 1e9)
    assert stages_made["train"].seconds >= stages_made["train"].cpu_seconds


def test_cores_share_what_workers_do(planned):
    one, two = by_stage(planned, machine(cores=1.0)), by_stage(planned, machine(cores=2.0))
    spread = one["retraining"].cpu_seconds - one["retraining"].work["start"]
    assert one["retraining"].seconds - two["retraining"].seconds == pytest.approx(spread / 2)
    assert one["train"].seconds == two["train"].seconds


def test_workers_are_started_for_every_pass(planned):
    config = planned[0]
    made = by_stage(planned, machine(fork=1.0))
    assert made["curvature"].work["workers"] == 2 * 2 * len(config.segments.indices)  # two passes, two workers
    assert made["gradients"].work["workers"] == 2 * len(config.train.checkpoints)
    assert made["retraining"].work["workers"] == 2
    assert "workers" not in by_stage(planned, machine(fork=1.0, workers=1))["retraining"].work


def test_every_checkpoint_has_its_rows(planned):
    config, corpus, _run, sample = planned
    row = costs.row_bytes(sample.whole, rank=config.gradients.rank, dtype=config.gradients.dtype)
    gradients = by_stage(planned, machine())["gradients"]
    assert gradients.disk_bytes == len(config.train.checkpoints) * len(corpus.documents) * row
    assert not gradients.cached


def test_what_does_not_fit_is_said_with_what_to_change(planned):
    config = planned[0]
    made = list(by_stage(planned, machine()).values())
    assert warnings(config, made, machine()) == []
    (line,) = warnings(config, made, machine(free_disk=10**3))
    assert line.startswith("disk: ") and "lower gradients.rank (4; the store takes" in line and "1.0 kB are free" in line
    lines = warnings(config, made, machine(free_memory=10**3))
    assert {line.split(" needs ")[0] for line in lines} == {f"memory: {stage.stage}" for stage in made}
    assert any("curvature.space to projected" in line for line in lines)


def test_a_run_of_fewer_checkpoints_than_are_asked_for_is_said(planned, tmp_path):
    config = planned[0]
    config = config.model_copy(update={"train": config.train.model_copy(update={"run": str(tmp_path)})})
    for number in range(5):
        if number == 3:
            said = warnings(config, [], machine())
            assert said == [
                f"train.run: {tmp_path} has 3 of the 4 checkpoints that are asked for; set train.checkpoints to [0, 1, 2], else "
                "stage train refuses it"
            ]
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps({"global_step": number}))
        (tmp_path / f"checkpoint-{number}" / "optimizer.pt").touch()
    assert warnings(config, [], machine()) == []
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    (line,) = warnings(config, [], machine())
    assert "checkpoint-2 has no optimizer.pt: stage curvature refuses it unless curvature.adam is none" in line
    blind = config.model_copy(update={"curvature": config.curvature.model_copy(update={"adam": "none"})})
    assert warnings(blind, [], machine()) == []


def test_copies_are_of_all_but_the_store(planned):
    made = list(by_stage(planned, machine()).values())
    assert cache_bytes(made) == sum(stage.disk_bytes for stage in made if stage.stage not in ("gradients", "verify"))


def test_another_machine_is_what_is_given():
    other = given(machine(), disk=1e7, memory=8e10)
    assert (other.disk, other.stored, other.free_memory) == (1e7, 1e7, 80_000_000_000)
    assert given(machine(), disk=None, memory=None) == machine()


def test_with_operations_given_no_pass_is_run(done, planned, monkeypatch):
    config, workspace, *_rest = done
    monkeypatch.setattr("tda.calibration._passes", None)
    other = calibrate(config, planned[3], planned[2].steps, workers=2, folder=workspace.root, flops=4e14)
    assert set(other.rates.values()) == {4e14}
    assert set(other.rates) == set(machine().rates)
    assert (other.alone, other.cores) == (1.0, 2.0)


def test_activations_that_are_kept_grow_with_the_tokens(done):
    config, _workspace, _before, corpus = done
    kept = sample_of(config, corpus.documents, vocabulary=corpus.vocabulary).kept
    assert kept["training"] > 2 * 4 * 2 * (16 + 24)  # both blocks keep at least the inputs of their layers, in float32
    assert kept["frozen"] > 0


def test_the_command_prints_a_table_and_writes_all_numbers(tmp_path, monkeypatch, capsys):
    import yaml

    write_corpus(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(toy_values(tmp_path)))
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--json", "plan.json", "--flops", "1e12"]) == OK
    shown = capsys.readouterr().out
    for word in ("prepare", "curvature ×2", "gradients ×4", "total", "(verify, on request)", "a machine of 1e+12 operations"):
        assert word in shown
    numbers = json.loads(Path("plan.json").read_text())
    assert [stage["stage"] for stage in numbers["stages"]][-1] == "report"
    assert numbers["total"]["cpu_seconds"] == pytest.approx(sum(stage["cpu_seconds"] for stage in numbers["stages"]))
    assert not Path("data").exists()  # nothing is left behind


def test_a_model_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    import yaml

    write_corpus(tmp_path)
    values = toy_values(tmp_path)
    values["train"]["model"] = str(tmp_path / "nowhere")
    values["prepare"]["tokenizer"] = ""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    assert main(["plan"]) == FAILED
    assert "nowhere" in capsys.readouterr().err


def test_a_rate_that_is_no_number_is_wrong_usage(capsys):
    for wrong in ("fast", "0", "-1", "nan", "inf"):
        with pytest.raises(SystemExit) as stop:
            main(["plan", f"--flops={wrong}"])
        assert stop.value.code == USAGE
        assert f"expected a number above 0, as 4e14; got {wrong}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (8.14, "8.1 s"),
        (200, "3 min 20 s"),
        (119.7, "2 min 0 s"),
        (5399.8, "1 h 30 min"),
        (7200 * 2 + 720, "4 h 12 min"),
        (3.4 * 86400, "3.4 days"),
    ],
)
def test_seconds_in_words(seconds, words):
    assert clock(seconds) == words


@pytest.mark.parametrize(
    ("number", "words"), [(12, "12 B"), (3400, "3.4 kB"), (1.25e6, "1.2 MB"), (124e9, "124 GB"), (2e12, "2.0 TB")]
)
def test_bytes_in_words(number, words):
    assert size(number) == words


def test_a_model_of_a_folder_is_planned_by_its_configuration(done, tmp_path):
    """Its configuration alone is asked for: no weights are there."""
    from transformers import GPT2Config

    config, _workspace, _before, corpus = done
    GPT2Config(vocab_size=corpus.vocabulary, n_positions=64, n_embd=16, n_layer=3, n_head=2).save_pretrained(tmp_path)
    named = config.model_copy(update={"train": config.train.model_copy(update={"model": str(tmp_path)})})
    some, whole = sample_model(named, vocabulary=corpus.vocabulary, blocks=2)
    assert (len(costs.shapes_of(some).attention), some.config.num_hidden_layers) == (2, 2)
    model, all_of_it = sample_model(named, vocabulary=corpus.vocabulary)
    assert whole == all_of_it
    assert whole.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert torch.is_tensor(next(model.parameters())) and not next(model.parameters()).is_meta


def test_a_model_of_another_task_is_refused_in_few_words(done, tmp_path):
    from transformers import T5Config

    config, _workspace, _before, corpus = done
    T5Config(vocab_size=corpus.vocabulary, d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    named = config.model_copy(update={"train": config.train.model_copy(update={"model": str(tmp_path)})})
    with pytest.raises(ValueError) as error:
        sample_model(named, vocabulary=corpus.vocabulary)
    assert str(error.value) == (
        f"train.model: {tmp_path} is a t5 model; expected llama, or a folder or hub id of a causal language model"
    )


def test_a_large_model_is_sampled_with_fewer_tokens(done, monkeypatch):
    config, _workspace, _before, corpus = done
    _model, whole = sample_model(config, vocabulary=corpus.vocabulary)
    monkeypatch.setattr("tda.model_sample.free_memory", lambda: 1)
    monkeypatch.setattr("tda.model_sample.CUT_VOCABULARY", 50)
    sample = sample_of(config, corpus.documents, vocabulary=corpus.vocabulary)
    assert sample.whole == whole
    assert sample.shapes.head == (whole.head[0], 50)
    assert max(int(row.max()) for row in sample.documents.tokens) < 50


@pytest.mark.parametrize("tie", [True, False])
def test_a_vocabulary_is_that_of_a_model_made_with_it(tie):
    from transformers import LlamaConfig, LlamaForCausalLM

    def made(size: int):
        shape = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
        return costs.shapes_of(LlamaForCausalLM(LlamaConfig(**shape, vocab_size=size, tie_word_embeddings=tie)).eval())

    assert costs.with_vocabulary(made(11), 40) == replace(made(40), parameters=made(11).parameters)


def test_a_plan_is_a_table_of_aligned_columns(done):
    config, workspace, *_rest = done
    text = render(make_plan(config, workspace))
    lines = text.splitlines()
    header = next(place for place, line in enumerate(lines) if line.startswith("stage"))
    assert len({len(line) for line in lines[header + 1 : header + 2]}) == 1
    assert all(len(line) <= len(lines[header + 1]) for line in lines[header : header + 13])
