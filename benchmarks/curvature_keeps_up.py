"""Claim: a curvature pass runs at the speed that its FLOPs allow, beside the frozen model's forward and backward.

The reference is the same batches through transformers' own forward and loss, and autograd's backward to the input embeddings.
`allowed` is the ratio that the FLOPs would give if each took the same time; matrix products are counted, softmax, sampling of
labels and norms are not. Prints one JSON line.
"""

import json
import sys
from collections.abc import Sequence

import torch

from benchmarks.common import (
    ROOT,
    count_flops,
    facts,
    frozen_pass,
    in_turns,
    lean_pass,
    made_batches,
    made_documents,
    made_model,
    options,
    speed,
)
from tda.config import load_config
from tda.ekfac import Covariances, corrected_eigenvalues, covariances, eigenbasis
from tda.model import tracked_layers
from tda.task import CausalLM


def main(arguments: Sequence[str]) -> None:
    chosen = options(arguments, __doc__)
    torch.set_num_threads(1)
    model, documents = made_model(chosen, config=load_config(ROOT / "params.yaml")), made_documents(chosen)
    layers = tracked_layers(model)
    batches = made_batches(documents, chosen)
    model.requires_grad_(False)

    def generator() -> torch.Generator:
        return torch.Generator(chosen.device).manual_seed(0)

    sums = covariances(model, layers, batches, task=CausalLM(), generator=generator())
    basis = eigenbasis(Covariances(dict(sums.A), dict(sums.S), sums.count), layers)  # which uses them up
    check(model, layers, batches, basis, sums)
    actions = {
        "reference": lambda: [frozen_pass(model, batch) for batch in batches],
        "lean_reference": lambda: [lean_pass(model, batch) for batch in batches],
        "covariances": lambda: covariances(model, layers, batches, task=CausalLM(), generator=generator()),
        "eigenvalues": lambda: corrected_eigenvalues(model, layers, batches, task=CausalLM(), basis=basis, generator=generator()),
    }
    flops = {name: count_flops(action) for name, action in actions.items()}
    spent = in_turns(actions, rounds=chosen.rounds, device=chosen.device)
    num_tokens = int(documents.lengths.sum())
    measured = {
        name: speed(times, spent["reference"], num_tokens=num_tokens)
        | {
            "ratio_to_lean_reference": speed(times, spent["lean_reference"], num_tokens=num_tokens)["ratio"],
            "allowed": round(flops["reference"] / flops[name], 3),
            "allowed_to_lean_reference": round(flops["lean_reference"] / flops[name], 3),
        }
        for name, times in spent.items()
    }
    print(json.dumps({"claim": "curvature_keeps_up", **facts(chosen, documents), **measured}))


def check(model, layers, batches, basis, sums) -> None:
    """Covariances are what plain sums over the inputs give, and eigenvalues are positive."""
    A, counted = None, 0
    module = dict(model.named_modules())[layers[0].name]
    held = []
    handle = module.register_forward_hook(lambda _module, inputs, _output: held.append(inputs[0].detach()))
    for batch in batches:
        model(input_ids=batch.tokens, use_cache=False)
        for row, mask in zip(held.pop(), batch.mask, strict=True):
            a = row[: int(mask.sum()) - 1].double()
            A = a.T @ a if A is None else A + a.T @ a
            counted += len(a)
    handle.remove()
    assert counted == sums.count
    torch.testing.assert_close(sums.A[layers[0].name].double(), A, rtol=1e-4, atol=1e-4 * float(A.diagonal().mean()))
    Q_A, _Q_S = basis[layers[0].name]
    torch.testing.assert_close(Q_A.T @ Q_A, torch.eye(len(Q_A), device=Q_A.device), rtol=0.0, atol=1e-4)


if __name__ == "__main__":
    main(sys.argv[1:])
