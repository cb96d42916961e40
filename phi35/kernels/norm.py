"""Adding to the residual stream and normalising it, forward and backward, each in one pass over memory."""

import torch
import triton
import triton.language as tl

from phi35.jitter import Jitter
from phi35.kernels.adamw import mix

_INTERPRETED_PROGRAMS = 4


def add_norm(
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    subtract_mean: bool,
    jitter: Jitter | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises the sum of two tensors.

    Args:
        hidden_states: (..., D), contiguous, N rows.
        residual: (..., D) added first, the sum rounded to the tensors' dtype; None for nothing.
        weight: (D,).
        bias: (D,) or None.
        eps: added to the mean square.
        subtract_mean: LayerNorm instead of RMSNorm.
        jitter: multiplies the normalised sum.

    Returns:
        the sum (``hidden_states`` itself without ``residual``), the normalised sum, and float32 means (N,) (empty for
        RMSNorm) and reciprocal deviations (N,).
    """
    width = hidden_states.shape[-1]
    num_rows = hidden_states.numel() // width
    total = hidden_states if residual is None else torch.empty_like(hidden_states)
    normed = torch.empty_like(hidden_states)
    deviations = torch.empty(num_rows, dtype=torch.float32, device=hidden_states.device)
    means = torch.empty(num_rows if subtract_mean else 0, dtype=torch.float32, device=hidden_states.device)
    block = triton.next_power_of_2(width)
    if num_rows == 0:
        return total, normed, means, deviations
    _norm_kernel[(num_rows,)](
        hidden_states,
        hidden_states if residual is None else residual,
        total,
        normed,
        weight,
        weight if bias is None else bias,
        means,
        deviations,
        deviations if jitter is None else jitter.seed,
        width,
        eps,
        *_interval(jitter),
        JITTER=jitter is not None,
        ADD=residual is not None,
        BIAS=bias is not None,
        SUBTRACT=subtract_mean,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return total, normed, means, deviations


def add_norm_backward(
    grad_total: torch.Tensor | None,
    grad_normed: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    means: torch.Tensor,
    deviations: torch.Tensor,
    has_bias: bool,
    jitter: Jitter | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of ``add_norm``.

    Args:
        grad_total: (..., D) gradient of the sum from what else reads it; None for none.
        grad_normed: (..., D).
        total: (..., D) the sum; all contiguous.
        weight: (D,).
        means: (N,) of the forward pass, empty for RMSNorm.
        deviations: (N,) reciprocal deviations of the forward pass.
        has_bias: whether a gradient of the bias is wanted.
        jitter: of the forward pass.

    Returns:
        the gradient of both summands (..., D), of the weight (D,), and of the bias (D,) or None; the last two float32.
    """
    width = total.shape[-1]
    num_rows = total.numel() // width
    grad = torch.empty_like(total)
    # Each program adds up the weight's gradient over its rows; few programs, so that the second sum is short.
    programs = max(1, min(num_rows, _programs(total.device)))
    parts = torch.empty((1 + has_bias, programs, width), dtype=torch.float32, device=total.device)
    block = triton.next_power_of_2(width)
    _norm_backward_kernel[(programs,)](
        grad_normed if grad_total is None else grad_total,
        grad_normed,
        total,
        weight,
        means,
        deviations,
        grad,
        parts[0],
        parts[-1],
        deviations if jitter is None else jitter.seed,
        num_rows,
        width,
        *_interval(jitter),
        JITTER=jitter is not None,
        ADD=grad_total is not None,
        BIAS=has_bias,
        SUBTRACT=means.numel() > 0,
        BLOCK=block,
        num_warps=_warps(block),
    )
    sums = parts.sum(dim=1)
    return grad, sums[0], sums[1] if has_bias else None


def _warps(block: int) -> int:
    """Eight elements (16 bytes of bfloat16) and more for each thread."""
    return max(1, min(8, block // 256))


def _interval(jitter: Jitter | None) -> tuple[float, float]:
    """Where the noise begins, and what a step of its 32 bits is worth."""
    return (1.0, 0.0) if jitter is None else (1.0 - jitter.amount, 2 * jitter.amount / 2**32)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    hidden_states,
    residual,
    total,
    normed,
    weight,
    bias,
    means,
    deviations,
    seed,
    width,
    eps,
    low,
    unit,
    JITTER: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    SUBTRACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    value = tl.load(hidden_states + at, mask=inside, other=0.0)
    if ADD:
        added = value.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        value = added.to(total.dtype.element_ty)
        tl.store(total + at, value, mask=inside)
    value = value.to(tl.float32)
    if SUBTRACT:
        mean = tl.sum(value, axis=0) / width
        value = tl.where(inside, value - mean, 0.0)
        tl.store(means + row, mean)
    deviation = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(deviations + row, deviation)
    result = value * deviation * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if JITTER:
        result *= _noise(at, seed, low, unit, normed.dtype.element_ty)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad_total,
    grad_normed,
    total,
    weight,
    means,
    deviations,
    grad,
    weight_parts,
    bias_parts,
    seed,
    num_rows,
    width,
    low,
    unit,
    JITTER: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    SUBTRACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    at = program.to(tl.int64) * width + columns
    for row in range(program, num_rows, programs):
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
        if JITTER:
            upstream *= _noise(at, seed, low, unit, total.dtype.element_ty)
        deviation = tl.load(deviations + row)
        if SUBTRACT:
            value = tl.where(inside, value - tl.load(means + row), 0.0)
        value *= deviation
        weight_sum += upstream * value
        if BIAS:
            bias_sum += upstream
        scaled = upstream * scale
        result = scaled - value * (tl.sum(scaled * value, axis=0) / width)
        if SUBTRACT:
            result -= tl.sum(scaled, axis=0) / width
        result *= deviation
        if ADD:
            result += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad + at, result.to(grad.dtype.element_ty), mask=inside)
        at += programs * width
    tl.store(weight_parts + program * width + columns, weight_sum, mask=inside)
    if BIAS:
        tl.store(bias_parts + program * width + columns, bias_sum, mask=inside)


@triton.jit
def _noise(at, seed, low, unit, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """What ``Jitter.noise`` gives at these places, rounded to the dtype KIND and widened."""
    bits = mix(at.to(tl.uint32) ^ (tl.load(seed).to(tl.uint32) * 2654435769))
    return (bits.to(tl.float32) * unit + low).to(KIND).to(tl.float32)
