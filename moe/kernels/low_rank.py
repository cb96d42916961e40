"""Experts with low-rank additions, W + B A, on the grouped products: gradients for rows and factors, none for W.

An addition is a little more depth of the product that runs anyway: [x, A x] times [W, B], and backward
[dY, B^T dY] times [W, A]. One kernel goes through both depths before a tile leaves the registers, so that nothing of
the size of the output is read or written for the addition; the factors' own products are as narrow as the rank, on
the same sorted rows. Weights in few bits are restored for their product and dropped again.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels import grouped_gemm, ops, rows
from moe.kernels.grouped_gemm import HALF_ROWS, TILE_ROWS, GemmConfig, _product_tile, _store, _tile_of, num_programs
from moe.kernels.routing import RoutingPlan, plan_routing
from phi35.fused import gated_activation
from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.linear import restored

MIN_RANK = 16
"""The least depth of a matrix instruction, and the multiple that ranks are padded to."""
_WIDE = GemmConfig()
_NARROW = GemmConfig(num_warps=4, num_stages=5)
"""Products as narrow as the rank wait for memory: a deep pipeline on few registers."""
_INTERPRETED = GemmConfig(block_n=64, block_k=32)

Weight = torch.Tensor | QuantizedTensor


@dataclass(frozen=True)
class Factors:
    """An addition s B A.

    Attributes:
        first: A (E, R, in), contiguous; R a multiple of ``MIN_RANK``.
        second: B (E, out, R), in any layout.
        scaling: s.
    """

    first: torch.Tensor
    second: torch.Tensor
    scaling: float


def adapted_experts(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    hidden_act: str,
    up: Factors | None,
    down: Factors | None,
) -> torch.Tensor:
    """Weighted sum of each token's experts, whose weights are W + B A.

    Args:
        hidden_states: (N, D), N > 0.
        expert_indices: (N, k) in [0, E).
        expert_weights: (N, k).
        gate_up_proj: (E, 2F, D), gate first; frozen.
        down_proj: (E, D, F); frozen.
        hidden_act: "silu" or "gelu".
        up: what is added to gate_up_proj, in the dtype of the tokens.
        down: what is added to down_proj.

    Returns:
        (N, D). Gradients go to tokens, multipliers and factors.
    """
    factors = [part for one in (up, down) for part in ((None, None) if one is None else (one.first, one.second))]
    scalings = tuple(1.0 if one is None else one.scaling for one in (up, down))
    return _AdaptedExperts.apply(
        hidden_states, expert_weights, *factors, expert_indices, gate_up_proj, down_proj, hidden_act, scalings
    )


class _AdaptedExperts(torch.autograd.Function):
    """Keeps the tokens, the gate and up rows and the rows of rank R; everything else is made again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        expert_weights: torch.Tensor,
        first_up: torch.Tensor | None,
        second_up: torch.Tensor | None,
        first_down: torch.Tensor | None,
        second_down: torch.Tensor | None,
        expert_indices: torch.Tensor,
        gate_up_proj: Weight,
        down_proj: Weight,
        hidden_act: str,
        scalings: tuple[float, float],
    ) -> torch.Tensor:
        num_experts = gate_up_proj.shape[0]
        second_up, second_down = _scaled(second_up, scalings[0]), _scaled(second_down, scalings[1])
        top_k = expert_indices.shape[1]
        plan = plan_routing(expert_indices, num_experts, HALF_ROWS)
        sorted_rows = rows.gather_rows(hidden_states, plan, top_k)
        low = _narrow(sorted_rows, first_up, plan, transposed=True)
        gate_up = _added(sorted_rows, _whole(gate_up_proj, hidden_states.dtype), low, second_up, plan, transposed=True)
        del sorted_rows
        acted = gated_activation(gate_up, hidden_act)
        low_acted = _narrow(acted, first_down, plan, transposed=True)
        mixed = _added(acted, _whole(down_proj, acted.dtype), low_acted, second_down, plan, transposed=True)
        ctx.save_for_backward(
            hidden_states, expert_weights, first_up, second_up, first_down, second_down, gate_up, low, plan.buffer
        )
        ctx.weights, ctx.scalings = (gate_up_proj, down_proj), scalings
        ctx.top_k, ctx.hidden_act = top_k, hidden_act
        return rows.combine_rows(mixed, plan.places, top_k, expert_weights, hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, expert_weights, *factors, gate_up, low, plan_buffer = ctx.saved_tensors
        first_up, second_up, first_down, second_down = factors
        gate_up_proj, down_proj = ctx.weights
        wanted = ctx.needs_input_grad
        plan = RoutingPlan.view(plan_buffer, expert_weights.numel(), gate_up_proj.shape[0], HALF_ROWS)
        grad = grad.contiguous()
        upstream = rows.gather_rows(grad, plan, ctx.top_k)
        low_grad = _narrow(upstream, second_down, plan, transposed=False)
        acted_grad = _added(upstream, _whole(down_proj, grad.dtype), low_grad, first_down, plan, transposed=False)
        gate_up_grad, acted, weights_grad = rows.gate_rows_backward(
            acted_grad, gate_up, plan, expert_weights, ctx.hidden_act
        )
        # ``acted`` carries the multipliers, ``upstream`` does not: each sum over rows has them once.
        down_grads: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if wanted[4] or wanted[5]:
            low_acted = _narrow(acted, first_down, plan, transposed=True)
            down_grads = _factor_grads(acted, low_grad, upstream, low_acted, plan, ctx.scalings[1])
        del upstream, acted, acted_grad
        low_grad = _narrow(gate_up_grad, second_up, plan, transposed=False)
        input_grad = None
        if wanted[0]:
            weight = _whole(gate_up_proj, grad.dtype)
            rows_grad = _added(gate_up_grad, weight, low_grad, first_up, plan, transposed=False)
            input_grad = rows.combine_rows(rows_grad, plan.places, ctx.top_k, None, grad.dtype)
            del rows_grad, weight
        up_grads: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if wanted[2] or wanted[3]:
            sorted_rows = rows.gather_rows(hidden_states, plan, ctx.top_k)
            up_grads = _factor_grads(sorted_rows, low_grad, gate_up_grad, low, plan, ctx.scalings[0])
        multipliers_grad = weights_grad.to(expert_weights.dtype) if wanted[1] else None
        return input_grad, multipliers_grad, *up_grads, *down_grads, *(None,) * 5


def _whole(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A weight in its own dtype, at an address that descriptors take."""
    if isinstance(weight, QuantizedTensor):
        return restored(weight, dtype)
    weight = weight.detach().contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


def _scaled(second: torch.Tensor | None, scaling: float) -> torch.Tensor | None:
    """s B, contiguous, in one pass."""
    if second is None:
        return None
    out = torch.empty(second.shape, dtype=second.dtype, device=second.device)
    return torch.mul(second, scaling, out=out)


def _narrow(
    values: torch.Tensor, factor: torch.Tensor | None, plan: RoutingPlan, transposed: bool
) -> torch.Tensor | None:
    """Rows (P, K) times a factor, (P, R); None without one."""
    if factor is None:
        return None
    config = _NARROW if values.is_cuda else _INTERPRETED
    return grouped_gemm.rows_by_experts(values, factor, plan, transposed, config)


def _factor_grads(
    inputs: torch.Tensor,
    low_grad: torch.Tensor | None,
    out_grad: torch.Tensor,
    low: torch.Tensor | None,
    plan: RoutingPlan,
    scaling: float,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of A, (E, R, in), and B, (E, out, R), from rows of the inputs, of A x, and of both gradients.

    That of B lies as PEFT lays B, the expert changing fastest.
    """
    if low is None or low_grad is None:
        return None, None
    config = _NARROW if inputs.is_cuda else _INTERPRETED
    # The wide side first: its tiles are tall, the rank is one narrow column of them.
    first = grouped_gemm.rows_by_rows(inputs, low_grad, plan, config).transpose(1, 2).contiguous()
    second = grouped_gemm.rows_by_rows(out_grad, low, plan, config).permute(1, 2, 0)
    scaled = torch.empty(second.shape, dtype=second.dtype, device=second.device)
    return first, torch.mul(second, scaling, out=scaled).permute(2, 0, 1)


def _added(
    values: torch.Tensor,
    weights: torch.Tensor,
    low: torch.Tensor | None,
    factor: torch.Tensor | None,
    plan: RoutingPlan,
    transposed: bool,
) -> torch.Tensor:
    """Each expert's rows (P, K) times its weights plus their low rows (P, R) times its factor.

    Args:
        values: (P, K).
        weights: (E, M, K) with ``transposed``, else (E, K, M).
        low: (P, R), or None without an addition.
        factor: (E, M, R) with ``transposed``, else (E, R, M).
        plan: with ``align`` = HALF_ROWS.
        transposed: multiply by the transposed weights and factors.

    Returns:
        (P, M); rows past those in use are undefined.
    """
    config = _WIDE if values.is_cuda else _INTERPRETED
    if low is None or factor is None:
        return ops.rows_by_experts(values, weights, plan, transposed, config)
    num_experts, first, second = weights.shape
    depth, columns = (second, first) if transposed else (first, second)
    rank = low.shape[1]
    out = torch.empty((values.shape[0], columns), dtype=values.dtype, device=values.device)
    programs = num_programs(values.device)
    block_n = min(config.block_n, triton.next_power_of_2(columns))
    block_r = strip_of(rank)
    _added_kernel[(programs,)](
        *(TensorDescriptor.from_tensor(values, [height, config.block_k]) for height in (TILE_ROWS, HALF_ROWS)),
        *(TensorDescriptor.from_tensor(low, [height, block_r]) for height in (TILE_ROWS, HALF_ROWS)),
        *(
            TensorDescriptor.from_tensor(one, [1, block_n, block_k] if transposed else [1, block_k, block_n])
            for one, block_k in ((weights, config.block_k), (factor, block_r))
        ),
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
        RANK=rank,
        BLOCK_R=block_r,
        GROUP=config.group,
        PROGRAMS=programs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def strip_of(rank: int) -> int:
    """How much of a rank is multiplied in one step: 16, 32 or 64."""
    return next(strip for strip in (64, 32, MIN_RANK) if rank % strip == 0)


@triton.jit
def _with_addition(  # type: ignore[no-untyped-def]
    total,
    low,
    factor,
    expert,
    row,
    column,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile's product of the rows of rank R, added to the product of its weights."""
    for r in tl.static_range(0, RANK, BLOCK_R):
        left = low.load([row, r])
        if TRANSPOSED:
            right = factor.load([expert, column, r]).reshape(BLOCK_N, BLOCK_R).T
        else:
            right = factor.load([expert, r, column]).reshape(BLOCK_R, BLOCK_N)
        total = tl.dot(left, right, total)
    return total


@triton.jit
def _added_kernel(  # type: ignore[no-untyped-def]
    rows,
    half_rows,
    low,
    half_low,
    weights,
    factor,
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
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """``grouped_gemm._rows_by_experts_kernel`` with a second, short depth."""
    num_n = tl.cdiv(columns, BLOCK_N)
    num_work = tl.load(tile_starts + num_experts) * num_n
    for work in tl.range(tl.program_id(0), num_work, PROGRAMS):
        expert, row, tile_n, whole = _tile_of(work, tile_starts, tile_experts, starts, num_n, BLOCK_M, GROUP)
        column = tile_n * BLOCK_N
        if whole:
            total = _product_tile(rows, weights, expert, row, column, depth, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K)
            total = _with_addition(total, low, factor, expert, row, column, TRANSPOSED, BLOCK_N, RANK, BLOCK_R)
            out.store([row, column], total.to(out.dtype))
        else:
            half = _product_tile(
                half_rows, weights, expert, row, column, depth, TRANSPOSED, BLOCK_M // 2, BLOCK_N, BLOCK_K
            )
            half = _with_addition(half, half_low, factor, expert, row, column, TRANSPOSED, BLOCK_N, RANK, BLOCK_R)
            _store(half_out, half, row, column, columns, columns, BLOCK_M // 2, BLOCK_N)
