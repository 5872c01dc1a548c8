"""Claim: gradient logging runs at 0.8 or more of the speed of the frozen model's forward and backward.

The reference is the same batches through transformers' own forward and loss, and autograd's backward to the input embeddings.
`rows` computes the projected gradients, `rows_and_store` also writes them to the store on disk. `lean_reference` is the reference
with our loss instead, which is faster: beside it stands what capturing alone costs. The rows are checked against autograd first.
Prints one JSON line.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import facts, frozen_pass, in_turns, lean_pass, made_batches, made_documents, made_model, options, speed
from tda.config import load_config
from tda.data import Batch
from tda.gradient_log import numbers_of, write_rows
from tda.gradients import gradient_rows
from tda.model import layer_matrix, linear_modules, tracked_layers
from tda.projection import Projection, random_projections
from tda.store import open_table
from tda.task import CausalLM


def main(arguments: Sequence[str]) -> None:
    chosen = options(arguments, __doc__)
    config = load_config(Path(__file__).parents[1] / "params.yaml")
    torch.set_num_threads(1)
    model, documents = made_model(chosen, config=config), made_documents(chosen)
    layers = tracked_layers(model)
    projections = {
        name: Projection(held.P_i.to(chosen.device), held.P_o.to(chosen.device))
        for name, held in random_projections(layers, rank=chosen.rank, seed=0).items()
    }
    batches = made_batches(documents, chosen)
    error = check(model, layers, documents, projections)
    model.requires_grad_(False)
    folder = Path(tempfile.mkdtemp(prefix="logging-"))
    dim = sum(held.size for held in projections.values())
    tables = iter(
        open_table(folder / str(number), checkpoint=0, segment=0, identity={}, dim=dim, dtype=config.gradients.dtype)
        for number in range(chosen.rounds + 1)
    )

    def computed(batch: Batch) -> torch.Tensor:
        return numbers_of(*gradient_rows(model, layers, batch, task=CausalLM(), projections=projections))

    def stored() -> None:
        rows, device = [batch.rows for batch in batches], torch.device(chosen.device)
        write_rows(next(tables), documents, rows, map(computed, batches), device=device)

    actions = {
        "reference": lambda: [frozen_pass(model, batch) for batch in batches],
        "lean_reference": lambda: [lean_pass(model, batch) for batch in batches],
        "rows": lambda: [computed(batch) for batch in batches],
        "rows_and_store": stored,
    }
    try:
        spent = in_turns(actions, rounds=chosen.rounds, device=chosen.device)
    finally:
        shutil.rmtree(folder)
    num_tokens = int(documents.lengths.sum())
    measured = {name: speed(times, spent["reference"], num_tokens=num_tokens) for name, times in spent.items()}
    lean = speed(spent["rows"], spent["lean_reference"], num_tokens=num_tokens)
    measured["rows"]["ratio_to_lean_reference"] = lean["ratio"]
    print(json.dumps({"claim": "logging_keeps_up", **facts(chosen, documents), "largest_error": error, **measured}))


def check(model, layers, documents, projections) -> float:
    """The largest difference of a row from the projection of autograd's gradient, as a share of the row's norm."""
    modules = linear_modules(model)
    device = next(model.parameters()).device
    batch = documents.batch(range(3)).to(device)
    rows, _losses = gradient_rows(model, layers, batch, task=CausalLM(), projections=projections)
    errors = []
    for place in range(3):
        alone = documents.batch([place]).to(device)
        model.zero_grad()
        log_p = model(input_ids=alone.tokens, use_cache=False).logits[:, :-1].log_softmax(dim=2)
        (-(log_p.gather(2, alone.tokens[:, 1:, None])[..., 0] * alone.loss_mask)).sum().backward()
        expected = torch.cat([
            projections[layer.name]
            .apply(layer_matrix(module, module.weight.grad, None if module.bias is None else module.bias.grad))
            .flatten()
            for layer, module in ((layer, modules[layer.name]) for layer in layers)
        ])
        errors.append(float((rows[place] - expected).norm() / expected.norm()))
    model.zero_grad()
    assert max(errors) < 1e-4, f"rows differ from autograd's by {max(errors)} of their norm"  # float32: 1e-6 to 1e-5 is usual
    return max(errors)


if __name__ == "__main__":
    main(sys.argv[1:])
