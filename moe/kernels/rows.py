"""The passes between the grouped products: copy rows to their experts, gate, and add them up again.

Each is bound by memory and touches every value once. Sums over a token's k rows and over a row are taken in float32
in a fixed order, so that results repeat to the bit.
"""

import torch
import triton
import triton.language as tl

from moe.kernels.routing import RoutingPlan

_CHUNK = 1024


def gather_rows(values: torch.Tensor, plan: RoutingPlan, top_k: int) -> torch.Tensor:
    """Copy each row of (N, D) to its k sorted rows; empty rows become zeros. Returns (P, D).

    ``values`` may be a strip of a wider tensor's columns.
    """
    num_tokens, width = values.shape
    if values.stride(1) != 1:
        values = values.contiguous()
    rows = torch.empty((plan.num_rows, width), dtype=values.dtype, device=values.device)
    num_experts = plan.counts.shape[0]
    grid = (num_tokens + num_experts * (plan.align - 1),)
    _gather_kernel[grid](
        values,
        rows,
        plan.places,
        plan.starts,
        plan.counts,
        num_tokens,
        width,
        values.stride(0),
        TOP_K=top_k,
        ALIGN=plan.align,
        CHUNK=min(2 * _CHUNK, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return rows


def combine_rows(
    rows: torch.Tensor, places: torch.Tensor, top_k: int, expert_weights: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Add each token's k rows of (P, D), times (N, k) weights where given; returns (N, D) of ``dtype``.

    ``places`` (N k,) says where the row of (token, choice) lies; products and sums are fused where the device can.
    """
    width = rows.shape[1]
    num_tokens = places.shape[0] // top_k
    out = torch.empty((num_tokens, width), dtype=dtype, device=rows.device)
    chunk = min(2 * _CHUNK, triton.next_power_of_2(width))
    _combine_kernel[(num_tokens, triton.cdiv(width, chunk))](
        rows,
        out,
        places,
        rows if expert_weights is None else expert_weights.contiguous(),
        width,
        TOP_K=top_k,
        WEIGHTED=expert_weights is not None,
        CHUNK=chunk,
        num_warps=4,
    )
    return out


def gate_rows_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, plan: RoutingPlan, expert_weights: torch.Tensor, hidden_act: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of w * (act(gate) * up) W_down, given grad = upstream times W_down without w.

    Args:
        grad: (P, F); overwritten with w * act(gate) * up, which the gradient of W_down needs.
        gate_up: (P, 2F) of the forward pass.
        plan: the routing.
        expert_weights: (N, k).
        hidden_act: "silu" or "gelu".

    Returns:
        the gradient of gate_up (P, 2F), ``grad`` overwritten, and the gradient of the weights (N, k) in float32.
    """
    width = grad.shape[1]
    gate_up_grad = torch.empty_like(gate_up)
    weights_grad = torch.empty(expert_weights.shape, dtype=torch.float32, device=grad.device)
    _gate_backward_kernel[(gate_up.shape[0],)](
        grad,
        gate_up,
        gate_up_grad,
        plan.sources,
        expert_weights.contiguous(),
        weights_grad,
        plan.starts[-1:],
        width,
        ACT=hidden_act,
        CHUNK=min(_CHUNK, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return gate_up_grad, grad, weights_grad


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    values,
    rows,
    places,
    starts,
    counts,
    num_tokens,
    width,
    stride,
    TOP_K: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per token writes its k copies; the programs after them write the empty rows."""
    program = tl.program_id(0)
    columns = tl.arange(0, CHUNK)
    if program < num_tokens:
        for first in range(0, width, CHUNK):
            inside = first + columns < width
            value = tl.load(values + program.to(tl.int64) * stride + first + columns, mask=inside)
            for choice in tl.static_range(TOP_K):
                row = tl.load(places + program * TOP_K + choice).to(tl.int64)
                tl.store(rows + row * width + first + columns, value, mask=inside)
    else:
        slot = program - num_tokens
        expert = slot // (ALIGN - 1)
        row = tl.load(starts + expert) + tl.load(counts + expert) + slot % (ALIGN - 1)
        if row < tl.load(starts + expert + 1):
            zeros = tl.zeros((CHUNK,), rows.dtype.element_ty)
            for first in range(0, width, CHUNK):
                tl.store(rows + row.to(tl.int64) * width + first + columns, zeros, mask=first + columns < width)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    rows, out, places, expert_weights, width, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, CHUNK: tl.constexpr
):
    """Each token's k rows, weighted, added in order of choice in float32."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < width
    total = tl.zeros((CHUNK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(places + token * TOP_K + choice).to(tl.int64)
        value = tl.load(rows + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(expert_weights + token * TOP_K + choice).to(tl.float32)
        total += value
    tl.store(out + token.to(tl.int64) * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def activate(value, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu or the exact gelu, in float32."""
    if ACT == "silu":
        return value / (1.0 + tl.exp(-value))
    return value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))


@triton.jit
def activate_gradient(value, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Derivative of ``activate``, in float32."""
    if ACT == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-value))
        return sigmoid * (1.0 + value * (1.0 - sigmoid))
    density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
    return 0.5 * (1.0 + tl.erf(value * 0.7071067811865476)) + value * density


@triton.jit
def _gate_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    gate_up,
    gate_up_grad,
    sources,
    expert_weights,
    weights_grad,
    num_rows,
    width,
    ACT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per sorted row, so that the gradient of its weight is one sum."""
    row = tl.program_id(0)
    if row < tl.load(num_rows):
        at = row.to(tl.int64)
        pair = tl.load(sources + row)
        weight = tl.load(expert_weights + pair, mask=pair >= 0, other=0.0).to(tl.float32)
        total = tl.zeros((CHUNK,), tl.float32)
        for first in range(0, width, CHUNK):
            columns = first + tl.arange(0, CHUNK)
            inside = columns < width
            gate = tl.load(gate_up + at * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(gate_up + (at * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
            upstream = tl.load(grad + at * width + columns, mask=inside, other=0.0).to(tl.float32)
            acted = activate(gate, ACT)
            total += acted * up * upstream
            upstream *= weight
            kind = grad.dtype.element_ty
            tl.store(grad + at * width + columns, (acted * up * weight).to(kind), mask=inside)
            gate_grad = upstream * up * activate_gradient(gate, ACT)
            tl.store(gate_up_grad + at * 2 * width + columns, gate_grad.to(kind), mask=inside)
            tl.store(gate_up_grad + (at * 2 + 1) * width + columns, (upstream * acted).to(kind), mask=inside)
        tl.store(weights_grad + pair, tl.sum(total, axis=0), mask=pair >= 0)
