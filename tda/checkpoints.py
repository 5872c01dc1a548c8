"""Reading the checkpoints of the pipeline's run, with checks that they belong to it and that documents fit the model."""

import functools
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tda.artifacts import MEAN_FILE, Workspace, damaged, existing, read_json
from tda.config import Train
from tda.data import Documents
from tda.model import Layer, freeze, layer_matrix, linear_modules, load_model, num_parameters, num_trained_parameters
from tda.preconditioner import adam_preconditioner

HASH_BLOCK = 1 << 24  # bytes
MODEL_FILES = ("config.json", "adapter_config.json", "*.safetensors", "*.bin")
AHEAD = 1e-4  # relative change of the logits: float32 rounding changes them less, attention to later tokens more


def architecture_digest(model: nn.Module) -> str:
    """A digest of every parameter's name and shape."""
    shapes = sorted((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    return xxhash.xxh3_128_hexdigest(repr(shapes).encode())


def weights_digest(folder: Path) -> str:
    """A digest of the weights at which the checkpoint in `folder` is attributed."""
    mean = folder / MEAN_FILE
    return _digest([mean] if mean.exists() else sorted((folder / "model").glob("*.safetensors")))


def start_facts(model: str) -> dict[str, str]:
    """What `train.json` says of the weights in the folder `train.model`; empty if that is no folder.

    Later stages depend on them too: an adapter's checkpoints are put on them, and retraining starts from them.
    """
    files = sorted(path for kind in MODEL_FILES for path in Path(model).glob(kind))
    return {"start_digest": _digest(files)} if files else {}


def run_facts(
    recipe: Train,
    model: nn.Module,
    documents: Documents,
    *,
    checkpoint_steps: list[int],
    stage_ends: list[int],
    stage_parts: list[str],
    optimizer: dict[str, Any],
) -> dict[str, Any]:
    """What `train.json` says of every run, trained here or adopted; `optimizer` has the settings that are not the recipe's."""
    settings = {
        "optimizer": recipe.optimizer,
        "momentum": recipe.momentum if recipe.optimizer == "sgd" else 0.0,
        "beta2": recipe.beta2,
        "epsilon": recipe.epsilon,
        "weight_decay": recipe.weight_decay,
    }
    return {
        "architecture_digest": architecture_digest(model),
        "num_parameters": num_parameters(model),
        "num_trained_parameters": num_trained_parameters(model),
        "num_documents": len(documents),
        "num_tokens": int(documents.lengths.sum()),
        "num_steps": checkpoint_steps[-1],
        "checkpoint_steps": checkpoint_steps,
        "stage_ends": stage_ends,
        "stage_parts": stage_parts,
        **{key: optimizer.get(key, value) for key, value in settings.items()},
    }


def _digest(paths: list[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def check_fits(model: nn.Module, documents: Documents, *, origin: str) -> None:
    """Refuse documents that do not fit the model (which is at `origin`), and a model that is not causal.

    Raises:
        ValueError: documents were tokenised for another model or are too long, or predictions depend on later tokens.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    largest = max(int(row.max()) for row in documents.tokens)
    if largest >= vocabulary:
        raise ValueError(
            f"{origin}: the model knows {vocabulary} tokens, the documents have the token {largest}; expected documents in this "
            "model's tokens; set prepare.tokenizer to its tokenizer's folder (empty: the one beside train.model)"
        )
    room = getattr(model.config, "max_position_embeddings", None)
    longest = int(documents.lengths.max())
    if room is not None and longest > room:
        raise ValueError(
            f"{origin}: the model has room for {room} tokens, the longest document has {longest}; set prepare.context to {room} "
            "or fewer"
        )
    if sees_ahead(model):
        raise ValueError(
            f"{origin}: the first prediction of {type(model).__name__} changes with the tokens after it; expected a causal "
            "language model, not one that reads both ways, as BERT does unless its config.json says is_decoder"
        )


@torch.no_grad()
def sees_ahead(model: nn.Module) -> bool:
    """Whether the logits at the first of a few tokens depend on the last one."""
    device = next(model.parameters()).device
    tokens = (torch.tensor([[0, 1, last]]).to(device) for last in (2, 3))
    first, other = (model(input_ids=one, use_cache=False).logits[0, 0].float() for one in tokens)
    return bool((first - other).norm() > AHEAD * first.norm())


def load_checkpoint(workspace: Workspace, index: int, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model at a checkpoint, with its mean weights if it has any. A missing or truncated one is a FileNotFoundError.

    Raises:
        ValueError: its architecture is not the run's.
    """
    training = read_json(workspace.training, stage="train")
    expected = training["architecture_digest"]
    folder = existing(workspace.checkpoint(index) / "model", stage="train")
    model = load_model(folder, dtype=dtype)
    if architecture_digest(model) != expected:
        raise ValueError(
            f"{folder}: a checkpoint of another architecture than the run in {workspace.training}; expected parameters with "
            f"digest {expected}, got {architecture_digest(model)}; restore it with `dvc checkout --force data/train`, or run "
            "`dvc repro --single-item --force train`"
        )
    mean = folder.parent / MEAN_FILE
    if mean.exists():
        try:
            model.load_state_dict(load_file(mean), strict=False)  # tied weights are in it only once
        except SafetensorError as error:
            raise FileNotFoundError(damaged(mean, error, stage="train")) from error
    return freeze(model, training.get("frozen", []))


def second_moments(workspace: Workspace, index: int) -> dict[str, Tensor]:
    """AdamW's second moments at a checkpoint, by parameter name. A missing optimizer state is a FileNotFoundError."""
    kind = "exp_avg_sq."
    return {name.removeprefix(kind): v for name, v in optimizer_state(workspace, index).items() if name.startswith(kind)}


def optimizer_state(workspace: Workspace, index: int) -> dict[str, Tensor]:
    """The optimizer's tensors at a checkpoint, as `train.optimizer_state` names them.

    Raises:
        FileNotFoundError: there are none; the message says what that costs and what accepts it.
        ValueError: the file is damaged.
    """
    path = workspace.checkpoint(index) / "optimizer.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the run used AdamW, whose second moments SOURCE needs to know how far a gradient moves a "
            "weight. Save the optimizer state with every checkpoint (a Hugging Face Trainer does unless save_only_model is "
            "set), or set curvature.adam to none: scores are then those of an SGD run and rank documents far worse (on an "
            "AdamW-trained classifier the rank correlation with real retraining fell from .44 to .17)"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(damaged(path, error, stage="train")) from error


def preconditioner(
    workspace: Workspace, checkpoints: list[int], layers: list[Layer], *, beta2: float, epsilon: float
) -> dict[str, Tensor]:
    """AdamW's P by layer, (d_out, d_in), averaged over checkpoints. A missing optimizer state is a FileNotFoundError."""
    modules = linear_modules(load_checkpoint(workspace, checkpoints[-1]))
    sums: dict[str, Tensor] = {}
    for index in checkpoints:
        P_of = functools.partial(_parameter_preconditioner, optimizer_state(workspace, index), beta2=beta2, epsilon=epsilon)
        for layer in layers:
            bias = P_of(f"{layer.name}.bias") if layer.bias else None
            P = layer_matrix(modules[layer.name], P_of(f"{layer.name}.weight"), bias)
            sums[layer.name] = sums.get(layer.name, torch.zeros(())) + P / len(checkpoints)
    return sums


def _parameter_preconditioner(state: dict[str, Tensor], name: str, *, beta2: float, epsilon: float) -> Tensor:
    v, step = state[f"exp_avg_sq.{name}"].float(), int(state[f"step.{name}"])
    return adam_preconditioner(v, step=step, beta2=beta2, epsilon=epsilon)
