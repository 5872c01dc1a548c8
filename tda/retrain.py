"""Retraining on all, on curated and on randomly reduced data, paired by seed.

The three models of a seed have the same initial weights and the same number of steps, and see the documents that they share in
the same order.
"""

import json
from pathlib import Path

import numpy as np
import polars as pl
from torch import nn

from tda.adapters import adapter_in
from tda.artifacts import Workspace, read_json, read_table, remove, write_json
from tda.config import Config, Train
from tda.data import Documents, load_documents
from tda.model import freeze
from tda.parallel import device_of, num_workers, parallel_map
from tda.run import initial_model, tokenizer_size
from tda.train import make_optimizer, mean_loss, schedule, stage_lengths, train

ARMS = ("all", "curated", "random")
COLUMNS = ("arm", "seed", "steps", "num_documents", "train_loss", "target_loss", "general_loss")


def arm_weights(arm: str, weights: np.ndarray, *, seed: int) -> np.ndarray:
    """Every document's weight in an arm; 0 drops it. The random control has the curated arm's weights, permuted by `seed`."""
    if arm == "all":
        return np.ones_like(weights)
    return weights if arm == "curated" else np.random.default_rng([seed, len(weights)]).permutation(weights)


def retrain_arms(config: Config, workspace: Workspace) -> pl.DataFrame:
    """A row per retrained model. Finished models of a run that was killed are not trained again.

    A decision on other documents is a ValueError.
    """
    recipe, training = config.train, read_json(workspace.training, stage="train")
    documents = load_documents(workspace.documents)
    weights = _decided_weights(workspace, documents)
    targets = load_documents(workspace.targets, half="verdict")
    heldout = load_documents(workspace.heldout)
    vocabulary, device = tokenizer_size(workspace), device_of(config.compute)
    adapter = adapter_in(workspace.checkpoint(0) / "model")
    if adapter is not None and adapter_in(recipe.model) is not None:
        adapter = None  # training starts from the adapter of train.model, not from a new one
    depends_on = [recipe.model_dump_json(), json.dumps(training), weights.tobytes().hex(), targets.digest(), heldout.digest()]
    work = workspace.work / "retraining" / documents.digest(*depends_on)

    def one(run: tuple[int, str]) -> Path:
        seed, arm = run
        path = work / f"{arm}-{seed}.json"
        if not path.exists():
            held = arm_weights(arm, weights, seed=seed)
            model = initial_model(recipe, vocabulary=vocabulary, context=config.prepare.context, seed=seed, adapter=adapter)
            model = freeze(model.to(device), training.get("frozen", []))
            losses = _train_on(documents, model, recipe, weights=held, seed=seed)
            values = {
                "arm": arm,
                "seed": seed,
                "steps": len(losses),
                "num_documents": int((held > 0).sum()),
                "train_loss": float(np.mean(losses[-20:])),
                "target_loss": mean_loss(model, targets),
                "general_loss": mean_loss(model, heldout),
            }
            write_json(path, values)
        return path

    runs = [(seed, arm) for seed in config.retraining.seeds for arm in ARMS]
    paths = list(parallel_map(one, runs, workers=num_workers(config.compute), description="retraining", unit="model"))
    table = pl.DataFrame([read_json(path, stage="retraining") for path in paths]).select(COLUMNS).sort("seed", "arm")
    remove(work)
    return table


def _decided_weights(workspace: Workspace, documents: Documents) -> np.ndarray:
    """Every document's weight by the decision; 0 of a dropped one.

    Raises:
        ValueError: the decision is on other documents.
    """
    decided = read_table(workspace.manifest, stage="curation").select("doc_id", "content_hash", "keep", "weight")
    known = pl.DataFrame({"doc_id": documents.ids, "content_hash": documents.content_hashes})
    decided = known.join(decided, on=["doc_id", "content_hash"], how="left", maintain_order="left")
    if decided["keep"].null_count():
        raise ValueError(f"{workspace.manifest} decides on other documents than {workspace.documents}; run `dvc repro curation`")
    return np.where(decided["keep"].to_numpy(), decided["weight"].to_numpy(), 0.0)


def _train_on(documents: Documents, model: nn.Module, recipe: Train, *, weights: np.ndarray, seed: int) -> list[float]:
    """Train `model` in place on the documents of positive weight; the loss of every step."""
    steps = schedule(documents, recipe, seed=seed, lengths=stage_lengths(documents, recipe), keep=weights > 0)
    losses: list[float] = []
    train(
        model,
        documents,
        steps,
        recipe,
        optimizer=make_optimizer(model, recipe),
        weights=weights,
        seed=seed,
        after=lambda result: losses.append(result.loss),
    )
    return losses
