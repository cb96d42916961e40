"""Vectors that one kernel leaves as integers for the next, so that its programs need not make them again.

A one-token kernel multiplies codes with 16-bit integers (``words``). Made anew by every program they cost as much as
half of the product, all of it after the wait for the predecessor. So a kernel that owns eight rows or more of the
vector leaves them as integers, with a scale for every eight, times the weight of the RMSNorm that comes next; the
norm's own factor multiplies the finished products, from sums of squares that each program leaves beside.

One int32 buffer holds a vector of W values: for each 16 of them eight words of bytes, in the order in which codes come
(W/2 words in all); then for each 16 two sums and the bits of two scales (W/4); then sums of squares, one a program.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from phi35.kernels.operands import Norm
from phi35.quantization.kernels.shapes import SPAN
from phi35.quantization.kernels.words import (
    LEVELS,
    ROUND,
    lanes,
    load_halves,
    load_norm_halves,
    several,
    split4,
    spread,
)

_SPAN = tl.constexpr(SPAN)


@dataclass(frozen=True)
class Prepared:
    """A vector as integers.

    Attributes:
        buffer: (``buffer_words(W)``,) int32.
        kind: of the codes that it will meet, "int4" or "int8".
        norm: RMSNorm whose weight is in the values; None for none.
        parts: sums of squares that stand in it; 0 without a norm.
    """

    buffer: torch.Tensor
    kind: str
    norm: Norm | None
    parts: int


def buffer_words(width: int) -> int:
    """int32 words that hold a vector."""
    return width // 2 + width // 4 + width // SPAN


def reading(source: Prepared | None, unused: torch.Tensor) -> dict[str, Any]:
    """Arguments of a kernel that takes its vector from a buffer, or from the vector itself."""
    parts = 0 if source is None else source.parts
    return {
        "prepared": unused if source is None else source.buffer,
        "PREPARED": source is not None,
        "PARTS": parts,
        "PADDED_PARTS": triton.next_power_of_2(max(1, parts)),
    }


def leaving(target: Prepared | None, unused: torch.Tensor) -> dict[str, Any]:
    """Arguments of a kernel that leaves its result so, or does not."""
    return {
        "left": unused if target is None else target.buffer,
        "left_norm": unused if target is None or target.norm is None else target.norm.weight,
        "LEFT": "none" if target is None else target.kind,
        "LEFT_NORM": target is not None and target.norm is not None,
    }


@triton.jit
def take_vector(  # type: ignore[no-untyped-def]
    vector,
    prepared,
    norms,
    norm_biases,
    eps,
    PREPARED: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """What ``dot_rows`` multiplies, and what is to multiply its products: from a buffer or from the vector itself."""
    if PREPARED:
        return _load(prepared, WIDTH, LANES, GROUPS), _norm_factor(prepared, eps, WIDTH, PARTS, PADDED_PARTS)
    else:
        tl.static_assert(GROUPS == 1)
        return spread(load_halves(vector, WIDTH, LANES), norms, norm_biases, eps, NORM, WIDTH, LANES, KIND, ASM), 1.0


@triton.jit
def take_norm(weight, bias, PREPARED: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """``load_norm_halves`` of what ``take_vector`` needs."""
    return load_norm_halves(weight, bias, "none" if PREPARED else NORM, WIDTH, LANES)


@triton.jit
def _load(prepared, WIDTH: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A flat tuple of tensors in the shape of ``lanes``: for each chunk eight words, two sums, two scales."""
    lane = lanes(LANES, GROUPS)
    places = ()
    for chunk in tl.static_range((WIDTH + 16 * LANES - 1) // (16 * LANES)):
        group = chunk * LANES + lane
        # 16 bytes a lane and load: of more, Triton would give a lane's part to its neighbour.
        for quarter in tl.static_range(3):
            if quarter < 2:
                at = prepared + quarter * 4 + several(group, 8, 4, GROUPS)
            else:
                at = prepared + WIDTH // 2 + several(group, 4, 4, GROUPS)
            if (chunk + 1) * LANES * 16 <= WIDTH:
                tile = tl.load(at)
            else:
                tile = tl.load(at, mask=several(group, 4, 4, GROUPS) < WIDTH // 4, other=0)
            if quarter < 2:
                places = places + split4(tile, LANES, GROUPS)
            else:
                sum_a, sum_b, scale_a, scale_b = split4(tile, LANES, GROUPS)
                scales = (scale_a.to(tl.float32, bitcast=True), scale_b.to(tl.float32, bitcast=True))
                places = places + (sum_a, sum_b) + scales  # type: ignore[assignment]
    return places


@triton.jit
def _norm_factor(prepared, eps, WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """RMSNorm's factor from PARTS sums of squares; 1 without them."""
    if PARTS == 0:
        return 1.0
    else:
        part = tl.arange(0, PADDED_PARTS)
        squares = tl.load(prepared + WIDTH // 2 + WIDTH // 4 + part, mask=part < PARTS, other=0)
        return 1.0 / tl.sqrt(tl.sum(squares.to(tl.float32, bitcast=True), axis=0) / WIDTH + eps)


@triton.jit
def left_norms(norm_weight, first, ROWS: tl.constexpr, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The next norm's weight for ``leave_vector``, (ROWS / 8, 8); loaded before the wait. 1 without NORM."""
    if NORM:
        column = first + tl.arange(0, ROWS // _SPAN)[:, None] * _SPAN + tl.arange(0, _SPAN)[None, :]
        return tl.load(norm_weight + column).to(tl.float32)
    else:
        return 1.0


@triton.jit
def leave_vector(  # type: ignore[no-untyped-def]
    prepared,
    values,
    norms,
    first,
    part,
    width,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
):
    """Leave values (ROWS,) float32, columns ``first`` on of ``width``, for codes of KIND; with NORM times ``norms``.

    ``first`` and ROWS are multiples of eight. ``part`` numbers the program, for its sum of squares.
    """
    spans: tl.constexpr = ROWS // _SPAN
    place = tl.arange(0, _SPAN)[None, :]
    column = first + tl.arange(0, spans)[:, None] * _SPAN + place
    wide = tl.reshape(values, (spans, _SPAN))
    if NORM:
        squares = tl.sum(tl.sum(wide * wide, axis=1), axis=0)
        tl.store(prepared + width // 2 + width // 4 + part, squares.to(tl.int32, bitcast=True))
        wide *= norms
    largest, total = tl.max(tl.abs(wide), axis=1), tl.sum(wide, axis=1)
    # A maximum passes over what is no number, a sum does not.
    largest = tl.where(total == total, largest, total)
    inverse = tl.where((largest > 1e-30) & (largest < float("inf")), LEVELS / largest, 0.0)
    scaled = wide * inverse[:, None]
    low = (scaled + ROUND).to(tl.int32, bitcast=True)
    high = (scaled + (ROUND + 128.0)).to(tl.int32, bitcast=True) >> 8
    half = column // _SPAN % 2
    if KIND == "int4":
        byte = (half * 2 + place % 2) * 8 + place // 2
    else:
        byte = (half * 2 + place // 4) * 8 + place % 4
    at = prepared.to(tl.pointer_type(tl.int8), bitcast=True) + column // 16 * 32 + byte
    tl.store(at, low.to(tl.int8))
    tl.store(at + 4, high.to(tl.int8))
    span = first + tl.arange(0, spans) * _SPAN
    end = prepared + width // 2 + span // 16 * 4 + span // _SPAN % 2
    tl.store(end, tl.sum((low << 16) >> 16, axis=1))
    tl.store(end + 2, (largest / LEVELS).to(tl.int32, bitcast=True))
