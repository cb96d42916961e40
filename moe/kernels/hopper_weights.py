"""Gradients of the experts' weights on Hopper: each expert's rows transposed times its rows, summed over them.

The schedule of ``moe.kernels.hopper_gemm``. The sums are short (an expert's tokens), so that writing a tile takes as
long as a fifth of computing it: that the loads of the next tile run meanwhile is what this kernel is for.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from moe.kernels.grouped_gemm import HALF_ROWS, num_programs
from moe.kernels.hopper_config import BLOCK_K, HopperConfig
from moe.kernels.hopper_gemm import descriptor, load, store_tile
from moe.kernels.routing import RoutingPlan


def rows_by_rows(
    left: torch.Tensor,
    right: torch.Tensor,
    plan: RoutingPlan,
    config: HopperConfig,
    out: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per expert, the sum over its rows of left^T right: (P, M), (P, C) -> (E, M, C), in ``out`` where given.

    ``out`` may be a strip of a wider tensor's columns. An expert without rows gets zeros. ``squares``
    (``num_squares(...)``,) float32 is overwritten with partial sums of the squares of all elements.
    """
    num_experts = plan.counts.shape[0]
    height, columns = left.shape[1], right.shape[1]
    if out is None:
        out = torch.empty((num_experts, height, columns), dtype=left.dtype, device=left.device)
    programs = num_programs(left.device) * config.waves
    _rows_by_rows_kernel[(programs,)](
        descriptor(left, BLOCK_K, HALF_ROWS),
        descriptor(right, BLOCK_K, config.block_n),
        descriptor(out.flatten(0, 1), HALF_ROWS, config.block_n),
        plan.starts,
        plan.counts,
        plan.counts if squares is None else squares,
        num_experts,
        height,
        columns,
        SQUARES=squares is not None,
        PROGRAMS=programs,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        GROUP=config.group,
        num_warps=4,
    )
    return out


def num_squares(num_experts: int, height: int, columns: int, config: HopperConfig) -> int:
    """Partial sums that ``rows_by_rows`` can leave: one for each row of each tile."""
    return num_experts * -(-height // (2 * HALF_ROWS)) * -(-columns // config.block_n) * 2 * HALF_ROWS


@gluon.jit
def _weights_tile(work, num_m, num_n, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    per_expert = num_m * num_n
    expert = work // per_expert
    local = work % per_expert
    group = local // (GROUP * num_n)
    size = gl.minimum(num_m - group * GROUP, GROUP)
    within = local - group * (GROUP * num_n)
    return expert, group * GROUP + within % size, within // size


@gluon.jit
def _weights_producer(  # type: ignore[no-untyped-def]
    left,
    right,
    low,
    high,
    wide,
    ready,
    empty,
    starts,
    counts,
    num_experts,
    height,
    columns,
    PROGRAMS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    BLOCK_K: gl.constexpr = low.shape[1]
    HALF: gl.constexpr = low.shape[2]
    num_m = (height + 2 * HALF - 1) // (2 * HALF)
    num_n = (columns + BLOCK_N - 1) // BLOCK_N
    stage = 0
    phase = 1
    for work in range(gl.program_id(0), num_experts * num_m * num_n, PROGRAMS):
        expert, tile_m, tile_n = _weights_tile(work, num_m, num_n, GROUP)
        begin = gl.load(starts + expert)
        count = gl.load(counts + expert)
        for k in range(0, count, BLOCK_K):
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, 2 * left.block_type.nbytes + right.block_type.nbytes)
            load(left, [begin + k, tile_m * (2 * HALF)], bar, low.index(stage))
            load(left, [begin + k, tile_m * (2 * HALF) + HALF], bar, high.index(stage))
            load(right, [begin + k, tile_n * BLOCK_N], bar, wide.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _weights_consumer(  # type: ignore[no-untyped-def]
    mine,
    wide,
    ready,
    empty,
    staging,
    out,
    counts,
    squares,
    num_experts,
    height,
    columns,
    SECOND: gl.constexpr,
    SQUARES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    BLOCK_K: gl.constexpr = mine.shape[1]
    HALF: gl.constexpr = mine.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    num_m = (height + 2 * HALF - 1) // (2 * HALF)
    num_n = (columns + BLOCK_N - 1) // BLOCK_N
    stage = 0
    phase = 0
    for work in range(gl.program_id(0), num_experts * num_m * num_n, PROGRAMS):
        expert, tile_m, tile_n = _weights_tile(work, num_m, num_n, GROUP)
        count = gl.load(counts + expert)
        total = gl.zeros([HALF, BLOCK_N], gl.float32, layout)
        for k in range(0, count, BLOCK_K):
            mbarrier.wait(ready.index(stage), phase)
            total = hopper.warpgroup_mma(mine.index(stage).permute((1, 0)), wide.index(stage), total, is_async=True)
            total = hopper.warpgroup_mma_wait(1, deps=[total])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=k > 0)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        total = hopper.warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=count > 0)
        row = tile_m * (2 * HALF) + SECOND * HALF
        # Whole halves only: the height is a multiple of HALF, and a half past it belongs to the next expert.
        if row < height:
            store_tile(total, staging, out, expert * height + row, tile_n * BLOCK_N)
        if SQUARES:
            # A row lies in four threads of one warp: no shared memory is needed. Rows past the height are zero.
            places = (work * 2 + SECOND) * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
            gl.store(squares + places, gl.sum(total * total, axis=1))
    tma.store_wait(0)


@gluon.jit
def _rows_by_rows_kernel(  # type: ignore[no-untyped-def]
    left,
    right,
    out,
    starts,
    counts,
    squares,
    num_experts,
    height,
    columns,
    SQUARES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    BLOCK_K: gl.constexpr = left.block_shape[0]
    HALF: gl.constexpr = left.block_shape[1]
    low = gl.allocate_shared_memory(left.dtype, [STAGES, BLOCK_K, HALF], left.layout)
    high = gl.allocate_shared_memory(left.dtype, [STAGES, BLOCK_K, HALF], left.layout)
    wide = gl.allocate_shared_memory(left.dtype, [STAGES, BLOCK_K, BLOCK_N], right.layout)
    staging0 = gl.allocate_shared_memory(left.dtype, [HALF, BLOCK_N], out.layout)
    staging1 = gl.allocate_shared_memory(left.dtype, [HALF, BLOCK_N], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(STAGES):
        mbarrier.init(ready.index(index), count=1)
        mbarrier.init(empty.index(index), count=2)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                _weights_consumer,
                (
                    low,
                    wide,
                    ready,
                    empty,
                    staging0,
                    out,
                    counts,
                    squares,
                    num_experts,
                    height,
                    columns,
                    0,
                    SQUARES,
                    PROGRAMS,
                    BLOCK_N,
                    STAGES,
                    GROUP,
                ),
            ),
            (
                _weights_consumer,
                (
                    high,
                    wide,
                    ready,
                    empty,
                    staging1,
                    out,
                    counts,
                    squares,
                    num_experts,
                    height,
                    columns,
                    1,
                    SQUARES,
                    PROGRAMS,
                    BLOCK_N,
                    STAGES,
                    GROUP,
                ),
            ),
            (
                _weights_producer,
                (
                    left,
                    right,
                    low,
                    high,
                    wide,
                    ready,
                    empty,
                    starts,
                    counts,
                    num_experts,
                    height,
                    columns,
                    PROGRAMS,
                    BLOCK_N,
                    STAGES,
                    GROUP,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )
