import numpy as np
import pytest
import torch
from torch import nn

from tda.losses import ROWS_ON_CPU, document_costs, document_losses, head_losses, logit_losses, sample_labels
from tda.model import plain_head
from tests.helpers import document_loss, random_documents, tiny_gpt2, tiny_llama

MODELS = {"llama": tiny_llama, "llama untied": lambda: tiny_llama(tie=False), "gpt2": tiny_gpt2}


def scaled_llama() -> nn.Module:
    """A Llama whose logits are scaled after the head."""
    model = tiny_llama()
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    model.forward = scaled
    return model


@pytest.mark.parametrize("build", [*MODELS.values(), scaled_llama], ids=[*MODELS, "scaled logits"])
def test_losses_and_gradients_of_all_parameters_are_those_of_autograd(build):
    documents, model = random_documents(loss_starts=[1, 2, 3, 1, 2]), build()
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    total, losses = document_losses(model, documents.batch(range(5)), weights=weights)
    expected = torch.stack([document_loss(model, documents, row) for row in range(5)])
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total, weights @ expected)
    parameters = list(model.parameters())
    for got, wanted in zip(
        torch.autograd.grad(3 * total, parameters), torch.autograd.grad(3 * (weights @ expected), parameters), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_a_head_is_plain_unless_the_logits_are_more_than_its_output():
    assert all(plain_head(model) is model.lm_head for model in (build() for build in MODELS.values()))
    assert plain_head(scaled_llama()) is None
    model = tiny_llama().train()
    assert plain_head(model) is model.lm_head
    assert model.training


def test_a_head_that_is_listened_to_is_called():
    documents, model, heard = random_documents(), tiny_llama(), []
    plain_head(model)  # runs the model once
    model.lm_head.register_forward_hook(lambda *_: heard.append(1))
    document_losses(model, documents.batch(range(5)))
    assert heard == [1]


@pytest.mark.filterwarnings("ignore")  # by torch itself, while it traces
@pytest.mark.parametrize("num_rows", [1, ROWS_ON_CPU, ROWS_ON_CPU + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_losses_are_the_same(num_rows, dtype):
    h, W, targets, _uniform, w = head_case(num_rows)
    given = (h.detach().to(dtype), W.detach().to(dtype), targets, None, w if dtype == torch.float64 else w.float())
    expected = head_losses(*given, differentiate=(True, True))
    found = head_losses(*given, differentiate=(True, True), backend="aot_eager")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **({} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 1e-2}))


def head_case(num_rows: int, *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(7, (num_rows,), generator=generator)
    return normal(num_rows, 5), 3 * normal(7, 5), targets, torch.rand(num_rows, generator=generator), normal(num_rows)


@pytest.mark.parametrize("sampled", [False, True], ids=["true", "sampled"])
def test_losses_by_blocks_are_those_of_all_logits_at_once(sampled):
    h, W, targets, uniform, w = head_case(2 * ROWS_ON_CPU + 3)
    uniform = uniform if sampled else None
    h, W = h.requires_grad_(), W.requires_grad_()
    expected = logit_losses(h @ W.T, targets, uniform)
    expected_dh, expected_dW = torch.autograd.grad((w * expected).sum(), [h, W])
    losses, dh, dW = head_losses(h.detach(), W.detach(), targets, uniform, w, differentiate=(True, True))
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(dh, expected_dh)
    torch.testing.assert_close(dW, expected_dW)


def test_a_narrow_model_has_losses_and_sums_in_float32():
    h, W, targets, _, w = head_case(6)
    losses, dh, dW = head_losses(h.bfloat16(), W.bfloat16(), targets, None, w.float(), differentiate=(True, True))
    assert losses.dtype == torch.float32
    assert dh.dtype == dW.dtype == torch.bfloat16
    exact = logit_losses(h.bfloat16().double() @ W.bfloat16().double().T, targets, None)
    # bfloat16 rounds a logit by 2^-9 of its size, and there are none above 32 here
    torch.testing.assert_close(losses.double(), exact, atol=32 * 2**-9, rtol=0.0)


def test_nothing_is_differentiated_where_gradients_are_off():
    documents, model = random_documents(), tiny_llama()
    with torch.no_grad():
        total, losses = document_losses(model, documents.batch(range(5)))
    assert not total.requires_grad
    torch.testing.assert_close(total, losses.sum())


def test_labels_do_not_depend_on_padding():
    documents, model = random_documents(6), tiny_llama()
    order = np.argsort(documents.lengths).tolist()

    def losses_of(rows, generator):
        return document_losses(model, documents.batch(rows), labels="sampled", generator=generator)[1]

    generator = torch.Generator().manual_seed(0)
    alone = torch.cat([losses_of([row], generator) for row in order])
    torch.testing.assert_close(losses_of(order, torch.Generator().manual_seed(0)), alone)


def test_margins_and_log_probabilities_are_costs():
    model, documents = tiny_llama(), random_documents(loss_starts=[1, 2, 3, 1, 2])
    batch = documents.batch(range(5))
    weights = torch.arange(5, dtype=torch.float64)
    p = model(input_ids=batch.tokens).logits[:, :-1].softmax(dim=2).gather(2, batch.tokens[:, 1:, None])[..., 0]
    for measurement, cost in {"margin": -torch.log(p / (1 - p)), "log_probability": -torch.log(p), "loss": -torch.log(p)}.items():
        total, costs = document_costs(model, batch, weights=weights, measurement=measurement)
        expected = torch.where(batch.loss_mask, cost, 0.0).sum(dim=1)
        torch.testing.assert_close(costs, expected.detach())
        torch.testing.assert_close(total, weights @ expected)
        parameters = list(model.parameters())
        gradients = (torch.autograd.grad(one, parameters, retain_graph=True) for one in (total, weights @ expected))
        torch.testing.assert_close(*gradients)


def test_drawn_labels_follow_the_probabilities():
    p = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.7, 0.0])
    labels = sample_labels(p.expand(20_000, 6), torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    share = labels.bincount(minlength=6) / len(labels)
    assert torch.all((share - p).abs() <= 4 * (p * (1 - p) / len(labels)).sqrt())  # four standard errors
    ends = sample_labels(p.expand(2, 6), torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [1, 4]
