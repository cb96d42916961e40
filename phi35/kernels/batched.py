"""A batch of tokens: what stands between the matrix products of a decoding step, which go through cuBLAS."""

import torch
import triton
import triton.language as tl

from phi35.kernels.cache_codes import EXPONENT, decode, encode, scale_of, scales_of
from phi35.kernels.common import activate, launch_options, slot_offset, wait_for_predecessor
from phi35.kernels.operands import LayerCache, Rope


def rotate_and_store(
    projected: torch.Tensor,
    rope: Rope,
    lengths: torch.Tensor,
    rope_long: torch.Tensor,
    query: torch.Tensor,
    cache: LayerCache,
    pdl: bool = False,
) -> None:
    """Rotate queries and keys at position ``lengths`` of their row and store keys and values in that slot.

    Args:
        projected: (B, W), queries, then keys, then values, bias included.
        rope: rotary tables.
        lengths: (B,) int64.
        rope_long: (B,) bool.
        query: (B, H d), written.
        cache: of B rows, one slot of each is written; a full row writes its last.
        pdl: launch programmatically.
    """
    batch, num_kv, head_dim = query.shape[0], cache.num_kv, cache.head_dim
    num_heads = query.shape[1] // head_dim
    _rotate_kernel[(num_heads + 2 * num_kv, batch)](
        projected,
        rope.inv_freq,
        rope.scaling,
        lengths,
        rope_long,
        query,
        cache.keys,
        cache.values,
        *scales_of(cache),
        cache.keys if cache.table is None else cache.table,
        cache.num_slots - 1,
        NUM_HEADS=num_heads,
        NUM_KV=num_kv,
        HALF=head_dim // 2,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2),
        PAGE=cache.page_size,
        KIND=cache.kind or "none",
        **launch_options(1, pdl),
    )


def gate_rows(gate_up: torch.Tensor, acted: torch.Tensor, hidden_act: str) -> None:
    """acted (B, F) = act(gate) * up of gate_up (B, 2F)."""
    batch, width = acted.shape
    chunk = min(1024, triton.next_power_of_2(width))
    _gate_kernel[(triton.cdiv(width, chunk), batch)](gate_up, acted, width, ACT=hidden_act, CHUNK=chunk, num_warps=4)


@triton.jit(do_not_specialize=["capacity"])
def _rotate_kernel(  # type: ignore[no-untyped-def]
    projected,
    inv_freq,
    scaling,
    lengths,
    rope_long,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    capacity,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PAGE: tl.constexpr,
    KIND: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    element = tl.arange(0, PADDED_HALF)
    inside = element < HALF
    kind = query.dtype.element_ty
    source = projected + (row * (NUM_HEADS + 2 * NUM_KV) + head) * (2 * HALF)
    low = tl.load(source + element, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF + element, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(lengths + row)
    factors = tl.load(rope_long + row).to(tl.int32)
    angle = position.to(tl.float32) * tl.load(inv_freq + factors * HALF + element, mask=inside, other=0.0)
    scale = tl.load(scaling + factors)
    turned = head < NUM_HEADS + NUM_KV
    cos = tl.where(turned, (tl.cos(angle) * scale).to(kind).to(tl.float32), 1.0)
    sin = tl.where(turned, (tl.sin(angle) * scale).to(kind).to(tl.float32), 0.0)
    slot = tl.minimum(position, capacity)
    at = slot_offset(table, row, head % NUM_KV, slot, capacity, NUM_KV, 2 * HALF, PAGE)
    first, second = (low * cos - high * sin).to(kind), (high * cos + low * sin).to(kind)
    own = query + (row * NUM_HEADS + head) * (2 * HALF)
    if KIND == "none":
        if head < NUM_HEADS:
            target = own
        elif head < NUM_HEADS + NUM_KV:
            target = keys + at
        else:
            target = values + at
        tl.store(target + element, first, mask=inside)
        tl.store(target + HALF + element, second, mask=inside)
    elif head < NUM_HEADS:
        tl.store(own + element, first, mask=inside)
        tl.store(own + HALF + element, second, mask=inside)
    else:
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        step = scale_of(tl.max(tl.maximum(tl.abs(wide_first), tl.abs(wide_second)), axis=0), KIND)
        if head < NUM_HEADS + NUM_KV:
            codes, scale_at = keys + at, key_scales + at // (2 * HALF)
        else:
            codes, scale_at = values + at, value_scales + at // (2 * HALF)
        tl.store(codes + element, encode(wide_first, step, KIND), mask=inside)
        tl.store(codes + HALF + element, encode(wide_second, step, KIND), mask=inside)
        tl.store(scale_at, step.to(key_scales.dtype.element_ty))


@triton.jit
def _gate_kernel(gate_up, acted, width, ACT: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded as the plain path rounds it.
    gate = activate(gate, ACT).to(acted.dtype.element_ty).to(tl.float32)
    tl.store(acted + row * width + columns, (gate * up).to(acted.dtype.element_ty), mask=inside)


HEADS_PER_PROGRAM = 8


def rotate_prompt(
    projected: torch.Tensor,
    rope: Rope,
    positions: torch.Tensor,
    places: torch.Tensor,
    use_long: torch.Tensor,
    cache: LayerCache,
    num_heads: int,
) -> None:
    """Rotate the queries and keys of N prompt tokens in place and store keys and values in the tokens' slots.

    Args:
        projected: (N, W), queries, then keys, then values, bias included; queries and keys are overwritten.
        rope: rotary tables.
        positions: (N,) int32 position, which is the slot, of each token.
        places: (N,) int32 row of the cache that each token belongs to.
        use_long: (N,) int32, whether the token stands under the long factors.
        cache: where to.
        num_heads: H.
    """
    num_kv, head_dim = cache.num_kv, cache.head_dim
    heads = num_heads + 2 * num_kv
    _rotate_prompt_kernel[(triton.cdiv(heads, HEADS_PER_PROGRAM), projected.shape[0])](
        projected,
        rope.inv_freq,
        rope.scaling,
        positions,
        places,
        use_long,
        cache.keys,
        cache.values,
        *scales_of(cache),
        cache.keys if cache.table is None else cache.table,
        cache.num_slots - 1,
        EXPONENT,
        NUM_HEADS=num_heads,
        NUM_KV=num_kv,
        HALF=head_dim // 2,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2),
        HEADS=HEADS_PER_PROGRAM,
        PAGE=cache.page_size,
        KIND=cache.kind or "none",
        num_warps=2,
    )


@triton.jit(do_not_specialize=["capacity"])
def _rotate_prompt_kernel(  # type: ignore[no-untyped-def]
    projected,
    inv_freq,
    scaling,
    positions,
    places,
    use_long,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    capacity,
    exponent,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    KIND: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    element = tl.arange(0, PADDED_HALF)
    real = (element < HALF)[None, :] & (head < NUM_HEADS + 2 * NUM_KV)[:, None]
    kind = projected.dtype.element_ty
    at = projected + (token * (NUM_HEADS + 2 * NUM_KV) + head[:, None]) * (2 * HALF) + element[None, :]
    low = tl.load(at, mask=real, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=real, other=0.0).to(tl.float32)
    position = tl.load(positions + token)
    factors = tl.load(use_long + token)
    angle = position.to(tl.float32) * tl.load(inv_freq + factors * HALF + element, mask=element < HALF, other=0.0)
    scale = tl.load(scaling + factors)
    # Tables are rounded as the plain path rounds them.
    cos = (tl.cos(angle) * scale).to(kind).to(tl.float32)[None, :]
    sin = (tl.sin(angle) * scale).to(kind).to(tl.float32)[None, :]
    turned = (head < NUM_HEADS + NUM_KV)[:, None]
    first = tl.where(turned, low * cos - high * sin, low).to(kind)
    second = tl.where(turned, high * cos + low * sin, high).to(kind)
    place = tl.load(places + token).to(tl.int64)
    is_key = turned & (head >= NUM_HEADS)[:, None]
    slot = slot_offset(table, place, (head % NUM_KV)[:, None], position, capacity, NUM_KV, 2 * HALF, PAGE)
    cached = slot + element[None, :]
    if KIND != "none":
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs(wide_first), tl.abs(wide_second)), axis=1)
        step = scale_of(largest, KIND)[:, None]
        code_first, code_second = encode(wide_first, step, KIND), encode(wide_second, step, KIND)
        # What attends within this chunk sees what the cache holds.
        stored = (head >= NUM_HEADS)[:, None]
        tl.store(at, tl.where(stored, (decode(code_first, exponent, KIND) * step).to(kind), first), mask=real)
        tl.store(at + HALF, tl.where(stored, (decode(code_second, exponent, KIND) * step).to(kind), second), mask=real)
        rounded = step.to(key_scales.dtype.element_ty)
        one = (head < NUM_HEADS + 2 * NUM_KV)[:, None]
        tl.store(key_scales + slot // (2 * HALF), rounded, mask=one & is_key)
        tl.store(value_scales + slot // (2 * HALF), rounded, mask=one & (turned == 0))
    else:
        code_first, code_second = first, second
        tl.store(at, first, mask=real & turned)
        tl.store(at + HALF, second, mask=real & turned)
    tl.store(keys + cached, code_first, mask=real & is_key)
    tl.store(keys + cached + HALF, code_second, mask=real & is_key)
    tl.store(values + cached, code_first, mask=real & (turned == 0))
    tl.store(values + cached + HALF, code_second, mask=real & (turned == 0))
