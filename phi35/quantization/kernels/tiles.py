"""Tiles of codes for matrix products: loaded as bytes, turned into whole numbers in registers.

A code becomes a float without a conversion: put into the lowest bits of the mantissa of 2^23 it gives 2^23 + code. The
exponent comes as an argument: as a constant, the compiler takes two instructions to mask a code and to set it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from phi35.quantization.codes import QuantizedTensor

EXPONENT = 0x4B000000
"""Bits of 2^23."""

_BASE = tl.constexpr(8388608.0)


def operands(weight: QuantizedTensor) -> tuple[Any, ...]:
    """Codes as bytes, scales, zero points, row scales and the exponent as the kernels take them."""
    codes = weight.codes.view(torch.uint8)
    zeros = weight.codes if weight.zero_point is None else weight.zero_point
    row_scale = weight.scale if weight.row_scale is None else weight.row_scale
    return codes, weight.scale, zeros, row_scale, EXPONENT


def constants(weight: QuantizedTensor, depth: int) -> dict[str, Any]:
    """Compile-time constants of a weight (..., rows, columns) that is read in tiles of up to ``depth`` columns.

    A tile ends within a group, so that each row of it has one scale.
    """
    one, width = weight.format, weight.shape[-1]
    group = one.group_size or width
    return {
        "WIDTH": width,
        "DEPTH": min(depth, one.group_size or depth),
        "KIND": one.kind,
        "GROUP": group,
        "ZEROS": not one.symmetric,
        "BYTES": one.scale_bits == 8,
    }


@triton.jit
def load_codes(  # type: ignore[no-untyped-def]
    codes,
    zeros,
    exponent,
    rows,
    real,
    first,
    kind: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """Codes less zero points (R, DEPTH) of rows (R,) int64 at columns first on, exact in ``kind``; 0 outside."""
    bits: tl.constexpr = 4 if KIND == "int4" else 8
    bytes_wide: tl.constexpr = WIDTH * bits // 8
    depth: tl.constexpr = DEPTH * bits // 8
    at = first * bits // 8 + tl.arange(0, depth)
    mask = real[:, None] & (at < bytes_wide)[None, :]
    found = tl.load(codes + rows[:, None] * bytes_wide + at[None, :], mask=mask, other=0, eviction_policy="evict_first")
    if KIND == "fp8":
        wide = found.to(tl.int32)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        # The bits of e4m3 are those of a float16 of a smaller exponent.
        value = half.to(tl.int16).to(tl.float16, bitcast=True)
        values = (value.to(tl.float32) * 256.0).to(kind)
    else:
        shift = _BASE + (1 << (bits - 1))
        if ZEROS:
            per: tl.constexpr = 32 // bits
            packed = tl.load(zeros + rows // per * (WIDTH // GROUP) + first // GROUP, mask=real, other=0)
            zero = (packed >> (rows % per * bits).to(tl.int32)) & ((1 << bits) - 1)
            shift = (zero.to(tl.float32) + _BASE)[:, None]
        if KIND == "int4":
            low = ((found & 15).to(tl.int32) | exponent).to(tl.float32, bitcast=True)
            high = ((found >> 4).to(tl.int32) | exponent).to(tl.float32, bitcast=True)
            values = tl.interleave((low - shift).to(kind), (high - shift).to(kind))
        else:
            values = ((found.to(tl.int32) | exponent).to(tl.float32, bitcast=True) - shift).to(kind)
    if WIDTH % DEPTH:
        values = tl.where((first + tl.arange(0, DEPTH) < WIDTH)[None, :], values, 0.0)
    return values


@triton.jit
def load_scale(  # type: ignore[no-untyped-def]
    scale, row_scale, rows, real, first, WIDTH: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr
):
    """Scales (R,) float32 of rows (R,) for columns first on."""
    value = tl.load(scale + rows * (WIDTH // GROUP) + first // GROUP, mask=real, other=0).to(tl.float32)
    if BYTES:
        value *= tl.load(row_scale + rows, mask=real, other=0.0)
    return value
