"""The output head and its loss, which never holds the float32 logits of a long batch.

The loss walks over the tokens in chunks. Each chunk's logits, their softmax and their gradient live only
while that chunk is worked on: with V = 32,064 and 131,072 tokens the full float32 logits would take 16.8 GB.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from phi35.config import ModelConfig
from phi35.fused_head import head_loss
from phi35.quantization.cpu import native

LOGITS_PER_CHUNK = 2**26
"""Logits held at once (256 MiB in float32)."""

IGNORED_LABEL = -100


class LanguageModelHead(nn.Linear):
    """Linear map to the vocabulary that can return the mean cross-entropy in place of logits.

    Args:
        hidden_size: D.
        vocab_size: V.
        bias: whether it has one.
        divisor: of the logits (muP).
        masked_ids: ids whose logits are the least number of their dtype, so that they are never chosen.
        device: of the parameters.

    Attributes:
        fused: take the loss by ``phi35.fused_head``.
        in_c: take logits of a few rows by the C kernel of models in few bits, where it runs and is faster than torch.
    """

    fused = False
    in_c = False

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        bias: bool = False,
        divisor: float = 1.0,
        masked_ids: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(hidden_size, vocab_size, bias=bias, device=device)
        self.divisor, self.masked_ids = divisor, tuple(masked_ids)
        self._masks: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}

    def forward(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None = None, per_token: bool = False
    ) -> torch.Tensor:
        """Logits, or the loss.

        Args:
            hidden_states: (..., D).
            labels: (...) int64 aligned with ``hidden_states`` (already shifted); negative ids do not count.
            per_token: give each label's loss in place of their mean.

        Returns:
            (..., V) logits in the head's dtype, or with ``labels`` a float32 scalar; with no label that counts it is 0.
            With ``per_token`` (...) float32, 0 where no label counts.
        """
        bias: torch.Tensor | None = self.bias
        if self.divisor != 1:
            # Divided before the product, so that the chunked losses below need not know of it.
            hidden_states, bias = hidden_states / self.divisor, None if bias is None else bias / self.divisor
        if self.masked_ids:
            mask = self._mask()
            bias = mask if bias is None else bias + mask
        if labels is None:
            if self.in_c and native.takes_bfloat16(hidden_states, self.weight):
                return native.bfloat16_product(hidden_states, self.weight, bias)
            return F.linear(hidden_states, self.weight, bias)
        flat_states, flat_labels = hidden_states.reshape(-1, self.in_features), labels.reshape(-1)
        if per_token:
            return _TokenLosses.apply(flat_states, self.weight, bias, flat_labels).view(labels.shape)
        if self.fused:
            return head_loss(flat_states, self.weight, bias, flat_labels)
        return _HeadLoss.apply(flat_states, self.weight, bias, flat_labels)

    def _mask(self) -> torch.Tensor:
        """(V,) zeros, and the least number for the masked ids: a bias that every form of the loss can take.

        Not a buffer: it follows from the ids alone, so that no checkpoint, cast or meta device can touch it.
        """
        key = self.weight.device, self.weight.dtype, self.weight.shape[0]
        if key not in self._masks:
            with torch.inference_mode(False):  # a later training pass may use it too
                mask = torch.zeros(key[2], device=key[0], dtype=key[1])
                mask[list(self.masked_ids)] = torch.finfo(key[1]).min
            self._masks[key] = mask
        return self._masks[key]


def build_head(config: ModelConfig) -> LanguageModelHead:
    """The head that a config asks for."""
    return LanguageModelHead(
        config.hidden_size,
        config.vocab_size,
        bias=config.lm_head_bias,
        divisor=config.mup_width_multiplier,
        masked_ids=config.dummy_token_indices,
    )


def loss_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in float32 of (..., V) logits against (...) labels; negative labels do not count."""
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    targets = targets.masked_fill(targets < 0, IGNORED_LABEL)
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for rows in _chunks(flat.shape[0], flat.shape[1]):
        total = total + F.cross_entropy(flat[rows].float(), targets[rows], ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Align labels (B, T) with the positions that predict them: moved left by one, the last column ignored."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def _chunks(num_rows: int, vocab_size: int) -> list[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocab_size)
    return [slice(first, first + size) for first in range(0, num_rows, size)]


def losses_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in float32 of (..., V) logits against (...) labels, label by label; 0 for negative labels."""
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    targets = targets.masked_fill(targets < 0, IGNORED_LABEL)
    parts = [
        F.cross_entropy(flat[rows].float(), targets[rows], ignore_index=IGNORED_LABEL, reduction="none")
        for rows in _chunks(flat.shape[0], flat.shape[1])
    ]
    return torch.cat(parts).view(labels.shape)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of a linear head, label by label; the backward pass makes the logits again, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_states, weight, bias, labels)
        parts = []
        for rows in _chunks(hidden_states.shape[0], weight.shape[0]):
            log_probs = F.linear(hidden_states[rows], weight, bias).float().log_softmax(dim=-1)
            picked = log_probs.gather(1, labels[rows].clamp(min=0)[:, None]).squeeze(1)
            parts.append(-picked.masked_fill(labels[rows] < 0, 0.0))
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, weight, bias, labels = ctx.saved_tensors
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_states = torch.empty_like(hidden_states) if need_states else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        for rows in _chunks(hidden_states.shape[0], weight.shape[0]):
            states, targets = hidden_states[rows], labels[rows].clamp(min=0)[:, None]
            grad = F.linear(states, weight, bias).float().softmax(dim=-1)
            grad.scatter_add_(1, targets, grad.new_full((1, 1), -1.0).expand_as(targets))
            grad *= grad_losses[rows].masked_fill(labels[rows] < 0, 0.0)[:, None]
            grad_logits = grad.to(hidden_states.dtype)
            if grad_states is not None:
                grad_states[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.mT @ states
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of a linear head; gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        counted = labels >= 0
        scale = 1.0 / counted.sum().clamp(min=1).float()
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_states = torch.empty_like(hidden_states) if need_states else None
        # Chunks are summed in float32: in bfloat16 the sum of many chunks would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for rows in _chunks(hidden_states.shape[0], weight.shape[0]):
            states, keep = hidden_states[rows], counted[rows]
            log_probs = F.linear(states, weight, bias).float().log_softmax(dim=-1)
            targets = labels[rows].clamp(min=0)[:, None]
            total -= log_probs.gather(1, targets).squeeze(1).masked_fill(~keep, 0.0).sum()
            if not (need_states or need_weight or need_bias):
                continue
            grad = log_probs.exp_()
            grad.scatter_add_(1, targets, grad.new_full((1, 1), -1.0).expand_as(targets))
            grad *= (keep * scale)[:, None]
            grad_logits = grad.to(hidden_states.dtype)
            if grad_states is not None:
                grad_states[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.mT @ states
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
        ctx.save_for_backward(
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors]
        return (*grads, None)
