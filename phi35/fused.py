"""Operations of the decoder as one differentiable step each, which keep for the backward pass only what it needs.

On CUDA each is a Triton kernel forward and one backward (``phi35.kernels``); elsewhere torch's operations do the same,
so that a model runs, and is tested, the same way everywhere. Intermediate values stay in float32 where the plain
modules round them to the model's dtype between operations.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from phi35.jitter import Jitter
from phi35.registry import resolve


def add_norm(
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    subtract_mean: bool,
    jitter: Jitter | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of two tensors (..., D), and its RMSNorm, or its LayerNorm with ``subtract_mean``, times the jitter.

    Without ``residual`` the sum is ``hidden_states``; handing it on from here lets the norm's backward pass add the
    gradients of both of its readers.
    """
    return _AddNorm.apply(hidden_states, residual, weight, bias, eps, subtract_mean, jitter)


def gated_activation(gate_up: torch.Tensor, activation: str, limit: float | None = None) -> torch.Tensor:
    """act(gate) * up of (..., 2F), gate first; keeps ``gate_up`` alone.

    Args:
        gate_up: (..., 2F).
        activation: "silu", "gelu" or "gegelu", which is ``gegelu`` of ``phi35.feed_forward``.
        limit: the clamp of "gegelu".
    """
    return _GatedActivation.apply(gate_up, activation, limit)


def activate(values: torch.Tensor, activation: str) -> torch.Tensor:
    """An activation ("silu", "gelu" or "quick_gelu") that keeps its argument alone."""
    return _Activation.apply(values, activation)


def rotate_heads(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries (B, H, T, d) and keys (B, K, T, d), and values, of a fused projection (B, T, (H + 2 K) d).

    All three are views of ``projected``, which is overwritten: nothing else may read it. (A linear layer's backward
    pass does not read its output.)
    """
    return _RotateHeads.apply(projected, cos, sin, num_heads, num_kv_heads)


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product of two matrices whose sums stay in float32, at the speed of their own dtype; without gradients."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def uses_kernels(tensor: torch.Tensor) -> bool:
    """Whether Triton's kernels take a tensor: on CUDA, or anywhere where Triton interprets them."""
    return (tensor.is_cuda and _triton_installed()) or _interpreted()


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        subtract_mean: bool,
        jitter: Jitter | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.contiguous()
        residual = None if residual is None else residual.contiguous()
        forward = resolve("phi35.kernels.norm:add_norm") if uses_kernels(hidden_states) else _add_norm_with_torch
        total, normed, means, deviations = forward(hidden_states, residual, weight, bias, eps, subtract_mean, jitter)
        ctx.save_for_backward(total, weight, means, deviations)
        ctx.jitter = jitter
        ctx.set_materialize_grads(False)
        ctx.kinds = residual is not None, None if bias is None else bias.dtype
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: torch.Tensor | None, grad_normed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        total, weight, means, deviations = ctx.saved_tensors
        has_residual, bias_dtype = ctx.kinds
        if grad_normed is None:
            return (grad_total, grad_total if has_residual else None, *(None,) * 5)
        grad_total = None if grad_total is None else grad_total.contiguous()
        backward = resolve("phi35.kernels.norm:add_norm_backward") if uses_kernels(total) else _norm_backward_with_torch
        grad, grad_weight, grad_bias = backward(
            grad_total, grad_normed.contiguous(), total, weight, means, deviations, bias_dtype is not None, ctx.jitter
        )
        grad_bias = None if grad_bias is None else grad_bias.to(bias_dtype)
        return grad, grad if has_residual else None, grad_weight.to(weight.dtype), grad_bias, *(None,) * 3


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: str, limit: float | None) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.activation, ctx.limit = activation, limit
        if uses_kernels(gate_up):
            return resolve("phi35.kernels.gated:gate")(gate_up, activation, limit)
        gate, up = _clamped(_wide(gate_up), limit)
        return (_ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        activation, limit = ctx.activation, ctx.limit
        if uses_kernels(gate_up):
            back = resolve("phi35.kernels.gated:gate_backward")
            return back(grad.contiguous(), gate_up, activation, limit), None, None
        gate, up = _clamped(_wide(gate_up), limit)
        upstream = _wide(grad)
        grad_gate = upstream * up * _derivative(gate, activation)
        grad_up = upstream * _ACTIVATIONS[activation](gate)
        if limit is not None:
            raw_gate, raw_up = gate_up.chunk(2, dim=-1)
            grad_gate = grad_gate.masked_fill(raw_gate > limit, 0.0)
            grad_up = grad_up.masked_fill(raw_up.abs() > limit, 0.0)
        return torch.cat((grad_gate, grad_up), dim=-1).to(gate_up.dtype), None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, activation: str) -> torch.Tensor:
        values = values.contiguous()
        ctx.save_for_backward(values)
        ctx.activation = activation
        if uses_kernels(values):
            return resolve("phi35.kernels.gated:activate")(values, activation)
        return _ACTIVATIONS[activation](_wide(values)).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (values,) = ctx.saved_tensors
        if uses_kernels(values):
            return resolve("phi35.kernels.gated:activate_backward")(grad.contiguous(), values, ctx.activation), None
        return (_wide(grad) * _derivative(_wide(values), ctx.activation)).to(values.dtype), None


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, length, width = projected.shape
        head_dim = cos.shape[-1]
        assert width == (num_heads + 2 * num_kv_heads) * head_dim and projected.is_contiguous()
        cos, sin = cos.reshape(-1, length, head_dim).contiguous(), sin.reshape(-1, length, head_dim).contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(True)
        projected = projected.detach()
        heads = projected.view(batch, length, -1, head_dim).transpose(1, 2)
        if uses_kernels(projected):
            rotate = resolve("phi35.kernels.rotary:rotate")
            rotate(projected, cos, sin, num_heads, num_kv_heads, head_dim)
        else:
            turned = heads[:, : num_heads + num_kv_heads]
            turned.copy_(_rotated(turned, cos, sin))
        queries, keys, values = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        return queries, keys, values

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_queries: torch.Tensor, grad_keys: torch.Tensor, grad_values: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if uses_kernels(grad_queries):
            back = resolve("phi35.kernels.rotary:rotate_backward")
            return (back(grad_queries, grad_keys, grad_values, cos, sin), *(None,) * 4)
        turned = torch.cat((grad_queries, grad_keys), dim=1)
        heads = torch.cat((_rotated(turned, cos, sin, back=True), grad_values), dim=1)
        return (heads.transpose(1, 2).flatten(2), *(None,) * 4)


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool = False) -> torch.Tensor:
    """(B, H, T, d) rotated, or turned back (the transposed rotation)."""
    cos, sin = _wide(cos).unsqueeze(1), _wide(sin).unsqueeze(1)
    wide = _wide(heads)
    if back:
        first, second = (wide * sin).chunk(2, dim=-1)
        return (wide * cos + torch.cat((second, -first), dim=-1)).to(heads.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(heads.dtype)


def _add_norm_with_torch(
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    subtract_mean: bool,
    jitter: Jitter | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    total = hidden_states if residual is None else hidden_states + residual
    wide = _wide(total)
    means = wide.mean(dim=-1) if subtract_mean else wide.new_empty(0)
    if subtract_mean:
        wide = wide - means.unsqueeze(-1)
    deviations = (wide.square().mean(dim=-1) + eps).rsqrt()
    normed = wide * deviations.unsqueeze(-1) * _wide(weight)
    if bias is not None:
        normed = normed + _wide(bias)
    if jitter is not None:
        normed = normed * jitter.noise(total)
    return total, normed.to(total.dtype), means, deviations


def _norm_backward_with_torch(
    grad_total: torch.Tensor | None,
    grad_normed: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    means: torch.Tensor,
    deviations: torch.Tensor,
    has_bias: bool,
    jitter: Jitter | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    wide, upstream = _wide(total), _wide(grad_normed)
    if jitter is not None:
        upstream = upstream * jitter.noise(total)
    if means.numel():
        wide = wide - means.unsqueeze(-1)
    value = wide * deviations.unsqueeze(-1)
    scaled = upstream * _wide(weight)
    grad = scaled - value * (scaled * value).mean(dim=-1, keepdim=True)
    if means.numel():
        grad = grad - scaled.mean(dim=-1, keepdim=True)
    grad = grad * deviations.unsqueeze(-1)
    if grad_total is not None:
        grad = grad + _wide(grad_total)
    rows = tuple(range(total.dim() - 1))
    return grad.to(total.dtype), (upstream * value).sum(dim=rows), upstream.sum(dim=rows) if has_bias else None


def _clamped(gate_up: torch.Tensor, limit: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate and what it multiplies; with a limit as "gegelu" has them."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is None:
        return gate, up
    return gate.clamp(max=limit), up.clamp(-limit, limit) + 1.0


def _quick_gelu(values: torch.Tensor) -> torch.Tensor:
    return values * torch.sigmoid(1.702 * values)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "quick_gelu": _quick_gelu,
    "gegelu": _quick_gelu,
}


def _derivative(values: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "gelu":
        density = torch.exp(-0.5 * values.square()) * 0.3989422804014327
        return 0.5 * (1.0 + torch.erf(values * 0.7071067811865476)) + values * density
    slope = 1.0 if activation == "silu" else 1.702
    chance = torch.sigmoid(slope * values)
    return chance * (1.0 + slope * values * (1.0 - chance))


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@functools.cache
def _triton_installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
