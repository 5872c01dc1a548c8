"""Low-rank adapters (LoRA, Hu et al. 2022, arXiv 2106.09685) by the `peft` library.

Two thin matrices beside each layer are trained, and the weights of the loaded model, the base, stay as they are. A checkpoint's
folder then holds only the adapter; its `adapter_config.json` says where the base is.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tda.artifacts import read_json, write_json
from tda.config import Lora

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG_FILE = "adapter_config.json"


def adapter_in(folder: str | Path) -> "PeftConfig | None":
    """The configuration of the adapter in `folder` (or under a hub id); None if there is a whole model.

    Raises:
        ValueError: it is not one that PEFT knows.
    """
    from transformers.utils import find_adapter_config_file

    try:
        if find_adapter_config_file(str(folder)) is None:
            return None
    except OSError:  # there is no such folder, which whoever loads the model can say better
        return None
    from peft import PeftConfig

    try:
        adapter = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(folder, CONFIG_FILE)}: no adapter that PEFT knows: {error}; expected the file that `save_pretrained` leaves"
        ) from error
    if getattr(adapter, "use_dora", False):
        raise ValueError(
            f"{Path(folder, CONFIG_FILE)}: an adapter with use_dora, whose magnitudes are not followed; expected LoRA without "
            "them; or merge the adapter into its model (`merge_and_unload`) and take that"
        )
    return adapter


def lora(settings: Lora, *, base: str) -> "PeftConfig | None":
    """The adapter that `train.lora` asks for, on the model at `base` (a folder or hub id); None if it asks for none.

    Raises:
        ValueError: there is an adapter already.
    """
    from peft import LoraConfig, TaskType

    if not settings.rank:
        return None
    if adapter_in(base) is not None:
        raise ValueError(f"train.lora.rank: {base} is an adapter already, and is trained on; expected rank 0, or its base")
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.layers,
    )


def attach(model: nn.Module, adapter: "PeftConfig", *, seed: int) -> nn.Module:
    """The model with a new adapter, the only part that is trained; equal seeds give equal adapters.

    Raises:
        ValueError: the adapter names no layer of this model, or layers that can have none.
    """
    torch.manual_seed(seed)
    adapter.inference_mode = False
    try:
        model.add_adapter(adapter)
    except (ValueError, re.error) as error:
        raise ValueError(f"train.lora: {error}; expected names of linear layers of train.model, or all-linear") from error
    return model.eval()


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """The base `model` with the adapter in `folder`, the only part that is trained.

    Raises:
        FileNotFoundError: its weights are truncated, or do not fit the model.
    """
    from safetensors import SafetensorError

    shared = _shared_names(model)
    try:
        report = model.load_adapter(str(folder), is_trainable=True, ignore_mismatched_sizes=True)
    except (OSError, SafetensorError, EOFError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"{folder}: adapter_model.safetensors cannot be read: {str(error).splitlines()[0]}; expected a whole adapter as "
            "`save_pretrained` leaves it; if it was cut short, remove it and run the stage that makes it again"
        ) from error
    if report.missing_keys or report.mismatched_keys:
        raise FileNotFoundError(
            f"{folder}: the adapter does not fit the model that it is put on: missing {sorted(report.missing_keys)[:3]}, of "
            f"another shape {sorted(report.mismatched_keys)[:3]}; expected an adapter of this model (train.model is the base)"
        )
    _restore_base(model, shared)
    return model.eval()


def _shared_names(model: nn.Module) -> list[list[str]]:
    """Groups of names that share one parameter, such as a head that is tied to the embedding."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _restore_base(model: nn.Module, shared: list[list[str]]) -> None:
    """Freeze and tie the base again: PEFT saves a head or embedding along with its adapter, and loads it untied and trained."""
    inner = {name.replace(".base_layer.", "."): name for name, _ in model.named_parameters(remove_duplicate=False)}
    for first, *others in shared:
        for other in others:
            owner, _, kind = inner[other].rpartition(".")
            setattr(model.get_submodule(owner), kind, model.get_parameter(inner[first]))
    for name, parameter in model.named_parameters():
        if ".base_layer." in name:
            parameter.requires_grad_(False)


def normalise_config(folder: Path, *, base: str = "") -> None:
    """Rewrite the adapter's configuration in `folder`, if any: the same bytes in every process, and the base at `base`."""
    path = folder / CONFIG_FILE
    if path.is_file():
        held = read_json(path, stage="train")
        layers = held.get("target_modules")  # PEFT writes a set, in any order
        held["target_modules"] = sorted(layers) if isinstance(layers, list) else layers
        write_json(path, held | ({"base_model_name_or_path": base} if base else {}))
