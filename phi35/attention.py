"""Causal self-attention with grouped keys and values, and the plan that all layers of one pass share.

What does not depend on the layer (positions, rotary tables, masks, cache slots) is worked out once per
forward pass as an ``AttentionPlan``. Sliding windows count as transformers does: a query sees
``sliding_window`` keys, itself among them (the published flash-attention code sees one more).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from phi35.block_sparse import (
    PADDED,
    BlockSparsePlan,
    PackedPlan,
    attend_block_sparse,
    block_pattern,
    plan_packed,
    plan_places,
    plan_sequence,
)
from phi35.cache import KVCache
from phi35.config import ModelConfig
from phi35.fused import rotate_heads
from phi35.packed_attention import PackedRows, attend_packed, packed_rows
from phi35.rope import CosSin, RotaryEmbedding, apply_rotary
from phi35.sequence_parallel import SequenceParallel


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """What every layer needs to attend in one forward pass.

    Attributes:
        cos_sin: rotary tables (B, 1, T, d).
        mask: bool, broadcastable to (B, H, T, n), True where a query may look; None with no restriction beyond
            ``is_causal``.
        is_causal: whether query t sees keys 0..t of its own chunk, with ``mask`` None.
        slots: where the cache stores the chunk: first slot, or (B, T) slots; None without a cache.
        num_slots: slots n of the cache to attend to; 0 attends to the chunk's own keys alone.
        stored_slots: host-side upper bound of the rows' lengths once the chunk is stored.
        lengths: (B,) tokens per row once the chunk is stored; None without a cache.
        uniform_length: the same on the host where all rows agree.
        packed: where the samples of packed rows lie; None for one sample a row.
        sequence_parallel: the processes that share the rows; None: this one has them whole.
        block_sparse: what block-sparse layers see; None where that is what all layers see.
        copies: the same plan on other devices, as far as layers there have asked for it.
    """

    cos_sin: CosSin
    mask: torch.Tensor | None
    is_causal: bool
    slots: torch.Tensor | int | None = None
    num_slots: int = 0
    stored_slots: int = 0
    lengths: torch.Tensor | None = None
    uniform_length: int | None = None
    packed: PackedRows | None = None
    sequence_parallel: SequenceParallel | None = None
    block_sparse: BlockSparsePlan | PackedPlan | None = None
    copies: dict[torch.device, "AttentionPlan"] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "AttentionPlan":
        """The plan on a device, copied there once a pass: how the layers of a spread model receive it.

        ``lengths`` stay where they are, beside the cache's own.
        """
        target = torch.device(device)
        if target == self.cos_sin[0].device:
            return self
        if target not in self.copies:

            def moved(part: Any) -> Any:
                return part.to(target) if hasattr(part, "to") else part

            self.copies[target] = dataclasses.replace(
                self,
                cos_sin=(moved(self.cos_sin[0]), moved(self.cos_sin[1])),
                mask=moved(self.mask),
                slots=moved(self.slots),
                packed=moved(self.packed),
                block_sparse=moved(self.block_sparse),
                copies=self.copies,
            )
        return self.copies[target]


class Attention(nn.Module):
    """Self-attention with a fused ``qkv_proj`` (queries, then keys, then values).

    Attributes:
        fused: without a cache, rotate by ``phi35.fused``.
    """

    fused = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.attention_head_dim
        self.dropout, self.window = config.attention_dropout, config.sliding_window
        self.scale = config.attention_scale
        self.is_block_sparse = config.is_block_sparse_layer(layer)
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states: torch.Tensor, plan: AttentionPlan, cache: KVCache | None) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D), storing keys and values where a cache is given."""
        batch, length, _ = hidden_states.shape
        projected = self.qkv_proj(hidden_states)
        if self.fused and cache is None:
            queries, keys, values = rotate_heads(projected, *plan.cos_sin, self.num_heads, self.num_kv_heads)
        else:
            heads = projected.view(batch, length, -1, self.head_dim).transpose(1, 2)
            queries, keys, values = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
            queries, keys = apply_rotary(queries, plan.cos_sin), apply_rotary(keys, plan.cos_sin)
        if cache is not None and plan.slots is not None:
            keys, values = cache.write(self.layer, keys, values, plan.slots)
            if plan.num_slots:
                keys, values = cache.read(self.layer, plan.num_slots)
        if plan.sequence_parallel is not None:
            queries, keys, values = plan.sequence_parallel.to_heads(queries, keys, values)
        dropout = self.dropout if self.training else 0.0
        if self.is_block_sparse and plan.block_sparse is not None:
            attended = attend_block_sparse(queries, keys, values, plan.block_sparse, self.scale, dropout)
        elif plan.packed is not None:
            attended = attend_packed(queries, keys, values, plan.packed, self.window, dropout, self.scale)
        else:
            attended = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=plan.mask,
                dropout_p=dropout,
                is_causal=plan.is_causal,
                scale=self.scale,
                enable_gqa=keys.shape[1] != queries.shape[1],
            )
        if plan.sequence_parallel is not None:
            attended = plan.sequence_parallel.to_tokens(attended)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))


def plan_attention(
    config: ModelConfig,
    rope: RotaryEmbedding,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: KVCache | None,
    rope_lengths: torch.Tensor | None,
    sequence_lengths: torch.Tensor | None = None,
    sequence_parallel: SequenceParallel | None = None,
    padding_side: str | None = None,
) -> AttentionPlan:
    """Work out one pass.

    Args:
        config: the model's config.
        rope: its rotary tables.
        hidden_states: (B, T, D) embeddings of the chunk; only shape, device and dtype count.
        attention_mask: (B, T) or (B, past + T), nonzero for real tokens, padding on either side; the last T columns
            are used.
        position_ids: (B, T) int64, or None for the running count of each row's real tokens.
        cache: keys and values seen before, or None.
        rope_lengths: (B,) int64, the total length each row will have, where it is known to exceed the present one.
        sequence_lengths: (B, S) int64 lengths of each row's samples, filled up with zeros: attention, positions and
            LongRoPE's factors are each sample's own; None for one sample a row.
        sequence_parallel: the s processes that share the rows, of which ``hidden_states`` is this one's stretch;
            ``sequence_lengths`` describe the whole rows.
        padding_side: "right" where the mask pads on the right alone, so that causality keeps padding from view; what
            padded positions give then means nothing.

    Raises:
        ValueError: for shapes that do not fit, a row that crosses the original length on cached short-factor keys, or
            arguments that packed rows decide themselves.
    """
    if sequence_lengths is not None or sequence_parallel is not None:
        if sequence_lengths is None or (position_ids, cache, rope_lengths) != (None, None, None):
            raise ValueError(
                "packed rows, and rows that processes share, take sequence_lengths (B, S) and neither position_ids nor "
                "a cache nor rope_lengths: those follow from the lengths"
            )
        return _plan_packed(config, rope, hidden_states, sequence_lengths, sequence_parallel)
    batch, length = hidden_states.shape[:2]
    _check_shapes(batch, length, attention_mask, position_ids, cache, rope_lengths)
    device = hidden_states.device
    valid = None if attention_mask is None else attention_mask[:, -length:].to(device).bool()
    if valid is not None and (device.type == "cpu" or cache is not None and length > 1) and bool(valid.all()):
        valid = None
    count = torch.full((batch,), length, device=device) if valid is None else valid.sum(dim=1)
    running = torch.arange(length, device=device).expand(batch, -1) if valid is None else valid.long().cumsum(1) - 1
    start = torch.zeros(batch, dtype=torch.int64, device=device) if cache is None else cache.lengths
    slots = start[:, None] + running
    positions = slots.clamp(min=0) if position_ids is None else position_ids.to(device)
    lengths = start + count
    reach = lengths
    if position_ids is not None:
        last = positions if valid is None else positions.masked_fill(~valid, -1)
        reach = torch.maximum(lengths, last.amax(dim=1) + 1)
    if rope_lengths is not None:
        reach = torch.maximum(reach, rope_lengths.to(device))
    use_long = _choose_factors(config, rope, cache, reach, length)
    cos_sin = rope(positions, use_long, hidden_states.dtype)
    if cache is None:
        shown = None if padding_side == "right" else valid
        mask, is_causal = _chunk_mask(shown, length, config.sliding_window, device)
        sparse = _plan_sparse(config, device, 0 if shown is None else running, shown, length, length, own_keys=True)
        return AttentionPlan(cos_sin=cos_sin, mask=mask, is_causal=is_causal, block_sparse=sparse)
    return _plan_cached(config, cos_sin, cache, valid, slots, lengths, length)


def _plan_packed(
    config: ModelConfig,
    rope: RotaryEmbedding,
    hidden_states: torch.Tensor,
    sequence_lengths: torch.Tensor,
    sequence_parallel: SequenceParallel | None,
) -> AttentionPlan:
    batch, length = hidden_states.shape[:2]
    if sequence_parallel is not None:
        length *= sequence_parallel.size
    rows = packed_rows(sequence_lengths, batch, length, hidden_states.device)
    positions, use_long = rows.position_ids(), rope.choose_long(rows.sample_lengths())
    if sequence_parallel is not None:
        positions, use_long = sequence_parallel.local(positions), sequence_parallel.local(use_long)
    pattern, heads = block_pattern(config), _heads(config, sequence_parallel)
    window = config.sliding_window
    is_plain = rows.is_plain and (window is None or length <= window)
    return AttentionPlan(
        cos_sin=rope(positions, use_long, hidden_states.dtype),
        mask=None,
        is_causal=is_plain and length > 1,
        packed=None if is_plain else rows,
        sequence_parallel=sequence_parallel,
        block_sparse=None if pattern is None or rows.all_offsets.is_meta else plan_packed(pattern, heads, rows),
    )


def _heads(config: ModelConfig, sequence_parallel: SequenceParallel | None) -> tuple[int, int]:
    """Numbers of the first head that this process attends with and of the one after its last."""
    if sequence_parallel is None:
        return 0, config.num_attention_heads
    count = config.num_attention_heads // sequence_parallel.size
    return sequence_parallel.rank * count, (sequence_parallel.rank + 1) * count


def _plan_sparse(
    config: ModelConfig,
    device: torch.device,
    first: torch.Tensor | int,
    valid: torch.Tensor | None,
    length: int,
    num_keys: int,
    own_keys: bool,
) -> BlockSparsePlan | None:
    """What block-sparse layers see in rows of one sequence each; None where they attend densely.

    Args:
        config: the model's.
        device: of the pass; on "meta" there is nothing to see.
        first: place of the first query where rows agree and nothing is padded, else (B, T) places.
        valid: (B, T) bool, False for padded queries; None for no padding.
        length: T.
        num_keys: n.
        own_keys: the keys are the queries' own, padded as they are; else at places 0 to n - 1.
    """
    pattern = block_pattern(config)
    if pattern is None or num_keys <= pattern.dense_length or device.type == "meta":
        return None
    heads = 0, config.num_attention_heads
    if isinstance(first, int):
        return plan_sequence(pattern, heads, first, length, num_keys, device)
    queries = first if valid is None else first.masked_fill(~valid, PADDED)
    return plan_places(pattern, heads, queries, queries if own_keys else num_keys)


def _plan_cached(
    config: ModelConfig,
    cos_sin: CosSin,
    cache: KVCache,
    valid: torch.Tensor | None,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    length: int,
) -> AttentionPlan:
    window, first = config.sliding_window, cache.uniform_length
    uniform: int | None
    if valid is None and first is not None:
        uniform, num_slots = first + length, first + length
    elif valid is not None and length > 1:
        longest, shortest = int(lengths.max()), int(lengths.min())
        uniform, num_slots = longest if longest == shortest else None, longest
    else:
        uniform, num_slots = None, cache.num_slots + length
    cache.reserve(num_slots)
    target: torch.Tensor | int = first if valid is None and first is not None else slots
    if valid is not None:
        target = torch.where(valid, slots, cache.capacity)
    mask: torch.Tensor | None
    alone = cache.num_slots == 0
    keys_seen = length if alone else num_slots
    place = first if valid is None and first is not None else slots
    sparse = _plan_sparse(config, slots.device, place, valid, length, keys_seen, own_keys=alone)
    if alone:
        mask, is_causal = _chunk_mask(valid, length, window, slots.device)
        read = 0
    else:
        read, is_causal, mask = num_slots, False, None
        if not (length == 1 and uniform is not None and (window is None or num_slots <= window)):
            keys = torch.arange(num_slots, device=slots.device)
            queries = slots.clamp(min=0)[:, None, :, None]
            mask = keys <= queries
            if window is not None:
                mask = mask & (keys > queries - window)
    return AttentionPlan(
        cos_sin=cos_sin,
        mask=mask,
        is_causal=is_causal,
        slots=target,
        num_slots=read,
        stored_slots=num_slots,
        lengths=lengths,
        uniform_length=uniform,
        block_sparse=sparse,
    )


def _chunk_mask(
    valid: torch.Tensor | None, length: int, window: int | None, device: torch.device
) -> tuple[torch.Tensor | None, bool]:
    """Mask within one chunk, and whether plain causality says it all."""
    windowed = window is not None and length > window
    if valid is None and not windowed:
        return None, length > 1
    index = torch.arange(length, device=device)
    mask = index <= index[:, None]
    if windowed and window is not None:
        mask = mask & (index > index[:, None] - window)
    mask = mask[None, None]
    if valid is not None:
        # A padded query sees itself: a row of the mask with no True would make NaN.
        mask = mask & valid[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=device)
    return mask, False


def _choose_factors(
    config: ModelConfig, rope: RotaryEmbedding, cache: KVCache | None, reach: torch.Tensor, length: int
) -> torch.Tensor:
    wanted = rope.choose_long(reach)
    if cache is None or not rope.switches:
        return wanted
    fresh = cache.lengths == 0
    use_long = torch.where(fresh, wanted, cache.rope_long)
    # The host-side bound spares the check, and its synchronisation, to all steps far from the crossing.
    if cache.num_slots and cache.num_slots + length > config.original_max_position_embeddings:
        crossing = (wanted & ~use_long).nonzero().flatten().tolist()
        if crossing:
            raise ValueError(
                f"rows {crossing} pass {config.original_max_position_embeddings} tokens while their cached keys stand "
                "under the short LongRoPE factors: pass rope_lengths (B) with the total length at the first chunk, or "
                "reset those rows of the cache and run their whole ids again"
            )
    cache.rope_long = use_long
    return use_long


def _check_shapes(
    batch: int,
    length: int,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: KVCache | None,
    rope_lengths: torch.Tensor | None,
) -> None:
    problems = []
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < length:
            problems.append(f"attention_mask must be ({batch}, {length}) or ({batch}, past + {length}), got {shape}")
    if position_ids is not None and tuple(position_ids.shape) != (batch, length):
        problems.append(f"position_ids must be ({batch}, {length}), got {tuple(position_ids.shape)}")
    if cache is not None and cache.batch_size != batch:
        problems.append(f"the cache has {cache.batch_size} rows and the batch {batch}")
    if rope_lengths is not None and tuple(rope_lengths.shape) != (batch,):
        problems.append(f"rope_lengths must be ({batch},), got {tuple(rope_lengths.shape)}")
    if problems:
        raise ValueError("; ".join(problems))
