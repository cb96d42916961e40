"""What the one-token kernels share: words of codes, the vector in bytes, products in registers.

A lane owns 16 columns at a time: two 32-bit words of eight 4-bit codes, or four of four bytes, one vector load a row.
Integer codes are multiplied four at a time (dp4a). The vector is turned into 16-bit integers for that, once a program,
with a scale for each lane's 16 columns, and cut into a high and a low byte; sums are exact in 32 bits. The rounding of
a value is at most 2^-16 of the largest of its 16 neighbours, less than that of bfloat16. e4m3 codes become float32
through the bits of a float16.

Instructions decide, not bandwidth alone: at 4 bits an H200 has time for seven a weight and lane at its memory's full
rate, of every kind; these take about two, prepared vector included.
"""

import triton
import triton.language as tl

LEVELS = tl.constexpr(32639.0)
"""The largest 16-bit integer whose high byte, rounded, is a signed byte."""

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23, in whose bits the two lowest bytes are 0."""


@triton.jit
def lanes(LANES: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of lanes within their group: (LANES,), or (GROUPS, LANES) for more than one."""
    if GROUPS == 1:
        return tl.arange(0, LANES)
    else:
        return tl.broadcast_to(tl.arange(0, LANES)[None, :], (GROUPS, LANES))


@triton.jit
def several(first, STEP: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``first`` times STEP plus 0 to COUNT - 1, along a new last dimension."""
    if GROUPS == 1:
        return first[:, None] * STEP + tl.arange(0, COUNT)[None, :]
    else:
        return first[:, :, None] * STEP + tl.arange(0, COUNT)[None, None, :]


@triton.jit
def _rows_of_groups(LANES: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which row of a program each group begins at, in the shape of ``lanes``."""
    if GROUPS == 1:
        return tl.zeros((LANES,), tl.int32)
    else:
        return tl.broadcast_to(tl.arange(0, GROUPS)[:, None] * ROWS, (GROUPS, LANES))


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
    GROUPS: tl.constexpr = 1,
):
    """Codes, scales and zero points of rows first to first + ROWS, all loads in flight at once; three flat tuples.

    Rows past the last repeat it unless EVEN. Of several GROUPS of lanes each has ROWS rows of its own, one behind the
    other.
    """
    per: tl.constexpr = 8 if KIND == "int4" else 4
    bits: tl.constexpr = 32 // per
    each: tl.constexpr = 16 // per
    lane = lanes(LANES, GROUPS)
    own = _rows_of_groups(LANES, ROWS, GROUPS)
    words = ()
    scales = ()
    points = ()
    start = tl.cast(first, tl.int64)
    for index in tl.static_range(ROWS):
        # One address for all rows, to which the constants of the others are added in the loads themselves.
        row = start + own + index if EVEN else tl.minimum(first + own + index, num_rows - 1).to(tl.int64)
        for chunk in tl.static_range((WIDTH + 16 * LANES - 1) // (16 * LANES)):
            column = (chunk * LANES + lane) * 16
            if EVEN:
                word = several(own * (WIDTH // 16) + chunk * LANES + lane, each, each, GROUPS)
                at = codes + start * (WIDTH // per) + word + index * (WIDTH // per)
                place = own * (WIDTH // GROUP) + column // GROUP
                group = scale + start * (WIDTH // GROUP) + place + index * (WIDTH // GROUP)
            else:
                at = codes + several(row * (WIDTH // 16) + chunk * LANES + lane, each, each, GROUPS)
                group = scale + row * (WIDTH // GROUP) + column // GROUP
            if (chunk + 1) * LANES * 16 <= WIDTH:
                found = tl.load(at, eviction_policy="evict_first")
                factor = tl.load(group)
            else:
                inside = several(column, 1, each, GROUPS) < WIDTH
                found = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
                factor = tl.load(group, mask=column < WIDTH, other=0)
            if each == 2:
                words = words + tl.split(found)
            else:
                words = words + split4(found, LANES, GROUPS)
            scales = scales + (factor,)  # type: ignore[assignment]
            if ZEROS:
                place = row // per * (WIDTH // GROUP) + column // GROUP
                packed = tl.load(zeros + place, mask=column < WIDTH, other=0)
                point = (packed >> (row % per * bits).to(tl.int32)) & ((1 << bits) - 1)
                points = points + (point,)  # type: ignore[assignment]
    return words, scales, points


@triton.jit
def load_halves(vector, WIDTH: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector (WIDTH,) as a tuple of (LANES, 8) tiles in its own dtype, two for each 16 columns of a lane."""
    tiles = ()
    for half in tl.static_range(2 * ((WIDTH + 16 * LANES - 1) // (16 * LANES))):
        column = _columns(half, LANES)
        if (half // 2 + 1) * LANES * 16 <= WIDTH:
            tile = tl.load(vector + column)
        else:
            tile = tl.load(vector + column, mask=column < WIDTH, other=0.0)
        tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def load_norm_halves(weight, bias, NORM: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """A norm's weight and bias in tiles; both empty where there is no norm, the bias but for "layernorm"."""
    weights = ()
    biases = ()
    if NORM != "none":
        weights = load_halves(weight, WIDTH, LANES)
    if NORM == "layernorm":
        biases = load_halves(bias, WIDTH, LANES)
    return weights, biases


@triton.jit
def _columns(half, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    return (half // 2 * LANES + tl.arange(0, LANES))[:, None] * 16 + half % 2 * 8 + tl.arange(0, 8)[None, :]


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
    ASM: tl.constexpr,
):
    """The norm of a vector in tiles, as a flat tuple of tensors (LANES,): for each chunk what ``_prepared`` gives."""
    count: tl.constexpr = 2 * ((WIDTH + 16 * LANES - 1) // (16 * LANES))
    mean = 0.0
    if NORM == "layernorm":
        total = tiles[0].to(tl.float32)
        for half in tl.static_range(1, count):
            total += tiles[half].to(tl.float32)
        mean = tl.sum(tl.sum(total, axis=1), axis=0) / WIDTH
    factor = 1.0
    if NORM != "none":
        squares = tl.zeros((LANES, 8), tl.float32)
        for half in tl.static_range(count):
            centred = tiles[half].to(tl.float32) - mean
            if (half // 2 + 1) * LANES * 16 > WIDTH:
                centred = tl.where(_columns(half, LANES) < WIDTH, centred, 0.0)
            squares += centred * centred
        factor = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / WIDTH + eps)
    prepared = ()
    for chunk in tl.static_range(count // 2):
        values = ()
        for half in tl.static_range(2 * chunk, 2 * chunk + 2):
            value = tiles[half].to(tl.float32)
            if NORM == "layernorm":
                value = (value - mean) * factor * weights[half].to(tl.float32) + biases[half].to(tl.float32)
            elif NORM != "none":
                value *= weights[half].to(tl.float32)
                if KIND == "fp8":
                    value *= factor
            values = values + split8(value, LANES)
        if KIND == "fp8":
            prepared = prepared + values
        else:
            # RMSNorm's factor goes to the scale of the integers.
            prepared = prepared + _prepared(values, factor if NORM == "rmsnorm" else 1.0, KIND, ASM)
    return prepared


@triton.jit
def split4(tile, LANES: tl.constexpr, GROUPS: tl.constexpr = 1):  # type: ignore[no-untyped-def]
    """Columns of a (LANES, 4) or (GROUPS, LANES, 4) tile."""
    shape: tl.constexpr = (LANES, 2, 2) if GROUPS == 1 else (GROUPS, LANES, 2, 2)
    even, odd = tl.split(tl.reshape(tile, shape))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def split8(tile, LANES: tl.constexpr, GROUPS: tl.constexpr = 1):  # type: ignore[no-untyped-def]
    """Columns of a (LANES, 8) or (GROUPS, LANES, 8) tile."""
    shape: tl.constexpr = (LANES, 2, 2, 2) if GROUPS == 1 else (GROUPS, LANES, 2, 2, 2)
    even, odd = tl.split(tl.reshape(tile, shape))
    a, b = tl.split(even)
    c, d = tl.split(odd)
    v0, v4 = tl.split(a)
    v2, v6 = tl.split(b)
    v1, v5 = tl.split(c)
    v3, v7 = tl.split(d)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _prepared(values, factor, KIND: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """16 values of a lane as integers: the bytes of four at a time, low and high, in the order in which codes come.

    Then their sum and their scale, times ``factor``.
    """
    largest = tl.abs(values[0])
    for place in tl.static_range(1, 16):
        largest = tl.maximum(largest, tl.abs(values[place]), propagate_nan=tl.PropagateNan.ALL)
    # What is no number, or infinite, has a scale of its kind and no inverse.
    inverse = tl.where((largest > 1e-30) & (largest < float("inf")), LEVELS / largest, 0.0)
    if KIND == "int4":
        # Of 8 codes in a word the even ones come first, as one mask finds them.
        packed = _bytes(values, inverse, 0, 2, ASM) + _bytes(values, inverse, 1, 2, ASM)
        packed = packed + _bytes(values, inverse, 8, 2, ASM) + _bytes(values, inverse, 9, 2, ASM)
    else:
        packed = _bytes(values, inverse, 0, 1, ASM) + _bytes(values, inverse, 4, 1, ASM)
        packed = packed + _bytes(values, inverse, 8, 1, ASM) + _bytes(values, inverse, 12, 1, ASM)
    low = packed[0] * 0
    high = packed[0] * 0
    ones = low + 0x01010101
    for quarter in tl.static_range(4):
        low = _dot4(ones, packed[2 * quarter], low, ASM)
        high = _dot4(ones, packed[2 * quarter + 1], high, ASM)
    return packed + (low + (high << 8), largest * factor / LEVELS)


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
def _dot4(codes, values, total, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """total plus the products of four unsigned bytes with four signed ones."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, values, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for place in tl.static_range(4):
            total += ((codes >> (8 * place)) & 255) * ((values << (24 - 8 * place)) >> 24)
        return total


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
            low = _dot4(four, prepared[START + 2 * quarter], low, ASM)
            high = _dot4(four, prepared[START + 2 * quarter + 1], high, ASM)
        part = (low + (high << 8)).to(tl.float32)
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
):
    """Products (GROUPS * ROWS,) float32 of held rows with a prepared vector, SPAN of whose values share a scale."""
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
                part = _dot16(words, point, prepared, (row * count + chunk) * each, chunk * per, KIND, ZEROS, SPAN, ASM)
            total += part * scales[row * count + chunk].to(tl.float32)
        sums = sums + (total,)  # type: ignore[assignment]
    result = _sum_lanes(sums, ROWS, LANES, GROUPS)
    if BYTES:
        rows = tl.minimum(first + tl.arange(0, GROUPS * ROWS), num_rows - 1)
        result *= tl.load(row_scale + rows)
    return result


@triton.jit
def _sum_lanes(sums, ROWS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over lanes of ROWS tensors (LANES,) or (GROUPS, LANES), reduced together: (GROUPS * ROWS,)."""
    tl.static_assert(ROWS <= 16 and ROWS & (ROWS - 1) == 0)
    shape: tl.constexpr = (LANES, ROWS) if GROUPS == 1 else (GROUPS, LANES, ROWS)
    if ROWS == 1:
        joined = tl.reshape(sums[0], shape)
    else:
        joined = tl.reshape(_joined(sums, 0, 1, ROWS), shape)
    if GROUPS == 1:
        return tl.sum(joined, axis=0)
    else:
        return tl.reshape(tl.sum(joined, axis=1), (GROUPS * ROWS,))


@triton.jit
def _joined(sums, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """COUNT of the tensors, every STEP-th from FIRST on, as (LANES, 2, 2, ...) whose last dimension turns fastest."""
    if COUNT == 2:
        return tl.join(sums[FIRST], sums[FIRST + STEP])
    else:
        even = _joined(sums, FIRST, 2 * STEP, COUNT // 2)
        odd = _joined(sums, FIRST + STEP, 2 * STEP, COUNT // 2)
        return tl.join(even, odd)
