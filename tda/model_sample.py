"""As much of a planned model as can be run in the time of a calibration: all of it, or some of its blocks.

It has random weights: of the model that `train.model` names, only the configuration is read.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tda import costs
from tda.adapters import adapter_in, attach, lora
from tda.adopt import find_checkpoints
from tda.capture import captured
from tda.config import Config, Train
from tda.costs import Decoder, load_of
from tda.data import Batch, Documents, batch_plan
from tda.losses import document_losses
from tda.model import build_model, num_parameters, num_trained_parameters
from tda.usage import free_memory

if TYPE_CHECKING:
    from peft import PeftConfig

SECONDS = 0.4  # for which one kind of pass is timed
PROBE = 1e9  # operations of the matrix product that shows how large a part of the model can be run
LEAST_TOKENS = 256  # in a batch: fewer do not keep a processor busy
TRAINING_BYTES = 16  # per parameter: weight, gradient and two moments
CUT_VOCABULARY = 4096  # tokens that a sample of a large model knows


@dataclass(frozen=True)
class Sample:
    """The model or a part of it, for calibration."""

    model: nn.Module
    shapes: Decoder
    whole: Decoder  # the model that is planned for
    kept: dict[str, float]  # bytes per token that are kept for the backward pass: `training`, `frozen`
    batch_tokens: int
    documents: Documents  # the corpus, in tokens that the sample knows


def sample_model(config: Config, *, vocabulary: int, blocks: int = 0) -> tuple[nn.Module, Decoder]:
    """The model of `train.model` with random weights and no more than some blocks (0: all); and the shapes of all of it.

    Of a model that is large for this machine's memory the vocabulary is cut too. A folder or hub id is asked for its
    configuration alone; where there is none, FileNotFoundError.
    """
    if config.train.model == "llama":
        shape = config.train.architecture
        number, size = shape.num_layers, vocabulary

        def made(number: int, size: int) -> nn.Module:
            some = shape.model_copy(update={"num_layers": number})
            return build_model(some, vocabulary=size, context=config.prepare.context, seed=0)

    else:
        from transformers import AutoModelForCausalLM

        about = _configuration(config.train.model)
        number, size = about.get_text_config().num_hidden_layers, about.get_text_config().vocab_size

        adapter = _adapter(config.train)

        def made(number: int, size: int) -> nn.Module:
            own = copy.deepcopy(about)  # a model keeps the configuration that it was made by
            own.get_text_config().num_hidden_layers, own.get_text_config().vocab_size = number, size
            try:
                model = AutoModelForCausalLM.from_config(own, dtype=torch.float32).eval()
                return model if adapter is None else attach(model, adapter, seed=0)
            except ValueError as error:
                if "Unrecognized configuration class" not in str(error):
                    raise
                raise ValueError(  # Transformers' own words list all that it knows
                    f"train.model: {config.train.model} is a {own.model_type} model; expected llama, or a folder or hub id of a "
                    "causal language model"
                ) from error

    with torch.device("meta"):
        whole = made(number, size)
    parameters, trained = num_parameters(whole), num_trained_parameters(whole)
    cut = min(size, CUT_VOCABULARY) if parameters * TRAINING_BYTES > free_memory() / 4 else size
    model = made(min(blocks or number, number), cut)
    shapes = costs.shapes_of(model)
    if blocks and blocks < number:
        one = shapes if blocks == 1 else costs.shapes_of(made(1, cut))
        shapes = costs.with_blocks(one, number)
    shapes = costs.with_vocabulary(shapes, size)
    return model, replace(shapes, parameters=parameters, frozen_parameters=parameters - trained)


def _adapter(recipe: Train) -> "PeftConfig | None":
    """The adapter that is trained: of the run that is taken over, or as `train.lora` has it."""
    if recipe.run:
        return adapter_in(find_checkpoints(Path(recipe.run))[0][1])
    return lora(recipe.lora, base=recipe.model)


def _configuration(name: str) -> Any:
    """The configuration of the model in a folder or under a hub id."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"train.model: no configuration in {name}: {str(error).splitlines()[0]}; expected llama, or a folder or hub id with "
            "the config.json of a causal language model"
        ) from error


def matrix_rate(shapes: Decoder) -> float:
    """Operations a second of a matrix product in the model's most frequent shape."""
    layer = max(shapes.tracked, key=lambda layer: layer.d_in * layer.d_out)
    rows = max(16, int(PROBE / (2 * layer.d_in * layer.d_out)))
    a, W = torch.randn(min(rows, 4096), layer.d_in), torch.randn(layer.d_in, layer.d_out)
    seconds = min(processor_seconds(lambda: a @ W) for _ in range(3))
    return 2 * a.shape[0] * layer.d_in * layer.d_out / seconds


def sample_of(config: Config, documents: Documents, *, vocabulary: int) -> Sample:
    """As many blocks of the model, and tokens in a batch, as can be run in the time of a calibration."""
    torch.set_num_threads(1)
    _model, whole = sample_model(config, vocabulary=vocabulary, blocks=1)
    rate = matrix_rate(whole)
    plan = batch_plan(documents.lengths, batch_tokens=config.gradients.batch_tokens)
    one = load_of(plan[:1], documents.lengths, documents.num_loss_tokens)
    affordable = rate * SECONDS
    tokens = max(LEAST_TOKENS, int(one.tokens * min(1.0, affordable / costs.training_step(whole, one))))
    short = load_of(
        batch_plan(documents.lengths, batch_tokens=min(tokens, config.gradients.batch_tokens))[:1],
        documents.lengths,
        documents.num_loss_tokens,
    )
    all_blocks = len(whole.attention)
    each = costs.training_step(whole, short) / all_blocks
    blocks = int(min(all_blocks, max(1, affordable / each)))
    model, whole = sample_model(config, vocabulary=vocabulary, blocks=blocks)
    shapes = costs.shapes_of(model)
    documents = replace(documents, tokens=[row % shapes.head[1] for row in documents.tokens])
    batch = documents.batch(batch_plan(documents.lengths, batch_tokens=LEAST_TOKENS)[0])
    scale = (whole.body + whole.head[0]) / (shapes.body + shapes.head[0])
    kept = {name: scale * value / batch.tokens.numel() for name, value in _kept_bytes(model, shapes, batch).items()}
    return Sample(model, shapes, whole, kept, min(tokens, config.gradients.batch_tokens), documents)


def _kept_bytes(model: nn.Module, shapes: Decoder, batch: Batch) -> dict[str, int]:
    """Bytes that a backward pass keeps of a forward pass, parameters not counted: when training, and with frozen weights."""
    held: dict[int, int] = {}
    head = model.get_output_embeddings().weight
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.shape != head.shape:  # the head's gradient is one of the weights'
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        document_losses(model, batch)
    training = sum(held.values())
    held.clear()
    inputs: list[int] = []
    layers = list(shapes.tracked)
    with (
        captured(model, layers, encode=lambda _layer, a: inputs.append(a.nbytes), consume=lambda *_: None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        document_losses(model, batch)
    return {"training": training, "frozen": sum(held.values()) + sum(inputs)}


def processor_seconds(action: Callable[[], object]) -> float:
    """The processor time that `action` takes in this process."""
    start = time.process_time()
    action()
    return time.process_time() - start
