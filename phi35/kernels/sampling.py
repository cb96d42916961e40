"""The ends of a step: the embedding of the tokens, and the choice of the next ones.

The choice follows ``phi35.generation.sampling``: repetition penalty, temperature, top-k, top-p, min-p, then the
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
        state.steps,
        state.tokens,
        state.lengths,
        state.history,
        state.logprobs,
        vocab,
        batch,
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
    steps,
    tokens,
    lengths,
    history,
    logprobs,
    vocab,
    batch,
    DRAWS: tl.constexpr,
    RING: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    row = tl.program_id(0)
    ids = tl.arange(0, PADDED)
    real = ids < vocab
    raw = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=real, other=float("-inf"))
    step = tl.load(steps + row)
    penalty = tl.load(penalties + row)
    scores = raw
    seen_at = seen + row.to(tl.int64) * vocab
    if penalty != 1.0:
        present = tl.load(seen_at + ids, mask=real, other=0) != 0
        scores = tl.where(present, tl.where(raw < 0, raw * penalty, raw / penalty), raw)
    temperature = tl.load(temperatures + row)
    best = tl.max(scores, axis=0)
    if temperature == 0.0:
        token = tl.argmax(scores, axis=0, tie_break_left=True)
    else:
        # Counted from the best down, as on the host; a divisor below the smallest normal number would count as 0.
        scaled = (scores - best) / tl.maximum(temperature, 1.1754944e-38)
        kept = _kept(scaled, real, vocab, tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row))
        draw = tl.load(draws + (step % DRAWS) * batch + row)
        cumulative = tl.cumsum(tl.where(kept, tl.exp(scaled), 0.0).to(tl.float64), axis=0)
        target = draw * tl.max(cumulative, axis=0)
        token = tl.sum((cumulative <= target).to(tl.int32), axis=0)
        # Rounding may carry a draw just below 1 past the end; the last token with any probability is meant.
        token = tl.minimum(token, tl.max(tl.where(kept & (scaled > -100.0), ids, 0), axis=0))
    highest = tl.max(raw, axis=0)
    normaliser = tl.log(tl.sum(tl.exp(raw - highest), axis=0))
    chosen = tl.sum(tl.where(ids == token, raw, 0.0), axis=0)
    tl.store(logprobs + (step % RING) * batch + row, chosen - highest - normaliser)
    tl.store(history + (step % RING) * batch + row, token.to(tl.int32))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(seen_at + token, 1)
    tl.store(steps + row, step + 1)
    tl.store(lengths + row, tl.load(lengths + row) + 1)


@triton.jit
def _kept(scaled, real, vocab, top_k, top_p, min_p):  # type: ignore[no-untyped-def]
    """Which tokens the filters leave; ``scaled`` are scores less the best, after the temperature."""
    # Order of the bits as signed numbers is that of the scores.
    bits = scaled.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    kept = real
    if top_k < vocab:
        threshold = tl.full((), -2147483648, tl.int32)
        for place in tl.range(0, 32):
            # Adding the highest bit to the lowest number gives 0, the first candidate.
            candidate = threshold + (tl.full((), 1, tl.int32) << (31 - place))
            reached = tl.sum(((order >= candidate) & real).to(tl.int32), axis=0) >= top_k
            threshold = tl.where(reached, candidate, threshold)
        kept = kept & (order >= threshold)
    chances = tl.where(kept, tl.exp(scaled), 0.0)
    if top_p < 1.0:
        wanted = top_p * tl.sum(chances, axis=0)
        threshold = tl.full((), -2147483648, tl.int32)
        for place in tl.range(0, 32):
            candidate = threshold + (tl.full((), 1, tl.int32) << (31 - place))
            reached = tl.sum(tl.where(order >= candidate, chances, 0.0), axis=0) >= wanted
            threshold = tl.where(reached, candidate, threshold)
        # Of equal scores at the edge the first ones stay, as a stable sort would leave them.
        equal = (order == threshold) & kept
        above = tl.sum(tl.where(order > threshold, chances, 0.0), axis=0)
        each = tl.max(tl.where(equal, chances, 0.0), axis=0)
        rank = tl.cumsum(equal.to(tl.int32), axis=0) - equal.to(tl.int32)
        kept = kept & ((order > threshold) | (equal & ((rank == 0) | (above + rank * each < wanted))))
    return kept & (chances >= min_p)
