"""Grouped matrix products for Hopper with one warp loading and two warpgroups multiplying (Triton's Gluon dialect).

The same two products as ``moe.kernels.grouped_gemm`` and the same row layout. A producer warp keeps a ring of
shared-memory stages filled by bulk tensor copies, also across output tiles, so that the loads of the next tile run
under the epilogue of this one; each of two warpgroups multiplies one half of the tile's rows. This is the cooperative
schedule of CUTLASS's Hopper kernels, without clusters.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe.kernels.grouped_gemm import HALF_ROWS, num_programs
from moe.kernels.hopper_config import BLOCK_K, HopperConfig
from moe.kernels.routing import RoutingPlan

# Renamed between Triton releases.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


def rows_by_experts(
    rows: torch.Tensor,
    weights: torch.Tensor,
    plan: RoutingPlan,
    transposed: bool,
    config: HopperConfig,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each expert's rows (P, K) times its weights, (E, M, K) with ``transposed``, else (E, K, M); (P, M) or ``out``."""
    num_experts, first, second = weights.shape
    depth, columns = (second, first) if transposed else (first, second)
    if out is None:
        out = torch.empty((rows.shape[0], columns), dtype=rows.dtype, device=rows.device)
    flat = weights.view(num_experts * first, second)
    block_n = config.block_n
    programs = num_programs(rows.device) * config.waves
    _rows_by_experts_kernel[(programs,)](
        descriptor(rows, HALF_ROWS, BLOCK_K),
        descriptor(flat, *((block_n, BLOCK_K) if transposed else (BLOCK_K, block_n))),
        descriptor(out, HALF_ROWS, block_n),
        descriptor(out, HALF_ROWS, block_n),
        plan.tile_starts,
        plan.tile_experts,
        plan.starts,
        num_experts,
        columns,
        depth,
        PROGRAMS=programs,
        TRANSPOSED=transposed,
        GATED=False,
        SAVE=False,
        BLOCK_N=block_n,
        STAGES=config.num_stages,
        GROUP=config.group,
        num_warps=4,
    )
    return out


def rows_by_experts_gated(
    rows: torch.Tensor, gate_up_proj: torch.Tensor, plan: RoutingPlan, config: HopperConfig, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(rows W_gate) * (rows W_up), (P, F), and the products (P, 2F) with ``save``, else an empty tensor."""
    num_experts, double, depth = gate_up_proj.shape
    width = double // 2
    out = torch.empty((rows.shape[0], width), dtype=rows.dtype, device=rows.device)
    gate_up = torch.empty((rows.shape[0], double), dtype=rows.dtype, device=rows.device) if save else out
    flat = gate_up_proj.view(num_experts * double, depth)
    half = config.block_n // 2
    programs = num_programs(rows.device) * config.waves
    _rows_by_experts_kernel[(programs,)](
        descriptor(rows, HALF_ROWS, BLOCK_K),
        descriptor(flat, half, BLOCK_K),
        descriptor(out, HALF_ROWS, half),
        descriptor(gate_up, HALF_ROWS, half),
        plan.tile_starts,
        plan.tile_experts,
        plan.starts,
        num_experts,
        width,
        depth,
        PROGRAMS=programs,
        TRANSPOSED=True,
        GATED=True,
        SAVE=save,
        BLOCK_N=half,
        STAGES=config.num_stages,
        GROUP=config.group,
        num_warps=4,
    )
    return out, gate_up if save else rows.new_empty(0)


def descriptor(matrix: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([height, width], gl.bfloat16)
    return TensorDescriptor.from_tensor(matrix, [height, width], layout)


@gluon.jit
def _tile_of(work, tile_starts, tile_experts, starts, num_n, BLOCK_M: gl.constexpr, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    """Expert, first row and column tile of a work item, and whether the tile is whole."""
    expert = gl.load(tile_experts + work // num_n)
    first = gl.load(tile_starts + expert)
    tiles = gl.load(tile_starts + expert + 1) - first
    local = work - first * num_n
    group = local // (GROUP * num_n)
    size = gl.minimum(tiles - group * GROUP, GROUP)
    within = local - group * (GROUP * num_n)
    column = within // size
    row = gl.load(starts + expert) + (group * GROUP + (within + column) % size) * BLOCK_M
    return expert, row, column, row + BLOCK_M // 2 < gl.load(starts + expert + 1)


@gluon.jit
def store_tile(value, stage, descriptor, row, column):  # type: ignore[no-untyped-def]
    """Write a tile through shared memory; returns while the copy is under way."""
    tma.store_wait(0)
    stage.store(value.to(descriptor.dtype))
    hopper.fence_async_shared()
    store(descriptor, [row, column], stage)


@gluon.jit
def _rows_producer(  # type: ignore[no-untyped-def]
    rows,
    weights,
    low,
    high,
    wide,
    ready,
    empty,
    tile_starts,
    tile_experts,
    starts,
    num_experts,
    columns,
    depth,
    PROGRAMS: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    BLOCK_M: gl.constexpr = 2 * low.shape[1]
    BLOCK_K: gl.constexpr = low.shape[2]
    HALF_BYTES: gl.constexpr = rows.block_type.nbytes
    WIDE_BYTES: gl.constexpr = wide.shape[1] * wide.shape[2] * 2
    num_n = (columns + BLOCK_N - 1) // BLOCK_N
    num_work = gl.load(tile_starts + num_experts) * num_n
    stage = 0
    phase = 1
    for work in range(gl.program_id(0), num_work, PROGRAMS):
        expert, row, tile_n, both = _tile_of(work, tile_starts, tile_experts, starts, num_n, BLOCK_M, GROUP)
        column = tile_n * BLOCK_N
        for k in range(0, depth, BLOCK_K):
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, 2 * HALF_BYTES + WIDE_BYTES, pred=both)
            mbarrier.expect(bar, HALF_BYTES + WIDE_BYTES, pred=both == 0)
            load(rows, [row, k], bar, low.index(stage))
            load(rows, [row + BLOCK_M // 2, k], bar, high.index(stage), pred=both)
            if GATED:
                at = expert * 2 * columns + column
                load(weights, [at, k], bar, wide.index(stage).slice(0, BLOCK_N, dim=0))
                load(weights, [at + columns, k], bar, wide.index(stage).slice(BLOCK_N, BLOCK_N, dim=0))
            elif TRANSPOSED:
                load(weights, [expert * columns + column, k], bar, wide.index(stage))
            else:
                load(weights, [expert * depth + k, column], bar, wide.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _rows_consumer(  # type: ignore[no-untyped-def]
    mine,
    wide,
    ready,
    empty,
    staging,
    out,
    gate_up,
    tile_starts,
    tile_experts,
    starts,
    num_experts,
    columns,
    depth,
    SECOND: gl.constexpr,
    PROGRAMS: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    GATED: gl.constexpr,
    SAVE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    HALF: gl.constexpr = mine.shape[1]
    BLOCK_K: gl.constexpr = mine.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    num_n = (columns + BLOCK_N - 1) // BLOCK_N
    num_work = gl.load(tile_starts + num_experts) * num_n
    stage = 0
    phase = 0
    for work in range(gl.program_id(0), num_work, PROGRAMS):
        expert, row, tile_n, both = _tile_of(work, tile_starts, tile_experts, starts, num_n, 2 * HALF, GROUP)
        column = tile_n * BLOCK_N
        if SECOND == 0 or both:
            total = gl.zeros([HALF, BLOCK_N], gl.float32, layout)
            if GATED:
                other = gl.zeros([HALF, BLOCK_N], gl.float32, layout)
            for k in range(0, depth, BLOCK_K):
                mbarrier.wait(ready.index(stage), phase)
                left = mine.index(stage)
                if GATED:
                    right = wide.index(stage).slice(0, BLOCK_N, dim=0).permute((1, 0))
                    right2 = wide.index(stage).slice(BLOCK_N, BLOCK_N, dim=0).permute((1, 0))
                    total = hopper.warpgroup_mma(left, right, total, is_async=True)
                    other = hopper.warpgroup_mma(left, right2, other, is_async=True)
                    total, other = hopper.warpgroup_mma_wait(2, deps=[total, other])
                else:
                    right = wide.index(stage).permute((1, 0)) if TRANSPOSED else wide.index(stage)
                    total = hopper.warpgroup_mma(left, right, total, is_async=True)
                    total = hopper.warpgroup_mma_wait(1, deps=[total])
                # The products of the stage before are done: it may be filled again.
                mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=k > 0)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            if GATED:
                total, other = hopper.warpgroup_mma_wait(0, deps=[total, other])
            else:
                total = hopper.warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
            row += SECOND * HALF
            if GATED:
                if SAVE:
                    store_tile(total, staging, gate_up, row, column)
                    store_tile(other, staging, gate_up, row, column + columns)
                    total = total.to(out.dtype).to(gl.float32)
                    other = other.to(out.dtype).to(gl.float32)
                total = total / (1.0 + gl.exp(-total)) * other
            store_tile(total, staging, out, row, column)
        else:
            # Half a tile: the rows after it are the next expert's, the stages pass unread.
            for _ in range(0, depth, BLOCK_K):
                mbarrier.wait(ready.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
    tma.store_wait(0)


@gluon.jit
def _rows_by_experts_kernel(  # type: ignore[no-untyped-def]
    rows,
    weights,
    out,
    gate_up,
    tile_starts,
    tile_experts,
    starts,
    num_experts,
    columns,
    depth,
    PROGRAMS: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    GATED: gl.constexpr,
    SAVE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    HALF: gl.constexpr = rows.block_shape[0]
    BLOCK_K: gl.constexpr = rows.block_shape[1]
    WIDE: gl.constexpr = [2 * BLOCK_N if GATED else BLOCK_N, BLOCK_K] if TRANSPOSED else [BLOCK_K, BLOCK_N]
    low = gl.allocate_shared_memory(rows.dtype, [STAGES, HALF, BLOCK_K], rows.layout)
    high = gl.allocate_shared_memory(rows.dtype, [STAGES, HALF, BLOCK_K], rows.layout)
    wide = gl.allocate_shared_memory(rows.dtype, [STAGES] + WIDE, weights.layout)
    staging0 = gl.allocate_shared_memory(rows.dtype, [HALF, BLOCK_N], out.layout)
    staging1 = gl.allocate_shared_memory(rows.dtype, [HALF, BLOCK_N], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(STAGES):
        mbarrier.init(ready.index(index), count=1)
        mbarrier.init(empty.index(index), count=2)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                _rows_consumer,
                (
                    low,
                    wide,
                    ready,
                    empty,
                    staging0,
                    out,
                    gate_up,
                    tile_starts,
                    tile_experts,
                    starts,
                    num_experts,
                    columns,
                    depth,
                    0,
                    PROGRAMS,
                    TRANSPOSED,
                    GATED,
                    SAVE,
                    BLOCK_N,
                    STAGES,
                    GROUP,
                ),
            ),
            (
                _rows_consumer,
                (
                    high,
                    wide,
                    ready,
                    empty,
                    staging1,
                    out,
                    gate_up,
                    tile_starts,
                    tile_experts,
                    starts,
                    num_experts,
                    columns,
                    depth,
                    1,
                    PROGRAMS,
                    TRANSPOSED,
                    GATED,
                    SAVE,
                    BLOCK_N,
                    STAGES,
                    GROUP,
                ),
            ),
            (
                _rows_producer,
                (
                    rows,
                    weights,
                    low,
                    high,
                    wide,
                    ready,
                    empty,
                    tile_starts,
                    tile_experts,
                    starts,
                    num_experts,
                    columns,
                    depth,
                    PROGRAMS,
                    TRANSPOSED,
                    GATED,
                    BLOCK_N,
                    STAGES,
                    GROUP,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )
