"""Cross-entropy of logits and its gradient, which takes the logits' place: each row is read and written once.

The second reading of a row comes from the cache: a row of 32,064 bfloat16 logits has 64 KB.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 8192
_SCALED = 2048


def loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, want_gradient: bool
) -> torch.Tensor:
    """Losses of the rows; the logits become ``scale`` times the gradient of their sum.

    Args:
        logits: (N, V), contiguous; overwritten where ``want_gradient``.
        labels: (N,) int64; negative ones do not count: their loss and gradient are 0.
        scale: float32 scalar on the device.
        want_gradient: whether to compute it.

    Returns:
        (N,) float32, unscaled.
    """
    num_rows, vocabulary = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    _cross_entropy_kernel[(num_rows,)](
        logits,
        labels,
        losses,
        scale,
        vocabulary,
        GRADIENT=want_gradient,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
    )
    return losses


def scaled(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor times a float32 scalar on its device; the product is rounded once, to the tensor's dtype."""
    out = torch.empty_like(values)
    count = values.numel()
    if count:
        _scale_kernel[(triton.cdiv(count, _SCALED),)](values, factor, out, count, BLOCK=_SCALED, num_warps=8)
    return out


@triton.jit
def _scale_kernel(values, factor, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    value = tl.load(values + places, mask=inside, eviction_policy="evict_first").to(tl.float32) * tl.load(factor)
    tl.store(out + places, value.to(out.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits, labels, losses, scale, vocabulary, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * vocabulary
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    # Each lane keeps its own running maximum and sum; they meet once, at the end.
    for first in range(0, vocabulary, BLOCK):
        value = tl.load(start + first + columns, mask=first + columns < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, value)
        # A lane that has seen nothing yet: -inf - -inf would be NaN.
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - anchor) + tl.exp(value - anchor)
        largest = higher
    peak = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp(largest - peak), axis=0)
    log_total = peak + tl.log(total)
    counts = label >= 0
    chosen = tl.load(start + tl.maximum(label, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counts, log_total - chosen, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit is read above and overwritten below, by another thread
        factor = tl.where(counts, tl.load(scale), 0.0)
        for first in range(0, vocabulary, BLOCK):
            at = first + columns
            value = tl.load(start + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
            grad = (tl.exp(value - log_total) - tl.where(at == label, 1.0, 0.0)) * factor
            tl.store(start + at, grad.to(logits.dtype.element_ty), mask=at < vocabulary)
