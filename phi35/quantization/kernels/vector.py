"""One token (batch 1) with weights in few bits: the products of a decoding step, as ``phi35.kernels.vector`` has them.

A program owns a few rows and asks for their codes and scales before it waits for the vector; norm, rotation, gating and
the residual are fused in. Codes are read once, in the layout in which they are stored.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from phi35.kernels.common import activate, launch_options, slot_offset, wait_for_predecessor
from phi35.kernels.operands import LayerCache, Norm, Rope
from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.kernels.words import dot_rows, hold_rows, load_halves, load_norm_halves, spread


@dataclass(frozen=True)
class WordConfig:
    """Shape of a program.

    Attributes:
        rows: weight rows per program: 1, 2, 4, 8 or 16.
        num_warps: warps that share each row, 16 columns a lane and load.
    """

    rows: int = 4
    num_warps: int = 4

    def __post_init__(self) -> None:
        assert self.rows in (1, 2, 4, 8, 16), "sums of rows are joined pair by pair"


HELD_WORDS = 144
"""32-bit registers of a lane that may wait for codes and scales, so that nothing is spilled."""

PROGRAMS = 264
"""Programs that a product should have at least: two for each multiprocessor of an H100 or H200."""


def choose(weight: QuantizedTensor) -> WordConfig:
    """The shape of a program for a weight: the fewest instructions a weight, among those with programs enough."""
    num_rows, width = weight.shape[-2:]
    fitting = [config for config in SHAPES if held_words(config, weight) <= HELD_WORDS]
    many = [config for config in fitting if num_rows >= PROGRAMS * config.rows]
    return min(many or fitting, key=lambda config: _instructions(config, width))


def held_words(config: WordConfig, weight: QuantizedTensor) -> int:
    """Registers of a lane that wait for codes and scales."""
    return config.rows * _chunks(config, weight.shape[-1]) * ((2 if weight.format.bits == 4 else 4) + 1)


def _chunks(config: WordConfig, width: int) -> int:
    """How many times a lane's 16 columns make a row."""
    return -(-width // (512 * config.num_warps))


def _instructions(config: WordConfig, width: int) -> float:
    """Instructions a weight, as counted in compiled kernels.

    220 to prepare a lane's 16 columns, 21 to multiply them with a row's codes, 20 to add up a row over the lanes.
    """
    chunks = _chunks(config, width)
    return (220 * chunks + config.rows * (21 * chunks + 20)) * 32 * config.num_warps / (config.rows * width)


SHAPES = tuple(WordConfig(rows, num_warps) for num_warps in (2, 4, 8) for rows in (1, 2, 4, 8, 16))
"""Shapes that are thought of."""


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
        "LANES": 32 * config.num_warps,
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
) -> None:
    """See ``phi35.kernels.vector.project_qkv``."""
    num_kv, head_dim = cache.num_kv, cache.head_dim
    pairs = max(1, config.rows // 2)
    while (head_dim // 2) % pairs:
        pairs //= 2
    _qkv_kernel[(weight.shape[0] // (2 * pairs),)](
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
        PAGE=cache.page_size,
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
) -> None:
    """out (1, N) = or, with ``add``, += product of the normed vector (1, W) with weight (N, W), plus bias (N,)."""
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
        ROWS=config.rows,
        EVEN=num_rows % config.rows == 0,
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
) -> None:
    """acted (1, F) = act(gate) * up of the normed hidden (1, D); weight (2F, D), gate first."""
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
        ROWS=rows,
        EVEN=half % rows == 0,
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
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    per_head: tl.constexpr = HALF // PAIRS
    num_rows: tl.constexpr = (NUM_HEADS + 2 * NUM_KV) * 2 * HALF
    head = tl.program_id(0) // per_head
    start = (tl.program_id(0) % per_head) * PAIRS
    element = start + tl.arange(0, PAIRS)
    low_row = head * (2 * HALF) + start
    high_row = low_row + HALF
    low_held = hold_rows(codes, scale, zeros, low_row, num_rows, PAIRS, WIDTH, LANES, KIND, GROUP, ZEROS, True)
    high_held = hold_rows(codes, scale, zeros, high_row, num_rows, PAIRS, WIDTH, LANES, KIND, GROUP, ZEROS, True)
    norms, norm_biases = load_norm_halves(norm_weight, norm_bias, NORM, WIDTH, LANES)
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
    tiles = load_halves(hidden, WIDTH, LANES)
    places = spread(tiles, norms, norm_biases, eps, NORM, WIDTH, LANES, KIND, ASM)
    low = dot_rows(low_held, places, row_scale, low_row, num_rows, PAIRS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM)
    high = dot_rows(high_held, places, row_scale, high_row, num_rows, PAIRS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM)
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
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    inside = rows < num_rows
    held = hold_rows(codes, scale, zeros, first, num_rows, ROWS, WIDTH, LANES, KIND, GROUP, ZEROS, EVEN)
    norms, norm_biases = load_norm_halves(norm_weight, norm_bias, NORM, WIDTH, LANES)
    if BIAS:
        added = tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    tiles = load_halves(vector, WIDTH, LANES)
    places = spread(tiles, norms, norm_biases, eps, NORM, WIDTH, LANES, KIND, ASM)
    total = dot_rows(held, places, row_scale, first, num_rows, ROWS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM)
    if BIAS:
        total += added
    if ADD:
        total += tl.load(out + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows, total.to(out.dtype.element_ty), mask=inside)


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
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    up_first = half + first
    gate_held = hold_rows(codes, scale, zeros, first, half, ROWS, WIDTH, LANES, KIND, GROUP, ZEROS, EVEN)
    up_held = hold_rows(codes, scale, zeros, up_first, 2 * half, ROWS, WIDTH, LANES, KIND, GROUP, ZEROS, EVEN)
    norms, norm_biases = load_norm_halves(norm_weight, norm_bias, NORM, WIDTH, LANES)
    wait_for_predecessor(PDL)
    tiles = load_halves(hidden, WIDTH, LANES)
    places = spread(tiles, norms, norm_biases, eps, NORM, WIDTH, LANES, KIND, ASM)
    gate = dot_rows(gate_held, places, row_scale, first, half, ROWS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM)
    up = dot_rows(up_held, places, row_scale, up_first, 2 * half, ROWS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM)
    tl.store(acted + rows, (activate(gate, ACT) * up).to(acted.dtype.element_ty), mask=rows < half)
