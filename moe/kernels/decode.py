"""A few tokens (decoding): read the weights of the chosen experts once, and nothing of the others.

Bound by the bandwidth of those weights, so that there is no sort and no padding in memory: a program owns a strip of
one expert's weights, finds the tokens that chose this expert among at most ``MAX_TOKENS * k`` pairs, and leaves if
there are none. The tokens of a strip lie in one small tile, empty slots are zero.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe.kernels.rows import activate

MAX_TOKENS = 64


@dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes of the two products.

    Attributes:
        columns: columns of down_proj's product per program, and gate and up columns each.
        depth: depth per pipeline stage.
        num_warps: warps per program.
        num_stages: pipeline depth.
    """

    columns: int = 32
    depth: int = 256
    num_warps: int = 4
    num_stages: int = 3


def decode_experts(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str,
    config: DecodeConfig,
) -> torch.Tensor:
    """Weighted sum of each token's experts, (N, D) with N <= MAX_TOKENS; forward only, shapes as in ``Experts``."""
    num_tokens, hidden_size = hidden_states.shape
    num_experts, _, width = down_proj.shape
    top_k = expert_indices.shape[1]
    num_pairs = num_tokens * top_k
    device = hidden_states.device
    out = torch.empty((num_tokens, hidden_size), dtype=hidden_states.dtype, device=device)
    if num_tokens == 0:
        return out
    acted = torch.empty((num_pairs, width), dtype=hidden_states.dtype, device=device)
    mixed = torch.empty((num_pairs, hidden_size), dtype=torch.float32, device=device)
    hidden_states, expert_indices = hidden_states.contiguous(), expert_indices.contiguous()
    slots = max(16, triton.next_power_of_2(num_tokens))
    # Two sizes, so that a growing batch does not compile anew at every step.
    pairs = 32 if num_pairs <= 32 else max(128, triton.next_power_of_2(num_pairs))
    _decode_up_kernel[(triton.cdiv(width, config.columns), num_experts)](
        hidden_states,
        gate_up_proj,
        acted,
        expert_indices,
        num_pairs,
        hidden_size,
        width,
        ACT=hidden_act,
        TOP_K=top_k,
        SLOTS=slots,
        PAIRS=pairs,
        COLUMNS=config.columns,
        DEPTH=min(config.depth, triton.next_power_of_2(hidden_size)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _decode_down_kernel[(triton.cdiv(hidden_size, config.columns), num_experts)](
        acted,
        down_proj,
        mixed,
        expert_indices,
        expert_weights.contiguous(),
        num_pairs,
        hidden_size,
        width,
        SLOTS=slots,
        PAIRS=pairs,
        COLUMNS=config.columns,
        DEPTH=min(config.depth, triton.next_power_of_2(width)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    chunk = min(512, triton.next_power_of_2(hidden_size))
    _sum_choices_kernel[(num_tokens, triton.cdiv(hidden_size, chunk))](
        mixed, out, hidden_size, TOP_K=top_k, CHUNK=chunk, num_warps=2
    )
    return out


@triton.jit
def _pairs_of(expert_indices, expert, num_pairs, SLOTS: tl.constexpr, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Number of pairs that chose this expert, and the pair in each slot (0 in slots past that number)."""
    pairs = tl.arange(0, PAIRS)
    chosen = tl.load(expert_indices + pairs, mask=pairs < num_pairs, other=-1).to(tl.int32)
    mine = (chosen == expert).to(tl.int32)
    rank = tl.cumsum(mine, axis=0) - mine
    slots = tl.arange(0, SLOTS)
    here = (rank[None, :] == slots[:, None]) & (mine[None, :] > 0)
    return tl.sum(mine, axis=0), tl.sum(tl.where(here, pairs[None, :], 0), axis=1)


@triton.jit
def _decode_up_kernel(  # type: ignore[no-untyped-def]
    hidden_states,
    gate_up_proj,
    acted,
    expert_indices,
    num_pairs,
    hidden_size,
    width,
    ACT: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert = tl.program_id(1)
    count, pair = _pairs_of(expert_indices, expert, num_pairs, SLOTS, PAIRS)
    if count > 0:
        used = tl.arange(0, SLOTS) < count
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        real = columns < width
        depth = tl.arange(0, DEPTH)
        gate_at = gate_up_proj + (expert.to(tl.int64) * 2 * width + columns)[None, :] * hidden_size
        up_at = gate_at + width.to(tl.int64) * hidden_size
        token_at = hidden_states + (pair // TOP_K)[:, None] * hidden_size
        gate = tl.zeros((SLOTS, COLUMNS), tl.float32)
        up = tl.zeros((SLOTS, COLUMNS), tl.float32)
        for first in range(0, hidden_size, DEPTH):
            at = first + depth
            inside = at < hidden_size
            token = tl.load(token_at + at[None, :], mask=used[:, None] & inside[None, :], other=0.0)
            weight_mask = inside[:, None] & real[None, :]
            gate_weight = tl.load(gate_at + at[:, None], mask=weight_mask, other=0.0, eviction_policy="evict_first")
            up_weight = tl.load(up_at + at[:, None], mask=weight_mask, other=0.0, eviction_policy="evict_first")
            gate = tl.dot(token, gate_weight, gate)
            up = tl.dot(token, up_weight, up)
        kind = acted.dtype.element_ty
        # Rounded as the large-batch path rounds them.
        gate = gate.to(kind).to(tl.float32)
        up = up.to(kind).to(tl.float32)
        at = pair[:, None] * width + columns[None, :]
        tl.store(acted + at, (activate(gate, ACT) * up).to(kind), mask=used[:, None] & real[None, :])


@triton.jit
def _decode_down_kernel(  # type: ignore[no-untyped-def]
    acted,
    down_proj,
    mixed,
    expert_indices,
    expert_weights,
    num_pairs,
    hidden_size,
    width,
    SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert = tl.program_id(1)
    count, pair = _pairs_of(expert_indices, expert, num_pairs, SLOTS, PAIRS)
    if count > 0:
        used = tl.arange(0, SLOTS) < count
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        real = columns < hidden_size
        depth = tl.arange(0, DEPTH)
        weight_at = down_proj + (expert.to(tl.int64) * hidden_size + columns)[None, :] * width
        row_at = acted + pair[:, None] * width
        total = tl.zeros((SLOTS, COLUMNS), tl.float32)
        for first in range(0, width, DEPTH):
            at = first + depth
            inside = at < width
            row = tl.load(row_at + at[None, :], mask=used[:, None] & inside[None, :], other=0.0)
            weight_mask = inside[:, None] & real[None, :]
            weight = tl.load(weight_at + at[:, None], mask=weight_mask, other=0.0, eviction_policy="evict_first")
            total = tl.dot(row, weight, total)
        scale = tl.load(expert_weights + pair, mask=used, other=0.0).to(tl.float32)
        # Rounded as the large-batch path rounds it, then weighted in float32.
        total = total.to(acted.dtype.element_ty).to(tl.float32) * scale[:, None]
        at = pair[:, None] * hidden_size + columns[None, :]
        tl.store(mixed + at, total, mask=used[:, None] & real[None, :])


@triton.jit
def _sum_choices_kernel(mixed, out, width, TOP_K: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < width
    total = tl.zeros((CHUNK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        total += tl.load(mixed + (token * TOP_K + choice) * width + columns, mask=inside, other=0.0)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)
