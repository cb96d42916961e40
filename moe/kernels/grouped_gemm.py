"""Grouped matrix products on rows sorted by expert: persistent Triton kernels fed by tensor-memory descriptors.

``rows_by_experts`` is the product of each expert's rows with its weights (forward, and gradients of rows);
``rows_by_rows`` sums over an expert's rows (gradients of weights). Float32 accumulation. Rows lie as
``moe.kernels.routing`` places them: a tile has one expert and ``TILE_ROWS`` rows, or half of them where the expert's
rows end, and half a tile costs half the work.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels.routing import RoutingPlan
from moe.kernels.rows import activate

TILE_ROWS = 128
HALF_ROWS = TILE_ROWS // 2


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes of one kind of product.

    Attributes:
        block_n: columns of the output per tile.
        block_k: depth per pipeline stage.
        num_warps: warps per program.
        num_stages: pipeline depth.
        group: row tiles of one expert that are swept together over the columns, to reuse weights in the L2 cache.
        flatten: let the compiler merge the tile loop and the depth loop, so that loads run ahead across tiles.
        waves: programs per multiprocessor, one after the other. With more than one, a kernel that holds some of the
            multiprocessors for a while (an exchange between GPUs) delays a part of the tiles, not whole programs.
    """

    block_n: int = 256
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 3
    group: int = 16
    flatten: bool = False
    waves: int = 1


def rows_by_experts(
    rows: torch.Tensor,
    weights: torch.Tensor,
    plan: RoutingPlan,
    transposed: bool,
    config: GemmConfig,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each expert's rows times its weights.

    Args:
        rows: (P, K).
        weights: (E, M, K) with ``transposed``, else (E, K, M).
        plan: with ``align`` = HALF_ROWS.
        transposed: multiply by the transposed weights of each expert.
        config: tiles.
        out: contiguous (P, M) to write to; None allocates it.

    Returns:
        (P, M); rows past those in use are undefined.
    """
    num_experts, first, second = weights.shape
    depth, columns = (second, first) if transposed else (first, second)
    if out is None:
        out = torch.empty((rows.shape[0], columns), dtype=rows.dtype, device=rows.device)
    programs = num_programs(rows.device) * config.waves
    block_n = min(config.block_n, triton.next_power_of_2(columns))
    weight_block = [1, block_n, config.block_k] if transposed else [1, config.block_k, block_n]
    _rows_by_experts_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows, [TILE_ROWS, config.block_k]),
        TensorDescriptor.from_tensor(rows, [HALF_ROWS, config.block_k]),
        TensorDescriptor.from_tensor(weights, weight_block),
        TensorDescriptor.from_tensor(out, [TILE_ROWS, block_n]),
        out,
        plan.tile_starts,
        plan.tile_experts,
        plan.starts,
        num_experts,
        columns,
        depth,
        TRANSPOSED=transposed,
        BLOCK_M=TILE_ROWS,
        BLOCK_N=block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        PROGRAMS=programs,
        FLATTEN=config.flatten,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def rows_by_experts_gated(
    rows: torch.Tensor, gate_up_proj: torch.Tensor, plan: RoutingPlan, hidden_act: str, config: GemmConfig, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(rows W_gate) * (rows W_up), the gating done before the tile leaves the registers.

    Args:
        rows: (P, D).
        gate_up_proj: (E, 2F, D), gate first.
        plan: with ``align`` = HALF_ROWS.
        hidden_act: "silu" or "gelu".
        config: tiles; half of ``block_n`` columns are gate, half up.
        save: also return the products, which the backward pass needs.

    Returns:
        (P, F), and (P, 2F) or an empty tensor.
    """
    num_experts, double, depth = gate_up_proj.shape
    width = double // 2
    out = torch.empty((rows.shape[0], width), dtype=rows.dtype, device=rows.device)
    gate_up = torch.empty((rows.shape[0], double) if save else (1, 2, width), dtype=rows.dtype, device=rows.device)
    half = min(config.block_n // 2, triton.next_power_of_2(width))
    programs = num_programs(rows.device) * config.waves
    _rows_by_experts_gated_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows, [TILE_ROWS, config.block_k]),
        TensorDescriptor.from_tensor(rows, [HALF_ROWS, config.block_k]),
        TensorDescriptor.from_tensor(gate_up_proj.view(num_experts, 2, width, depth), [1, 2, half, config.block_k]),
        TensorDescriptor.from_tensor(out, [TILE_ROWS, half]),
        out,
        TensorDescriptor.from_tensor(gate_up.view(-1, 2, width), [TILE_ROWS, 1, half]),
        gate_up,
        plan.tile_starts,
        plan.tile_experts,
        plan.starts,
        num_experts,
        width,
        depth,
        ACT=hidden_act,
        SAVE=save,
        BLOCK_M=TILE_ROWS,
        HALF_N=half,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        PROGRAMS=programs,
        FLATTEN=config.flatten,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, gate_up if save else rows.new_empty(0)


def rows_by_rows(
    left: torch.Tensor,
    right: torch.Tensor,
    plan: RoutingPlan,
    config: GemmConfig,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per expert, the sum over its rows of left^T right: (P, M), (P, C) -> (E, M, C), in ``out`` where given.

    ``out`` may be a strip of a wider tensor's columns. An expert without rows gets zeros.
    """
    num_experts = plan.counts.shape[0]
    height, columns = left.shape[1], right.shape[1]
    if out is None:
        out = torch.empty((num_experts, height, columns), dtype=left.dtype, device=left.device)
    programs = num_programs(left.device) * config.waves
    block_m = min(TILE_ROWS, triton.next_power_of_2(height))
    block_n = min(config.block_n, triton.next_power_of_2(columns))
    _rows_by_rows_kernel[(programs,)](
        TensorDescriptor.from_tensor(left, [config.block_k, block_m]),
        TensorDescriptor.from_tensor(right, [config.block_k, block_n]),
        TensorDescriptor.from_tensor(out, [1, block_m, block_n]),
        plan.starts,
        plan.counts,
        num_experts,
        height,
        columns,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        PROGRAMS=programs,
        FLATTEN=config.flatten,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # Triton's interpreter
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


@triton.jit
def _tile_of(work, tile_starts, tile_experts, starts, num_n, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Expert, first row and column tile of a work item, and whether the tile is whole.

    Row tiles of one expert come in groups that are swept over the columns.
    """
    expert = tl.load(tile_experts + work // num_n)
    first = tl.load(tile_starts + expert)
    tiles = tl.load(tile_starts + expert + 1) - first
    local = work - first * num_n
    group = local // (GROUP * num_n)
    size = tl.minimum(tiles - group * GROUP, GROUP)
    within = local - group * (GROUP * num_n)
    column = within // size
    # Rotated from column to column: else, where the number of programs is a multiple of ``size``, the same programs
    # would get every half tile.
    row = tl.load(starts + expert) + (group * GROUP + (within + column) % size) * BLOCK_M
    return expert, row, column, row + BLOCK_M // 2 < tl.load(starts + expert + 1)


@triton.jit
def _store(pointer, value, row, column, columns, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of a matrix, without a descriptor: its buffer would stand beside the whole tile's in shared memory."""
    at = column + tl.arange(0, WIDTH)
    place = (row + tl.arange(0, HEIGHT)).to(tl.int64)[:, None] * stride + at[None, :]
    tl.store(pointer + place, value.to(pointer.dtype.element_ty), mask=(at < columns)[None, :])


@triton.jit
def _product_tile(  # type: ignore[no-untyped-def]
    rows,
    weights,
    expert,
    row,
    column,
    depth,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = rows.load([row, k])
        if TRANSPOSED:
            right = weights.load([expert, column, k]).reshape(BLOCK_N, BLOCK_K).T
        else:
            right = weights.load([expert, k, column]).reshape(BLOCK_K, BLOCK_N)
        total = tl.dot(left, right, total)
    return total


@triton.jit
def _rows_by_experts_kernel(  # type: ignore[no-untyped-def]
    rows,
    half_rows,
    weights,
    out,
    half_out,
    tile_starts,
    tile_experts,
    starts,
    num_experts,
    columns,
    depth,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_n = tl.cdiv(columns, BLOCK_N)
    num_work = tl.load(tile_starts + num_experts) * num_n
    for work in tl.range(tl.program_id(0), num_work, PROGRAMS, flatten=FLATTEN):
        expert, row, tile_n, whole = _tile_of(work, tile_starts, tile_experts, starts, num_n, BLOCK_M, GROUP)
        column = tile_n * BLOCK_N
        if whole:
            total = _product_tile(rows, weights, expert, row, column, depth, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K)
            out.store([row, column], total.to(out.dtype))
        else:
            half = _product_tile(
                half_rows, weights, expert, row, column, depth, TRANSPOSED, BLOCK_M // 2, BLOCK_N, BLOCK_K
            )
            _store(half_out, half, row, column, columns, columns, BLOCK_M // 2, BLOCK_N)


@triton.jit
def _gated_tile(  # type: ignore[no-untyped-def]
    rows,
    weights,
    expert,
    row,
    column,
    depth,
    BLOCK_M: tl.constexpr,
    HALF_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    total = tl.zeros((BLOCK_M, 2 * HALF_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = rows.load([row, k])
        # One box holds the gate's rows and, HALF_N further down, the matching rows of up.
        right = weights.load([expert, 0, column, k]).reshape(2 * HALF_N, BLOCK_K).T
        total = tl.dot(left, right, total)
    return total.reshape(BLOCK_M, 2, HALF_N).permute(0, 2, 1).split()


@triton.jit
def _rows_by_experts_gated_kernel(  # type: ignore[no-untyped-def]
    rows,
    half_rows,
    weights,
    out,
    half_out,
    gate_up,
    half_gate_up,
    tile_starts,
    tile_experts,
    starts,
    num_experts,
    width,
    depth,
    ACT: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALF_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_n = tl.cdiv(width, HALF_N)
    num_work = tl.load(tile_starts + num_experts) * num_n
    for work in tl.range(tl.program_id(0), num_work, PROGRAMS, flatten=FLATTEN):
        expert, row, tile_n, whole = _tile_of(work, tile_starts, tile_experts, starts, num_n, BLOCK_M, GROUP)
        column = tile_n * HALF_N
        # What backward reads is rounded; gating the same values keeps the two passes consistent.
        kind = out.dtype
        if whole:
            gate, up = _gated_tile(rows, weights, expert, row, column, depth, BLOCK_M, HALF_N, BLOCK_K)
            if SAVE:
                gate_up.store([row, 0, column], gate.to(kind).reshape(BLOCK_M, 1, HALF_N))
                gate_up.store([row, 1, column], up.to(kind).reshape(BLOCK_M, 1, HALF_N))
                gate = gate.to(kind).to(tl.float32)
                up = up.to(kind).to(tl.float32)
            out.store([row, column], (activate(gate, ACT) * up).to(kind))
        else:
            low, high = _gated_tile(half_rows, weights, expert, row, column, depth, BLOCK_M // 2, HALF_N, BLOCK_K)
            if SAVE:
                _store(half_gate_up, low, row, column, width, 2 * width, BLOCK_M // 2, HALF_N)
                _store(half_gate_up + width, high, row, column, width, 2 * width, BLOCK_M // 2, HALF_N)
                low = low.to(kind).to(tl.float32)
                high = high.to(kind).to(tl.float32)
            _store(half_out, activate(low, ACT) * high, row, column, width, width, BLOCK_M // 2, HALF_N)


@triton.jit
def _rows_by_rows_kernel(  # type: ignore[no-untyped-def]
    left_rows,
    right_rows,
    out,
    starts,
    counts,
    num_experts,
    height,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_m = tl.cdiv(height, BLOCK_M)
    num_n = tl.cdiv(columns, BLOCK_N)
    per_expert = num_m * num_n
    for work in tl.range(tl.program_id(0), num_experts * per_expert, PROGRAMS, flatten=FLATTEN):
        expert = work // per_expert
        local = work % per_expert
        group = local // (GROUP * num_n)
        size = tl.minimum(num_m - group * GROUP, GROUP)
        within = local - group * (GROUP * num_n)
        m = (group * GROUP + within % size) * BLOCK_M
        n = (within // size) * BLOCK_N
        begin = tl.load(starts + expert)
        # Whole depth blocks: the rows past the count up to the tile's end are zeros.
        depth = tl.cdiv(tl.load(counts + expert), BLOCK_K) * BLOCK_K
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, depth, BLOCK_K):
            left = left_rows.load([begin + k, m])
            right = right_rows.load([begin + k, n])
            total = tl.dot(left.T, right, total)
        out.store([expert, m, n], total.to(out.dtype).reshape(1, BLOCK_M, BLOCK_N))
