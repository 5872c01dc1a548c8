"""Runs of the Hugging Face Trainer, really trained, taken over: optimizer state, learning rates, the whole pipeline."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from tda.adopt import other_recipe, parameter_order
from tda.artifacts import Workspace, read_json
from tda.checkpoints import check_fits, load_checkpoint, optimizer_state
from tda.config import Config
from tda.data import load_documents
from tda.dynamics import load_exposure, load_segments
from tda.factors import load_factors
from tda.tokens import train_tokenizer
from tests.helpers import random_documents
from tests.toy import run_stages, sentences, toy_config, write_corpus

pytestmark = pytest.mark.filterwarnings(
    "ignore:Call to deprecated:DeprecationWarning", "ignore::UserWarning:torch", "ignore::FutureWarning"
)
CONTEXT, STEPS, SAVE = 24, 24, 4


GPT2_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class Run:
    """A workspace, and the Trainer's live state at the end of the run that it adopts."""

    workspace: Workspace
    config: Config
    output: Path
    moments: dict[str, torch.Tensor]  # exp_avg_sq by parameter name, as the optimizer held it
    rates: list[float]  # of every step


def small_gpt2(vocabulary: int, *, dropout: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    share = {} if dropout else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=32, n_embd=16, n_layer=2, n_head=2, **share))


def small_llama(vocabulary: int, *, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )


def trained(folder: Path, make_model: Any, *, adapt: Any = lambda model: model, **arguments: Any) -> Run:
    """A base model with its tokenizer in `base`, documents prepared with it, and a Trainer's run on them in `output`.

    What is trained is what `adapt` makes of the model.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    write_corpus(folder)
    tokenizer = train_tokenizer((sentences("harbour", n) for n in range(20)), vocabulary=300)
    model = make_model(len(tokenizer))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = toy_config(
        folder,
        train__model=str(folder / "base"),
        train__run=str(folder / "output"),
        train__optimizer="sgd" if arguments.get("optim") == "sgd" else "adamw",
    )
    workspace = Workspace(folder)
    run_stages(config, workspace, "prepare")
    documents = load_documents(workspace.documents)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in documents.tokens]

    def collate(some: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in some)
        ids = torch.tensor([row["input_ids"] + [2] * (length - len(row["input_ids"])) for row in some])
        mask = torch.tensor([[1] * len(row["labels"]) + [0] * (length - len(row["labels"])) for row in some])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    rates: list[float] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    settings = {
        "output_dir": str(folder / "output"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "save_steps": SAVE,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model=adapt(model),
        args=TrainingArguments(**settings | arguments),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Watch()],
    )
    trainer.train()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    state = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
    moments = {names[key]: value["exp_avg_sq"].clone() for key, value in state.items() if "exp_avg_sq" in value}
    return Run(workspace, config, folder / "output", moments, rates)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Run:
    return trained(tmp_path_factory.mktemp("gpt2"), lambda size: small_gpt2(size, dropout=True))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Run:
    return trained(tmp_path_factory.mktemp("llama"), lambda size: small_llama(size, tied=False), logging_steps=6)


@pytest.fixture(scope="module")
def sgd(tmp_path_factory) -> Run:
    return trained(tmp_path_factory.mktemp("sgd"), lambda size: small_gpt2(size, dropout=False), optim="sgd", learning_rate=0.3)


@pytest.fixture(params=["gpt2", "llama"])
def adamw(request) -> Run:
    return request.getfixturevalue(request.param)


def copy_of(run: Run, folder: Path, **changes: object) -> tuple[Config, Workspace, Path]:
    """The run with its documents under another root, to be changed."""
    shutil.copytree(run.workspace.documents.parent, Workspace(folder).documents.parent)
    shutil.copytree(run.output, folder / "output")
    train = run.config.train.model_copy(update={"run": str(folder / "output")} | changes)
    return run.config.model_copy(update={"train": train}), Workspace(folder), folder / "output"


def test_the_state_of_every_parameter_is_under_its_own_name(adamw):
    run_stages(adamw.config, adamw.workspace, "train")
    saved = load_file(adamw.workspace.checkpoint(3) / "optimizer.safetensors")
    names = [name for name, _ in load_checkpoint(adamw.workspace, 3).named_parameters()]
    assert set(adamw.moments) == set(names)
    for name in names:
        torch.testing.assert_close(saved[f"exp_avg_sq.{name}"], adamw.moments[name], rtol=0, atol=0)
        assert int(saved[f"step.{name}"]) == STEPS


def test_what_the_trainer_decays_comes_first(adamw):
    from transformers import Trainer

    model = load_checkpoint(adamw.workspace, 3) if adamw.workspace.training.exists() else None
    if model is None:
        run_stages(adamw.config, adamw.workspace, "train")
        model = load_checkpoint(adamw.workspace, 3)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    order = parameter_order(model)
    first = [name in decayed for name in order]
    assert first == sorted(first, reverse=True)
    assert 0 < sum(first) < len(order)
    assert sorted(order) == sorted(name for name, _ in model.named_parameters())


def test_checkpoints_learning_rates_and_segments_are_those_of_the_run(adamw):
    run_stages(adamw.config, adamw.workspace, "train", "segments")
    training = read_json(adamw.workspace.training, stage="train")
    assert training["checkpoint_steps"] == [8, 12, 16, 24]  # 4 of 6
    assert (training["optimizer"], training["weight_decay"], training["beta2"]) == ("adamw", 0.1, 0.999)
    rates = pl.read_parquet(adamw.workspace.trajectory)["learning_rate"].to_numpy()
    assert len(rates) == len(adamw.rates) == STEPS
    logged = 1 if "gpt2" in str(adamw.output) else 6
    known = np.arange(logged, STEPS + 1, logged) - 1
    np.testing.assert_allclose(rates[known], np.array(adamw.rates)[known], rtol=1e-12)
    if logged == 1:
        np.testing.assert_allclose(rates, adamw.rates, rtol=1e-12)
    segments = load_segments(adamw.workspace)
    assert [(segment.first_step, segment.last_step) for segment in segments] == [(1, 12), (13, 24)]
    assert segments[1].mean_learning_rate == pytest.approx(rates[12:].mean())


def test_every_document_counts_as_seen_equally_often(adamw):
    run_stages(adamw.config, adamw.workspace, "train", "segments")
    documents = load_documents(adamw.workspace.documents)
    exposure = load_exposure(adamw.workspace, documents)
    np.testing.assert_array_equal(exposure, np.full((len(documents), 2), 1 / len(documents)))


def test_adopted_weights_are_those_of_the_trainer(adamw):
    run_stages(adamw.config, adamw.workspace, "train")
    model = load_checkpoint(adamw.workspace, 3)
    saved = load_file(adamw.output / f"checkpoint-{STEPS}" / "model.safetensors")
    state = model.state_dict()
    for name, value in saved.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    tied = "gpt2" in str(adamw.output)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == tied
    assert ("lm_head.weight" in saved) != tied


def test_the_whole_pipeline_runs_on_an_adopted_run(adamw):
    from tda.query import answer

    names = ["train", "segments", "curvature", "gradients", "scores", "curation", "retraining", "evaluation", "report"]
    run_stages(adamw.config, adamw.workspace, *names)
    scores = pl.read_parquet(adamw.workspace.scores)["score_source"].to_numpy()
    assert np.isfinite(scores).all()
    assert scores.std() > 0
    found = answer("The boat meets the tide.", config=adamw.config, workspace=adamw.workspace, top=2)
    assert len(found["helped"]) == 2
    runs = pl.read_parquet(adamw.workspace.retraining)
    assert np.isfinite(runs["target_loss"].to_numpy()).all()
    layers = read_json(adamw.workspace.gradients(0), stage="gradients@0")["layers"]
    heads = [layer["name"] for layer in layers if "lm_head" in layer["name"]]
    assert heads == ([] if "gpt2" in str(adamw.output) else ["lm_head"])  # a tied head is an embedding


def test_layers_that_the_trainer_kept_frozen_are_not_attributed(tmp_path):
    """Nor are they trained by the retraining that the verdict rests on."""

    def half_frozen(size: int) -> Any:
        model = small_gpt2(size, dropout=False)
        for part in (model.transformer.wte, model.transformer.wpe, model.transformer.h[0]):
            part.requires_grad_(False)
        return model

    run = trained(tmp_path, half_frozen)
    run_stages(run.config, run.workspace, "train", "segments", "curvature", "gradients", "scores", "curation", "retraining")
    training = read_json(run.workspace.training, stage="train")
    frozen = set(training["frozen"])
    model = load_checkpoint(run.workspace, 0)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    assert all(name.startswith(("transformer.wte", "transformer.wpe", "transformer.h.0.")) for name in frozen)
    layers = load_factors(run.workspace.curvature(1)).layers
    assert [layer.name for layer in layers] == [f"transformer.h.1.{name}" for name in GPT2_LAYERS]
    state = optimizer_state(run.workspace, 3)
    for name, moment in run.moments.items():
        torch.testing.assert_close(state[f"exp_avg_sq.{name}"], moment)


def test_a_run_of_sgd(sgd):
    run_stages(sgd.config, sgd.workspace, "train", "segments", "curvature", "gradients", "scores")
    training = read_json(sgd.workspace.training, stage="train")
    assert (training["optimizer"], training["momentum"]) == ("sgd", 0.0)
    rates = pl.read_parquet(sgd.workspace.trajectory)["learning_rate"].to_numpy()
    np.testing.assert_allclose(rates, sgd.rates, rtol=1e-12)
    scores = pl.read_parquet(sgd.workspace.scores)["score_source"].to_numpy()
    assert np.isfinite(scores).all()
    assert scores.std() > 0


def test_without_optimizer_state_curvature_says_what_that_costs(gpt2, tmp_path, capfd):
    config, workspace, output = copy_of(gpt2, tmp_path)
    for path in output.glob("checkpoint-*/optimizer.pt"):
        path.unlink()
    run_stages(config, workspace, "train", "segments")
    said = capfd.readouterr().err
    assert (
        "tda train: train.run: checkpoint-8 has no optimizer.pt: stage curvature refuses it unless curvature.adam is none" in said
    )
    assert "learning_rate" not in said  # the highest that was logged may be below the peak
    with pytest.raises(FileNotFoundError, match=r"optimizer\.safetensors is missing: .*save_only_model.*curvature\.adam to none"):
        run_stages(config, workspace, "curvature")
    blind = config.model_copy(update={"curvature": config.curvature.model_copy(update={"adam": "none"})})
    run_stages(blind, workspace, "curvature", "gradients", "scores")
    assert np.isfinite(pl.read_parquet(workspace.scores)["score_source"].to_numpy()).all()


def test_weights_in_another_format_are_adopted(gpt2, tmp_path):
    config, workspace, output = copy_of(gpt2, tmp_path)
    for path in output.glob("checkpoint-*/model.safetensors"):
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    run_stages(config, workspace, "train")
    assert (workspace.checkpoint(0) / "model" / "model.safetensors").exists()


def remove_output(output: Path) -> None:
    shutil.rmtree(output)


def remove_checkpoints(output: Path) -> None:
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)


def keep_two(output: Path) -> None:
    for step in range(SAVE, STEPS - SAVE, SAVE):
        shutil.rmtree(output / f"checkpoint-{step}")


def cut_weights(output: Path) -> None:
    path = output / f"checkpoint-{STEPS}" / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_optimizer(output: Path) -> None:
    path = output / f"checkpoint-{STEPS}" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_optimizer(output: Path, change: Any) -> None:
    path = output / f"checkpoint-{STEPS}" / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


def drop_a_parameter(output: Path) -> None:
    def change(saved: dict) -> None:
        saved["state"].pop(saved["param_groups"][1]["params"].pop())

    change_optimizer(output, change)


def swap_two_parameters(output: Path) -> None:
    def change(saved: dict) -> None:
        saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]

    change_optimizer(output, change)


def set_in_groups(**settings: Any) -> Any:
    """Every group with these settings; None takes one away."""

    def change(saved: dict) -> None:
        for group in saved["param_groups"]:
            group |= settings
            for key in [key for key, value in settings.items() if value is None]:
                del group[key]

    return lambda output: change_optimizer(output, change)


def keeps(*kinds: str, **settings: Any) -> Any:
    """The state that another optimizer has of a parameter, and settings of its groups."""

    def change(saved: dict) -> None:
        for values in saved["state"].values():
            moment = values["exp_avg"]
            values.clear()
            values |= {kind: moment.clone() for kind in kinds}
        for group in saved["param_groups"]:
            held = {key: group[key] for key in ("params", "lr", "weight_decay")}
            group.clear()
            group |= held | settings

    return lambda output: change_optimizer(output, change)


RMSPROP = keeps("square_avg", "step", momentum=0.0, alpha=0.99, eps=1e-8, centered=False)
LION = keeps("exp_avg", betas=(0.9, 0.99))
ADAMAX = keeps("exp_avg", "exp_inf", "step", betas=(0.9, 0.999), eps=1e-8)
EIGHT_BITS = keeps("state1", "state2", "step", betas=(0.9, 0.999), eps=1e-8)
NESTEROV = keeps("momentum_buffer", momentum=0.9, dampening=0.0, nesterov=True)


def log_no_rates(output: Path) -> None:
    for folder in output.glob("checkpoint-*"):
        state = json.loads((folder / "trainer_state.json").read_text())
        (folder / "trainer_state.json").write_text(json.dumps(state | {"log_history": []}))


def leave_no_rates(output: Path) -> None:
    log_no_rates(output)
    for path in output.glob("checkpoint-*/scheduler.pt"):
        path.unlink()


def leave_the_last_rate(output: Path) -> None:
    leave_no_rates(output)
    path = output / f"checkpoint-{STEPS}" / "trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"log_history": [{"step": STEPS, "learning_rate": 1e-6}]}))


def cut_state(output: Path) -> None:
    path = output / f"checkpoint-{STEPS}" / "trainer_state.json"
    path.write_text(path.read_text()[:100])


def other_architecture(output: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (output / f"checkpoint-{SAVE * 2}" / name).unlink()
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    other.save_pretrained(output / f"checkpoint-{SAVE * 2}")
    (output / f"checkpoint-{SAVE * 2}" / "optimizer.pt").unlink()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (remove_output, FileNotFoundError, r"train\.run: no folder .*output"),
        (remove_checkpoints, FileNotFoundError, r"train\.run: .* has no checkpoint-\* folder"),
        (keep_two, FileNotFoundError, r"has 2 of the 4 checkpoints that are asked for; set train\.checkpoints to \[0, 1\]"),
        (cut_weights, FileNotFoundError, "checkpoint-24: no causal language model could be loaded"),
        (cut_optimizer, FileNotFoundError, r"optimizer\.pt cannot be read"),
        (drop_a_parameter, ValueError, r"is for \d+ parameters, the model has \d+"),
        (swap_two_parameters, ValueError, "expected the optimizer of this model"),
        (set_in_groups(betas=None), ValueError, "expected AdamW as torch has it, or SGD"),
        (set_in_groups(amsgrad=True), ValueError, "an optimizer with amsgrad; expected AdamW"),
        (set_in_groups(decoupled_weight_decay=False), ValueError, "weight_decay as a part of the gradient"),
        (RMSPROP, ValueError, r"a state of square_avg, step and the settings alpha, .*; expected AdamW"),
        (LION, ValueError, r"a state of exp_avg and the settings betas, .*; expected AdamW"),
        (ADAMAX, ValueError, r"a state of exp_avg, exp_inf, step .*; expected AdamW"),
        (EIGHT_BITS, ValueError, r"a state of state1, state2, step .*; expected AdamW"),
        (NESTEROV, ValueError, "an optimizer with nesterov; expected AdamW"),
        (leave_no_rates, ValueError, "no learning rate in its log_history before step 24.*smaller logging_steps"),
        (leave_the_last_rate, ValueError, "no learning rate in its log_history before step 24.*smaller logging_steps"),
        (cut_state, ValueError, r"train.run: .*trainer_state.json cannot be read: .*; expected the file as the Trainer wrote it"),
        (other_architecture, ValueError, "another architecture than the ones before it"),
    ],
)
def test_a_run_that_cannot_be_adopted_is_refused(gpt2, tmp_path, spoil, error, message):
    config, workspace, output = copy_of(gpt2, tmp_path)
    spoil(output)
    with pytest.raises(error, match=message):
        run_stages(config, workspace, "train")
    assert not workspace.training.exists()
    assert not workspace.checkpoints.exists()


def test_rates_that_were_not_logged_come_from_the_checkpoints_schedulers(gpt2, tmp_path):
    config, workspace, output = copy_of(gpt2, tmp_path)
    log_no_rates(output)
    run_stages(config, workspace, "train")
    rates = pl.read_parquet(workspace.trajectory)["learning_rate"].to_numpy()
    next_ones = np.arange(SAVE, STEPS, SAVE)
    np.testing.assert_allclose(rates[next_ones], np.array(gpt2.rates)[next_ones], rtol=1e-12)
    assert np.corrcoef(rates[SAVE:], gpt2.rates[SAVE:])[0, 1] > 0.99


def test_what_retraining_does_otherwise_is_said(gpt2, tmp_path, capfd):
    config, workspace, _output = copy_of(gpt2, tmp_path)
    other = config.train.model_copy(update={"learning_rate": 0.03, "optimizer": "sgd"})
    run_stages(config.model_copy(update={"train": other}), workspace, "train")
    said = capfd.readouterr().err
    assert (
        "tda train: the run had optimizer adamw (train.optimizer is sgd), beta2 0.999 (train.beta2 is 0.99), learning_rate 0.01 "
        "(train.learning_rate is 0.03): retraining, and so the verdict, goes by params.yaml"
    ) in said
    same = {"optimizer": "adamw", "weight_decay": config.train.weight_decay, "beta2": config.train.beta2, "momentum": 0.0}
    assert other_recipe(config.train, same) == ""
    assert "the run had beta1 0.95 (train.beta1 is 0.9): " in other_recipe(config.train, same | {"beta1": 0.95})


def test_the_learning_rate_of_the_recipe_is_that_of_the_run_though_no_step_had_it(llama, capfd):
    """The first rate that this run has logged is of step 6, below the peak."""
    config = llama.config.model_copy(update={"train": llama.config.train.model_copy(update={"learning_rate": 0.01})})
    run_stages(config, llama.workspace, "train")
    assert "learning_rate" not in capfd.readouterr().err


def test_a_model_that_reads_both_ways_is_refused(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    for is_decoder in (False, True):
        torch.manual_seed(0)
        model = BertLMHeadModel(BertConfig(vocab_size=300, max_position_embeddings=32, is_decoder=is_decoder, **sizes)).eval()
        documents = random_documents(2)
        if is_decoder:
            check_fits(model, documents, origin="bert")
        else:
            with pytest.raises(
                ValueError, match="bert: the first prediction of BertLMHeadModel changes with the tokens after it"
            ):
                check_fits(model, documents, origin="bert")


def test_documents_in_the_tokens_of_another_model_are_refused(gpt2, tmp_path):
    config, workspace, _output = copy_of(gpt2, tmp_path)
    table = pl.read_parquet(workspace.documents)
    table.with_columns(pl.col("tokens").list.eval(pl.element() + 250)).write_parquet(workspace.documents)
    with pytest.raises(ValueError, match=r"the model knows \d+ tokens, the documents have the token \d+"):
        run_stages(config, workspace, "train")


def test_a_base_model_is_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"toy: train: with train\.run, train\.model is the model that the run started from"):
        toy_config(tmp_path, train__run="output")


def test_a_model_folder_without_a_tokenizer_is_named_by_its_key(gpt2, tmp_path):
    write_corpus(tmp_path)
    shutil.copytree(gpt2.workspace.root / "base", tmp_path / "base")
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"train\.model: no tokenizer in .*base.*expected a folder with tokenizer\.json"):
        run_stages(toy_config(tmp_path, train__model=str(tmp_path / "base")), Workspace(tmp_path), "prepare")
