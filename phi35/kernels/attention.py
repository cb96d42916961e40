"""Attention of one new token a row over a preallocated cache, the keys of a head split over programs.

Flash-decoding: each program takes a part of a row's keys, and the program of a head that finishes last adds the
parts, so that no further kernel is needed. Lengths are read on the device; the number of splits is fixed, so that the
launch does not depend on them. Tokens side by side that share a row's keys (``LayerCache.repeats``) are taken by the
same programs, so that the keys are read once.
"""

import torch
import triton
import triton.language as tl

from phi35.kernels import coded_attention
from phi35.kernels.cache_codes import EXPONENT, decode, scales_of
from phi35.kernels.coded_attention import attend_codes
from phi35.kernels.common import launch_options, prefetch, slot_offset, wait_for_predecessor
from phi35.kernels.configs import AttentionConfig
from phi35.kernels.operands import LayerCache

PREFETCHED_STEPS = 3
"""Steps whose keys and values a program asks for before it waits."""


class AttentionScratch:
    """What the parts of a head leave for the last program: float32 sums, scales, and arrival counts (zero between)."""

    def __init__(self, batch: int, num_kv: int, group: int, head_dim: int, splits: int, device: torch.device) -> None:
        parts = batch * num_kv * splits * group
        self.sums = torch.empty(parts * head_dim, dtype=torch.float32, device=device)
        self.scales = torch.empty(parts * 2, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(batch * num_kv, dtype=torch.int32, device=device)


def attend(
    query: torch.Tensor,
    cache: LayerCache,
    lengths: torch.Tensor,
    out: torch.Tensor,
    scratch: AttentionScratch,
    sliding_window: int | None,
    config: AttentionConfig,
    pdl: bool,
    ahead: tuple[torch.Tensor, ...] = (),
) -> None:
    """Attend from one token a row, whose own key and value are already stored.

    Args:
        query: (B, H d), rotated.
        cache: of B rows; pages hold whole steps of keys. With ``repeats`` R, R rows side by side have the same keys.
        lengths: (B,) int64, slot of each row's new token; a longer row reads as a full one.
        out: (B, H d), written.
        scratch: made for the same sizes and splits.
        sliding_window: keys a token sees, itself among them; None for all.
        config: shape of a program.
        pdl: launch programmatically.
        ahead: up to three contiguous tensors (weights of the kernels to come) that are brought into the second-level
            cache meanwhile: attention over few keys leaves the memory idle.
    """
    batch, num_kv, head_dim, slots = query.shape[0], cache.num_kv, cache.head_dim, cache.num_slots
    assert cache.page_size % config.block == 0
    group, tokens = query.shape[1] // head_dim // num_kv, cache.repeats
    assert batch % tokens == 0
    asked = [(tensor, tensor.nbytes) for tensor in ahead] + [(query, 0)] * (3 - len(ahead))
    _attend_kernel[(config.splits, num_kv, batch // tokens)](
        query,
        cache.keys,
        cache.values,
        *scales_of(cache),
        cache.keys if cache.table is None else cache.table,
        lengths,
        out,
        scratch.sums,
        scratch.scales,
        scratch.arrived,
        slots - 1,
        head_dim**-0.5,
        EXPONENT,
        *(tensor for tensor, _ in asked),
        *(num_bytes for _, num_bytes in asked),
        NUM_KV=num_kv,
        GROUP=group,
        TOKENS=tokens,
        PADDED_TOKENS=triton.next_power_of_2(tokens),
        PADDED_GROUP=max(16, triton.next_power_of_2(group * tokens)),
        HEAD_DIM=head_dim,
        PADDED_DIM=max(16, triton.next_power_of_2(head_dim)),
        SPLITS=config.splits,
        PADDED_SPLITS=triton.next_power_of_2(config.splits),
        BLOCK=config.block,
        PAGE=cache.page_size,
        STAGES=config.num_stages,
        WINDOW=sliding_window if sliding_window is not None and sliding_window < slots else 0,
        PREFETCHED=PREFETCHED_STEPS,
        PARTS=config.splits * num_kv * (batch // tokens),
        LANES=config.num_warps * 32,
        AHEAD=len(ahead),
        KIND=cache.kind or "none",
        **coded_attention.widths(head_dim),
        **launch_options(config.num_warps, pdl),
    )


@triton.jit(do_not_specialize=["capacity"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    lengths,
    out,
    sums,
    scales,
    arrived,
    capacity,
    softmax_scale,
    exponent,
    ahead_a,
    ahead_b,
    ahead_c,
    bytes_a,
    bytes_b,
    bytes_c,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED_TOKENS: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    PREFETCHED: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
    KIND: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) * TOKENS
    # Written by the sampler at the end of the previous step.
    if TOKENS == 1:
        total = tl.minimum(tl.load(lengths + row), capacity).to(tl.int32) + 1
        first = tl.maximum(total - WINDOW, 0) if WINDOW else 0
    else:
        tokens = tl.arange(0, PADDED_TOKENS)
        last = tl.load(lengths + row + tokens, mask=tokens < TOKENS, other=0)
        total = tl.minimum(tl.max(last, axis=0), capacity).to(tl.int32) + 1
        earliest = tl.min(tl.where(tokens < TOKENS, last, capacity), axis=0)
        first = tl.maximum(tl.minimum(earliest, capacity).to(tl.int32) + 1 - WINDOW, 0) if WINDOW else 0
    # The programs of a head take turns, step by step, so that together they walk through memory: with a stretch each,
    # all of a long cache's memory pages would be wanted at once. Steps begin at multiples of BLOCK: none reaches into
    # two pages of a paged cache.
    start = first // BLOCK * BLOCK + split * BLOCK
    place = tl.program_id(2).to(tl.int64) * NUM_KV + head
    if PDL:
        itemsize: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth // 8
        for step in tl.static_range(PREFETCHED):
            slot = start + step * SPLITS * BLOCK
            num_bytes = tl.minimum(tl.maximum(total - slot, 0), BLOCK) * (HEAD_DIM * itemsize)
            offset = slot_offset(table, row, head, tl.minimum(slot, capacity), capacity, NUM_KV, HEAD_DIM, PAGE)
            prefetch(keys + offset, num_bytes, 0, 1, LANES)
            prefetch(values + offset, num_bytes, 0, 1, LANES)
        part = (tl.program_id(2) * NUM_KV + head) * SPLITS + split
        if AHEAD > 0:
            prefetch(ahead_a, bytes_a, part, PARTS, LANES)
        if AHEAD > 1:
            prefetch(ahead_b, bytes_b, part, PARTS, LANES)
        if AHEAD > 2:
            prefetch(ahead_c, bytes_c, part, PARTS, LANES)
    wait_for_predecessor(PDL)
    scale = softmax_scale * 1.4426950408889634
    if GROUP * TOKENS == 1 and KIND == "none":
        best, weight, summed = _attend_one(
            query + place * HEAD_DIM,
            keys,
            values,
            table,
            row,
            head,
            capacity,
            first,
            start,
            total,
            scale,
            NUM_KV,
            HEAD_DIM,
            PADDED_DIM,
            BLOCK,
            PAGE,
            SPLITS,
            STAGES,
        )
    elif GROUP * TOKENS == 1:
        best, weight, summed, high = attend_codes(
            query + place * HEAD_DIM,
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
            NUM_KV,
            HEAD_DIM,
            LOW,
            HIGH,
            BLOCK,
            PAGE,
            SPLITS,
            STAGES,
            KIND,
            ASM,
        )
    else:
        best, weight, summed = _attend_group(
            query,
            lengths,
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
            NUM_KV,
            GROUP,
            TOKENS,
            PADDED_GROUP,
            WINDOW,
            HEAD_DIM,
            PADDED_DIM,
            BLOCK,
            PAGE,
            SPLITS,
            STAGES,
            KIND,
        )
    members = tl.arange(0, 1 if GROUP * TOKENS == 1 else PADDED_GROUP)
    shape: tl.constexpr = (NUM_KV, GROUP, TOKENS, HEAD_DIM, SPLITS)
    if GROUP * TOKENS == 1 and KIND != "none":
        _leave(out, sums, place, row, head, split, members, weight, summed, 0, LOW, shape)
        if HIGH > 0:
            _leave(out, sums, place, row, head, split, members, weight, high, LOW, HIGH, shape)
    else:
        _leave(out, sums, place, row, head, split, members, weight, summed, 0, PADDED_DIM, shape)
    if SPLITS > 1:
        part = (place * SPLITS + split) * (GROUP * TOKENS) + members
        tl.store(scales + part * 2, best, mask=members < GROUP * TOKENS)
        tl.store(scales + part * 2 + 1, weight, mask=members < GROUP * TOKENS)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + place, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            tl.store(arrived + place, 0)
            _add_parts(
                out,
                sums,
                scales,
                place,
                row,
                head,
                NUM_KV,
                GROUP,
                TOKENS,
                HEAD_DIM,
                PADDED_DIM,
                SPLITS,
                PADDED_SPLITS,
            )


@triton.jit
def _leave(  # type: ignore[no-untyped-def]
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
        at = _head_at(row, head, members, NUM_KV, GROUP)[:, None] * HEAD_DIM + columns[None, :]
        tl.store(out + at, (summed / weight[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        part = (place * SPLITS + split) * (GROUP * TOKENS) + members
        tl.store(sums + part[:, None] * HEAD_DIM + columns[None, :], summed, mask=mask)


@triton.jit
def _head_at(row, head, members, NUM_KV: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which head of all queries a member is: the queries of a head of keys, token after token from ``row`` on."""
    token = row + members // GROUP
    return (tl.cast(token, tl.int64) * NUM_KV + head) * GROUP + members % GROUP


@triton.jit
def _attend_one(  # type: ignore[no-untyped-def]
    query_at,
    keys,
    values,
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
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One query of a head of its own: maximum (1,), sum of weights (1,) and weighted values (1, d), base 2.

    Each of the BLOCK lanes of keys keeps a running softmax of its own, so that the loop needs no exchange between
    them; they are joined once at the end.
    """
    dims = tl.arange(0, PADDED_DIM)
    inside_dims = (dims < HEAD_DIM)[None, :]
    lanes = tl.arange(0, BLOCK)
    scaled = tl.load(query_at + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32) * scale
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    summed = tl.zeros((BLOCK, PADDED_DIM), tl.float32)
    for step in tl.range(start, total, SPLITS * BLOCK, num_stages=STAGES):
        slots = step + lanes
        inside = (slots < total) & (slots >= first)
        offset = slot_offset(table, row, head, step, capacity, NUM_KV, HEAD_DIM, PAGE)
        at = offset + lanes[:, None] * HEAD_DIM + dims[None, :]
        mask = inside[:, None] & inside_dims
        key = tl.load(keys + at, mask=mask, other=0)
        value = tl.load(values + at, mask=mask, other=0)
        score = tl.sum(key.to(tl.float32) * scaled[None, :], axis=1)
        score = tl.where(inside, score, float("-inf"))
        higher = tl.maximum(best, score)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(best - finite)
        chance = tl.exp2(score - finite)
        weight = weight * shrink + chance
        summed = summed * shrink[:, None] + chance[:, None] * value.to(tl.float32)
        best = higher
    top = tl.max(best, axis=0)
    shrink = tl.exp2(best - tl.where(top == float("-inf"), 0.0, top))
    joined = tl.sum(summed * shrink[:, None], axis=0)
    one = tl.zeros((1,), tl.float32)
    return one + top, one + tl.sum(weight * shrink, axis=0), joined[None, :]


@triton.jit
def _attend_group(  # type: ignore[no-untyped-def]
    query,
    lengths,
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
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
):
    """The queries that share a head of keys, on the matrix units: maxima (g,), sums (g,), weighted values (g, d)."""
    members, dims, lanes = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK)
    mask = (members < GROUP * TOKENS)[:, None] & (dims < HEAD_DIM)[None, :]
    heads = _head_at(row, head, members, NUM_KV, GROUP)
    queries = tl.load(query + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    if TOKENS > 1:
        last = tl.load(lengths + row + members // GROUP, mask=members < GROUP * TOKENS, other=0)
        totals = tl.minimum(last, capacity).to(tl.int32) + 1
    best = tl.full((PADDED_GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((PADDED_GROUP,), tl.float32)
    summed = tl.zeros((PADDED_GROUP, PADDED_DIM), tl.float32)
    for step in tl.range(start, total, SPLITS * BLOCK, num_stages=STAGES):
        slots = step + lanes
        inside = (slots < total) & (slots >= first)
        real = inside[:, None] & (dims < HEAD_DIM)[None, :]
        offset = slot_offset(table, row, head, step, capacity, NUM_KV, HEAD_DIM, PAGE)
        at = offset + lanes[:, None] * HEAD_DIM + dims[None, :]
        key = tl.load(keys + at, mask=real, other=0)
        value = tl.load(values + at, mask=real, other=0)
        if KIND != "none":
            # Codes are exact in the queries' dtype; scales stay in float32.
            key = decode(key, exponent, KIND).to(queries.dtype)
            value = decode(value, exponent, KIND).to(queries.dtype)
        score = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        if KIND != "none":
            scales_at = offset // HEAD_DIM + lanes
            score *= tl.load(key_scales + scales_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        seen = inside[None, :]
        if TOKENS > 1:
            seen = seen & (slots[None, :] < totals[:, None])
            if WINDOW:
                seen = seen & (slots[None, :] >= totals[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, axis=1))
        # A step may lie before the window; then nothing has been seen yet.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(best - finite)
        chance = tl.exp2(score - finite[:, None])
        weight = weight * shrink + tl.sum(chance, axis=1)
        if KIND != "none":
            chance *= tl.load(value_scales + scales_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        summed = tl.dot(chance.to(value.dtype), value, summed * shrink[:, None], input_precision="ieee")
        best = higher
    return best, weight, summed


@triton.jit
def _add_parts(  # type: ignore[no-untyped-def]
    out,
    sums,
    scales,
    place,
    row,
    head,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """Add the parts of a head; the reads go past the first-level cache, which may hold older values."""
    dims, parts = tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_SPLITS)
    for member in tl.static_range(GROUP * TOKENS):
        part = (place * SPLITS + parts) * (GROUP * TOKENS) + member
        real = parts < SPLITS
        best = tl.load(scales + part * 2, mask=real, other=float("-inf"), cache_modifier=".cg")
        weight = tl.load(scales + part * 2 + 1, mask=real, other=0.0, cache_modifier=".cg")
        mask = real[:, None] & (dims < HEAD_DIM)[None, :]
        part_sums = tl.load(sums + part[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        shrink = tl.exp2(best - tl.max(best, axis=0))
        total = tl.sum(part_sums * shrink[:, None], axis=0) / tl.sum(weight * shrink, axis=0)
        at = _head_at(row, head, member, NUM_KV, GROUP) * HEAD_DIM + dims
        tl.store(out + at, total.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
