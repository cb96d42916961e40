"""A vector's values as 16-bit integers, four for the codes of a word at a time, and their products with codes.

Either whole, two in a word, two of which meet codes at once (dp2a), or as bytes, low and high, four at once (dp4a).
"""

import triton
import triton.language as tl

LEVELS = tl.constexpr(32639.0)
"""The largest 16-bit integer whose high byte, rounded, is a signed byte."""

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23, in whose bits the two lowest bytes are 0."""


@triton.jit
def prepared_integers(values, factor, KIND: tl.constexpr, ASM: tl.constexpr, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """16 values of a lane as integers, four at a time, in the order in which codes come.

    With HALVES two words of two integers each; else the bytes of four, low and high. Then the integers' sum and their
    scale, times ``factor``.
    """
    largest = tl.abs(values[0])
    for place in tl.static_range(1, 16):
        largest = tl.maximum(largest, tl.abs(values[place]), propagate_nan=tl.PropagateNan.ALL)
    # What is no number, or infinite, has a scale of its kind and no inverse.
    inverse = tl.where((largest > 1e-30) & (largest < float("inf")), LEVELS / largest, 0.0)
    packed = four_integers(values, inverse, 0, KIND, ASM, HALVES)
    for quarter in tl.static_range(1, 4):
        packed = packed + four_integers(values, inverse, quarter, KIND, ASM, HALVES)
    ones = packed[0] * 0 + 0x01010101
    low = ones * 0
    high = ones * 0
    for quarter in tl.static_range(4):
        one, two = packed[2 * quarter], packed[2 * quarter + 1]
        if HALVES:
            low = product(ones, two, product(ones, one, low, "dp2a.lo", ASM), "dp2a.hi", ASM)
        else:
            low = product(ones, one, low, "dp4a", ASM)
            high = product(ones, two, high, "dp4a", ASM)
    return packed + (low if HALVES else low + (high << 8), largest * factor / LEVELS)


@triton.jit
def four_integers(  # type: ignore[no-untyped-def]
    values, inverse, QUARTER: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr, HALVES: tl.constexpr
):
    """Two words of the integers that meet codes at once: of a word of 8 codes the even ones first, as a mask finds."""
    step: tl.constexpr = 2 if KIND == "int4" else 1
    first: tl.constexpr = QUARTER // 2 * 8 + QUARTER % 2 if KIND == "int4" else QUARTER * 4
    if HALVES:
        return _halves(values, inverse, first, step, ASM)
    else:
        return _bytes(values, inverse, first, step, ASM)


@triton.jit
def _halves(values, inverse, FIRST: tl.constexpr, STEP: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four values' integers in two words. Added to ``ROUND``, a number leaves its nearest integer in 16 bits."""
    words = ()
    for pair in tl.static_range(2):
        a = (values[FIRST + STEP * 2 * pair] * inverse + ROUND).to(tl.int32, bitcast=True)
        b = (values[FIRST + STEP * (2 * pair + 1)] * inverse + ROUND).to(tl.int32, bitcast=True)
        if ASM:
            word = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            word = (a & 0xFFFF) | (b << 16)
        words = words + (word,)  # type: ignore[assignment]
    return words


@triton.jit
def _bytes(values, inverse, FIRST: tl.constexpr, STEP: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Low bytes of four values' integers in a word, and high ones, which are those of the integers plus 128.

    Added to ``ROUND``, a number leaves its nearest integer in the two lowest bytes of the sum.
    """
    low = ()
    high = ()
    for place in tl.static_range(4):
        value = values[FIRST + STEP * place]
        low = low + ((value * inverse + ROUND).to(tl.int32, bitcast=True),)  # type: ignore[assignment]
        high = high + ((value * inverse + (ROUND + 128.0)).to(tl.int32, bitcast=True),)  # type: ignore[assignment]
    return _packed(low, 0, ASM), _packed(high, 1, ASM)


@triton.jit
def _packed(numbers, BYTE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Byte 0 or 1 of each of four numbers in a word."""
    a, b, c, d = numbers
    if ASM:
        pick: tl.constexpr = "0x0040" if BYTE == 0 else "0x0051"
        return tl.inline_asm_elementwise(
            "{.reg .b32 s, t; prmt.b32 s, $1, $2, "
            + pick
            + "; prmt.b32 t, $3, $4, "
            + pick
            + "; prmt.b32 $0, s, t, 0x5410;}",
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        shift: tl.constexpr = 8 * BYTE
        low = ((a >> shift) & 255) | (((b >> shift) & 255) << 8)
        return low | (((c >> shift) & 255) << 16) | ((d >> shift) << 24)


@triton.jit
def product(codes, values, total, NAME: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """total plus the products of four unsigned bytes with signed ones, or of two, low or high, with signed halves."""
    if ASM:
        kinds: tl.constexpr = ".u32.s32 $0, $1, $2, $3;" if NAME == "dp4a" else ".s32.u32 $0, $2, $1, $3;"
        return tl.inline_asm_elementwise(
            NAME + kinds, "=r,r,r,r", [codes, values, total], dtype=tl.int32, is_pure=True, pack=1
        )
    elif NAME == "dp4a":
        for place in tl.static_range(4):
            total += ((codes >> (8 * place)) & 255) * ((values << (24 - 8 * place)) >> 24)
        return total
    else:
        first: tl.constexpr = 16 if NAME == "dp2a.hi" else 0
        for place in tl.static_range(2):
            total += ((codes >> (first + 8 * place)) & 255) * ((values << (16 - 16 * place)) >> 16)
        return total
