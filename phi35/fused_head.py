"""The head's loss with its logits in the model's dtype, each turned into its gradient where it lies.

Departs from ``phi35.language_model_head``'s plain form in three ways: no float32 copy of the logits is made, a chunk
is as large as keeps matrix products efficient, and the gradients' factor is applied in float32.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from phi35.fused import uses_kernels, wide_product
from phi35.registry import resolve

LOGITS_PER_CHUNK = 2**28
"""Logits held at once (512 MiB in bfloat16)."""

ROWS_PER_TILE = 256
"""Chunks are multiples of this, so that only the last one leaves a matrix product's tiles half empty."""


def head_loss(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy, a float32 scalar, of the logits ``hidden_states @ weight.T + bias``.

    Args:
        hidden_states: (N, D).
        weight: (V, D).
        bias: (V,) or None.
        labels: (N,) int64; negative ones do not count.
    """
    return _HeadLoss.apply(hidden_states, weight, bias, labels)


class _HeadLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        scale = (labels >= 0).sum().clamp(min=1).float().reciprocal()
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        need_bias = need_bias and bias is not None
        wanted = need_states or need_weight or need_bias
        grad_states = torch.empty_like(hidden_states) if need_states else None
        grad_weight: torch.Tensor | None = None
        grad_bias: torch.Tensor | None = None
        losses = []
        rows = max(ROWS_PER_TILE, LOGITS_PER_CHUNK // weight.shape[0] // ROWS_PER_TILE * ROWS_PER_TILE)
        alone = hidden_states.shape[0] <= rows
        for first in range(0, hidden_states.shape[0], rows):
            part = slice(first, first + rows)
            logits = F.linear(hidden_states[part], weight, bias)
            loss = resolve("phi35.kernels.cross_entropy:loss_and_gradient") if uses_kernels(logits) else _with_torch
            losses.append(loss(logits, labels[part], scale, wanted))
            if grad_states is not None:
                torch.mm(logits, weight, out=grad_states[part])
            if need_weight:
                # Chunks are summed in float32: in bfloat16 the sum of many would lose the small ones.
                product = (torch.mm if alone else wide_product)(logits.mT, hidden_states[part])
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
            if need_bias:
                summed = logits.sum(dim=0, dtype=torch.float32)
                grad_bias = summed if grad_bias is None else grad_bias.add_(summed)
            del logits
        ctx.save_for_backward(
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return torch.cat(losses).sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In float32: rounded to bfloat16 the factor would give a micro-batch another weight than its tokens'.
        grads = [None if grad is None else _scaled(grad, grad_loss) for grad in ctx.saved_tensors]
        return (*grads, None)


def _scaled(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    if uses_kernels(values) and values.dtype != torch.float64 and values.is_contiguous():
        product: torch.Tensor = resolve("phi35.kernels.cross_entropy:scaled")(values, factor)
        return product
    return (values.to(torch.promote_types(values.dtype, torch.float32)) * factor).to(values.dtype)


def _with_torch(logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, want_gradient: bool) -> torch.Tensor:
    """What the kernel does (``phi35.kernels.cross_entropy``)."""
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    counted, targets = labels >= 0, labels.clamp(min=0)[:, None]
    losses = -log_probs.gather(1, targets).squeeze(1).masked_fill(~counted, 0.0)
    if want_gradient:
        grad = log_probs.exp_()
        grad.scatter_add_(1, targets, grad.new_full((1, 1), -1.0).expand_as(targets))
        logits.copy_(grad * (counted * scale)[:, None])
    return losses.float()
