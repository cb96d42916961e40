"""The operations of a decoding step in plain torch: any device, dtype and batch, rounded as the model rounds them.

What the kernels are tested against, and the step itself where they cannot run.
"""

import torch
from torch.nn import functional as F

from phi35.feed_forward import ACTIVATIONS
from phi35.kernels.operands import Norm, Rope, StepState
from phi35.rope import apply_rotary


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
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """See ``phi35.kernels.batched.rotate_and_store``."""
    batch, num_kv, slots, head_dim = keys.shape
    heads = projected.view(batch, -1, 1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv
    row = rope_long.long()
    angles = (lengths[:, None].float() * rope.inv_freq[row])[:, None, None, :]
    angles = torch.cat((angles, angles), dim=-1)
    scale = rope.scaling[row][:, None, None, None]
    cos_sin = (angles.cos() * scale).to(projected.dtype), (angles.sin() * scale).to(projected.dtype)
    turned = apply_rotary(heads[:, : num_heads + num_kv], cos_sin)[:, :, 0]
    rows, slot = torch.arange(batch, device=projected.device), lengths.clamp(max=slots - 1)
    query.copy_(turned[:, :num_heads].reshape(batch, -1))
    keys.transpose(1, 2)[rows, slot] = turned[:, num_heads:]
    values.transpose(1, 2)[rows, slot] = heads[:, num_heads + num_kv :, 0]


def project_qkv(
    hidden: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rope: Rope,
    lengths: torch.Tensor,
    rope_long: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """See ``phi35.kernels.vector.project_qkv``; here for any batch."""
    projected = F.linear(normed(hidden, norm), weight, bias)
    rotate_and_store(projected, rope, lengths, rope_long, query, keys, values)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    sliding_window: int | None,
) -> None:
    """See ``phi35.kernels.attention.attend``."""
    batch, num_kv, slots, head_dim = keys.shape
    places = torch.arange(slots, device=query.device)
    last = lengths.clamp(max=slots - 1)[:, None]
    mask = places <= last
    if sliding_window is not None:
        mask = mask & (places > last - sliding_window)
    queries = query.view(batch, -1, 1, head_dim)
    attended = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask[:, None, None, :], enable_gqa=queries.shape[1] != num_kv
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
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
) -> None:
    """See ``phi35.kernels.batched.rotate_prompt``."""
    num_kv, head_dim = keys.shape[1], keys.shape[3]
    heads = projected.view(len(projected), -1, head_dim)
    angles = positions[:, None].float() * rope.inv_freq[use_long.long()]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    scale = rope.scaling[use_long.long()][:, None, None]
    cos_sin = (angles.cos() * scale).to(projected.dtype), (angles.sin() * scale).to(projected.dtype)
    heads[:, : num_heads + num_kv] = apply_rotary(heads[:, : num_heads + num_kv], cos_sin)
    rows, slots = places.long(), positions.long()
    keys.transpose(1, 2)[rows, slots] = heads[:, num_heads : num_heads + num_kv]
    values.transpose(1, 2)[rows, slots] = heads[:, num_heads + num_kv :]
