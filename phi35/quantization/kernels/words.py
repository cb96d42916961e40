"""What the one-token kernels load and hold: words of codes, the vector.

A lane owns 16 columns at a time: two 32-bit words of eight 4-bit codes, or four of four bytes, one vector load a row.
The vector is turned into 16-bit integers, with a scale for a lane's 16 columns or for each eight (``prepared``); sums
with integer codes are exact in 32 bits. The rounding of a value is at most 2^-16 of the largest of its neighbours, less
than that of bfloat16. e4m3 codes become float32 through the bits of a float16.

Instructions decide, not bandwidth alone: at 4 bits an H200 has time for seven a weight and lane at its memory's full
rate, of every kind; these take about two, the vector included.
"""

import triton
import triton.language as tl

from phi35.quantization.kernels.integers import prepared_integers


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
def places(first, ROWS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of a program's rows from ``first`` on, in the shape of their products: (ROWS,) or (GROUPS, ROWS)."""
    if GROUPS == 1:
        return first + tl.arange(0, ROWS)
    else:
        return first + tl.arange(0, GROUPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]


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
    HALVES: tl.constexpr = False,
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
            prepared = prepared + prepared_integers(values, factor if NORM == "rmsnorm" else 1.0, KIND, ASM, HALVES)
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
