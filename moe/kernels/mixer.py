"""SparseMixer's sampled choice and its gradient, each in one kernel: for ``moe.router`` in training, without a bias.

The noise is drawn by torch, in the router's order: one seed gives the routing of the plain form. A program holds all
scores of some tokens in registers.
"""

import torch
import triton
import triton.language as tl

MAX_EXPERTS = 128
_TOKENS = 64


def choose(
    scores: torch.Tensor,
    exponentials: tuple[torch.Tensor, torch.Tensor],
    coins: tuple[torch.Tensor, torch.Tensor],
    jitter_eps: float,
    coin_threshold: float,
    factors: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two experts for each token.

    Args:
        scores: (N, E) float32, contiguous; E at most ``MAX_EXPERTS``.
        exponentials: of each choice, (N, E) numbers from the exponential distribution.
        coins: of each choice, (N, 1) uniform numbers.
        jitter_eps: half the relative distance beyond which an expert is dropped.
        coin_threshold: a coin above it keeps the upper factor.
        factors: lower and upper midpoint factor.

    Returns:
        (N, 2) int64 experts, (N, 2) weights p c, (N, 2) chances p.
    """
    num_tokens, num_experts = scores.shape
    indices = torch.empty(num_tokens, 2, dtype=torch.int64, device=scores.device)
    weights = torch.empty(num_tokens, 2, dtype=torch.float32, device=scores.device)
    chances = torch.empty_like(weights)
    if num_tokens:
        _choose_kernel[(triton.cdiv(num_tokens, _TOKENS),)](
            scores,
            *exponentials,
            *coins,
            indices,
            weights,
            chances,
            num_tokens,
            2 * jitter_eps,
            coin_threshold,
            *factors,
            **_shape(num_experts),
        )
    return indices, weights, chances


def choose_backward(grad: torch.Tensor, scores: torch.Tensor, indices: torch.Tensor, jitter_eps: float) -> torch.Tensor:
    """Gradient (N, E) of the scores from that of the weights (N, 2): for each choice (G p) (onehot - g)."""
    num_tokens, num_experts = scores.shape
    scores_grad = torch.empty_like(scores)
    if num_tokens:
        _choose_backward_kernel[(triton.cdiv(num_tokens, _TOKENS),)](
            grad.contiguous(), scores, indices, scores_grad, num_tokens, 2 * jitter_eps, **_shape(num_experts)
        )
    return scores_grad


def _shape(num_experts: int) -> dict[str, int]:
    return {
        "NUM_EXPERTS": num_experts,
        "PADDED": triton.next_power_of_2(num_experts),
        "TOKENS": _TOKENS,
        "num_warps": 4,
    }


@triton.jit
def _gates(scores, candidates, threshold):  # type: ignore[no-untyped-def]
    """Candidates with those far from the best at minus infinity, and their softmax."""
    best = tl.max(candidates, axis=1)[:, None]
    far = (best - scores) / tl.maximum(tl.abs(scores), best) > threshold
    kept = tl.where(far, float("-inf"), candidates)
    likelihoods = tl.exp(kept - best)
    return kept, likelihoods / tl.sum(likelihoods, axis=1)[:, None]


@triton.jit
def _sample(kept, gates, exponentials, coins, at, rows, real, columns, coin_threshold, low, high):  # type: ignore[no-untyped-def]
    """One choice: experts, their chances and their factors."""
    noise = tl.load(exponentials + at, mask=real, other=1.0)
    coin = tl.load(coins + rows[0], mask=rows[1], other=0.0)
    # Among NaN any column might be found, also one that is no expert; their chances stay NaN.
    noisy = kept - tl.log(noise)
    chosen = tl.argmax(tl.where(noisy == noisy, noisy, float("-inf")), axis=1, tie_break_left=True)
    likeliest = tl.argmax(tl.where(gates == gates, gates, 0.0), axis=1, tie_break_left=True)
    chance = tl.sum(tl.where(columns == chosen[:, None], gates, 0.0), axis=1)
    return chosen, chance, tl.where((chosen == likeliest) | (coin > coin_threshold), high, low)


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    scores,
    exponentials1,
    exponentials2,
    coins1,
    coins2,
    indices,
    weights,
    chances,
    num_tokens,
    threshold,
    coin_threshold,
    low,
    high,
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    columns = tl.arange(0, PADDED)[None, :]
    real = inside[:, None] & (columns < NUM_EXPERTS)
    at = token[:, None] * NUM_EXPERTS + columns
    # Tokens past the end have scores of zero: a row without any would be NaN.
    values = tl.where(columns < NUM_EXPERTS, tl.load(scores + at, mask=real, other=0.0), float("-inf"))
    kept, gates = _gates(values, values, threshold)
    drawn = (token, inside)
    chosen, chance, factor = _sample(
        kept, gates, exponentials1, coins1, at, drawn, real, columns, coin_threshold, low, high
    )
    tl.store(indices + 2 * token, chosen.to(tl.int64), mask=inside)
    tl.store(weights + 2 * token, chance * factor, mask=inside)
    tl.store(chances + 2 * token, chance, mask=inside)
    kept, gates = _gates(values, tl.where(columns == chosen[:, None], float("-inf"), values), threshold)
    chosen, chance, factor = _sample(
        kept, gates, exponentials2, coins2, at, drawn, real, columns, coin_threshold, low, high
    )
    tl.store(indices + 2 * token + 1, chosen.to(tl.int64), mask=inside)
    tl.store(weights + 2 * token + 1, chance * factor, mask=inside)
    tl.store(chances + 2 * token + 1, chance, mask=inside)


@triton.jit
def _choose_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    scores,
    indices,
    scores_grad,
    num_tokens,
    threshold,
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    columns = tl.arange(0, PADDED)[None, :]
    real = inside[:, None] & (columns < NUM_EXPERTS)
    at = token[:, None] * NUM_EXPERTS + columns
    # Tokens past the end have scores of zero: a row without any would be NaN.
    values = tl.where(columns < NUM_EXPERTS, tl.load(scores + at, mask=real, other=0.0), float("-inf"))
    candidates = values
    total = tl.zeros((TOKENS, PADDED), tl.float32)
    for choice in tl.static_range(2):
        _, gates = _gates(values, candidates, threshold)
        mine = columns == tl.load(indices + 2 * token + choice, mask=inside, other=0)[:, None]
        upstream = tl.load(grad + 2 * token + choice, mask=inside, other=0.0)
        chance = tl.sum(tl.where(mine, gates, 0.0), axis=1)
        total += (upstream * chance)[:, None] * (tl.where(mine, 1.0, 0.0) - gates)
        candidates = tl.where(mine, float("-inf"), candidates)
    tl.store(scores_grad + at, total, mask=real)
