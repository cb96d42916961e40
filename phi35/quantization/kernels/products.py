"""Products of held codes with a prepared vector, in registers, and their sums over lanes."""

import triton
import triton.language as tl

from phi35.quantization.kernels.integers import product
from phi35.quantization.kernels.words import places


@triton.jit
def dot_rows(  # type: ignore[no-untyped-def]
    held,
    prepared,
    row_scale,
    first,
    num_rows,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    SPAN: tl.constexpr = 16,
    GROUPS: tl.constexpr = 1,
    HALVES: tl.constexpr = False,
):
    """Products (ROWS,) or (GROUPS, ROWS) float32 of held rows with a prepared vector.

    SPAN of the vector's values share a scale.
    """
    sums = _row_sums(held, prepared, ROWS, WIDTH, LANES, KIND, ZEROS, ASM, SPAN, HALVES)
    result = _sum_lanes(sums, ROWS, LANES, GROUPS)
    if BYTES:
        rows = tl.minimum(places(first, ROWS, GROUPS), num_rows - 1)
        result *= tl.load(row_scale + rows)
    return result


@triton.jit
def dot_pairs(  # type: ignore[no-untyped-def]
    held,
    others,
    prepared,
    row_scale,
    first,
    apart,
    num_rows,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """``dot_rows`` of rows ``first`` on, none beyond num_rows, and of those ``apart`` rows on, added up at once."""
    sums = _row_sums(held, prepared, ROWS, WIDTH, LANES, KIND, ZEROS, ASM, SPAN, HALVES)
    more = _row_sums(others, prepared, ROWS, WIDTH, LANES, KIND, ZEROS, ASM, SPAN, HALVES)
    mixed = ()
    for row in tl.static_range(ROWS):
        mixed = mixed + (sums[row], more[row])  # type: ignore[assignment]
    total = _sum_lanes(mixed, 2 * ROWS, LANES, GROUPS)
    shape: tl.constexpr = (ROWS, 2) if GROUPS == 1 else (GROUPS, ROWS, 2)
    one, other = tl.split(tl.reshape(total, shape))
    if BYTES:
        rows = tl.minimum(places(first, ROWS, GROUPS), num_rows - 1)
        one *= tl.load(row_scale + rows)
        other *= tl.load(row_scale + apart + rows)
    return one, other


@triton.jit
def _row_sums(  # type: ignore[no-untyped-def]
    held,
    prepared,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    ASM: tl.constexpr,
    SPAN: tl.constexpr,
    HALVES: tl.constexpr,
):
    """For each held row its lanes' sums of products with a prepared vector, float32."""
    words, scales, points = held
    each: tl.constexpr = 2 if KIND == "int4" else 4
    per: tl.constexpr = 16 if KIND == "fp8" else 8 + 32 // SPAN
    count: tl.constexpr = (WIDTH + 16 * LANES - 1) // (16 * LANES)
    sums = ()
    for row in tl.static_range(ROWS):
        total = tl.zeros(scales[0].shape, tl.float32)
        for chunk in tl.static_range(count):
            if KIND == "fp8":
                part = _dot16_fp8(words, prepared, (row * count + chunk) * each, chunk * per)
            else:
                point = points[row * count + chunk] if ZEROS else 0
                part = _dot16(
                    words, point, prepared, (row * count + chunk) * each, chunk * per, KIND, ZEROS, SPAN, ASM, HALVES
                )
            total += part * scales[row * count + chunk].to(tl.float32)
        sums = sums + (total,)  # type: ignore[assignment]
    return sums


@triton.jit
def _dot16(  # type: ignore[no-untyped-def]
    words,
    point,
    prepared,
    WORD: tl.constexpr,
    START: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    SPAN: tl.constexpr,
    ASM: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Sum over a lane's 16 codes, words WORD on, of (code - zero) times prepared values, START on; float32 (LANES,).

    SPAN of them, 8 or 16, have a sum and a scale of their own: sums stand behind the bytes, then scales.
    """
    middle: tl.constexpr = 8 if KIND == "int4" else 128
    spans: tl.constexpr = 16 // SPAN
    result = tl.zeros(words[WORD].shape, tl.float32)
    for span in tl.static_range(spans):
        total, scale = prepared[START + 8 + span], prepared[START + 8 + spans + span]
        low = total * 0 if ZEROS else total * (-middle)
        high = total * 0
        for quarter in tl.static_range(4 * span // spans, 4 * (span + 1) // spans):
            if KIND == "int4":
                word = words[WORD + quarter // 2]
                four = (word >> (4 * (quarter % 2))) & 0x0F0F0F0F
            else:
                four = words[WORD + quarter]
            one, two = prepared[START + 2 * quarter], prepared[START + 2 * quarter + 1]
            if HALVES:
                low = product(four, two, product(four, one, low, "dp2a.lo", ASM), "dp2a.hi", ASM)
            else:
                low = product(four, one, low, "dp4a", ASM)
                high = product(four, two, high, "dp4a", ASM)
        part = (low if HALVES else low + (high << 8)).to(tl.float32)
        if ZEROS:
            part -= point.to(tl.float32) * total.to(tl.float32)
        if span == 0:
            result = part * scale
        else:
            result += part * scale
    return result


@triton.jit
def _from_fp8(code):  # type: ignore[no-untyped-def]
    """e4m3 in the lowest 8 bits, as float32 over 256: its bits are those of a float16 of a smaller exponent."""
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _dot16_fp8(words, values, WORD: tl.constexpr, START: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum over a lane's 16 codes, words WORD on, of code times values, START on; float32 (LANES,)."""
    total = _from_fp8(words[WORD]) * values[START]
    for place in tl.static_range(1, 16):
        total += _from_fp8(words[WORD + place // 4] >> (8 * (place % 4))) * values[START + place]
    return total * 256.0


@triton.jit
def _sum_lanes(sums, ROWS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over lanes of ROWS tensors (LANES,) or (GROUPS, LANES), reduced together: (ROWS,) or (GROUPS, ROWS)."""
    tl.static_assert(ROWS <= 16 and ROWS & (ROWS - 1) == 0)
    shape: tl.constexpr = (LANES, ROWS) if GROUPS == 1 else (GROUPS, LANES, ROWS)
    if ROWS == 1:
        joined = tl.reshape(sums[0], shape)
    else:
        joined = tl.reshape(_joined(sums, 0, 1, ROWS), shape)
    return tl.sum(joined, axis=0 if GROUPS == 1 else 1)


@triton.jit
def _joined(sums, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """COUNT of the tensors, every STEP-th from FIRST on, as (LANES, 2, 2, ...) whose last dimension turns fastest."""
    if COUNT == 2:
        return tl.join(sums[FIRST], sums[FIRST + STEP])
    else:
        even = _joined(sums, FIRST, 2 * STEP, COUNT // 2)
        odd = _joined(sums, FIRST + STEP, 2 * STEP, COUNT // 2)
        return tl.join(even, odd)
