"""act(gate) * up and its gradient, and quick GELU, element by element."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def gate(gate_up: torch.Tensor, activation: str, limit: float | None = None) -> torch.Tensor:
    """act(gate) * up: (..., 2F), gate first, to (..., F).

    Args:
        gate_up: contiguous.
        activation: "silu", "gelu" (exact) or "gegelu" (quick GELU of the gate, up + 1, both clamped).
        limit: the clamp of "gegelu".
    """
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    num_rows = out.numel() // width
    if num_rows == 0:
        return out
    block = min(_BLOCK, triton.next_power_of_2(width))
    _gate_kernel[(num_rows, triton.cdiv(width, block))](
        gate_up, out, width, ACT=activation, LIMIT=limit or 0.0, BLOCK=block, num_warps=4
    )
    return out


def gate_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, activation: str, limit: float | None = None
) -> torch.Tensor:
    """Gradient (..., 2F) of ``gate``, from that of its result (..., F); both contiguous."""
    width = grad.shape[-1]
    num_rows = grad.numel() // width
    gate_up_grad = torch.empty_like(gate_up)
    if num_rows == 0:
        return gate_up_grad
    block = min(_BLOCK, triton.next_power_of_2(width))
    _gate_backward_kernel[(num_rows, triton.cdiv(width, block))](
        grad, gate_up, gate_up_grad, width, ACT=activation, LIMIT=limit or 0.0, BLOCK=block, num_warps=4
    )
    return gate_up_grad


def activate(values: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of every element of a contiguous tensor: "silu", "gelu" or "quick_gelu"."""
    out = torch.empty_like(values)
    if values.numel() == 0:
        return out
    _activate_kernel[(triton.cdiv(values.numel(), _BLOCK),)](
        values, values, out, values.numel(), ACT=activation, BACKWARD=False, BLOCK=_BLOCK, num_warps=4
    )
    return out


def activate_backward(grad: torch.Tensor, values: torch.Tensor, activation: str) -> torch.Tensor:
    """Gradient of ``activate``."""
    out = torch.empty_like(values)
    if values.numel() == 0:
        return out
    _activate_kernel[(triton.cdiv(values.numel(), _BLOCK),)](
        values, grad, out, values.numel(), ACT=activation, BACKWARD=True, BLOCK=_BLOCK, num_warps=4
    )
    return out


@triton.jit
def _activation(value, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACT == "silu":
        return value * tl.sigmoid(value)
    if ACT == "quick_gelu" or ACT == "gegelu":
        return value * tl.sigmoid(1.702 * value)
    return value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))


@triton.jit
def _derivative(value, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACT == "silu":
        chance = tl.sigmoid(value)
        return chance * (1.0 + value * (1.0 - chance))
    if ACT == "quick_gelu" or ACT == "gegelu":
        chance = tl.sigmoid(1.702 * value)
        return chance * (1.0 + 1.702 * value * (1.0 - chance))
    density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
    return 0.5 * (1.0 + tl.erf(value * 0.7071067811865476)) + value * density


@triton.jit
def _gate_kernel(  # type: ignore[no-untyped-def]
    gate_up, out, width, ACT: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    if ACT == "gegelu":
        gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
    tl.store(out + row * width + columns, (_activation(gate, ACT) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(  # type: ignore[no-untyped-def]
    grad, gate_up, gate_up_grad, width, ACT: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    kind = gate_up_grad.dtype.element_ty
    if ACT == "gegelu":
        # What the clamps cut off has no gradient.
        gate_inside, up_inside = gate <= LIMIT, tl.abs(up) <= LIMIT
        gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        gate_grad = tl.where(gate_inside, upstream * up * _derivative(gate, ACT), 0.0)
        up_grad = tl.where(up_inside, upstream * _activation(gate, ACT), 0.0)
    else:
        gate_grad = upstream * up * _derivative(gate, ACT)
        up_grad = upstream * _activation(gate, ACT)
    tl.store(gate_up_grad + row * 2 * width + columns, gate_grad.to(kind), mask=inside)
    tl.store(gate_up_grad + (row * 2 + 1) * width + columns, up_grad.to(kind), mask=inside)


@triton.jit
def _activate_kernel(  # type: ignore[no-untyped-def]
    values, grad, out, count, ACT: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    value = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        result = _derivative(value, ACT) * tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    else:
        result = _activation(value, ACT)
    tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)
