"""What the programs of one head's attention leave for the last of them, which adds it up."""

import triton
import triton.language as tl

from phi35.quantization.kernels.prepared import leave_vector


@triton.jit
def leave_part(  # type: ignore[no-untyped-def]
    out,
    sums,
    place,
    row,
    head,
    split,
    members,
    weight,
    summed,
    FROM: tl.constexpr,
    WIDTH: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Store columns FROM on of the weighted values: for the program that adds the parts, or divided where none does."""
    NUM_KV: tl.constexpr = SHAPE[0]
    GROUP: tl.constexpr = SHAPE[1]
    TOKENS: tl.constexpr = SHAPE[2]
    HEAD_DIM: tl.constexpr = SHAPE[3]
    SPLITS: tl.constexpr = SHAPE[4]
    columns = FROM + tl.arange(0, WIDTH)
    mask = (members < GROUP * TOKENS)[:, None] & (columns < HEAD_DIM)[None, :]
    if SPLITS == 1:
        at = head_at(row, head, members, NUM_KV, GROUP)[:, None] * HEAD_DIM + columns[None, :]
        tl.store(out + at, (summed / weight[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        part = (place * SPLITS + split) * (GROUP * TOKENS) + members
        tl.store(sums + part[:, None] * HEAD_DIM + columns[None, :], summed, mask=mask)


@triton.jit
def head_at(row, head, members, NUM_KV: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which head of all queries a member is: the queries of a head of keys, token after token from ``row`` on."""
    token = row + members // GROUP
    return (tl.cast(token, tl.int64) * NUM_KV + head) * GROUP + members % GROUP


@triton.jit
def add_parts(  # type: ignore[no-untyped-def]
    out,
    left,
    sums,
    scales,
    place,
    row,
    head,
    LEFT: tl.constexpr,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """Add the parts of a head; the reads go past the first-level cache, which may hold older values.

    With LEFT ("int4", "int8") the result goes to ``left`` alone, as integers for a product with such codes.
    """
    dims, parts = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    width: tl.constexpr = NUM_KV * GROUP * HEAD_DIM
    for member in tl.static_range(GROUP * TOKENS):
        part = (place * SPLITS + parts) * (GROUP * TOKENS) + member
        real = parts < SPLITS
        best = tl.load(scales + part * 2, mask=real, other=float("-inf"), cache_modifier=".cg")
        weight = tl.load(scales + part * 2 + 1, mask=real, other=0.0, cache_modifier=".cg")
        mask = real[:, None] & (dims < HEAD_DIM)[None, :]
        part_sums = tl.load(sums + part[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        shrink = tl.exp2(best - tl.max(best, axis=0))
        total = tl.sum(part_sums * shrink[:, None], axis=0) / tl.sum(weight * shrink, axis=0)
        first = head_at(row, head, member, NUM_KV, GROUP) * HEAD_DIM
        rounded = total.to(out.dtype.element_ty)
        if LEFT == "none":
            tl.store(out + first + dims, rounded, mask=dims < HEAD_DIM)
        else:
            value = rounded.to(tl.float32)
            leave_vector(left, value, 1.0, first.to(tl.int32), 0, width, PADDED_DIM, HEAD_DIM, LEFT, False)
