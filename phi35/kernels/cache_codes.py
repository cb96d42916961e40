"""Eight-bit keys and values in registers: the kernels' side of ``phi35.cache_codes``, to the bit the same.

Rounding is done on the bits of float32, half to even: every device has it, also those without e4m3 of their own.
"""

from typing import Any

import triton
import triton.language as tl

from phi35.kernels.operands import LayerCache

EXPONENT = 0x4B000000
"""Bits of 2^23. As an argument: as a constant, the compiler takes two instructions to mask a code and to set it."""

LIFT = tl.constexpr(2.0**60)
"""Twice in a product with ``decode_raw`` of fp8."""
_FP8_BITS = tl.constexpr(0x87F00000 - 2**32)
_INT8_ZERO = tl.constexpr(8388608.0 + 128.0)
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)
_SUBNORMAL = tl.constexpr(0.015625)
_SUBNORMAL_ROUNDER = tl.constexpr(16384.0)
_SUBNORMAL_ROUNDER_BITS = tl.constexpr(0x46800000)


def scales_of(cache: LayerCache) -> tuple[Any, Any]:
    """Scales of keys and values as the kernels take them, also where there are none."""
    if cache.key_scales is None or cache.value_scales is None:
        return cache.keys, cache.values
    return cache.key_scales, cache.value_scales


@triton.jit
def scale_of(largest, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of a head from its largest magnitude: float32 that bfloat16 holds."""
    exact = largest / (127.0 if KIND == "int8" else 448.0)
    bits = exact.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def encode(values, scale, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes uint8 of float32 values under a scale that broadcasts to them."""
    limit: tl.constexpr = 127.0 if KIND == "int8" else 448.0
    ratio = tl.where(scale == 0.0, 0.0, values / tl.where(scale == 0.0, 1.0, scale))
    ratio = tl.minimum(tl.maximum(ratio, -limit), limit)
    if KIND == "int8":
        whole = (ratio + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS
        return (whole + 128).to(tl.uint8)
    size = tl.abs(ratio)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (size + _SUBNORMAL_ROUNDER).to(tl.int32, bitcast=True) - _SUBNORMAL_ROUNDER_BITS
    code = tl.where(size < _SUBNORMAL, small, normal)
    return tl.where(ratio < 0.0, code | 0x80, code).to(tl.uint8)


@triton.jit
def decode(codes, exponent, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """What codes uint8 stand for before their scale, float32; ``exponent`` is ``EXPONENT``."""
    wide = codes.to(tl.int32)
    if KIND == "int8":
        return (wide | exponent).to(tl.float32, bitcast=True) - _INT8_ZERO
    # The bits of e4m3 are those of a float16 of a smaller exponent.
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def decode_raw(codes, exponent, KIND: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same in few instructions: fp8 comes times 2^-120, which ``LIFT`` undoes in two halves.

    ASM takes four bytes of int8 at a time by instructions of their own, which the interpreter does not know.
    """
    if KIND == "int8":
        if ASM:
            wide = tl.inline_asm_elementwise(
                "prmt.b32 $0, $4, $5, 0x7440; prmt.b32 $1, $4, $5, 0x7441; "
                "prmt.b32 $2, $4, $5, 0x7442; prmt.b32 $3, $4, $5, 0x7443;",
                "=r,=r,=r,=r,r,r,r,r,r",
                [codes, exponent],
                dtype=tl.int32,
                is_pure=True,
                pack=4,
            )
        else:
            wide = codes.to(tl.int32) | exponent
        return wide.to(tl.float32, bitcast=True) - _INT8_ZERO
    # Sign, exponent and mantissa of e4m3 in their places of a float32, whose exponent counts from 127 in place of 7.
    signed = codes.to(tl.int8, bitcast=True).to(tl.int32)
    return ((signed << 20) & _FP8_BITS).to(tl.float32, bitcast=True)
