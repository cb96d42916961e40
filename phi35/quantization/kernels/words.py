"""What the one-token kernels share: words of codes, the vector spread over their places, products in registers.

A lane owns one 32-bit word of a row at a time, eight codes of 4 bits or four of 8, so that loads are coalesced and the
vector is spread once for all rows of a program: value c of a word meets the code in place c. A code becomes a float
without a conversion: put into the lowest bits of the mantissa of 2^23 it gives 2^23 + code, from which 2^23 + zero is
subtracted; put into high bits of the mantissa of 1 it gives 1 + code / 2^k, and what is too much, the vector's sum, is
subtracted once a word. Codes stay where they are in the word: instead of their being shifted, the vector's values are
scaled. Products are exact in float32 up to 2^11 times the rounding of a sum, that is to about 3e-5.

The two exponents come as arguments: as constants, the compiler takes two instructions to mask a code and to set them.
"""

import triton
import triton.language as tl

EXPONENTS = (0x4B000000, 0x3F800000)
"""Bits of 2^23 and of 1, the last two operands of every kernel."""

_BASE = tl.constexpr(8388608.0)


@triton.jit
def hold_rows(  # type: ignore[no-untyped-def]
    codes,
    scale,
    zeros,
    first,
    num_rows,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Codes, scales and zero points of rows first to first + ROWS, all loads in flight at once; three flat tuples.

    Rows past the last repeat it unless EVEN.
    """
    per: tl.constexpr = 8 if KIND == "int4" else 4
    bits: tl.constexpr = 32 // per
    count: tl.constexpr = (WIDTH // per + LANES - 1) // LANES
    words = ()
    scales = ()
    points = ()
    for index in tl.static_range(ROWS):
        row = first + index if EVEN else tl.minimum(first + index, num_rows - 1)
        for chunk in tl.static_range(count):
            word = chunk * LANES + tl.arange(0, LANES)
            group = word * per // GROUP
            if (chunk + 1) * LANES <= WIDTH // per:
                found = tl.load(codes + row * (WIDTH // per) + word, eviction_policy="evict_first")
                factor = tl.load(scale + row * (WIDTH // GROUP) + group)
            else:
                inside = word < WIDTH // per
                found = tl.load(
                    codes + row * (WIDTH // per) + word, mask=inside, other=0, eviction_policy="evict_first"
                )
                factor = tl.load(scale + row * (WIDTH // GROUP) + group, mask=inside, other=0)
            words = words + (found,)  # type: ignore[assignment]
            scales = scales + (factor,)  # type: ignore[assignment]
            if ZEROS:
                inside = word < WIDTH // per
                packed = tl.load(zeros + row // per * (WIDTH // GROUP) + group, mask=inside, other=0)
                point = (packed >> (row % per * bits)) & ((1 << bits) - 1)
                points = points + (point,)  # type: ignore[assignment]
    return words, scales, points


@triton.jit
def load_squares(vector, WIDTH: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector (WIDTH,) as a tuple of (LANES, codes per word) tiles in its own dtype; zeros past its end."""
    per: tl.constexpr = 8 if KIND == "int4" else 4
    tiles = ()
    for chunk in tl.static_range((WIDTH // per + LANES - 1) // LANES):
        word = chunk * LANES + tl.arange(0, LANES)
        at = vector + word[:, None] * per + tl.arange(0, per)[None, :]
        if (chunk + 1) * LANES <= WIDTH // per:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(word < WIDTH // per)[:, None], other=0.0)
        tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def load_norm_squares(weight, bias, NORM: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """A norm's weight and bias in tiles; both empty where there is no norm, the bias but for "layernorm"."""
    weights = ()
    biases = ()
    if NORM != "none":
        weights = load_squares(weight, WIDTH, LANES, KIND)
    if NORM == "layernorm":
        biases = load_squares(bias, WIDTH, LANES, KIND)
    return weights, biases


@triton.jit
def spread(  # type: ignore[no-untyped-def]
    tiles,
    weights,
    biases,
    eps,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """The norm of a vector in tiles, as a flat tuple of float32 tensors (LANES,): for each tile its ``_places``."""
    per: tl.constexpr = 8 if KIND == "int4" else 4
    count: tl.constexpr = (WIDTH // per + LANES - 1) // LANES
    mean = 0.0
    if NORM == "layernorm":
        total = tiles[0].to(tl.float32)
        for chunk in tl.static_range(1, count):
            total += tiles[chunk].to(tl.float32)
        mean = tl.sum(tl.sum(total, axis=1), axis=0) / WIDTH
    factor = 1.0
    if NORM != "none":
        squares = tl.zeros((LANES, per), tl.float32)
        for chunk in tl.static_range(count):
            centred = tiles[chunk].to(tl.float32) - mean
            if (chunk + 1) * LANES > WIDTH // per:
                centred = tl.where((chunk * LANES + tl.arange(0, LANES) < WIDTH // per)[:, None], centred, 0.0)
            squares += centred * centred
        factor = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / WIDTH + eps)
    places = ()
    for chunk in tl.static_range(count):
        value = tiles[chunk].to(tl.float32)
        if NORM != "none":
            value = (value - mean) * factor * weights[chunk].to(tl.float32)
        if NORM == "layernorm":
            value += biases[chunk].to(tl.float32)
        places = places + _places(value, LANES, KIND, ZEROS)
    return places


@triton.jit
def _places(value, LANES: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of a (LANES, codes per word) tile, scaled as ``_word_product`` finds their codes, and what it subtracts.

    The last two are the share of the vector that 1 + code / 2^k counts too much, and the vector's sum.
    """
    if KIND == "int4":
        even, odd = tl.split(tl.reshape(value, (LANES, 2, 2, 2)))
        a, b = tl.split(even)
        c, d = tl.split(odd)
        v0, v4 = tl.split(a)
        v2, v6 = tl.split(b)
        v1, v5 = tl.split(c)
        v3, v7 = tl.split(d)
        high = v3 + v4 + v6 + v7
        w3, w4, w6, w7 = v3 * 2048, v4 * 128, v6 * 2048, v7 * 128
        excess = (w3 + w6) + (w4 + w7)
        if not ZEROS:
            excess += 8 * high
        return (v0, v1 / 16, v2 / 256, w3, w4, v5 / 256, w6, w7, excess, v0 + v1 + v2 + v5 + high)
    else:
        even, odd = tl.split(tl.reshape(value, (LANES, 2, 2)))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        total = (v0 + v1) + (v2 + v3)
        if KIND == "int8":
            return (v0, v1 / 256, v2, v3 / 256, total, total)
        else:
            return (v0, v1, v2, v3, total, total)


@triton.jit
def _float(bits, exponent):  # type: ignore[no-untyped-def]
    return (bits | exponent).to(tl.float32, bitcast=True)


@triton.jit
def _from_fp8(code):  # type: ignore[no-untyped-def]
    """e4m3 in the lowest 8 bits, as float32 over 256: its bits are those of a float16 of a smaller exponent."""
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _word_product(  # type: ignore[no-untyped-def]
    word, point, places, large, one, START: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr
):
    """Sum over a word's codes of (code - zero) times the vector's values, places START on of the tuple."""
    if KIND == "int4":
        middle: tl.constexpr = 0 if ZEROS else 8
        high = word >> 12
        total = _float(word & 0xF0000, one) * places[START + 4] - places[START + 8]
        total += _float(high & 0xF0000, one) * places[START + 7]
        total += _float(word & 0xF000, one) * places[START + 3]
        total += _float(high & 0xF000, one) * places[START + 6]
        total += (_float(word & 0xF, large) - (_BASE + middle)) * places[START]
        total += (_float(word & 0xF0, large) - (_BASE + 16 * middle)) * places[START + 1]
        total += (_float(word & 0xF00, large) - (_BASE + 256 * middle)) * places[START + 2]
        total += (_float(high & 0xF00, large) - (_BASE + 256 * middle)) * places[START + 5]
        if ZEROS:
            total -= point.to(tl.float32) * places[START + 9]
    elif KIND == "int8":
        offset: tl.constexpr = 0 if ZEROS else 128
        high = word >> 16
        total = (_float(word & 0xFF, large) - (_BASE + offset)) * places[START]
        total += (_float(word & 0xFF00, large) - (_BASE + 256 * offset)) * places[START + 1]
        total += (_float(high & 0xFF, large) - (_BASE + offset)) * places[START + 2]
        total += (_float(high & 0xFF00, large) - (_BASE + 256 * offset)) * places[START + 3]
        if ZEROS:
            total -= point.to(tl.float32) * places[START + 5]
    else:
        total = _from_fp8(word) * places[START]
        total += _from_fp8(word >> 8) * places[START + 1]
        total += _from_fp8(word >> 16) * places[START + 2]
        total += _from_fp8(word >> 24) * places[START + 3]
        total *= 256.0
    return total


@triton.jit
def dot_rows(  # type: ignore[no-untyped-def]
    held,
    places,
    row_scale,
    large,
    one,
    first,
    num_rows,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Products (ROWS,) float32 of held rows with a vector in places."""
    words, scales, points = held
    per: tl.constexpr = 8 if KIND == "int4" else 4
    count: tl.constexpr = (WIDTH // per + LANES - 1) // LANES
    sums = ()
    for row in tl.static_range(ROWS):
        total = tl.zeros((LANES,), tl.float32)
        for chunk in tl.static_range(count):
            point = points[row * count + chunk] if ZEROS else 0
            part = _word_product(words[row * count + chunk], point, places, large, one, chunk * (per + 2), KIND, ZEROS)
            total += part * scales[row * count + chunk].to(tl.float32)
        sums = sums + (total,)  # type: ignore[assignment]
    result = _sum_lanes(sums, ROWS, LANES)
    if BYTES:
        rows = tl.minimum(first + tl.arange(0, ROWS), num_rows - 1)
        result *= tl.load(row_scale + rows)
    return result


@triton.jit
def _sum_lanes(sums, ROWS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over lanes of ROWS tensors (LANES,), reduced together: (ROWS,)."""
    tl.static_assert(ROWS <= 16 and ROWS & (ROWS - 1) == 0)
    if ROWS == 1:
        joined = tl.reshape(sums[0], (LANES, 1))
    else:
        joined = _joined(sums, 0, 1, ROWS)
    return tl.sum(tl.reshape(joined, (LANES, ROWS)), axis=0)


@triton.jit
def _joined(sums, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """COUNT of the tensors, every STEP-th from FIRST on, as (LANES, 2, 2, ...) whose last dimension turns fastest."""
    if COUNT == 2:
        return tl.join(sums[FIRST], sums[FIRST + STEP])
    else:
        even = _joined(sums, FIRST, 2 * STEP, COUNT // 2)
        odd = _joined(sums, FIRST + STEP, 2 * STEP, COUNT // 2)
        return tl.join(even, odd)
