"""One query of a head of its own over keys and values in eight bits: what ``phi35.kernels.attention`` does with codes.

Half the bytes come with as much arithmetic, so that instructions count here: a head's width is cut into powers of two
instead of padded to one (96 is 64 and 32), a byte becomes a float in one instruction, scales are applied to scores and
weights alone.
"""

import os

import triton
import triton.language as tl

from phi35.kernels.cache_codes import LIFT, decode_raw
from phi35.kernels.common import slot_offset


def widths(head_dim: int) -> dict[str, int | bool]:
    """Constants of the kernel: two powers of two that a head's width is cut into, and whether to use instructions."""
    low = 1 << (head_dim.bit_length() - 1)
    high = head_dim - low
    if high & (high - 1) or 0 < high < 16:
        low, high = 2 * low, 0
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
    return {"LOW": low, "HIGH": high, "ASM": not interpreted}


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    codes, offset, lanes, inside, FROM: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Codes (BLOCK, WIDTH) of a step's keys or values from column FROM on."""
    columns = FROM + tl.arange(0, WIDTH)
    at = offset + lanes[:, None] * HEAD_DIM + columns[None, :]
    mask = inside[:, None]
    if FROM + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(codes + at, mask=mask, other=0)


@triton.jit
def _query(query_at, scale, FROM: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = FROM + tl.arange(0, WIDTH)
    return tl.load(query_at + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32) * scale


@triton.jit
def attend_codes(  # type: ignore[no-untyped-def]
    query_at,
    keys,
    values,
    key_scales,
    value_scales,
    exponent,
    table,
    row,
    head,
    capacity,
    first,
    start,
    total,
    scale,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
):
    """Maximum (1,) and sum of weights (1,), base 2, and weighted values (1, LOW) and (1, HIGH); HIGH 0 gives none.

    Each of the BLOCK lanes of keys keeps a running softmax of its own, as in ``attention._attend_one``.
    """
    lift: tl.constexpr = LIFT if KIND == "fp8" else 1.0
    lanes = tl.arange(0, BLOCK)
    scale *= lift
    query_low = _query(query_at, scale, 0, LOW, HEAD_DIM)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    summed_low = tl.zeros((BLOCK, LOW), tl.float32)
    if HIGH > 0:
        query_high = _query(query_at, scale, LOW, HIGH, HEAD_DIM)
        summed_high = tl.zeros((BLOCK, HIGH), tl.float32)
    for step in tl.range(start, total, SPLITS * BLOCK, num_stages=STAGES):
        slots = step + lanes
        inside = (slots < total) & (slots >= first)
        offset = slot_offset(table, row, head, step, capacity, NUM_KV, HEAD_DIM, PAGE)
        scales_at = offset // HEAD_DIM + lanes
        key_low = _tile(keys, offset, lanes, inside, 0, LOW, HEAD_DIM)
        value_low = _tile(values, offset, lanes, inside, 0, LOW, HEAD_DIM)
        key_scale = tl.load(key_scales + scales_at, mask=inside, other=0.0).to(tl.float32)
        value_scale = tl.load(value_scales + scales_at, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(decode_raw(key_low, exponent, KIND, ASM) * query_low[None, :], axis=1)
        if HIGH > 0:
            key_high = _tile(keys, offset, lanes, inside, LOW, HIGH, HEAD_DIM)
            value_high = _tile(values, offset, lanes, inside, LOW, HIGH, HEAD_DIM)
            score += tl.sum(decode_raw(key_high, exponent, KIND, ASM) * query_high[None, :], axis=1)
        score = tl.where(inside, score * lift * key_scale, float("-inf"))
        higher = tl.maximum(best, score)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(best - finite)
        chance = tl.exp2(score - finite)
        weight = weight * shrink + chance
        share = chance * value_scale * lift
        summed_low = summed_low * shrink[:, None] + share[:, None] * decode_raw(value_low, exponent, KIND, ASM)
        if HIGH > 0:
            summed_high = summed_high * shrink[:, None] + share[:, None] * decode_raw(value_high, exponent, KIND, ASM)
        best = higher
    top = tl.max(best, axis=0)
    shrink = tl.exp2(best - tl.where(top == float("-inf"), 0.0, top))
    rest = shrink * lift
    one = tl.zeros((1,), tl.float32)
    best, weight = one + top, one + tl.sum(weight * shrink, axis=0)
    low = tl.sum(summed_low * rest[:, None], axis=0)[None, :]
    high = low
    if HIGH > 0:
        high = tl.sum(summed_high * rest[:, None], axis=0)[None, :]
    return best, weight, low, high
