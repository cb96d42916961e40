"""Experts with weights in few bits: up to 64 tokens read the codes of the chosen experts once, more in sorted tiles.

As ``moe.kernels.decode`` and ``moe.kernels.grouped_gemm`` do it for plain weights; codes become whole numbers in
registers (``phi35.quantization.kernels.tiles``). Of a few tokens each group's part is scaled in float32; in the tiles
of many, weights are scaled and rounded to the activations' dtype before they are multiplied. Forward only.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe.kernels import rows as row_passes
from moe.kernels.decode import _pairs_of, _sum_choices_kernel
from moe.kernels.routing import plan_routing
from moe.kernels.rows import activate
from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.kernels.tiles import constants, load_codes, load_scale, operands

FEW_TOKENS = 64


@dataclass(frozen=True)
class ExpertConfig:
    """Shapes of programs.

    Attributes:
        columns: columns of down_proj's product per program, and gate and up columns each, of a few tokens.
        depth: depth per step, cut to a group.
        num_warps: warps per program.
        num_stages: steps in flight.
        tile_rows: sorted rows per program of many tokens; a power of two.
        tile_columns: their columns, gate and up together.
        tile_depth: their depth per step.
    """

    columns: int = 32
    depth: int = 128
    num_warps: int = 4
    num_stages: int = 4
    tile_rows: int = 128
    tile_columns: int = 128
    tile_depth: int = 64


def run_experts(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: QuantizedTensor,
    down_proj: QuantizedTensor,
    hidden_act: str,
    config: ExpertConfig | None = None,
) -> torch.Tensor:
    """Weighted sum of each token's experts, (N, D); shapes as in ``moe.experts.Experts.forward``."""
    config = ExpertConfig() if config is None else config
    run = few if hidden_states.shape[0] <= FEW_TOKENS else many
    return run(hidden_states, expert_indices, expert_weights, gate_up_proj, down_proj, hidden_act, config)


def few(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: QuantizedTensor,
    down_proj: QuantizedTensor,
    hidden_act: str,
    config: ExpertConfig,
) -> torch.Tensor:
    """The sum for at most ``FEW_TOKENS`` tokens: no sort, an expert that nobody chose is not read."""
    num_tokens, hidden_size = hidden_states.shape
    num_experts, _, width = down_proj.shape
    top_k = expert_indices.shape[1]
    num_pairs = num_tokens * top_k
    out = hidden_states.new_empty((num_tokens, hidden_size))
    if num_tokens == 0:
        return out
    acted = hidden_states.new_empty((num_pairs, width))
    mixed = hidden_states.new_empty((num_pairs, hidden_size), dtype=torch.float32)
    hidden_states, expert_indices = hidden_states.contiguous(), expert_indices.contiguous()
    shape = {
        "SLOTS": max(16, triton.next_power_of_2(num_tokens)),
        # Two sizes, so that a growing batch does not compile anew at every step.
        "PAIRS": 32 if num_pairs <= 32 else max(128, triton.next_power_of_2(num_pairs)),
        "COLUMNS": config.columns,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    _few_up_kernel[(triton.cdiv(width, config.columns), num_experts)](
        hidden_states,
        *operands(gate_up_proj),
        acted,
        expert_indices,
        num_pairs,
        width,
        ACT=hidden_act,
        TOP_K=top_k,
        **constants(gate_up_proj, config.depth),
        **shape,
    )
    _few_down_kernel[(triton.cdiv(hidden_size, config.columns), num_experts)](
        acted,
        *operands(down_proj),
        mixed,
        expert_indices,
        expert_weights.contiguous(),
        num_pairs,
        hidden_size,
        **constants(down_proj, config.depth),
        **shape,
    )
    chunk = min(512, triton.next_power_of_2(hidden_size))
    _sum_choices_kernel[(num_tokens, triton.cdiv(hidden_size, chunk))](
        mixed, out, hidden_size, TOP_K=top_k, CHUNK=chunk, num_warps=2
    )
    return out


def many(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: QuantizedTensor,
    down_proj: QuantizedTensor,
    hidden_act: str,
    config: ExpertConfig,
) -> torch.Tensor:
    """The sum for any number of tokens, sorted by expert."""
    num_experts, hidden_size, width = down_proj.shape
    top_k = expert_indices.shape[1]
    plan = plan_routing(expert_indices, num_experts, config.tile_rows)
    sorted_rows = row_passes.gather_rows(hidden_states, plan, top_k)
    acted = sorted_rows.new_empty((plan.num_rows, width))
    mixed = sorted_rows.new_empty((plan.num_rows, hidden_size))
    shape = {
        "EXPERTS": triton.next_power_of_2(num_experts),
        "TILE": config.tile_rows,
        "num_warps": 8 if config.tile_rows >= 128 else 4,
        "num_stages": 3,
    }
    tiles = plan.num_rows // config.tile_rows
    half = config.tile_columns // 2
    _many_up_kernel[(triton.cdiv(width, half), tiles)](
        sorted_rows,
        *operands(gate_up_proj),
        acted,
        plan.starts,
        num_experts,
        width,
        ACT=hidden_act,
        COLUMNS=half,
        **constants(gate_up_proj, config.tile_depth),
        **shape,
    )
    _many_down_kernel[(triton.cdiv(hidden_size, config.tile_columns), tiles)](
        acted,
        *operands(down_proj),
        mixed,
        plan.starts,
        num_experts,
        hidden_size,
        COLUMNS=config.tile_columns,
        **constants(down_proj, config.tile_depth),
        **shape,
    )
    return row_passes.combine_rows(mixed, plan.places, top_k, expert_weights, hidden_states.dtype)


@triton.jit
def _few_up_kernel(  # type: ignore[no-untyped-def]
    hidden_states,
    codes,
    scale,
    zeros,
    row_scale,
    exponent,
    acted,
    expert_indices,
    num_pairs,
    width,
    ACT: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
):
    expert = tl.program_id(1)
    count, pair = _pairs_of(expert_indices, expert, num_pairs, SLOTS, PAIRS)
    if count > 0:
        used = tl.arange(0, SLOTS) < count
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        real = columns < width
        gate_rows = expert.to(tl.int64) * 2 * width + columns
        up_rows = gate_rows + width
        token_at = hidden_states + (pair // TOP_K)[:, None] * WIDTH
        kind: tl.constexpr = acted.dtype.element_ty
        gate = tl.zeros((SLOTS, COLUMNS), tl.float32)
        up = tl.zeros((SLOTS, COLUMNS), tl.float32)
        for first in range(0, WIDTH, DEPTH):
            at = first + tl.arange(0, DEPTH)
            token = tl.load(token_at + at[None, :], mask=used[:, None] & (at < WIDTH)[None, :], other=0.0)
            code = load_codes(codes, zeros, exponent, gate_rows, real, first, kind, WIDTH, DEPTH, KIND, GROUP, ZEROS)
            factor = load_scale(scale, row_scale, gate_rows, real, first, WIDTH, GROUP, BYTES)
            gate += tl.dot(token, tl.trans(code)) * factor[None, :]
            code = load_codes(codes, zeros, exponent, up_rows, real, first, kind, WIDTH, DEPTH, KIND, GROUP, ZEROS)
            factor = load_scale(scale, row_scale, up_rows, real, first, WIDTH, GROUP, BYTES)
            up += tl.dot(token, tl.trans(code)) * factor[None, :]
        # Rounded as the plain way rounds them.
        gate = gate.to(kind).to(tl.float32)
        up = up.to(kind).to(tl.float32)
        out_at = pair[:, None] * width + columns[None, :]
        tl.store(acted + out_at, (activate(gate, ACT) * up).to(kind), mask=used[:, None] & real[None, :])


@triton.jit
def _few_down_kernel(  # type: ignore[no-untyped-def]
    acted,
    codes,
    scale,
    zeros,
    row_scale,
    exponent,
    mixed,
    expert_indices,
    expert_weights,
    num_pairs,
    hidden_size,
    SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
):
    expert = tl.program_id(1)
    count, pair = _pairs_of(expert_indices, expert, num_pairs, SLOTS, PAIRS)
    if count > 0:
        used = tl.arange(0, SLOTS) < count
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        real = columns < hidden_size
        rows = expert.to(tl.int64) * hidden_size + columns
        row_at = acted + pair[:, None] * WIDTH
        kind: tl.constexpr = acted.dtype.element_ty
        total = tl.zeros((SLOTS, COLUMNS), tl.float32)
        for first in range(0, WIDTH, DEPTH):
            at = first + tl.arange(0, DEPTH)
            row = tl.load(row_at + at[None, :], mask=used[:, None] & (at < WIDTH)[None, :], other=0.0)
            code = load_codes(codes, zeros, exponent, rows, real, first, kind, WIDTH, DEPTH, KIND, GROUP, ZEROS)
            factor = load_scale(scale, row_scale, rows, real, first, WIDTH, GROUP, BYTES)
            total += tl.dot(row, tl.trans(code)) * factor[None, :]
        weight = tl.load(expert_weights + pair, mask=used, other=0.0).to(tl.float32)
        # Rounded as the plain way rounds it, then weighted in float32.
        total = total.to(kind).to(tl.float32) * weight[:, None]
        out_at = pair[:, None] * hidden_size + columns[None, :]
        tl.store(mixed + out_at, total, mask=used[:, None] & real[None, :])


@triton.jit
def _expert_of(starts, row, num_experts, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Expert whose rows hold a sorted row in use."""
    experts = tl.arange(0, EXPERTS)
    found = tl.load(starts + experts, mask=experts < num_experts, other=2147483647)
    return tl.sum((found <= row).to(tl.int32), axis=0) - 1


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    codes,
    scale,
    zeros,
    row_scale,
    exponent,
    rows,
    real,
    first,
    kind: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """A tile of weights (R, DEPTH), rounded to ``kind``."""
    code = load_codes(codes, zeros, exponent, rows, real, first, tl.float32, WIDTH, DEPTH, KIND, GROUP, ZEROS)
    factor = load_scale(scale, row_scale, rows, real, first, WIDTH, GROUP, BYTES)
    return (code * factor[:, None]).to(kind)


@triton.jit
def _many_up_kernel(  # type: ignore[no-untyped-def]
    sorted_rows,
    codes,
    scale,
    zeros,
    row_scale,
    exponent,
    acted,
    starts,
    num_experts,
    width,
    ACT: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
):
    start = tl.program_id(1) * TILE
    if start < tl.load(starts + num_experts):
        expert = _expert_of(starts, start, num_experts, EXPERTS)
        rows = start + tl.arange(0, TILE)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        real = columns < width
        gate_rows = expert.to(tl.int64) * 2 * width + columns
        up_rows = gate_rows + width
        kind: tl.constexpr = acted.dtype.element_ty
        gate = tl.zeros((TILE, COLUMNS), tl.float32)
        up = tl.zeros((TILE, COLUMNS), tl.float32)
        for first in range(0, WIDTH, DEPTH):
            at = first + tl.arange(0, DEPTH)
            row_at = sorted_rows + rows.to(tl.int64)[:, None] * WIDTH + at[None, :]
            row = tl.load(row_at, mask=(at < WIDTH)[None, :], other=0.0)
            weight = _scaled(
                codes, scale, zeros, row_scale, exponent, gate_rows, real, first, kind, WIDTH, DEPTH, KIND, GROUP,
                ZEROS, BYTES,
            )  # fmt: skip
            gate = tl.dot(row, tl.trans(weight), gate)
            weight = _scaled(
                codes, scale, zeros, row_scale, exponent, up_rows, real, first, kind, WIDTH, DEPTH, KIND, GROUP,
                ZEROS, BYTES,
            )  # fmt: skip
            up = tl.dot(row, tl.trans(weight), up)
        gate = gate.to(kind).to(tl.float32)
        up = up.to(kind).to(tl.float32)
        out_at = acted + rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(out_at, (activate(gate, ACT) * up).to(kind), mask=real[None, :])


@triton.jit
def _many_down_kernel(  # type: ignore[no-untyped-def]
    acted,
    codes,
    scale,
    zeros,
    row_scale,
    exponent,
    mixed,
    starts,
    num_experts,
    hidden_size,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
):
    start = tl.program_id(1) * TILE
    if start < tl.load(starts + num_experts):
        expert = _expert_of(starts, start, num_experts, EXPERTS)
        rows = start + tl.arange(0, TILE)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        real = columns < hidden_size
        weight_rows = expert.to(tl.int64) * hidden_size + columns
        kind: tl.constexpr = acted.dtype.element_ty
        total = tl.zeros((TILE, COLUMNS), tl.float32)
        for first in range(0, WIDTH, DEPTH):
            at = first + tl.arange(0, DEPTH)
            row_at = acted + rows.to(tl.int64)[:, None] * WIDTH + at[None, :]
            row = tl.load(row_at, mask=(at < WIDTH)[None, :], other=0.0)
            weight = _scaled(
                codes, scale, zeros, row_scale, exponent, weight_rows, real, first, kind, WIDTH, DEPTH, KIND, GROUP,
                ZEROS, BYTES,
            )  # fmt: skip
            total = tl.dot(row, tl.trans(weight), total)
        out_at = mixed + rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
        tl.store(out_at, total.to(kind), mask=real[None, :])
