"""Low-rank adapters through the whole pipeline: trained here, or by a Trainer with PEFT and taken over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tda.artifacts import Workspace, read_json
from tda.attribute import attribute
from tda.checkpoints import load_checkpoint, optimizer_state
from tda.config import Config
from tda.data import load_documents
from tda.gradient_log import row_identity
from tda.means import RunningMean
from tda.model import load_model, moving_state, tracked_layers, trained_parameters
from tda.task import CausalLM
from tda.tokens import train_tokenizer
from tda.trajectory import Recorder
from tests.helpers import dense_gradient, document_loss, random_documents, tiny_llama, with_adapter
from tests.integration.test_adopt import small_llama, trained
from tests.toy import run_stages, sentences, toy_config, write_corpus

pytestmark = pytest.mark.filterwarnings(
    "ignore:Call to deprecated:DeprecationWarning",
    "ignore::UserWarning:torch",
    "ignore::UserWarning:peft",
    "ignore::FutureWarning",
)
LORA = {"rank": 2, "alpha": 4, "layers": "all-linear"}
SCORED = ("prepare", "train", "segments", "curvature", "gradients", "scores")
DECIDED = ("curation", "retraining", "evaluation", "report")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model and its tokenizer, as a team has them before it fine-tunes."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer((sentences("harbour", n) for n in range(20)), vocabulary=300)
    small_llama(len(tokenizer), tied=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(base, tmp_path_factory) -> tuple[Config, Workspace]:
    folder = tmp_path_factory.mktemp("adapted")
    write_corpus(folder)
    full_rank = {"gradients__rank": 64, "gradients__dtype": "float32"}
    config = toy_config(folder, train__model=str(base), train__lora=LORA, train__learning_rate=0.05, **full_rank)
    run_stages(config, Workspace(folder), *SCORED)
    return config, Workspace(folder)


def test_a_checkpoint_is_the_adapter_and_the_base_stays_as_it_is(done, base):
    _config, workspace = done
    whole = dict(load_model(base).named_parameters())
    for index in range(4):
        folder = workspace.checkpoint(index)
        assert sorted(path.name for path in folder.glob("model/*.safetensors")) == ["adapter_model.safetensors"]
        assert all("lora_" in name for name in load_file(folder / "mean.safetensors"))
        assert all("lora_" in name for name in optimizer_state(workspace, index))
        model = load_checkpoint(workspace, index)
        assert {"lora_" in name for name in trained_parameters(model)} == {True}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert torch.equal(parameter, whole[name.replace(".base_layer", "")])
    assert {"lora_" in layer.name for layer in tracked_layers(model)} == {True}
    assert len(tracked_layers(model)) == 2 * 7 * 2  # A and B, of seven layers of each block


def test_stored_rows_are_the_gradients_of_the_adapter(done):
    _config, workspace = done
    documents, queries = load_documents(workspace.documents), load_documents(workspace.targets, half="score")
    model = load_checkpoint(workspace, 3)
    layers = tracked_layers(model)

    def gradient(held: Any, row: int) -> torch.Tensor:
        G = dense_gradient(model, layers, document_loss(model, held, row))
        return torch.cat([G[layer.name].flatten() for layer in layers])

    target = sum(gradient(queries, row) for row in range(len(queries))) / queries.num_loss_tokens.sum()
    expected = [float(gradient(documents, row) @ target) for row in range(8)]
    got = pl.read_parquet(workspace.scores)["score_gradient_dot"].to_numpy()[:8]
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_rest_of_the_pipeline_retrains_adapters_from_one_start(done, tmp_path):
    config, workspace = done
    shutil.copytree(workspace.root, tmp_path, dirs_exist_ok=True)
    run_stages(config, Workspace(tmp_path), *DECIDED)
    runs = pl.read_parquet(Workspace(tmp_path).retraining)
    assert runs.group_by("arm").len().sort("arm").rows() == [("all", 2), ("curated", 2), ("random", 2)]
    assert runs["target_loss"].n_unique() == len(runs)
    page = Workspace(tmp_path).report.read_text(encoding="utf-8")
    assert f", of which {sum(map(torch.numel, trained_parameters(load_checkpoint(workspace, 0)).values())):,} are trained" in page
    first = read_json(workspace.training, stage="train")["final_loss"]
    assert runs.filter(arm="all", seed=0)["train_loss"].item() == pytest.approx(first, rel=1e-6)  # the run, once more


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(done, tmp_path, monkeypatch):
    from tda import run as training

    config, workspace = done
    again = Workspace(tmp_path)
    shutil.copytree(workspace.root / "data" / "prepare", tmp_path / "data" / "prepare")
    save = training.save_checkpoint

    def killed(folder: Path, *args: Any, **kwargs: Any) -> None:
        save(folder, *args, **kwargs)
        if folder.name == "1":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", killed)
        run_stages(config, again, "train")
    run_stages(config, again, "train")
    for path in sorted(workspace.checkpoints.rglob("*")):
        if path.is_file():
            assert (again.checkpoints / path.relative_to(workspace.checkpoints)).read_bytes() == path.read_bytes(), path


def test_an_adapter_is_trained_on(done, tmp_path):
    """As train.model it is where training and every retraining start."""
    _config, workspace = done
    start = workspace.checkpoint(3) / "model"
    again = Workspace(tmp_path)
    for name in ("prepare", "truth"):
        shutil.copytree(workspace.root / "data" / name, tmp_path / "data" / name)
    further = toy_config(workspace.root, train__model=str(start))
    run_stages(further, again, *SCORED[1:], *DECIDED)
    first, trained = (read_json(held.training, stage="train") for held in (workspace, again))
    assert trained["first_loss"] < first["first_loss"]
    assert {"lora_" in name for name in trained_parameters(load_checkpoint(again, 3))} == {True}
    retrained = pl.read_parquet(again.retraining).filter(arm="all", seed=0)["train_loss"].item()
    assert retrained == pytest.approx(trained["final_loss"], rel=1e-6)
    with pytest.raises(ValueError, match=r"train.lora.rank: .* is an adapter already"):
        run_stages(toy_config(workspace.root, train__model=str(start), train__lora=LORA), again, "train")


def test_a_trainers_adapters_are_taken_over(tmp_path):
    """Their own files say where the base was when they were trained; it is at train.model now."""

    def adapt(model: nn.Module) -> nn.Module:
        model.name_or_path = "somewhere/else"
        return with_adapter(model, lora_dropout=0.1)

    run = trained(tmp_path, lambda vocabulary: small_llama(vocabulary, tied=True), adapt=adapt)
    for folder in run.output.glob("checkpoint-*"):
        assert read_json(folder / "adapter_config.json", stage="")["base_model_name_or_path"] == "somewhere/else"
    run_stages(run.config, run.workspace, *SCORED[1:], *DECIDED)
    training = read_json(run.workspace.training, stage="train")
    assert (training["optimizer"], training["frozen"]) == ("adamw", [])
    state = optimizer_state(run.workspace, 3)
    assert len(run.moments) == 2 * 7 * 2
    for name, moments in run.moments.items():
        assert torch.equal(state[f"exp_avg_sq.{name.removeprefix('base_model.model.')}"], moments)
    saved = load_file(run.output / "checkpoint-24" / "adapter_model.safetensors")
    ours = dict(load_checkpoint(run.workspace, 3).named_parameters())
    for name, value in saved.items():
        assert torch.equal(ours[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")], value)
    assert {tuple(layer.name.split(".")[-2:]) for layer in tracked_layers(load_checkpoint(run.workspace, 3))} == {
        ("lora_A", "default"),
        ("lora_B", "default"),
    }
    scores = pl.read_parquet(run.workspace.scores)
    assert scores["score_source"].std() > 0
    assert scores["score_averaged_influence"].std() > 0

    # A base that changes where it is changes what every later stage depends on, and no row of before is taken for one of now.
    identity = row_identity(run.config, run.workspace, 3, {})
    other = load_model(run.config.train.model)
    other.model.norm.weight.data *= 2
    other.save_pretrained(run.config.train.model)
    run_stages(run.config, run.workspace, "train")
    changed = {key for key, value in read_json(run.workspace.training, stage="train").items() if training[key] != value}
    assert changed == {"start_digest"}
    after = row_identity(run.config, run.workspace, 3, {})
    assert {key for key in after if after[key] != identity[key]} == {"base"}


@pytest.mark.parametrize("wrapped", [True, False])
def test_any_model_from_python(wrapped):
    """PEFT's own wrapper, or an adapter inside a model of transformers: scores of every method are those of the adapter."""
    documents, queries = random_documents(12), random_documents(3, seed=1)
    torch.manual_seed(0)
    adapted = with_adapter(tiny_llama().float())
    model = adapted if wrapped else adapted.base_model.model
    task = CausalLM()
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=0.1)
    recorder = Recorder(model, optimizer, num_steps=6, num_checkpoints=3)
    for rows in torch.arange(12).repeat(2).split(4):
        batch = documents.batch(rows.tolist())
        total, _losses = task.losses(model, batch)
        optimizer.zero_grad()
        (total / batch.sizes.sum()).backward()
        optimizer.step()
        recorder.step(rows)
    run = recorder.run
    dots = attribute("gradient_dot", run, task, documents, queries).values
    layers = tracked_layers(run.model)
    for query in range(3):
        q = dense_gradient(run.model, layers, document_loss(run.model, queries, query))
        g = dense_gradient(run.model, layers, document_loss(run.model, documents, 5))
        expected = sum((q[name] * g[name]).sum().item() for name in q) / queries.num_loss_tokens[query]
        assert dots[query, 5] == pytest.approx(expected, rel=1e-4)
    oracle = attribute("replay", run, task, documents, queries).values
    for method in ("source", "averaged_influence"):
        got = attribute(method, run, task, documents, queries).values
        assert np.corrcoef(got.ravel(), oracle.ravel())[0, 1] > 0.9, method


@pytest.mark.parametrize("layers", [r".*(q_proj|lm_head)", r".*(q_proj|embed_tokens)"])
def test_an_adapter_at_either_end_of_the_model(base, tmp_path, layers):
    """PEFT saves the weights of a head or embedding with its adapter; they are not trained for that."""
    write_corpus(tmp_path)
    config, workspace = toy_config(tmp_path, train__model=str(base), train__lora=LORA | {"layers": layers}), Workspace(tmp_path)
    run_stages(config, workspace, *SCORED)
    model = load_checkpoint(workspace, 3)
    assert {"lora_" in name for name in trained_parameters(model)} == {True}
    assert {layer.name.split(".")[-2] for layer in tracked_layers(model)} <= {"lora_A", "lora_B"}
    assert pl.read_parquet(workspace.scores)["score_source"].std() > 0


def test_frozen_weights_are_neither_summed_nor_kept():
    model = with_adapter(tiny_llama())
    assert {"lora_" in name for name in moving_state(model)} == {True}
    mean = RunningMean(model)
    mean.add()
    assert mean.take().keys() == moving_state(model).keys()
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=0.1)
    recorder = Recorder(model, optimizer, num_steps=1, num_checkpoints=1)
    recorder.step([0])
    (checkpoint,) = recorder.run.checkpoints
    assert checkpoint.weights.keys() == recorder.run.initial.keys() == moving_state(model).keys()


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def says(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def of_another_model(folder: Path) -> None:
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    other = small_llama(300, tied=True)
    other.config.hidden_size = 32
    with_adapter(type(other)(other.config)).save_pretrained(folder)
    says(folder, base_model_name_or_path=base)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"adapter_model.safetensors cannot be read"),
        (lambda folder: says(folder, peft_type="MAGIC"), r"no adapter that PEFT knows"),
        (lambda folder: says(folder, base_model_name_or_path="/gone"), r"/gone: no causal language model could be loaded"),
        (lambda folder: says(folder, base_model_name_or_path=None), r"does not say which model it was trained on"),
        (lambda folder: says(folder, use_dora=True), r"an adapter with use_dora, whose magnitudes are not followed"),
        (of_another_model, r"does not fit the model"),
    ],
)
def test_a_damaged_adapter_is_named(done, base, tmp_path, damage: Callable[[Path], None], message):
    _config, workspace = done
    folder = tmp_path / "model"
    shutil.copytree(workspace.checkpoint(3) / "model", folder)
    damage(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_model(folder)


def test_settings_that_cannot_work_are_refused(done, tmp_path):
    config, workspace = done
    with pytest.raises(ValueError, match=r"lora.rank: adapters are trained on a model that is loaded"):
        toy_config(tmp_path, train__lora=LORA)
    shutil.copytree(workspace.root / "data" / "prepare", tmp_path / "data" / "prepare")
    for layers in ("no_such_layer", "("):
        wrong = toy_config(tmp_path, train__model=config.train.model, train__lora=LORA | {"layers": layers})
        with pytest.raises(ValueError, match=r"train.lora: .*expected"):
            run_stages(wrong, Workspace(tmp_path), "train")
