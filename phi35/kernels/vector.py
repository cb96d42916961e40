"""One token (batch 1): products of weight matrices with a vector, with everything around them fused in.

A program owns a few rows of a matrix, holds all of their weights in registers, and asks for them before it waits for
the vector. Norms are computed anew by each program: the vector is short and lies in the caches. Weights are read once,
in the canonical layout. Sums are float32.
"""

import torch
import triton
import triton.language as tl

from phi35.kernels.common import (
    activate,
    dot_tiles,
    launch_options,
    load_norm,
    load_tiles,
    load_vector,
    normalise,
    prefetch_rows,
    slot_offset,
    wait_for_predecessor,
)
from phi35.kernels.configs import VectorConfig
from phi35.kernels.operands import LayerCache, Norm, Rope


def project_qkv(
    hidden: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rope: Rope,
    lengths: torch.Tensor,
    rope_long: torch.Tensor,
    query: torch.Tensor,
    cache: LayerCache,
    config: VectorConfig,
    pdl: bool,
) -> None:
    """Norm, query-key-value product, rotation at position ``lengths[0]``, and the store into the cache's next slot.

    Args:
        hidden: (1, D).
        norm: before the product.
        weight: (W, D), queries, then keys, then values.
        bias: (W,) or None.
        rope: rotary tables.
        lengths: (1,) int64 tokens in the cache.
        rope_long: (1,) bool, which factors.
        query: (1, H d), written.
        cache: of one row, one slot of which is written; a full one writes its last.
        config: shape of a program.
        pdl: launch programmatically.
    """
    num_kv, head_dim = cache.num_kv, cache.head_dim
    width = hidden.shape[1]
    pairs = max(1, config.rows // 2)
    while (head_dim // 2) % pairs:
        pairs //= 2
    grid = (weight.shape[0] // (2 * pairs),)
    asked = config.asked_ahead(2 * pairs, weight.shape[0])
    _qkv_kernel[grid](
        hidden,
        norm.weight,
        norm.bias,
        norm.eps,
        weight,
        weight if bias is None else bias,
        rope.inv_freq,
        rope.scaling,
        lengths,
        rope_long,
        query,
        cache.keys,
        cache.values,
        cache.keys if cache.table is None else cache.table,
        cache.num_slots - 1,
        *asked,
        NORM=norm.kind,
        BIAS=bias is not None,
        NUM_HEADS=query.shape[1] // head_dim,
        NUM_KV=num_kv,
        HALF=head_dim // 2,
        WIDTH=width,
        CHUNK=config.chunk(width, weight.element_size()),
        PAIRS=pairs,
        PAGE=cache.page_size,
        PARTS=config.wave if asked[1] else 0,
        LANES=config.num_warps * 32,
        **launch_options(config.num_warps, pdl),
    )


def project_add(
    vector: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    config: VectorConfig,
    pdl: bool,
) -> None:
    """hidden (1, N) += vector (1, W) times weight (N, W), plus bias (N,)."""
    num_rows, width = weight.shape
    asked = config.asked_ahead(config.rows, num_rows)
    _project_kernel[(triton.cdiv(num_rows, config.rows),)](
        vector,
        weight,
        weight if bias is None else bias,
        hidden,
        num_rows,
        *asked,
        BIAS=bias is not None,
        WIDTH=width,
        CHUNK=config.chunk(width, weight.element_size()),
        ROWS=config.rows,
        EVEN=num_rows % config.rows == 0,
        PARTS=config.wave if asked[1] else 0,
        LANES=config.num_warps * 32,
        **launch_options(config.num_warps, pdl),
    )


def project_gate_up(
    hidden: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    acted: torch.Tensor,
    hidden_act: str,
    config: VectorConfig,
    pdl: bool,
) -> None:
    """acted (1, F) = act(gate) * up of the normed hidden (1, D); weight (2F, D), gate first."""
    half, width = weight.shape[0] // 2, weight.shape[1]
    rows = max(1, config.rows // 2)
    asked = config.asked_ahead(rows, half)
    _gate_up_kernel[(triton.cdiv(half, rows),)](
        hidden,
        norm.weight,
        norm.bias,
        norm.eps,
        weight,
        acted,
        half,
        *asked,
        NORM=norm.kind,
        ACT=hidden_act,
        WIDTH=width,
        CHUNK=config.chunk(width, weight.element_size()),
        ROWS=rows,
        EVEN=half % rows == 0,
        PARTS=config.wave if asked[1] else 0,
        LANES=config.num_warps * 32,
        **launch_options(config.num_warps, pdl),
    )


def project_logits(
    hidden: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logits: torch.Tensor,
    config: VectorConfig,
    pdl: bool,
) -> None:
    """logits (1, V), best in float32, of the normed hidden (1, D); weight (V, D), bias (V,) or None."""
    num_rows, width = weight.shape
    asked = config.asked_ahead(config.rows, num_rows)
    _logits_kernel[(triton.cdiv(num_rows, config.rows),)](
        hidden,
        norm.weight,
        norm.bias,
        norm.eps,
        weight,
        weight if bias is None else bias,
        logits,
        num_rows,
        *asked,
        NORM=norm.kind,
        BIAS=bias is not None,
        WIDTH=width,
        CHUNK=config.chunk(width, weight.element_size()),
        ROWS=config.rows,
        EVEN=num_rows % config.rows == 0,
        PARTS=config.wave if asked[1] else 0,
        LANES=config.num_warps * 32,
        **launch_options(config.num_warps, pdl),
    )


@triton.jit(do_not_specialize=["capacity"])
def _qkv_kernel(  # type: ignore[no-untyped-def]
    hidden,
    norm_weight,
    norm_bias,
    eps,
    weight,
    bias,
    inv_freq,
    scaling,
    lengths,
    rope_long,
    query,
    keys,
    values,
    table,
    capacity,
    ahead_row,
    ahead_rows,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    count: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    per_head: tl.constexpr = HALF // PAIRS
    head = tl.program_id(0) // per_head
    element = (tl.program_id(0) % per_head) * PAIRS + tl.arange(0, PAIRS)
    low_rows = head * (2 * HALF) + element
    low_tiles = load_tiles(weight, low_rows, 0, WIDTH, CHUNK, True)
    high_tiles = load_tiles(weight, low_rows + HALF, 0, WIDTH, CHUNK, True)
    norms, norm_biases = load_norm(norm_weight, norm_bias, NORM, WIDTH, CHUNK)
    # The sampler at the end of the previous step wrote these two, a whole step ago.
    position = tl.load(lengths)
    factors = tl.load(rope_long).to(tl.int32)
    frequency = tl.load(inv_freq + factors * HALF + element)
    scale = tl.load(scaling + factors)
    # Rounded as the plain path rounds its tables.
    kind = query.dtype.element_ty
    angle = position.to(tl.float32) * frequency
    turned = head < NUM_HEADS + NUM_KV
    cos = tl.where(turned, (tl.cos(angle) * scale).to(kind).to(tl.float32), 1.0)
    sin = tl.where(turned, (tl.sin(angle) * scale).to(kind).to(tl.float32), 0.0)
    if PDL and PARTS > 0:
        prefetch_rows(weight, ahead_row, ahead_rows, WIDTH, PARTS, LANES)
    wait_for_predecessor(PDL)
    chunks = normalise(load_vector(hidden, WIDTH, CHUNK), norms, norm_biases, eps, NORM, WIDTH, CHUNK)
    low = dot_tiles(low_tiles, chunks, count)
    high = dot_tiles(high_tiles, chunks, count)
    if BIAS:
        low += tl.load(bias + low_rows).to(tl.float32)
        high += tl.load(bias + low_rows + HALF).to(tl.float32)
    low, high = low.to(kind).to(tl.float32), high.to(kind).to(tl.float32)
    slot = tl.minimum(position, capacity)
    at = slot_offset(table, 0, head % NUM_KV, slot, capacity, NUM_KV, 2 * HALF, PAGE)
    if head < NUM_HEADS:
        target = query + head * (2 * HALF)
    elif head < NUM_HEADS + NUM_KV:
        target = keys + at
    else:
        target = values + at
    tl.store(target + element, (low * cos - high * sin).to(kind))
    tl.store(target + element + HALF, (high * cos + low * sin).to(kind))


@triton.jit
def _project_kernel(  # type: ignore[no-untyped-def]
    vector,
    weight,
    bias,
    hidden,
    num_rows,
    ahead_row,
    ahead_rows,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    tiles = load_tiles(weight, rows, num_rows, WIDTH, CHUNK, EVEN)
    if BIAS:
        added = tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    if PDL and PARTS > 0:
        prefetch_rows(weight, ahead_row, ahead_rows, WIDTH, PARTS, LANES)
    wait_for_predecessor(PDL)
    chunks = load_vector(vector, WIDTH, CHUNK)
    residual = tl.load(hidden + rows, mask=inside, other=0.0).to(tl.float32)
    total = dot_tiles(tiles, chunks, (WIDTH + CHUNK - 1) // CHUNK)
    if BIAS:
        total += added
    tl.store(hidden + rows, (residual + total).to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    hidden,
    norm_weight,
    norm_bias,
    eps,
    weight,
    acted,
    half,
    ahead_row,
    ahead_rows,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    count: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate_tiles = load_tiles(weight, rows, half, WIDTH, CHUNK, EVEN)
    up_tiles = load_tiles(weight + half.to(tl.int64) * WIDTH, rows, half, WIDTH, CHUNK, EVEN)
    norms, norm_biases = load_norm(norm_weight, norm_bias, NORM, WIDTH, CHUNK)
    if PDL and PARTS > 0:
        prefetch_rows(weight, ahead_row, ahead_rows, WIDTH, PARTS, LANES)
        prefetch_rows(weight, half + ahead_row, ahead_rows, WIDTH, PARTS, LANES)
    wait_for_predecessor(PDL)
    chunks = normalise(load_vector(hidden, WIDTH, CHUNK), norms, norm_biases, eps, NORM, WIDTH, CHUNK)
    gate = dot_tiles(gate_tiles, chunks, count)
    up = dot_tiles(up_tiles, chunks, count)
    tl.store(acted + rows, (activate(gate, ACT) * up).to(acted.dtype.element_ty), mask=rows < half)


@triton.jit
def _logits_kernel(  # type: ignore[no-untyped-def]
    hidden,
    norm_weight,
    norm_bias,
    eps,
    weight,
    bias,
    logits,
    num_rows,
    ahead_row,
    ahead_rows,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    tiles = load_tiles(weight, rows, num_rows, WIDTH, CHUNK, EVEN)
    norms, norm_biases = load_norm(norm_weight, norm_bias, NORM, WIDTH, CHUNK)
    if PDL and PARTS > 0:
        prefetch_rows(weight, ahead_row, ahead_rows, WIDTH, PARTS, LANES)
    wait_for_predecessor(PDL)
    chunks = normalise(load_vector(hidden, WIDTH, CHUNK), norms, norm_biases, eps, NORM, WIDTH, CHUNK)
    total = dot_tiles(tiles, chunks, (WIDTH + CHUNK - 1) // CHUNK)
    if BIAS:
        total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(logits + rows, total.to(logits.dtype.element_ty), mask=inside)
