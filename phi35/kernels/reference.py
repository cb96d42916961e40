"""The operations of a decoding step in plain torch: any device, dtype and batch, rounded as the model rounds them.

What the kernels are tested against, and the step itself where they cannot run.
"""

import torch
from torch.nn import functional as F

from phi35.block_sparse import BlockPattern
from phi35.feed_forward import ACTIVATIONS
from phi35.kernels.operands import LayerCache, Norm, Rope, StepState
from phi35.rope import apply_rotary

GATHERED_BYTES = 2**21
"""Keys that are gathered from pages at a time on a CPU."""


def normed(hidden: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The norm of (B, D)."""
    if norm.kind == "rmsnorm":
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.eps)
    if norm.kind == "layernorm":
        return F.layer_norm(hidden, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return hidden


def rotate_and_store(
    projected: torch.Tensor,
    rope: Rope,
    lengths: torch.Tensor,
    rope_long: torch.Tensor,
    query: torch.Tensor,
    cache: LayerCache,
) -> None:
    """See ``phi35.kernels.batched.rotate_and_store``."""
    batch = len(projected)
    rows = torch.arange(batch, device=projected.device)
    heads = projected.view(batch, -1, cache.head_dim)
    num_heads = heads.shape[1] - 2 * cache.num_kv
    heads = _rotated(heads, rope, lengths, rope_long, num_heads + cache.num_kv)
    query.copy_(heads[:, :num_heads].reshape(batch, -1))
    slots = lengths.clamp(max=cache.num_slots - 1)
    cache.store(rows, slots, heads[:, num_heads : num_heads + cache.num_kv], heads[:, num_heads + cache.num_kv :])


def project_qkv(
    hidden: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rope: Rope,
    lengths: torch.Tensor,
    rope_long: torch.Tensor,
    query: torch.Tensor,
    cache: LayerCache,
) -> None:
    """See ``phi35.kernels.vector.project_qkv``; here for any batch."""
    projected = F.linear(normed(hidden, norm), weight, bias)
    rotate_and_store(projected, rope, lengths, rope_long, query, cache)


def attend(
    query: torch.Tensor,
    cache: LayerCache,
    lengths: torch.Tensor,
    out: torch.Tensor,
    sliding_window: int | None,
    scale: float | None = None,
    pattern: BlockPattern | None = None,
) -> None:
    """See ``phi35.kernels.attention.attend``; here with any factor on the products, and block-sparse with a pattern."""
    batch = query.shape[0]
    at_once = batch
    if cache.table is not None and query.device.type == "cpu":
        # What is gathered from pages for a few rows stays in the processor's cache, and its memory is used again.
        row_bytes = cache.num_slots * cache.num_kv * cache.head_dim * cache.dtype.itemsize
        at_once = max(1, GATHERED_BYTES // row_bytes)
    for start in range(0, batch, at_once):
        rows = slice(start, min(batch, start + at_once))
        _attend_rows(query[rows], cache, rows, lengths[rows], out[rows], sliding_window, scale, pattern)


def _attend_rows(
    query: torch.Tensor,
    cache: LayerCache,
    rows: slice,
    lengths: torch.Tensor,
    out: torch.Tensor,
    sliding_window: int | None,
    scale: float | None,
    pattern: BlockPattern | None,
) -> None:
    """``attend`` for some rows of a cache."""
    batch, num_slots = query.shape[0], cache.num_slots
    keys, values = cache.read(rows, num_slots)
    places = torch.arange(num_slots, device=query.device)
    last = lengths.clamp(max=num_slots - 1)[:, None]
    mask = places <= last
    if sliding_window is not None:
        mask = mask & (places > last - sliding_window)
    queries = query.view(batch, -1, 1, cache.head_dim)
    mask = mask[:, None, None, :]
    if pattern is not None:
        heads = torch.arange(queries.shape[1], device=query.device)[:, None, None]
        mask = mask & pattern.sees(heads, last[:, None, None, :], places)
    attended = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=queries.shape[1] != cache.num_kv
    )
    out.copy_(attended.reshape(batch, -1))


def project_add(vector: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor) -> None:
    """hidden (B, N) += vector (B, W) times weight (N, W), plus bias (N,)."""
    hidden.add_(F.linear(vector, weight, bias))


def project_gate_up(
    hidden: torch.Tensor, norm: Norm, weight: torch.Tensor, acted: torch.Tensor, hidden_act: str
) -> None:
    """acted (B, F) = act(gate) * up of the normed hidden (B, D); weight (2F, D), gate first."""
    gate, up = F.linear(normed(hidden, norm), weight).chunk(2, dim=-1)
    acted.copy_(ACTIVATIONS[hidden_act](gate) * up)


def project_logits(
    hidden: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None, logits: torch.Tensor
) -> None:
    """logits (B, V) float32 of the normed hidden (B, D)."""
    logits.copy_(F.linear(normed(hidden, norm), weight, bias))


def choose(logits: torch.Tensor, state: StepState) -> None:
    """The greedy token of each row; moves the state on. Penalties and sampling are ``phi35.generation.sampling``'s."""
    tokens = logits.argmax(dim=-1)
    rows = torch.arange(len(tokens), device=logits.device)
    place = (int(state.steps[0]) if len(tokens) else 0) % state.history.shape[0]
    state.history[place] = tokens.int().to(state.history.device)
    state.logprobs[place] = logits.log_softmax(dim=-1)[rows, tokens].to(state.logprobs.device)
    state.tokens.copy_(tokens)
    state.seen[rows, tokens] = 1
    state.steps.add_(1)
    state.lengths.add_(1)


def rotate_prompt(
    projected: torch.Tensor,
    rope: Rope,
    positions: torch.Tensor,
    places: torch.Tensor,
    use_long: torch.Tensor,
    cache: LayerCache,
    num_heads: int,
) -> None:
    """See ``phi35.kernels.batched.rotate_prompt``."""
    heads = projected.view(len(projected), -1, cache.head_dim)
    turned = num_heads + cache.num_kv
    heads.copy_(_rotated(heads, rope, positions, use_long, turned))
    kept = cache.store(places.long(), positions.long(), heads[:, num_heads:turned], heads[:, turned:])
    if cache.kind is not None:
        heads[:, num_heads:turned], heads[:, turned:] = kept


def _rotated(
    heads: torch.Tensor, rope: Rope, positions: torch.Tensor, use_long: torch.Tensor, turned: int
) -> torch.Tensor:
    """Heads (N, n, d), of which the first ``turned`` are rotated at positions (N,)."""
    row = use_long.long()
    angles = positions[:, None].float() * rope.inv_freq[row]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    scale = rope.scaling[row][:, None, None]
    cos_sin = (angles.cos() * scale).to(heads.dtype), (angles.sin() * scale).to(heads.dtype)
    return torch.cat((apply_rotary(heads[:, :turned], cos_sin), heads[:, turned:]), dim=1)
