"""Models: building and loading language models, and finding the linear layers of any model, each seen as one matrix."""

import copy
import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from tda.adapters import adapter_in, load_adapter
from tda.config import Architecture

PROBE_TOKENS = 4  # any few tokens show which layers share an input
WORTH_SAYING = 0.9  # a share of the trained weights: users are told if methods follow fewer
EVERY_LAYER = ".*"  # the pattern that matches all layers


@dataclass(frozen=True)
class Layer:
    """A tracked linear layer, seen as a matrix (d_out, d_in) whose last column is the bias, if there is one."""

    name: str
    d_in: int  # the layer's inputs, plus one if there is a bias
    d_out: int
    bias: bool  # whether it is tracked: it is trained, if the weight is
    group: str  # the name of the first layer that reads the same input as this one


def build_model(architecture: Architecture, *, vocabulary: int, context: int, seed: int) -> nn.Module:
    """A Llama of the given shape with random weights, in eval mode; equal seeds give equal weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_key_value_heads,
        max_position_embeddings=context,
        tie_word_embeddings=architecture.tie_embeddings,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def load_model(name: str | Path, *, base: str = "", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model in a folder or under a hub id, in eval mode.

    An adapter is loaded onto the model that it was trained on, at `base` or where the adapter's file says; only the adapter is
    not frozen.

    Raises:
        FileNotFoundError: there is no such folder, or its weights are missing or truncated.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    adapter = adapter_in(name)
    if adapter is not None:
        base = base or adapter.base_model_name_or_path or ""
        if not base:
            raise FileNotFoundError(
                f"{name}: the adapter's file does not say which model it was trained on; expected base_model_name_or_path there"
            )
        return cast_weights(load_adapter(load_model(base, dtype=dtype), name), dtype)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError, EOFError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: no causal language model could be loaded: {str(error).splitlines()[0]}; expected a folder with "
            "config.json and whole weights, or a hub id that can be reached; if a checkpoint was cut short, remove it and run "
            "the stage that makes it again"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise FileNotFoundError(
            f"{name}: the weights do not fit the model: missing {missing[:3]}, of another shape "
            f"{list(report['mismatched_keys'])[:3]}; expected a checkpoint of the architecture that its config.json names"
        )
    return model.eval()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters in `dtype`. Buffers stay: rotary frequencies in bfloat16 turn far tokens by other angles."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every `Linear`, transformers' `Conv1D` and plain `Conv2d` by name whose weight is a parameter of its own.

    Left out are weights shared with an embedding, and weights computed from other parameters (`weight_norm`).
    """
    from transformers.pytorch_utils import Conv1D

    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv2d))
        and isinstance(module.weight, nn.Parameter)
        and id(module.weight) not in embeddings
        and _is_a_matrix(module)
    }


def _is_a_matrix(module: nn.Module) -> bool:
    """Whether the layer applies one matrix at every position; a grouped convolution does not."""
    return not isinstance(module, nn.Conv2d) or (
        module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    )


def run_few_tokens(model: nn.Module) -> None:
    """Run a causal language model on a few tokens."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
    # On the meta device transformers cannot make a mask; any will do.
    mask = {"attention_mask": torch.zeros(1, 1, PROBE_TOKENS, PROBE_TOKENS, device=device)} if tokens.is_meta else {}
    model(input_ids=tokens, use_cache=False, **mask)


def tracked_layers(
    model: nn.Module,
    pattern: str = EVERY_LAYER,
    *,
    probe: Callable[[nn.Module], object] = run_few_tokens,
    frozen_too: bool = False,
) -> list[Layer]:
    """The linear layers whose whole name matches `pattern` (a regular expression), in the order of use.

    Layers with a frozen weight are left out, unless the whole model is frozen or `frozen_too` is set. `probe` runs the model on
    any input, which shows which layers are used, and which of them read the same input (a group).

    Raises:
        ValueError: no layer matches, or a layer is used more than once, so that its gradient is not one outer product per
            position.
    """
    chosen = _matching_modules(model, pattern, frozen_too=frozen_too)
    calls = _calls(model, chosen, probe)
    repeated = {name for name, count in Counter(name for name, _ in calls).items() if count > 1}
    repeated |= _shared_weights(chosen)
    if repeated:
        raise ValueError(
            f"layers: {', '.join(sorted(repeated))} used more than once in a forward pass; expected layers with a weight and one "
            "use of their own; leave them out by the pattern of layers (curvature.layers in params.yaml, for `attribute`: layers)"
        )
    if not calls:
        raise ValueError(
            f"layers: the model calls none of {', '.join(list(chosen)[:4])}; expected layers that it calls; a weight that is "
            "only used in functions, such as F.linear, is not followed"
        )
    layers: list[Layer] = []
    leaders: dict[tuple, str] = {}
    for name, inputs in calls:
        module = chosen[name]
        bias = _follows_bias(module)
        d_in, d_out = weight_shape(module)
        group = leaders.setdefault((id(inputs), *input_view(module)), name)
        layers.append(Layer(name, d_in + bias, d_out, bias, group))
    return layers


def _matching_modules(model: nn.Module, pattern: str, *, frozen_too: bool) -> dict[str, nn.Module]:
    """The linear layers by name that `tracked_layers` follows if they are used; none is a ValueError."""
    modules = linear_modules(model)
    if not frozen_too and any(parameter.requires_grad for parameter in model.parameters()):
        modules = {name: module for name, module in modules.items() if module.weight.requires_grad}
    if not modules:
        raise ValueError(
            "layers: the model trains no linear layer of its own (Linear, transformers' Conv1D, or plain Conv2d); expected one "
            "that is not frozen and shares no weight with an embedding"
        )
    try:
        chosen = {name: module for name, module in modules.items() if re.fullmatch(pattern, name)}
    except re.error as error:
        raise ValueError(f"layers: {pattern!r} is no regular expression: {error}; expected one of layers' names") from error
    if not chosen:
        names = ", ".join(list(modules)[:8]) + (", ..." if len(modules) > 8 else "")
        raise ValueError(
            f"layers: {pattern!r} (curvature.layers in params.yaml) matches none of the linear layers that are trained, which "
            f"are {names}"
        )
    return chosen


def _calls(model: nn.Module, modules: dict[str, nn.Module], probe: Callable[[nn.Module], object]) -> list[tuple[str, Tensor]]:
    """Every call of one of the modules while `probe` runs the model, in order: the module's name, and its input."""
    plain_head(model)  # probes a model it has not seen: before there are hooks
    calls: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(
            lambda _module, args, named, _output, name=name: calls.append((name, input_of(args, named))), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            probe(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def embedding_layers(model: nn.Module, pattern: str = EVERY_LAYER) -> list[Layer]:
    """The matrices (token, d) of plain trained embeddings whose whole name matches `pattern`, each a group of its own.

    A head that shares the weight belongs to it. The name is that of the first module with the weight, as in `named_parameters`.
    """
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            first.setdefault(id(module.weight), name)
    weights = {
        first[id(module.weight)]: module.weight
        for module in model.modules()
        if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq
    }
    return [
        Layer(name, weight.shape[1], weight.shape[0], False, name)
        for name, weight in weights.items()
        if isinstance(weight, nn.Parameter) and weight.requires_grad and re.fullmatch(pattern, name)
    ]


def modules_by_weight(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Linear layers and embeddings by the id of their weight, which several may share."""
    held: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")  # not `module.weight`, which may be computed
        if isinstance(module, (nn.Linear, nn.Embedding)) and weight is not None:
            held.setdefault(id(weight), []).append(module)
    return held


def one_hot(embedding: nn.Embedding, tokens: Tensor, *, like: Tensor) -> Tensor:
    """Which row of the weight was looked up, (*tokens, row), without those of padding, which are not trained."""
    rows = like.new_zeros(*tokens.shape, embedding.num_embeddings).scatter_(-1, tokens[..., None], 1)
    if embedding.padding_idx is not None:
        rows[..., embedding.padding_idx] = 0
    return rows


def what_is_left_out(model: nn.Module, layers: Sequence[Layer]) -> str:
    """A sentence on which trained weights `layers` lack, if they hold less than `WORTH_SAYING` of them; else empty.

    Embeddings, and vectors such as norms and biases, do not count: they are left out by all methods, but for embeddings, which
    averaged influence follows.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    every = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1 and id(weight) not in embeddings}
    trained = {name: weight for name, weight in every.items() if weight.requires_grad} or every
    tracked = {parameter_name(layer.name, "weight") for layer in layers}
    others = [name for name in trained if name not in tracked]
    share = 1 - sum(trained[name].numel() for name in others) / max(1, sum(weight.numel() for weight in trained.values()))
    if share >= WORTH_SAYING:
        return ""
    return (
        f"scores follow {share:.0%} of the trained weights (embeddings and vectors not counted); left out are those of no "
        f"Linear, Conv1D or plain Conv2d, or that do not run: {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}"
    )


def _shared_weights(modules: dict[str, nn.Module]) -> set[str]:
    uses = Counter(id(module.weight) for module in modules.values())
    return {name for name, module in modules.items() if uses[id(module.weight)] > 1}


_has_plain_head: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The head, if the logits are simply its output on the last hidden states; else None.

    A head with a bias, or logits that are scaled or capped, are not plain. A model that is seen for the first time is probed
    with a few tokens.
    """
    if model not in _has_plain_head:
        _has_plain_head[model] = _probe_head(model)
    head = model.get_output_embeddings() if _has_plain_head[model] else None
    return head if isinstance(head, nn.Linear) else None  # not a Linear while `row_layers` has replaced it


@torch.no_grad()
def _probe_head(model: nn.Module) -> bool:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    trunk = getattr(model, "base_model", model)
    if not isinstance(head, nn.Linear) or head.bias is not None or trunk is model:
        return False
    if head.weight.is_meta:  # there are no values to compare, as when costs are counted: assume the usual
        return True
    tokens = torch.arange(PROBE_TOKENS, device=head.weight.device)[None]
    was_training = model.training
    model.eval()
    hidden = getattr(trunk(input_ids=tokens, use_cache=False), "last_hidden_state", None)
    plain = hidden is not None and torch.equal(model(input_ids=tokens, use_cache=False).logits, head(hidden))
    model.train(was_training)
    return plain


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a layer as a matrix; the inputs of a convolution are the values of a patch."""
    d_out, d_in = layer_matrix(module, module.weight, None).shape
    return d_in, d_out


def layer_matrix(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A weight-shaped and a bias-shaped tensor as one (d_out, d_in) matrix, the bias as its last column."""
    matrix = weight.T if _stored_transposed(module) else weight.flatten(1)
    return matrix if bias is None else torch.cat([matrix, bias[:, None]], dim=1)


def parameter_name(layer: str, kind: str) -> str:
    """The model's name for the weight or bias of a layer; `layer` is empty if the model is that layer."""
    return f"{layer}.{kind}" if layer else kind


def layer_parameters(module: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
    """The inverse of `layer_matrix`: the weight, and the bias if the matrix has it, by the module's names for them."""
    inputs, _outputs = weight_shape(module)
    weight, bias = matrix[:, :inputs], matrix[:, inputs:]
    as_module = weight.T if _stored_transposed(module) else weight
    return {"weight": as_module.reshape(module.weight.shape)} | ({"bias": bias[:, 0]} if bias.shape[1] else {})


def _stored_transposed(module: nn.Module) -> bool:
    """Whether the weight is (inputs, outputs), as transformers' `Conv1D` has it."""
    return not isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))


def input_view(module: nn.Module) -> tuple:
    """How a layer views its input: layers with the same input and the same view are a group."""
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation) if isinstance(module, nn.Conv2d) else ()
    return (_follows_bias(module), *geometry)


def _follows_bias(module: nn.Module) -> bool:
    """Whether the layer's gradient has a column for its bias: not where that is frozen and the weight is trained."""
    return module.bias is not None and (module.bias.requires_grad or not module.weight.requires_grad)


def input_of(args: tuple, named: dict[str, Tensor]) -> Tensor:
    """What a layer is called on, by place or by name."""
    return args[0] if args else next(iter(named.values()))


def layer_inputs(module: nn.Module, a: Tensor, shape: Sequence[int]) -> Tensor:
    """A layer's input as (example, position, inputs): a position is a token, a patch of an image, or the whole example.

    `shape` is the shape of the model's input, examples first. Rows that cannot be assigned to examples are a ValueError.
    """
    if isinstance(module, nn.Conv2d):
        return F.unfold(a, module.kernel_size, dilation=module.dilation, padding=module.padding, stride=module.stride).mT
    return _by_example(a, shape)


def layer_outputs(module: nn.Module, Ds: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient at a layer's output as (example, position, d_out); `shape` as above."""
    if isinstance(module, nn.Conv2d):
        return Ds.flatten(2).mT
    return _by_example(Ds, shape)


def _by_example(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows as (example, position, ...): some models flatten examples with all or some of the position axes before a layer."""
    examples = shape[0]
    if rows.ndim > 2 and rows.shape[0] == examples:
        return rows.flatten(1, -2)
    if rows.ndim == 2 and rows.shape[0] in itertools.accumulate(shape, operator.mul):
        return rows.unflatten(0, (examples, rows.shape[0] // examples))
    raise ValueError(
        f"a tracked layer sees {tuple(rows.shape)} where the model's input is {tuple(shape)}: which of its rows belongs to which "
        "example is not known; expected examples first, or examples and positions flattened; leave the layer out by the pattern "
        "of layers (curvature.layers in params.yaml, for `attribute`: layers)"
    )


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, with the values of tensors that `deepcopy` refuses: kept activations, weights that are made of others."""
    kept = (value for module in model.modules() for value in tree_leaves(vars(module)) if isinstance(value, Tensor))
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in kept if not value.is_leaf})


def freeze(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """The model, with the named parameters marked as not trained."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def num_parameters(model: nn.Module) -> int:
    """Parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_trained_parameters(model: nn.Module) -> int:
    """Parameters that are not frozen, shared ones counted once."""
    return sum(parameter.numel() for parameter in trained_parameters(model).values())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def moving_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without its frozen parameters: what training changes."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}
