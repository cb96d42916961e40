"""The ends of a step: the embedding of the tokens, and the choice of the next ones.

The choice follows ``phi35.generation.sampling``: repetition penalty, mask, temperature, top-k, top-p, min-p, then the
inverse of the cumulative distribution at one given number a row, so that device and host choose alike. There is no
sort: thresholds are found by bisection over the bits of the scores, all of which a program holds in registers.
"""

import torch
import triton
import triton.language as tl

from phi35.kernels.common import launch_options, wait_for_predecessor
from phi35.kernels.operands import StepState


def embed(tokens: torch.Tensor, table: torch.Tensor, hidden: torch.Tensor, pdl: bool) -> None:
    """hidden (B, D) = rows of ``table`` (V, D) at ``tokens`` (B,) int64."""
    batch, width = hidden.shape
    chunk = min(1024, triton.next_power_of_2(width))
    grid = (triton.cdiv(width, chunk), batch)
    _embed_kernel[grid](tokens, table, hidden, width, CHUNK=chunk, **launch_options(4, pdl))


def choose(logits: torch.Tensor, state: StepState, pdl: bool) -> None:
    """Choose each row's next token from logits (B, V) float32, and move ``state`` on by one step."""
    batch, vocab = logits.shape
    _choose_kernel[(batch,)](
        logits,
        state.temperature,
        state.top_k,
        state.top_p,
        state.min_p,
        state.penalty,
        state.draws,
        state.seen,
        state.masked,
        state.allowed,
        state.steps,
        state.tokens,
        state.lengths,
        state.history,
        state.logprobs,
        vocab,
        state.draws.stride(0),
        state.history.stride(0),
        state.allowed.stride(0),
        DRAWS=state.draws.shape[0],
        RING=state.history.shape[0],
        PADDED=triton.next_power_of_2(vocab),
        **launch_options(max(1, min(32, triton.next_power_of_2(vocab) // 128)), pdl),
    )


@triton.jit
def _embed_kernel(tokens, table, hidden, width, CHUNK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    wait_for_predecessor(PDL)
    row = tl.program_id(1)
    columns = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < width
    token = tl.load(tokens + row)
    tl.store(hidden + row * width + columns, tl.load(table + token * width + columns, mask=inside), mask=inside)


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    penalties,
    draws,
    seen,
    masked,
    allowed,
    steps,
    tokens,
    lengths,
    history,
    logprobs,
    vocab,
    draws_stride,
    history_stride,
    allowed_stride,
    DRAWS: tl.constexpr,
    RING: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    row = tl.program_id(0)
    ids = tl.arange(0, PADDED)
    real = ids < vocab
    logits_at = logits + row.to(tl.int64) * vocab
    seen_at = seen + row.to(tl.int64) * vocab
    raw = tl.load(logits_at + ids, mask=real, other=float("-inf"))
    step = tl.load(steps + row)
    penalty = tl.load(penalties + row)
    temperature = tl.load(temperatures + row)
    best, token = tl.max(raw, axis=0, return_indices=True, return_indices_tie_break_left=True)
    normaliser = best + tl.log(tl.sum(tl.exp(raw - best), axis=0))
    scores = raw
    if penalty != 1.0:
        present = tl.load(seen_at + ids, mask=real, other=0) != 0
        scores = tl.where(present, tl.where(raw < 0, raw * penalty, raw / penalty), raw)
        best, token = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    if tl.load(masked + row) != 0:
        words = tl.load(allowed + row * allowed_stride + ids // 32, mask=real, other=0)
        scores = tl.where((words >> (ids % 32)) & 1 != 0, scores, float("-inf"))
        best, token = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    if temperature != 0.0:
        # Counted from the best down, as on the host; a divisor below the smallest normal number would count as 0.
        chances = tl.exp((scores - best) / tl.maximum(temperature, 1.1754944e-38))
        chances = _filtered(chances, real, vocab, tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row))
        draw = tl.load(draws + (step % DRAWS) * draws_stride + row).to(tl.float32)
        cumulative = tl.cumsum(chances, axis=0)
        passed = (cumulative > draw * tl.max(cumulative, axis=0)) & (chances > 0)
        # Rounding may carry a draw just below 1 past the end; the last token with any probability is meant.
        last = tl.max(tl.where(chances > 0, ids, 0), axis=0)
        token = tl.minimum(tl.min(tl.where(passed, ids, PADDED), axis=0), last)
    tl.store(logprobs + (step % RING) * history_stride + row, tl.load(logits_at + token) - normaliser)
    tl.store(history + (step % RING) * history_stride + row, token.to(tl.int32))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(seen_at + token, 1)
    tl.store(steps + row, step + 1)
    tl.store(lengths + row, tl.load(lengths + row) + 1)


@triton.jit
def _filtered(chances, real, vocab, top_k, top_p, min_p):  # type: ignore[no-untyped-def]
    """Chances, of which the largest is 1, with those that the filters drop at 0."""
    chances = tl.where(real, chances, 0.0)
    if top_k < vocab:
        # Positive floats are ordered as their bits are. At least k chances reach ``low``, fewer reach ``high``.
        low, high = tl.full((), 0, tl.int32), tl.full((), 0x3F800001, tl.int32)
        reached = tl.full((), 2147483647, tl.int32)
        while (high - low > 1) & (reached != top_k):
            middle = low + (high - low) // 2
            count = tl.sum((chances.to(tl.int32, bitcast=True) >= middle).to(tl.int32), axis=0)
            enough = count >= top_k
            low = tl.where(enough, middle, low)
            reached = tl.where(enough, count, reached)
            high = tl.where(enough, high, middle)
        chances = tl.where(chances.to(tl.int32, bitcast=True) >= low, chances, 0.0)
    if top_p < 1.0:
        chances = _nucleus(chances, top_p * tl.sum(chances, axis=0))
    return tl.where(chances >= min_p, chances, 0.0)


@triton.jit
def _nucleus(chances, wanted):  # type: ignore[no-untyped-def]
    """The fewest chances whose sum reaches ``wanted``; of equal ones at the edge the first, as a stable sort does."""
    low, high = tl.full((), 0, tl.int32), tl.full((), 0x3F800001, tl.int32)
    above = tl.full((), 0.0, tl.float32)
    count_low, count_high = tl.full((), 2147483647, tl.int32), tl.full((), 0, tl.int32)
    while (high - low > 1) & (count_low - count_high > 1):
        middle = low + (high - low) // 2
        inside = chances.to(tl.int32, bitcast=True) >= middle
        total = tl.sum(tl.where(inside, chances, 0.0), axis=0)
        count = tl.sum(inside.to(tl.int32), axis=0)
        enough = total >= wanted
        low = tl.where(enough, middle, low)
        count_low = tl.where(enough, count, count_low)
        high = tl.where(enough, high, middle)
        above = tl.where(enough, above, total)
        count_high = tl.where(enough, count_high, count)
    order = chances.to(tl.int32, bitcast=True)
    kept = tl.where(order >= low, chances, 0.0)
    if count_low - count_high > 1:
        # Several equal chances at the edge; they lie at ``low``.
        equal = order == low
        each = tl.max(tl.where(equal, chances, 0.0), axis=0)
        rank = tl.cumsum(equal.to(tl.int32), axis=0) - equal.to(tl.int32)
        equal = equal & ((rank == 0) | (above + rank * each < wanted))
        kept = tl.where((order >= high) | equal, chances, 0.0)
    return kept
