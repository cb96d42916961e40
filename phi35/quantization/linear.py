"""Products with quantized weights: which way they run, and their gradient.

``quantized_linear`` is the one entry. It needs no host synchronisation on a GPU and can be captured. Where no kernel
takes the tensors, blocks of rows are restored one after the other and multiplied, so that the whole weight never
exists beside its codes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from phi35.kernels import availability
from phi35.quantization.codes import QuantizedTensor, dequantize
from phi35.quantization.cpu import native

BLOCK_VALUES = 2**22
"""Weights that the plain way restores at once."""

GPU_BLOCK_VALUES = 2**26
"""The same in the backward pass on a GPU, whose product wants large blocks (128 MiB in bfloat16)."""


def quantized_linear(
    hidden_states: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Product with a quantized weight.

    Args:
        hidden_states: (..., columns), any floating dtype.
        weight: (rows, columns).
        bias: (rows,) or None.

    Returns:
        (..., rows) in the dtype of ``hidden_states``; sums over a row are taken in float32 by the kernels.
    """
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        out = _Product.apply(flat, weight)
        out = out if bias is None else out + bias
    else:
        out = product(flat, weight, bias)
    return out.view(*hidden_states.shape[:-1], -1)


def quantized_embedding(input_ids: torch.Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (..., columns) of a quantized weight, restored in ``dtype``, at ids (...)."""
    ids, one = input_ids.reshape(-1), weight.format
    # fp8 is indexed as bytes: not every device indexes it.
    picked = {
        suffix: tensor.view(torch.uint8)[ids].view(tensor.dtype) if tensor.element_size() == 1 else tensor[ids]
        for suffix, tensor in weight.tensors().items()
        if suffix != "_zero_point"
    }
    zeros = None
    if weight.zero_point is not None:
        words = weight.zero_point[ids // one.per_word]
        zeros = words >> (ids % one.per_word * one.bits)[:, None] & ((1 << one.bits) - 1)
    return dequantize(QuantizedTensor.of(one, picked), dtype, zeros).view(*input_ids.shape, -1)


def product(hidden_states: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(N, columns) times a quantized weight (rows, columns), without gradients."""
    if hidden_states.shape[0] <= native.MAX_TOKENS and native.takes(hidden_states.dtype, weight):
        return native.product(hidden_states, weight, bias)
    if kernels_take(hidden_states, weight):
        from phi35.quantization.kernels import ops

        return ops.product(hidden_states, weight, bias)
    return plain_product(hidden_states, weight, bias)


def kernels_take(hidden_states: torch.Tensor, weight: QuantizedTensor) -> bool:
    """Whether the GPU's kernels run these tensors."""
    device, known = hidden_states.device, hidden_states.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and device.type == "cuda" and weight.codes.device == device and _gpu_missing(device) is None


def _gpu_missing(device: torch.device) -> str | None:
    return availability.missing(device)


# What torch.compiler.assume_constant_result sets, without importing the compiler (3 s).
_gpu_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def plain_product(
    hidden_states: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same on any device and in any dtype, block of rows by block of rows."""
    rows, columns = weight.shape
    out = hidden_states.new_empty((hidden_states.shape[0], rows))
    step = _block(rows, columns, weight.format.per_word)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = _restored(weight, start, stop, hidden_states.dtype)
        out[:, start:stop] = F.linear(hidden_states, part, None if bias is None else bias[start:stop])
    return out


def blocks_of_rows(weight: QuantizedTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A weight (rows, columns) in ``dtype``, some rows at a time."""
    rows, columns = weight.shape
    step = _block(rows, columns, weight.format.per_word)
    for start in range(0, rows, step):
        yield _restored(weight, start, min(start + step, rows), dtype)


def restored(weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole weight (..., rows, columns) in ``dtype``: as much memory as it would take unquantized."""
    one, columns = weight.format, weight.shape[-1]
    # Stacked rows stand one behind the other; zero points are packed along rows, which end with whole words.
    flat = QuantizedTensor.of(one, {name: part.reshape(-1, part.shape[-1]) for name, part in weight.tensors().items()})
    return _restored(flat, 0, flat.shape[0], dtype).view(*weight.shape[:-1], columns)


def _restored(weight: QuantizedTensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    if native.takes(dtype, weight):
        return native.restore(weight, start, stop, dtype)
    if weight.codes.is_cuda and _gpu_missing(weight.codes.device) is None:
        from phi35.quantization.kernels import matrix

        return matrix.restore(weight, start, stop, dtype)
    return dequantize(weight.rows(start, stop), dtype)


def _block(rows: int, columns: int, multiple: int, values: int = BLOCK_VALUES) -> int:
    return min(rows, max(1, values // columns // multiple) * multiple)


class _Product(torch.autograd.Function):
    """The product, whose gradient goes to the input alone."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
        ctx.weight = weight
        return product(hidden_states, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad, weight = grads[0], ctx.weight
        rows, columns = weight.shape
        total = torch.zeros((grad.shape[0], columns), dtype=torch.float32, device=grad.device)
        step = _block(rows, columns, weight.format.per_word, GPU_BLOCK_VALUES if grad.is_cuda else BLOCK_VALUES)
        for start in range(0, rows, step):
            part = _restored(weight, start, min(start + step, rows), grad.dtype)
            total += grad[:, start : start + step] @ part
        return total.to(grad.dtype), None
