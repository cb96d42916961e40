"""Rotary embedding of queries and keys where they lie in the fused projection's output, and back."""

import torch
import triton
import triton.language as tl


def rotate(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    """Rotates queries and keys in place.

    Args:
        projected: (B, T, (H + 2 K) d), contiguous: queries, keys, values.
        cos: (B or 1, T, d), contiguous.
        sin: like ``cos``.
        num_heads: H.
        num_kv_heads: K.
        head_dim: d, even.
    """
    batch, length, width = projected.shape
    half = head_dim // 2
    _rotate_kernel[(batch * length,)](
        projected,
        cos,
        sin,
        length,
        length if cos.shape[0] > 1 else 0,
        WIDTH=width,
        HEADS=num_heads + num_kv_heads,
        HALF=half,
        HEAD_BLOCK=triton.next_power_of_2(num_heads + num_kv_heads),
        HALF_BLOCK=triton.next_power_of_2(half),
        num_warps=4,
    )


def rotate_backward(
    grad_queries: torch.Tensor, grad_keys: torch.Tensor, grad_values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Gradient (B, T, (H + 2 K) d) of the projection from those of its parts, (B, H or K, T, d), strided as they come.

    Args:
        grad_queries: (B, H, T, d), elements of a head side by side.
        grad_keys: (B, K, T, d).
        grad_values: (B, K, T, d).
        cos: (B or 1, T, d), contiguous.
        sin: like ``cos``.
    """
    batch, num_heads, length, head_dim = grad_queries.shape
    num_kv_heads = grad_keys.shape[1]
    parts = [part if part.stride(3) == 1 else part.contiguous() for part in (grad_queries, grad_keys, grad_values)]
    grad = grad_queries.new_empty((batch, length, (num_heads + 2 * num_kv_heads) * head_dim))
    half = head_dim // 2
    for kind, (part, first) in enumerate(zip(parts, (0, num_heads, num_heads + num_kv_heads), strict=True)):
        heads = part.shape[1]
        _rotate_back_kernel[(batch * length,)](
            part,
            grad,
            cos,
            sin,
            length,
            length if cos.shape[0] > 1 else 0,
            part.stride(0),
            part.stride(1),
            part.stride(2),
            WIDTH=grad.shape[2],
            FIRST=first * head_dim,
            HEADS=heads,
            HALF=half,
            ROTATE=kind < 2,
            HEAD_BLOCK=triton.next_power_of_2(heads),
            HALF_BLOCK=triton.next_power_of_2(half),
            num_warps=4,
        )
    return grad


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    projected,
    cos,
    sin,
    length,
    table_length,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HALF_BLOCK)
    heads = tl.arange(0, HEAD_BLOCK)
    real = columns < HALF
    inside = (heads < HEADS)[:, None] & real[None, :]
    table = (token // length * table_length + token % length) * (2 * HALF) + columns
    # Both halves of a table are equal, save that they are read as they lie.
    cos_first = tl.load(cos + table, mask=real, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + table + HALF, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + table, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + table + HALF, mask=real, other=0.0).to(tl.float32)[None, :]
    at = projected + token * WIDTH + heads[:, None] * (2 * HALF) + columns[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = projected.dtype.element_ty
    tl.store(at, (first * cos_first - second * sin_first).to(kind), mask=inside)
    tl.store(at + HALF, (second * cos_second + first * sin_second).to(kind), mask=inside)


@triton.jit
def _rotate_back_kernel(  # type: ignore[no-untyped-def]
    part,
    grad,
    cos,
    sin,
    length,
    table_length,
    batch_stride,
    head_stride,
    token_stride,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTATE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row, position = token // length, token % length
    columns = tl.arange(0, HALF_BLOCK)
    heads = tl.arange(0, HEAD_BLOCK)
    real = columns < HALF
    inside = (heads < HEADS)[:, None] & real[None, :]
    source = part + row * batch_stride + position * token_stride + heads[:, None] * head_stride + columns[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        table = (row * table_length + position) * (2 * HALF) + columns
        cos_first = tl.load(cos + table, mask=real, other=0.0).to(tl.float32)[None, :]
        cos_second = tl.load(cos + table + HALF, mask=real, other=0.0).to(tl.float32)[None, :]
        sin_first = tl.load(sin + table, mask=real, other=0.0).to(tl.float32)[None, :]
        sin_second = tl.load(sin + table + HALF, mask=real, other=0.0).to(tl.float32)[None, :]
        turned = first * cos_first + second * sin_second
        second = second * cos_second - first * sin_first
        first = turned
    kind = grad.dtype.element_ty
    target = grad + token * WIDTH + FIRST + heads[:, None] * (2 * HALF) + columns[None, :]
    tl.store(target, first.to(kind), mask=inside)
    tl.store(target + HALF, second.to(kind), mask=inside)
