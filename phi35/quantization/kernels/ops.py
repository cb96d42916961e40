"""The product with a quantized weight as a torch operator: it goes through torch.compile and CUDA graphs whole."""

import torch
from torch.nn import functional as F

from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.config import WeightFormat
from phi35.quantization.kernels import matrix, vector
from phi35.quantization.kernels.shapes import choose

RESTORED_VALUES = 2**26
"""Weights that are restored at once for many tokens (128 MiB in bfloat16)."""


def product(hidden_states: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(N, columns) times a weight (rows, columns) on CUDA, plus bias: (N, rows) in the activations' dtype."""
    one = weight.format
    return quantized_product(
        hidden_states,
        weight.codes,
        weight.scale,
        weight.zero_point,
        weight.row_scale,
        bias,
        one.bits,
        one.type,
        one.group_size or 0,
        one.symmetric,
        one.scale_bits,
    )


@torch.library.custom_op("phi35_quantization::product", mutates_args=())
def quantized_product(
    hidden_states: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    kind: str,
    group_size: int,
    symmetric: bool,
    scale_bits: int,
) -> torch.Tensor:
    """See ``product``; a group of 0 columns is a whole row."""
    one = WeightFormat(bits=bits, type=kind, group_size=group_size or None, symmetric=symmetric, scale_bits=scale_bits)
    weight = QuantizedTensor(one, codes, scale, zero_point, row_scale)
    num_tokens, rows = hidden_states.shape[0], codes.shape[0]
    if num_tokens == 0:
        return hidden_states.new_empty((0, rows))
    if num_tokens == 1:
        out = hidden_states.new_empty((1, rows))
        vector.project(hidden_states.contiguous(), None, weight, bias, out, choose(weight), pdl=False)
        return out
    # Matrix units would round float32 activations.
    if num_tokens <= matrix.MAX_TOKENS and hidden_states.dtype != torch.float32:
        return matrix.product(hidden_states, weight, bias)
    return _restored_product(hidden_states, weight, bias)


@quantized_product.register_fake
def _(
    hidden_states: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    kind: str,
    group_size: int,
    symmetric: bool,
    scale_bits: int,
) -> torch.Tensor:
    return hidden_states.new_empty((hidden_states.shape[0], codes.shape[0]))


def _restored_product(hidden_states: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product by torch, block of rows by block of rows."""
    rows, columns = weight.shape
    step = min(rows, max(1, RESTORED_VALUES // columns // 32) * 32)
    out = hidden_states.new_empty((hidden_states.shape[0], rows))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = matrix.restore(weight, start, stop, hidden_states.dtype)
        out[:, start:stop] = F.linear(hidden_states, part, None if bias is None else bias[start:stop])
    return out
