"""Losses and measurements of documents under a causal language model, in nats, with labels that are true or sampled.

Rows are padded on the right and attention is causal, so padding cannot affect a real token, and no attention mask is passed.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tda.model import plain_head
from tda.packing import DocumentBatch

Labels = Literal["true", "sampled"]
Measurement = Literal["loss", "margin", "log_probability"]
Backend = str | Callable  # of torch.compile

ROWS_AT_ONCE, ROWS_ON_CPU = 2048, 256  # rows of logits in a block; on a CPU, blocks with a small vocabulary stay in the cache


def document_losses(
    model: nn.Module,
    batch: DocumentBatch,
    *,
    weights: Float[Tensor, " batch"] | None = None,
    labels: Labels = "true",
    generator: torch.Generator | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " batch"]]:
    """The sum over documents of `weights` (default 1) times the loss, to be differentiated; and every document's loss.

    A document's loss is the cross-entropy of its predictions that count, summed, in nats. Sampled labels are drawn from the
    model itself: squared gradients of their loss average to the true Fisher matrix (Martens 2020, section 5), which for
    cross-entropy is the Gauss-Newton matrix. One random number is drawn per prediction, document by document. A `backend`
    compiles the elementwise work on logits of true labels.
    """
    places, targets = batch.predictions
    uniform = None
    if labels == "sampled":
        uniform = torch.rand(len(places), generator=generator, device=places.device)
    w = places.new_ones(len(places), dtype=torch.float32)
    if weights is not None:
        w = weights[batch.documents_of(places)]
    head = plain_head(model)
    if head is None or head._forward_hooks:  # a head with hooks must be called, or they would not run
        losses = logit_losses(document_logits(model, batch), targets, uniform)
        total = (w * losses).sum()
    else:
        hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
        W = head.weight if torch.is_grad_enabled() else head.weight.detach()
        total, losses = _HeadLosses.apply(hidden.flatten(0, 1).index_select(0, places), W, targets, uniform, w, backend)
    return total, batch.sums(losses.detach())


def document_logits(model: nn.Module, batch: DocumentBatch) -> Float[Tensor, "prediction vocabulary"]:
    """The logits of every prediction that counts."""
    places, _targets = batch.predictions
    return at_least_float32(model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[places])


def document_costs(
    model: nn.Module, batch: DocumentBatch, *, weights: Float[Tensor, " batch"], measurement: Measurement
) -> tuple[Float[Tensor, ""], Float[Tensor, " batch"]]:
    """As `document_losses`, for the measurement signed so that lower is better: loss, -log p/(1-p), or -log p."""
    if measurement in ("loss", "log_probability"):
        return document_losses(model, batch, weights=weights)
    _places, targets = batch.predictions
    costs = -batch.sums(margins(document_logits(model, batch), targets))
    return (weights * costs).sum(), costs.detach()


def logit_losses(
    logits: Float[Tensor, "row vocabulary"], targets: Int[Tensor, " row"], uniform: Float[Tensor, " row"] | None
) -> Float[Tensor, " row"]:
    """Cross-entropy of `targets`, or of the labels that `uniform` draws if it is given, in nats."""
    labels = targets if uniform is None else sample_labels(logits.detach().softmax(dim=1), uniform)
    return F.cross_entropy(logits, labels, reduction="none")


def margins(logits: Float[Tensor, "*n label"], targets: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Log-odds of the targets, log p/(1-p)."""
    right = logits.gather(-1, targets[..., None])[..., 0]
    others = logits.scatter(-1, targets[..., None], -torch.inf).logsumexp(dim=-1)  # log of the sum over every other label
    return right - others


def sample_labels(p: Float[Tensor, "row vocabulary"], uniform: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    """A label per row, drawn from the probabilities `p` by the inverse of their cumulative sum at `uniform` (0 to 1)."""
    summed = p.cumsum(dim=1)
    labels = torch.searchsorted(summed, (uniform * summed[:, -1])[:, None].to(p.dtype), right=True)
    return labels[:, 0].clamp_(max=p.shape[1] - 1)


def head_losses(
    h: Float[Tensor, "row d"],
    W: Float[Tensor, "vocabulary d"],
    targets: Int[Tensor, " row"],
    uniform: Float[Tensor, " row"] | None,
    w: Float[Tensor, " row"],
    *,
    differentiate: tuple[bool, bool],
    backend: Backend | None = None,
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row d"] | None, Float[Tensor, "vocabulary d"] | None]:
    """`logit_losses` of `h W^T`, and the gradients by `h` and by `W` of their sum weighted by `w`, as `differentiate` asks.

    Logits are computed block by block, and a block's gradients at once, so that all logits are never in memory together. On one
    CPU thread, with the default model and documents, that takes 0.6 times as long as autograd through all logits, and 0.2 times
    with sampled labels; a whole training step takes 0.7 times as long (benchmarks/head_losses_keep_up.py).
    """
    of_h, of_W = differentiate
    dh, dW = torch.empty_like(h) if of_h else None, at_least_float32(torch.zeros_like(W)) if of_W else None
    losses = at_least_float32(h.new_empty(len(h), 0)).new_empty(len(h))
    rows = ROWS_ON_CPU if h.device.type == "cpu" else ROWS_AT_ONCE
    for start in range(0, len(h), rows):
        block = slice(start, start + rows)
        logits = h[block] @ W.T
        if backend is not None and uniform is None:
            losses[block], Ds = _compiled(backend)(*map(_of_any_length, (logits, targets[block])))
        else:
            log_p = at_least_float32(logits).log_softmax(dim=1)
            p = None if uniform is None else log_p.exp()
            labels = (targets[block] if p is None else sample_labels(p, uniform[block]))[:, None]
            losses[block] = -log_p.gather(1, labels)[:, 0]
            p = log_p.exp_() if p is None else p
            Ds = p.scatter_add_(1, labels, p.new_full(labels.shape, -1)).to(h.dtype)  # p - 1 at the label
        if of_h:
            dh[block] = w[block, None] * (Ds @ W)
        if of_W:
            dW += Ds.T @ (w[block, None] * h[block]).to(h.dtype)
    return losses, dh, dW if dW is None else dW.to(W.dtype)


@no_type_check
def _losses_and_slopes(logits, targets):
    """The losses and their gradients by the logits: compiled, two passes over a row instead of half a dozen."""
    log_p = at_least_float32(logits).log_softmax(dim=1)
    at_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    return -log_p.gather(1, targets[:, None])[:, 0], (log_p.exp() - at_target.to(log_p.dtype)).to(logits.dtype)


@functools.cache
def _compiled(backend: Backend) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_losses_and_slopes, backend=backend, fullgraph=True)


def _of_any_length(rows: Tensor) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    return rows


class _HeadLosses(torch.autograd.Function):
    """`head_losses` for autograd: their weighted sum, which can be differentiated, and the losses, which cannot."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, W: Tensor, targets: Tensor, uniform: Tensor | None, w: Tensor, backend: Backend | None
    ) -> tuple[Tensor, Tensor]:
        losses, dh, dW = head_losses(h, W, targets, uniform, w, differentiate=ctx.needs_input_grad[:2], backend=backend)
        ctx.mark_non_differentiable(losses)
        ctx.save_for_backward(dh, dW)
        return (w * losses).sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, _of_losses: Tensor) -> tuple[Tensor | None, ...]:
        dh, dW = ctx.saved_tensors
        return None if dh is None else g * dh, None if dW is None else g * dW, None, None, None, None


@no_type_check  # is compiled
def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or unchanged in float64: reductions over data are never narrower."""
    return values if values.dtype == torch.float64 else values.float()
