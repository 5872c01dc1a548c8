"""Tiny models and documents that the tests share, and slow obvious twins."""

import numpy as np
import torch
from torch import Tensor, nn

from tda.config import Architecture
from tda.data import Documents
from tda.model import Layer, build_model, layer_matrix

VOCABULARY = 11
CONTEXT = 12


def tiny_llama(seed: int = 0, *, tie: bool = True) -> nn.Module:
    shape = Architecture(
        hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_key_value_heads=1, tie_embeddings=tie
    )
    model = build_model(shape, vocabulary=VOCABULARY, context=CONTEXT, seed=seed).double()
    return sharpen(model)


def tiny_gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=8, n_layer=2, n_head=2, use_cache=False)
    return sharpen(GPT2LMHeadModel(config).eval().double())


def tiny_opt(seed: int = 0) -> nn.Module:
    """A model whose feed-forward layers see examples and positions flattened."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=8,
        word_embed_proj_dim=8,
        ffn_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
    )
    return sharpen(OPTForCausalLM(config).eval().double())


def sharpen(model: nn.Module) -> nn.Module:
    """Weights ten times as large, so that the predictions, and with them gradients and curvature, are far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(10)
    return model


def random_documents(num_documents: int = 5, *, seed: int = 0, loss_starts: list[int] | None = None) -> Documents:
    """Documents of uneven lengths."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, CONTEXT + 1, size=num_documents)
    return Documents(
        ids=[f"doc-{number}" for number in range(num_documents)],
        sources=["a" if number % 2 else "b" for number in range(num_documents)],
        parts=["general" if number % 3 == 0 else "mixed" for number in range(num_documents)],
        content_hashes=[f"hash-{number}" for number in range(num_documents)],
        tokens=[random.integers(0, VOCABULARY, size=length).astype(np.int32) for length in lengths],
        loss_starts=np.array(loss_starts or [1] * num_documents),
    )


def document_loss(model: nn.Module, documents: Documents, row: int) -> Tensor:
    """Summed token loss of one document, straight from the model."""
    tokens = torch.from_numpy(documents.tokens[row].astype(np.int64))[None]
    log_p = model(input_ids=tokens).logits[0, :-1].log_softmax(dim=1)
    losses = -log_p[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]]
    return losses[documents.loss_starts[row] - 1 :].sum()


def dense_gradient(model: nn.Module, layers: list[Layer], loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` by autograd, as (d_out, d_in) matrices; the graph is kept for a next call."""
    gradients = {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        held = [module.weight, module.bias] if layer.bias else [module.weight]
        weight, *bias = torch.autograd.grad(loss, held, retain_graph=True)
        gradients[layer.name] = layer_matrix(module, weight, bias[0] if bias else None)
    return gradients


def dense_fisher(model: nn.Module, layers: list[Layer], documents: Documents, *, weight: float) -> dict[str, Tensor]:
    """The Gauss-Newton matrix of `weight` times the summed token loss, mean over documents, by layer, summed over every label.

    (d_out d_in, d_out d_in), in the order of a flattened (d_out, d_in) gradient.
    """
    fisher: dict[str, Tensor] = {}
    for row in range(len(documents)):
        tokens = torch.from_numpy(documents.tokens[row].astype(np.int64))[None]
        log_p = model(input_ids=tokens).logits[0, :-1].log_softmax(dim=1)
        for token in range(int(documents.loss_starts[row]) - 1, log_p.shape[0]):
            for label in range(VOCABULARY):
                for name, G in dense_gradient(model, layers, log_p[token, label]).items():
                    g = G.flatten()
                    term = log_p[token, label].exp().detach() * torch.outer(g, g)
                    fisher[name] = fisher.get(name, 0) + weight * term / len(documents)
    return fisher


def with_adapter(model: nn.Module, **settings: object) -> nn.Module:
    """The model with an adapter by PEFT, as its users make one; its B is not zero."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.eval()
