"""What a `Recorder` takes down of training loops, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune, weight_norm
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from tda.attribute import attribute
from tda.data import Examples
from tda.task import Classification
from tda.trajectory import Recorder, Run


def data(num: int = 12) -> Examples:
    generator = torch.Generator().manual_seed(1)
    return Examples(torch.randn(num, 4, generator=generator), torch.arange(num) % 3)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def recorded(
    model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 12, before=lambda _step: None, after=lambda: None
) -> Recorder:
    """Steps of four rows with all optimizers, of which the first is recorded; four checkpoints of twelve steps are expected."""
    rows, recorder = data(), Recorder(model, optimizers[0], num_steps=12, num_checkpoints=4)
    for step in range(steps):
        before(step)
        numbers = [(4 * step + place) % 12 for place in range(4)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        (Classification().losses(model, rows.batch(numbers))[0] / 4).backward()
        for optimizer in optimizers:
            optimizer.step()
        recorder.step(numbers)
        after()
    return recorder


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, **called) -> Run:
    """The run of twelve steps."""
    return recorded(model, *optimizers, **called).run


def sgd(*parameters, **settings) -> torch.optim.SGD:
    return torch.optim.SGD(*parameters, lr=0.05, **settings)


class Keeping(nn.Module):
    """A model that keeps its activations, as one does to look at them."""

    def __init__(self):
        super().__init__()
        self.body = layers()
        self.seen = []

    def forward(self, x):
        self.hidden = self.body[:2](x)
        self.seen.append(self.hidden)
        return self.body[2](self.hidden)


def pruned() -> nn.Module:
    model = layers()
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


def normalised() -> nn.Module:
    model = layers()
    weight_norm(model[0])
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated", "ignore:attribute. scores follow")
@pytest.mark.parametrize("make", [Keeping, pruned, normalised])
def test_a_model_that_holds_computed_tensors_is_recorded(make):
    model = make()
    run = train(model, sgd(model.parameters()))
    queries = data().select([1, 2])
    scores = [attribute(method, run, Classification(), data(), queries).values for method in ("replay", "source", "replay")]
    np.testing.assert_array_equal(scores[0], scores[2])
    if make is Keeping:
        plain = layers()
        again = train(plain, sgd(plain.parameters()))
        np.testing.assert_array_equal(scores[1], attribute("source", again, Classification(), data(), queries).values)


@pytest.mark.parametrize(("taken", "steps"), [(7, [3, 6, 7]), (2, [2]), (12, [3, 6, 9, 12]), (14, [3, 6, 9, 12, 14])])
def test_a_run_that_ends_at_another_step_than_expected_has_a_checkpoint_there(taken, steps):
    model = layers()
    recorder = recorded(model, sgd(model.parameters()), steps=taken)
    run = recorder.run
    assert [checkpoint.step for checkpoint in run.checkpoints] == steps
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.checkpoints[-1].weights[name], value, atol=0, rtol=0)
    assert len(recorder.run.checkpoints) == len(steps), "asked for again, it is the same"
    attribute("source", run, Classification(), data(), data(2), num_segments=1)


def test_a_run_without_steps_or_whose_last_weights_are_gone_is_refused():
    model = layers()
    with pytest.raises(ValueError, match=r"run: checkpoints at steps \[\] of 0; expected at least one"):
        _ = recorded(model, sgd(model.parameters()), steps=0).run
    recorder = recorded(model, sgd(model.parameters()), steps=7)
    model.load_state_dict(layers().state_dict())
    with pytest.raises(ValueError, match="the last step, 7, has no checkpoint, and weights were changed since; expected those"):
        _ = recorder.run
    recorder = recorded(model, sgd(model.parameters()))
    model.load_state_dict(layers().state_dict())
    assert recorder.run.checkpoints[-1].step == 12


def test_a_run_whose_last_step_has_no_checkpoint_is_refused():
    model = layers()
    run = train(model, sgd(model.parameters()))
    with pytest.raises(ValueError, match=r"checkpoints at steps \[3, 6, 9\] of 12"):
        replace(run, checkpoints=run.checkpoints[:-1])


def test_a_run_much_longer_than_expected_is_told_of():
    model = layers()
    with pytest.warns(UserWarning, match="the last checkpoint stands for 18 of 30 steps; expected about 3, as for the others"):
        _ = recorded(model, sgd(model.parameters()), steps=30).run


@pytest.mark.parametrize("rows", [[], [-1, 2], torch.tensor([True, False]), torch.tensor([0.0, 1.0]), torch.tensor(3)])
def test_rows_that_are_no_row_numbers_are_refused(rows):
    model = layers()
    with pytest.raises(ValueError, match=r"recorder: step 1 was taken on rows .*; expected row numbers from 0, one or more"):
        Recorder(model, sgd(model.parameters()), num_steps=6).step(rows)


def test_a_momentum_that_a_scheduler_cycles_is_refused():
    model = layers()
    optimizer = sgd(model.parameters(), momentum=0.9)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=20)
    with pytest.raises(ValueError, match=r"at step 2 the optimizer's groups have .*'momentum': 0\.9.*; expected .*0\.95.* along"):
        train(model, optimizer, after=scheduler.step)
    model = layers()
    optimizer = sgd(model.parameters(), momentum=0.9)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=20, cycle_momentum=False)
    train(model, optimizer, after=scheduler.step)


def test_groups_that_come_apart_or_are_added_are_refused():
    model = layers()
    optimizer = sgd([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    scheduler = LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5**step])
    with pytest.raises(ValueError, match=r"parameter groups differ in lr: \[0\.025, 0\.05\]; expected one value"):
        train(model, optimizer, after=scheduler.step)
    model = layers()
    optimizer = sgd(model[2].parameters())
    with pytest.raises(ValueError, match="at step 7 the optimizer's groups have"):
        train(model, optimizer, before=lambda step: step == 6 and optimizer.add_param_group({"params": model[0].parameters()}))


def test_the_optimizer_of_a_copy_is_refused():
    with pytest.raises(ValueError, match="the optimizer has none of the model's parameters; expected the model that it trains"):
        Recorder(layers(), sgd(layers().parameters()), num_steps=6)


def test_an_optimizer_that_has_taken_steps_is_refused():
    """AdamW's second moments would be corrected for fewer steps than they are of."""
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    with pytest.raises(ValueError, match="recorder: the optimizer has taken steps already, and its moments are those of more"):
        Recorder(model, optimizer, num_steps=6)


def test_settings_may_be_tensors():
    model = layers()
    groups = [{"params": layer.parameters(), "lr": torch.tensor(0.01)} for layer in (model[0], model[2])]
    optimizer = torch.optim.AdamW(groups, betas=(torch.tensor(0.5), torch.tensor(0.75)), foreach=False)
    recorded = Recorder(model, optimizer, num_steps=6)._settings
    assert (recorded.beta1, recorded.beta2) == (0.5, 0.75)
    assert isinstance(recorded.beta1, float)


def test_weights_that_another_optimizer_moves_are_told_of():
    model = layers()
    with pytest.warns(UserWarning, match=r"recorder: 2\.weight, 2\.bias moved, though the optimizer does not have them; they"):
        train(model, sgd(model[0].parameters()), sgd(model[2].parameters()))


@pytest.mark.parametrize("at_first", [True, False])
def test_weights_that_move_in_a_part_of_the_run_are_told_of(at_first):
    model = layers()
    model[0].requires_grad_(at_first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def before(step: int) -> None:
        if step == 6:
            model[0].requires_grad_(not at_first)

    with pytest.warns(UserWarning, match=r"recorder: 0\.weight, 0\.bias did not move between some checkpoints; they count as"):
        run = train(model, optimizer, before=before)
    if not at_first:
        for method in ("source", "averaged_influence"):
            with pytest.raises(ValueError, match=r"attribute: 0 has no second moments at step .*; expected those of every layer"):
                attribute(method, run, Classification(), data(), data(2))
