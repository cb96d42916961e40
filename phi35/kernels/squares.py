"""Sums of squares of long tensors, at the rate at which memory is read."""

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_BLOCKS = 16


def num_parts(count: int) -> int:
    """Partial sums of a tensor of ``count`` elements."""
    return triton.cdiv(count, _BLOCK * _BLOCKS)


def write_parts(tensor: torch.Tensor, parts: torch.Tensor) -> None:
    """Partial sums of squares, the same at every call.

    Args:
        tensor: contiguous, of any floating dtype.
        parts: (``num_parts(tensor.numel())``,) float32, overwritten.
    """
    if tensor.numel():
        _squares_kernel[(parts.numel(),)](tensor, parts, tensor.numel(), BLOCK=_BLOCK, BLOCKS=_BLOCKS, num_warps=8)


@triton.jit
def _squares_kernel(tensor, parts, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    part = tl.program_id(0)
    first = part.to(tl.int64) * (BLOCK * BLOCKS)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in tl.static_range(BLOCKS):
        places = first + block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(tensor + places, mask=places < count, other=0.0).to(tl.float32)
        total += value * value
    tl.store(parts + part, tl.sum(total, axis=0))
