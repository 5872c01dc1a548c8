"""Claim: losses by blocks of logits, with their gradients beside them, are faster than autograd on all logits at once.

`frozen` differentiates in the hidden states, `training` also in the head's weight, `sampled` is `frozen` with labels drawn from
the model, in the reference by `torch.multinomial`. `step` is a whole training step of AdamW against one through transformers'
logits, padding included. Losses and gradients are checked against the reference first. Prints one JSON line.
"""

import json
import sys
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from benchmarks.common import ROOT, facts, in_turns, made_documents, made_model, options, speed
from tda.config import load_config
from tda.losses import head_losses
from tda.train import Step, make_optimizer, train

STEPS = 6


def main(arguments: Sequence[str]) -> None:
    chosen = options(arguments, __doc__)
    torch.set_num_threads(1)
    config = load_config(ROOT / "params.yaml")
    recipe = config.train
    documents = made_documents(chosen)
    size = recipe.batch_size
    batches = [documents.batch(range(start, start + size)).to(chosen.device) for start in range(0, STEPS * size, size)]
    rows = sum(int(batch.loss_mask.sum()) for batch in batches) // STEPS
    generator = torch.Generator(chosen.device).manual_seed(0)
    h = torch.randn(rows, chosen.hidden_size, generator=generator, device=chosen.device)
    W = torch.randn(chosen.vocabulary, chosen.hidden_size, generator=generator, device=chosen.device) / chosen.hidden_size**0.5
    targets = torch.randint(chosen.vocabulary, (rows,), generator=generator, device=chosen.device)
    uniform = torch.rand(rows, generator=generator, device=chosen.device)
    w = torch.ones(rows, device=chosen.device)

    def plain(*, training: bool, sampled: bool = False) -> list[torch.Tensor]:
        hidden, weight = h.clone().requires_grad_(), W.clone().requires_grad_(training)
        logits = hidden @ weight.T
        labels = torch.multinomial(logits.detach().softmax(dim=1), 1)[:, 0] if sampled else targets
        losses = cross_entropy(logits, labels, reduction="none")
        losses.sum().backward()
        return [losses.detach(), hidden.grad, weight.grad]

    def ours(*, training: bool, sampled: bool = False) -> list[torch.Tensor]:
        return list(head_losses(h, W, targets, uniform if sampled else None, w, differentiate=(True, training)))

    for expected, got in zip(plain(training=True), ours(training=True), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # float32 sums over the rows, in another order

    steps = [Step(index + 1, 0, batch.rows, recipe.learning_rate) for index, batch in enumerate(batches)]
    models = [made_model(chosen, config=config) for _ in range(2)]
    optimizers = [make_optimizer(model, recipe) for model in models]

    def plain_steps() -> None:
        model, optimizer = models[1].train(), optimizers[1]
        for batch in batches:
            logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
            losses = cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
            ((losses * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    train(models[0], documents, steps, recipe, optimizer=optimizers[0])
    plain_steps()
    moved = recipe.learning_rate * STEPS  # how far Adam moves a weight, whatever the size of its gradient
    for got, expected in zip(*(model.state_dict().values() for model in models), strict=True):
        torch.testing.assert_close(got, expected, rtol=0.0, atol=0.1 * moved)

    kinds = {"frozen": {"training": False}, "training": {"training": True}, "sampled": {"training": False, "sampled": True}}
    actions = {}
    for kind, options_of in kinds.items():
        actions[f"{kind} plain"] = lambda options_of=options_of: plain(**options_of)
        actions[kind] = lambda options_of=options_of: ours(**options_of)
    actions |= {
        "step plain": plain_steps,
        "step": lambda: train(models[0], documents, steps, recipe, optimizer=optimizers[0]),
    }
    spent = in_turns(actions, rounds=chosen.rounds, device=chosen.device)
    step_tokens = sum(int(batch.mask.sum()) for batch in batches)
    measured = {
        kind: speed(spent[kind], spent[f"{kind} plain"], num_tokens=step_tokens if kind == "step" else rows)
        for kind in (*kinds, "step")
    }
    print(json.dumps({"claim": "head_losses_keep_up", **facts(chosen, documents), "rows": rows, **measured}))


if __name__ == "__main__":
    main(sys.argv[1:])
