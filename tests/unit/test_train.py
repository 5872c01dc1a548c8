import itertools

import numpy as np
import pytest
import torch

from tda.artifacts import Workspace, write_json
from tda.checkpoints import architecture_digest, load_checkpoint
from tda.config import Train, load_config
from tda.model import load_model
from tda.train import (
    StepResult,
    checkpoint_steps,
    learning_rates,
    make_optimizer,
    mean_loss,
    optimizer_state,
    resume,
    save_checkpoint,
    schedule,
    stage_lengths,
    train,
    trajectory_table,
)
from tests.helpers import document_loss, random_documents, tiny_llama, with_adapter


def recipe(**changes) -> Train:
    values = load_config().train.model_dump() | {"batch_size": 2, "learning_rate": 0.01, "warmup": 0.0} | changes
    return Train.model_validate(values)


def test_a_step_of_sgd_is_the_gradient_of_the_mean_token_loss():
    documents = random_documents(4)
    model, twin = tiny_llama(), tiny_llama()
    one = recipe(optimizer="sgd", momentum=0.0, weight_decay=0.0, max_gradient_norm=0.0, schedule="constant", batch_size=4)
    steps = schedule(documents, one, seed=0, lengths=[0, 1])
    weights = np.array([1.0, 0.5, 2.0, 1.0])
    train(model, documents, steps, one, optimizer=make_optimizer(model, one), weights=weights)
    rows = steps[0].rows
    loss = sum(weights[row] * document_loss(twin, documents, row) for row in rows) / int(documents.num_loss_tokens[rows].sum())
    loss.backward()
    for trained, start in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(trained, start - 0.01 * start.grad)


def test_schedules_of_two_selections_see_shared_documents_in_one_order():
    documents = random_documents(12)
    keep = np.arange(12) % 4 != 1
    one = recipe(stages=[{"part": "all", "epochs": 2}])
    whole = [row for step in schedule(documents, one, seed=3, lengths=[12]) for row in step.rows]
    reduced = [row for step in schedule(documents, one, seed=3, lengths=[12], keep=keep) for row in step.rows]
    assert len(whole) == 24
    assert len(reduced) == 22  # 12 steps too: five an epoch, the last of one document, and two of a third epoch
    assert reduced[:9] == [row for row in whole[:12] if keep[row]]
    assert reduced[9:18] == [row for row in whole[12:] if keep[row]]


def test_every_epoch_sees_every_document_of_its_part_once():
    documents = random_documents(9)
    one = recipe(stages=[{"part": "general", "epochs": 1}, {"part": "all", "epochs": 2}])
    steps = schedule(documents, one, seed=0, lengths=stage_lengths(documents, one))
    seen = [row for step in steps if step.stage == 0 for row in step.rows]
    assert sorted(seen) == [0, 3, 6]
    assert np.bincount([row for step in steps if step.stage == 1 for row in step.rows]).tolist() == [2] * 9


def test_a_stage_whose_documents_were_all_dropped_is_refused():
    documents = random_documents(6)
    keep = np.array([part == "general" for part in documents.parts])
    with pytest.raises(ValueError, match="no documents are left for part mixed"):
        schedule(documents, recipe(), seed=0, lengths=[1, 1], keep=keep)
    with pytest.raises(ValueError, match=r"none of the parts .* has documents"):
        schedule(documents, recipe(stages=[{"part": "general", "epochs": 1}]), seed=0, lengths=[0])


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_learning_rates_warm_up_and_fall(shape):
    rates = learning_rates(recipe(schedule=shape, warmup=0.2, learning_rate=2.0), 20)
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert (rates[-1] == 2.0) == (shape == "constant")


def test_checkpoints_are_even_and_one_is_at_each_stage_end():
    assert checkpoint_steps(60, 6, [60]) == [10, 20, 30, 40, 50, 60]
    assert checkpoint_steps(60, 6, [17, 60]) == [10, 17, 30, 40, 50, 60]
    with pytest.raises(ValueError, match="5 checkpoints of 3 steps"):
        checkpoint_steps(3, 5, [3])


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step():
    documents, model = random_documents(4), tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    steps = schedule(documents, recipe(), seed=0, lengths=[0, 1])
    with pytest.raises(ValueError, match=r"the loss of step 1 is nan at learning rate .*train.learning_rate"):
        train(model, documents, steps, recipe(), optimizer=make_optimizer(model, recipe()))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_resumed_run_ends_with_the_same_bits(kind, tmp_path):
    documents = random_documents(8)
    one = recipe(optimizer=kind)
    steps = schedule(documents, one, seed=0, lengths=[2, 6])
    straight = tiny_llama()
    train(straight, documents, steps, one, optimizer=make_optimizer(straight, one))
    first = tiny_llama()
    optimizer = make_optimizer(first, one)
    train(first, documents, steps[:3], one, optimizer=optimizer)
    save_checkpoint(tmp_path / "0", first, optimizer, step=3)
    second = tiny_llama(seed=5)
    optimizer = make_optimizer(second, one)
    assert resume(tmp_path / "0", second, optimizer) == 3
    train(second, documents, steps[3:], one, optimizer=optimizer)
    for (name, expected), got in zip(straight.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, got), name


def test_optimizer_state_is_named_after_parameters():
    documents, model = random_documents(4), tiny_llama()
    optimizer = make_optimizer(model, recipe())
    train(model, documents, schedule(documents, recipe(), seed=0, lengths=[0, 2]), recipe(), optimizer=optimizer)
    state = optimizer_state(model, optimizer)
    assert state["step.model.layers.0.mlp.up_proj.weight"] == 2
    assert state["exp_avg_sq.model.layers.0.mlp.up_proj.weight"].shape == (12, 8)


def test_mean_loss_is_over_all_tokens():
    documents, model = random_documents(5, loss_starts=[1, 2, 3, 1, 1]), tiny_llama()
    expected = sum(document_loss(model, documents, row).item() for row in range(5)) / documents.num_loss_tokens.sum()
    assert mean_loss(model, documents, batch_tokens=20) == pytest.approx(expected, rel=1e-12)


def test_trajectory_records_batches_and_rates():
    documents = random_documents(6)
    steps = schedule(documents, recipe(), seed=0, lengths=[1, 2])
    table = trajectory_table([StepResult(step, 1.5, 0.5) for step in steps])
    assert table["documents"].to_list() == [step.rows for step in steps]
    assert table["stage"].to_list() == [0, 1, 1]
    assert table["gradient_scale"].to_list() == [0.5] * 3


@pytest.mark.parametrize("adapted", [False, True])
def test_weights_in_bfloat16_leave_rotary_frequencies_as_they_are(tmp_path, adapted):
    """Rounded to 8 bits they would turn the 512th token by up to a radian too much."""
    workspace, base = Workspace(tmp_path), tmp_path / "base"
    tiny_llama().float().save_pretrained(base)
    model = with_adapter(load_model(base)) if adapted else load_model(base)
    model.save_pretrained(workspace.checkpoint(0) / "model")
    whole = load_model(workspace.checkpoint(0) / "model", base=str(base))
    write_json(workspace.training, {"architecture_digest": architecture_digest(whole)})
    expected = dict(whole.named_buffers())
    for narrow in (
        load_model(workspace.checkpoint(0) / "model", base=str(base), dtype=torch.bfloat16),
        load_checkpoint(workspace, 0, dtype=torch.bfloat16),
    ):
        assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
        assert all(torch.equal(buffer, expected[name]) for name, buffer in narrow.named_buffers())
