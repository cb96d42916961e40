"""One token (batch 1) with weights in few bits: the products of a decoding step, as ``phi35.kernels.vector`` has them.

A program owns a few rows and asks for their codes and scales before it waits for the vector; norm, rotation, gating and
the residual are fused in. Codes are read once, in the layout in which they are stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from phi35.kernels.common import activate, launch_options, slot_offset, wait_for_predecessor
from phi35.kernels.operands import LayerCache, Norm, Rope
from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.kernels.prepared import (
    Prepared,
    leave_vector,
    leaving,
    left_norms,
    reading,
    take_norm,
    take_vector,
)
from phi35.quantization.kernels.shapes import WordConfig
from phi35.quantization.kernels.words import dot_rows, hold_rows


def operands(weight: QuantizedTensor) -> tuple[Any, ...]:
    """Codes as words, scales, zero points and row scales as the kernels take them."""
    codes = weight.codes if weight.format.type == "int" else weight.codes.view(torch.int32)
    zeros = codes if weight.zero_point is None else weight.zero_point
    return codes, weight.scale, zeros, weight.scale if weight.row_scale is None else weight.row_scale


def constants(weight: QuantizedTensor, config: WordConfig) -> dict[str, Any]:
    """Compile-time constants of a weight."""
    one, width = weight.format, weight.shape[-1]
    return {
        "WIDTH": width,
        "LANES": config.lanes,
        "KIND": one.kind,
        "GROUP": one.group_size or width,
        "ZEROS": not one.symmetric,
        "BYTES": one.scale_bits == 8,
        "ASM": not interpreted(),
    }


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, which knows no machine instructions."""
    return bool(triton.knobs.runtime.interpret)


def project_qkv(
    hidden: torch.Tensor,
    norm: Norm,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    rope: Rope,
    lengths: torch.Tensor,
    rope_long: torch.Tensor,
    query: torch.Tensor,
    cache: LayerCache,
    config: WordConfig,
    pdl: bool,
    source: Prepared | None = None,
) -> None:
    """See ``phi35.kernels.vector.project_qkv``; ``source`` stands for the normed hidden."""
    num_kv, head_dim = cache.num_kv, cache.head_dim
    pairs = max(1, config.rows // 2 // config.groups)
    while (head_dim // 2) % (pairs * config.groups):
        pairs //= 2
    assert pairs > 0, "a head of half a multiple of 4 dimensions has pairs for up to four groups"
    _qkv_kernel[(weight.shape[0] // (2 * pairs * config.groups),)](
        hidden,
        norm.weight,
        norm.bias,
        norm.eps,
        *operands(weight),
        weight.scale if bias is None else bias,
        rope.inv_freq,
        rope.scaling,
        lengths,
        rope_long,
        query,
        cache.keys,
        cache.values,
        cache.keys if cache.table is None else cache.table,
        cache.num_slots - 1,
        NORM=norm.kind,
        BIAS=bias is not None,
        NUM_HEADS=query.shape[1] // head_dim,
        NUM_KV=num_kv,
        HALF=head_dim // 2,
        PAIRS=pairs,
        GROUPS=config.groups,
        PAGE=cache.page_size,
        **reading(source, weight.codes),
        **constants(weight, config),
        **launch_options(config.num_warps, pdl),
    )


def project(
    vector: torch.Tensor,
    norm: Norm | None,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: WordConfig,
    pdl: bool,
    add: bool = False,
    source: Prepared | None = None,
    target: Prepared | None = None,
) -> None:
    """out (1, N) = or, with ``add``, += product of the normed vector (1, W) with weight (N, W), plus bias (N,).

    ``source`` stands for the normed vector; in ``target`` out is left for the next kernel.
    """
    num_rows = weight.shape[0]
    _project_kernel[(triton.cdiv(num_rows, config.rows),)](
        vector,
        vector if norm is None else norm.weight,
        vector if norm is None else norm.bias,
        0.0 if norm is None else norm.eps,
        *operands(weight),
        weight.scale if bias is None else bias,
        out,
        num_rows,
        NORM="none" if norm is None else norm.kind,
        BIAS=bias is not None,
        ADD=add,
        ROWS=config.rows // config.groups,
        GROUPS=config.groups,
        EVEN=num_rows % config.rows == 0,
        **reading(source, weight.codes),
        **leaving(target, weight.codes),
        **constants(weight, config),
        **launch_options(config.num_warps, pdl),
    )


def project_gate_up(
    hidden: torch.Tensor,
    norm: Norm,
    weight: QuantizedTensor,
    acted: torch.Tensor,
    hidden_act: str,
    config: WordConfig,
    pdl: bool,
    source: Prepared | None = None,
    target: Prepared | None = None,
) -> None:
    """acted (1, F) = act(gate) * up of the normed hidden (1, D); weight (2F, D), gate first.

    ``source`` stands for the normed hidden; with ``target`` acted is left there alone.
    """
    half, rows = weight.shape[0] // 2, max(1, config.rows // 2)
    _gate_up_kernel[(triton.cdiv(half, rows),)](
        hidden,
        norm.weight,
        norm.bias,
        norm.eps,
        *operands(weight),
        acted,
        half,
        NORM=norm.kind,
        ACT=hidden_act,
        ROWS=rows // config.groups,
        GROUPS=config.groups,
        EVEN=half % rows == 0,
        **reading(source, weight.codes),
        **leaving(target, weight.codes),
        **constants(weight, config),
        **launch_options(config.num_warps, pdl),
    )


@triton.jit(do_not_specialize=["capacity"])
def _qkv_kernel(  # type: ignore[no-untyped-def]
    hidden,
    norm_weight,
    norm_bias,
    eps,
    codes,
    scale,
    zeros,
    row_scale,
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
    prepared,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    PREPARED: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    pairs: tl.constexpr = PAIRS * GROUPS
    per_head: tl.constexpr = HALF // pairs
    num_rows: tl.constexpr = (NUM_HEADS + 2 * NUM_KV) * 2 * HALF
    head = tl.program_id(0) // per_head
    start = (tl.program_id(0) % per_head) * pairs
    element = start + tl.arange(0, pairs)
    low_row = head * (2 * HALF) + start
    high_row = low_row + HALF
    low_held = hold_rows(codes, scale, zeros, low_row, num_rows, PAIRS, WIDTH, LANES, KIND, GROUP, ZEROS, True, GROUPS)
    high_held = hold_rows(
        codes, scale, zeros, high_row, num_rows, PAIRS, WIDTH, LANES, KIND, GROUP, ZEROS, True, GROUPS
    )
    norms, norm_biases = take_norm(norm_weight, norm_bias, PREPARED, NORM, WIDTH, LANES)
    # The sampler at the end of the previous step wrote these two, a whole step ago.
    position = tl.load(lengths)
    factors = tl.load(rope_long).to(tl.int32)
    frequency = tl.load(inv_freq + factors * HALF + element)
    multiplier = tl.load(scaling + factors)
    # Rounded as the plain path rounds its tables.
    kind = query.dtype.element_ty
    angle = position.to(tl.float32) * frequency
    turned = head < NUM_HEADS + NUM_KV
    cos = tl.where(turned, (tl.cos(angle) * multiplier).to(kind).to(tl.float32), 1.0)
    sin = tl.where(turned, (tl.sin(angle) * multiplier).to(kind).to(tl.float32), 0.0)
    wait_for_predecessor(PDL)
    span: tl.constexpr = 8 if PREPARED else 16
    places, factor = take_vector(
        hidden, prepared, norms, norm_biases, eps, PREPARED, PARTS, PADDED_PARTS, NORM, WIDTH, LANES, KIND, ASM, GROUPS
    )
    low = dot_rows(
        low_held, places, row_scale, low_row, num_rows, PAIRS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM, span, GROUPS
    )
    high = dot_rows(
        high_held, places, row_scale, high_row, num_rows, PAIRS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM, span, GROUPS
    )
    low, high = low * factor, high * factor
    if BIAS:
        low += tl.load(bias + head * (2 * HALF) + element).to(tl.float32)
        high += tl.load(bias + head * (2 * HALF) + HALF + element).to(tl.float32)
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
    norm_weight,
    norm_bias,
    eps,
    codes,
    scale,
    zeros,
    row_scale,
    bias,
    out,
    num_rows,
    prepared,
    left,
    left_norm,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    PREPARED: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    LEFT: tl.constexpr,
    LEFT_NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    all_rows: tl.constexpr = ROWS * GROUPS
    first = tl.program_id(0) * all_rows
    rows = first + tl.arange(0, all_rows)
    inside = rows < num_rows
    held = hold_rows(codes, scale, zeros, first, num_rows, ROWS, WIDTH, LANES, KIND, GROUP, ZEROS, EVEN, GROUPS)
    norms, norm_biases = take_norm(norm_weight, norm_bias, PREPARED, NORM, WIDTH, LANES)
    if BIAS:
        added = tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    if LEFT != "none":
        next_norms = left_norms(left_norm, first, all_rows, LEFT_NORM)
    wait_for_predecessor(PDL)
    if ADD:
        residual = tl.load(out + rows, mask=inside, other=0.0).to(tl.float32)
    span: tl.constexpr = 8 if PREPARED else 16
    places, factor = take_vector(
        vector, prepared, norms, norm_biases, eps, PREPARED, PARTS, PADDED_PARTS, NORM, WIDTH, LANES, KIND, ASM, GROUPS
    )
    total = dot_rows(
        held, places, row_scale, first, num_rows, ROWS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM, span, GROUPS
    )
    total *= factor
    if BIAS:
        total += added
    if ADD:
        total += residual
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + rows, rounded, mask=inside)
    if LEFT != "none":
        tl.static_assert(EVEN)
        leave_vector(
            left, rounded.to(tl.float32), next_norms, first, tl.program_id(0), num_rows, all_rows, LEFT, LEFT_NORM
        )


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    hidden,
    norm_weight,
    norm_bias,
    eps,
    codes,
    scale,
    zeros,
    row_scale,
    acted,
    half,
    prepared,
    left,
    left_norm,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    PREPARED: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    LEFT: tl.constexpr,
    LEFT_NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    all_rows: tl.constexpr = ROWS * GROUPS
    first = tl.program_id(0) * all_rows
    rows = first + tl.arange(0, all_rows)
    up_first = half + first
    gate_held = hold_rows(codes, scale, zeros, first, half, ROWS, WIDTH, LANES, KIND, GROUP, ZEROS, EVEN, GROUPS)
    up_held = hold_rows(codes, scale, zeros, up_first, 2 * half, ROWS, WIDTH, LANES, KIND, GROUP, ZEROS, EVEN, GROUPS)
    norms, norm_biases = take_norm(norm_weight, norm_bias, PREPARED, NORM, WIDTH, LANES)
    if LEFT != "none":
        next_norms = left_norms(left_norm, first, all_rows, LEFT_NORM)
    wait_for_predecessor(PDL)
    span: tl.constexpr = 8 if PREPARED else 16
    places, factor = take_vector(
        hidden, prepared, norms, norm_biases, eps, PREPARED, PARTS, PADDED_PARTS, NORM, WIDTH, LANES, KIND, ASM, GROUPS
    )
    gate = dot_rows(
        gate_held, places, row_scale, first, half, ROWS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM, span, GROUPS
    )
    up = dot_rows(
        up_held, places, row_scale, up_first, 2 * half, ROWS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM, span, GROUPS
    )
    value = (activate(gate * factor, ACT) * (up * factor)).to(acted.dtype.element_ty)
    if LEFT == "none":
        tl.store(acted + rows, value, mask=rows < half)
    else:
        tl.static_assert(EVEN)
        leave_vector(left, value.to(tl.float32), next_norms, first, tl.program_id(0), half, all_rows, LEFT, LEFT_NORM)
