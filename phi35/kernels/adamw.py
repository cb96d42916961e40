"""One pass of AdamW over a tensor: gradient, moments and weights are each read and written once."""

import torch
import triton
import triton.language as tl

_BLOCK = 2048


def update(
    weights: torch.Tensor,
    grad: torch.Tensor,
    master: torch.Tensor | None,
    first: torch.Tensor,
    second: torch.Tensor,
    factor: torch.Tensor | None,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    step_size: float,
    second_correction: float,
    key: int,
) -> None:
    """Updates weights, master and moments in place; all tensors contiguous and of one size.

    Args:
        weights: what the model computes with.
        grad: of any floating dtype.
        master: float32 weights, or None where ``weights`` are the master; these are then rounded stochastically if
            they are bfloat16.
        first: first moment; bfloat16 ones are rounded stochastically.
        second: second moment, of the same dtype.
        factor: float32 scalar on the device that multiplies the gradient; None for 1, NaN for no update.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: Adam's epsilon.
        decay: 1 - learning rate * weight decay.
        step_size: learning rate over the first moment's bias correction.
        second_correction: 1 / sqrt(the second moment's bias correction).
        key: 31 random bits for stochastic rounding.
    """
    count = weights.numel()
    if count == 0:
        return
    _adamw_kernel[(triton.cdiv(count, _BLOCK),)](
        weights,
        grad,
        weights if master is None else master,
        first,
        second,
        first if factor is None else factor,
        count,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        epsilon,
        decay,
        step_size,
        second_correction,
        key,
        HAS_MASTER=master is not None,
        HAS_FACTOR=factor is not None,
        ROUND_WEIGHTS=master is None and weights.dtype == torch.bfloat16,
        ROUND_MOMENTS=first.dtype == torch.bfloat16,
        BLOCK=_BLOCK,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["key"])
def _adamw_kernel(  # type: ignore[no-untyped-def]
    weights,
    grad,
    master,
    first,
    second,
    factor,
    count,
    beta1,
    one_less_beta1,
    beta2,
    one_less_beta2,
    epsilon,
    decay,
    step_size,
    second_correction,
    key,
    HAS_MASTER: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    ROUND_WEIGHTS: tl.constexpr,
    ROUND_MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Nothing is read twice: "evict_first" keeps the cache from holding it (5 % of the time on an H200).
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    upstream = tl.load(grad + places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if HAS_FACTOR:
        scale = tl.load(factor)
        upstream *= scale
    mean = tl.load(first + places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    square = tl.load(second + places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    value = tl.load(master + places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    mean = mean * beta1 + upstream * one_less_beta1
    square = square * beta2 + upstream * upstream * one_less_beta2
    value = value * decay - step_size * mean / (tl.sqrt(square) * second_correction + epsilon)
    if HAS_FACTOR:
        inside = places < tl.where(scale == scale, count, 0)
    if ROUND_WEIGHTS or ROUND_MOMENTS:
        bits = mix(places.to(tl.uint32) ^ (key.to(tl.uint32) * 2654435769))
        more = mix(bits + 1640531527)
    if HAS_MASTER:
        tl.store(master + places, value, mask=inside, eviction_policy="evict_first")
    if ROUND_WEIGHTS:
        value = _round_stochastically(value, bits >> 16)
    tl.store(weights + places, value.to(weights.dtype.element_ty), mask=inside, eviction_policy="evict_first")
    if ROUND_MOMENTS:
        mean = _round_stochastically(mean, bits & 0xFFFF)
        square = _round_stochastically(square, more >> 16)
    tl.store(first + places, mean.to(first.dtype.element_ty), mask=inside, eviction_policy="evict_first")
    tl.store(second + places, square.to(second.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def mix(bits):  # type: ignore[no-untyped-def]
    """A 32-bit finalizer (MurmurHash3's): every bit of the result hangs on every bit of the argument."""
    bits = (bits ^ (bits >> 16)) * 2246822507
    bits = (bits ^ (bits >> 13)) * 3266489909
    return bits ^ (bits >> 16)


@triton.jit
def _round_stochastically(value, noise):  # type: ignore[no-untyped-def]
    """float32 to a value that bfloat16 holds: up with the probability of the part cut off."""
    bits = value.to(tl.uint32, bitcast=True) + noise
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
