"""Block-sparse attention as in phi-3-small (arXiv 2404.14219, section 2): local blocks and vertical stripes.

Tokens of a sequence form blocks. A query sees the blocks up to its own within a local distance, and of the earlier
ones every ``vert_stride``-th, each head another one, always causally. While a sequence fits into the local blocks this
is plain causal attention.

One definition, ``BlockPattern.sees``, is read by all forms: exact masks for any device, made for a bounded number of
queries at a time, and on CUDA, where rows have no padding between them and their cache, FlexAttention, which skips the
blocks that nobody sees. Blocks count from a sequence's first token, wherever padding puts that in a row.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from phi35.config import ModelConfig
from phi35.flex_kernels import BLOCK_TENSORS, FlexBlocks, attend_flex
from phi35.packed_attention import PackedRows

MASK_ELEMENTS = 2**26
"""Elements of an exact mask that is held at once (64 MiB)."""

PADDED = 2**40
"""Place of a padded token: after all real ones, so that those never see it, while padding sees itself."""

FLEX_QUERY_BLOCK = 128
"""Queries that FlexAttention works on at once."""

FLEX_KEY_BLOCK = {False: 64, True: 128}
"""Keys likewise, without and with gradients: of torch 2.11's backward kernels for Hopper none takes fewer than 128."""


@dataclass(frozen=True, kw_only=True)
class BlockPattern:
    """Which keys each head's queries see.

    Attributes:
        block_size: tokens of a block.
        num_local_blocks: blocks up to a query's own that it sees.
        vert_stride: of the earlier blocks b those with (b + head x step + 1) % vert_stride == 0 are seen.
        head_step: by how many blocks the stripes of neighbouring heads differ; 0: all heads alike.
    """

    block_size: int
    num_local_blocks: int
    vert_stride: int
    head_step: int

    @property
    def dense_length(self) -> int:
        """Sequences of at most so many tokens are attended to as without the pattern."""
        return self.block_size * self.num_local_blocks

    def sees(self, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Whether a head's query sees a key.

        Args:
            heads: numbers of the heads; this and the next two are broadcast against each other.
            queries: places of the queries in their sequences, from 0.
            keys: places of the keys.

        Returns:
            bool.
        """
        query_blocks, key_blocks = _quotient(queries, self.block_size), _quotient(keys, self.block_size)
        local = query_blocks - key_blocks < self.num_local_blocks
        stripe = _remainder(key_blocks + heads * self.head_step + 1, self.vert_stride) == 0
        return (keys <= queries) & (local | stripe)

    def num_pairs(self, length: int, num_heads: int) -> int:
        """Pairs of a query and a key that are seen in a sequence, summed over the heads."""
        size = self.block_size
        blocks = torch.arange(-(-length // size)) * size
        sizes = (length - blocks).clamp(max=size)
        heads = torch.arange(num_heads)[:, None, None]
        seen = self.sees(heads, blocks[:, None], blocks) & (blocks < blocks[:, None])
        own = sizes * (sizes + 1) // 2
        return int((seen * sizes[:, None] * size).sum()) + num_heads * int(own.sum())


@dataclass(frozen=True, kw_only=True)
class BlockSparsePlan:
    """What all block-sparse layers of one pass share.

    Attributes:
        pattern: which keys are seen.
        queries: (B or 1, T) int64 places of the queries in their sequences.
        keys: (B or 1, n) int64 places of the keys.
        heads: numbers of the first head that this process attends with and of the one after its last.
        mask: (B or 1, H, T, n) bool, where it is small enough to be kept.
        flex: the blocks that FlexAttention works through; where it serves.
        first: place of the first query, where ``flex`` serves.
    """

    pattern: BlockPattern
    queries: torch.Tensor
    keys: torch.Tensor
    heads: tuple[int, int]
    mask: torch.Tensor | None = None
    flex: FlexBlocks | None = None
    first: int = 0

    def to(self, device: torch.device) -> "BlockSparsePlan":
        """The same on another device."""
        if self.flex is not None:
            sizes = self.queries.shape[1], self.keys.shape[1]
            return plan_sequence(self.pattern, self.heads, self.first, *sizes, device)
        mask = None if self.mask is None else self.mask.to(device)
        return dataclasses.replace(self, queries=self.queries.to(device), keys=self.keys.to(device), mask=mask)


@dataclass(frozen=True, kw_only=True)
class PackedPlan:
    """The same for packed rows.

    Attributes:
        rows: where the samples lie.
        plans: a plan for each length of a sample that is long enough for the pattern to show.
    """

    rows: PackedRows
    plans: Mapping[int, BlockSparsePlan]

    def to(self, device: torch.device) -> "PackedPlan":
        """The same on another device."""
        plans = {length: plan.to(device) for length, plan in self.plans.items()}
        return PackedPlan(rows=self.rows.to(device), plans=plans)


def block_pattern(config: ModelConfig) -> BlockPattern | None:
    """The pattern of a config's block-sparse layers; None where it has none."""
    if not config.blocksparse_block_size:
        return None
    step = max(1, config.blocksparse_vert_stride // config.num_attention_heads)
    return BlockPattern(
        block_size=config.blocksparse_block_size,
        num_local_blocks=config.blocksparse_num_local_blocks,
        vert_stride=config.blocksparse_vert_stride,
        head_step=0 if config.blocksparse_homo_head_pattern else step,
    )


def plan_sequence(
    pattern: BlockPattern, heads: tuple[int, int], first: int, num_queries: int, num_keys: int, device: torch.device
) -> BlockSparsePlan:
    """The plan of sequences without padding.

    Args:
        pattern: the pattern.
        heads: numbers of the first head and of the one after the last.
        first: place of the first query.
        num_queries: T, at places first to first + T - 1.
        num_keys: n, at places 0 to n - 1.
        device: of the pass.
    """
    queries = torch.arange(first, first + num_queries, device=device)[None]
    keys = torch.arange(num_keys, device=device)[None]
    plan = BlockSparsePlan(pattern=pattern, queries=queries, keys=keys, heads=heads)
    if device.type == "cuda" and num_queries >= FLEX_QUERY_BLOCK and 128 % pattern.block_size == 0:
        gradients = torch.is_grad_enabled()
        flex = flex_blocks(pattern, heads, first, num_queries, num_keys, device, gradients=gradients)
        return dataclasses.replace(plan, flex=flex, first=first)
    return _with_mask(plan)


def plan_places(
    pattern: BlockPattern, heads: tuple[int, int], queries: torch.Tensor, keys: torch.Tensor | int
) -> BlockSparsePlan:
    """The plan of rows whose tokens stand at different places.

    Args:
        pattern: the pattern.
        heads: as of ``plan_sequence``.
        queries: (B, T) places; ``PADDED`` for padding.
        keys: (B, n) places, likewise; a number n: 0 to n - 1.
    """
    if isinstance(keys, int):
        keys = torch.arange(keys, device=queries.device)[None]
    return _with_mask(BlockSparsePlan(pattern=pattern, queries=queries, keys=keys, heads=heads))


def plan_packed(pattern: BlockPattern, heads: tuple[int, int], rows: PackedRows) -> PackedPlan | None:
    """The plan of packed rows; None where no sample is long enough for the pattern to show."""
    lengths = {length for sample in rows.samples for length in sample if length > pattern.dense_length}
    device = rows.all_offsets.device
    plans = {length: plan_sequence(pattern, heads, 0, length, length, device) for length in sorted(lengths)}
    return PackedPlan(rows=rows, plans=plans) if plans else None


def attend_block_sparse(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: BlockSparsePlan | PackedPlan,
    scale: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention under a plan.

    Args:
        queries: (B, H, T, d).
        keys: (B, K, n, d), K a divisor of H.
        values: (B, K, n, d).
        plan: of this pass.
        scale: factor on the products of queries and keys; None takes 1 / sqrt(d).
        dropout: of the attention weights; FlexAttention has none, so that exact masks serve then.

    Returns:
        (B, H, T, d).
    """
    if isinstance(plan, PackedPlan):
        return _sample_by_sample(queries, keys, values, plan, scale, dropout)
    gqa = keys.shape[1] != queries.shape[1]
    if plan.flex is not None and not dropout:
        return attend_flex(queries, keys, values, plan.flex, scale)
    length, rows = queries.shape[2], queries.shape[2]
    if plan.mask is None:
        rows = max(1, MASK_ELEMENTS // (plan.queries.shape[0] * queries.shape[1] * keys.shape[2]))
    parts = []
    for start in range(0, length, rows):
        part = slice(start, start + rows)
        mask = _exact_mask(plan, part) if plan.mask is None else plan.mask
        attended = F.scaled_dot_product_attention(
            queries[:, :, part], keys, values, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=gqa
        )
        parts.append(attended)
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def flex_blocks(
    pattern: BlockPattern,
    heads: tuple[int, int],
    first: int,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    *,
    gradients: bool,
    key_block: int | None = None,
    options: Mapping[str, int] | None = None,
) -> FlexBlocks:
    """FlexAttention's form of the pattern, worked out block by block: no mask of single tokens is made.

    Args:
        pattern: the pattern.
        heads: as of ``plan_sequence``, as are the next four.
        first: place of the first query.
        num_queries: T.
        num_keys: n.
        device: of the pass.
        gradients: whether they will be asked for.
        key_block: keys that are worked on at once, a multiple of the pattern's block; None: ``FLEX_KEY_BLOCK``.
        options: of the kernels; None: those that go with ``FLEX_KEY_BLOCK``.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if key_block is None:
        key_block = FLEX_KEY_BLOCK[gradients]
    if options is None:
        options = {} if gradients else _FORWARD_TILES
    size, columns = pattern.block_size, -(-num_keys // key_block)
    starts = torch.arange(first, first + num_queries, FLEX_QUERY_BLOCK, device=device)[:, None]
    ends = (starts + FLEX_QUERY_BLOCK - 1).clamp(max=first + num_queries - 1)
    numbers = torch.arange(*heads, device=device)[:, None, None]
    key_starts = torch.arange(0, columns * key_block, size, device=device)
    # Queries of a flex block lie in few blocks of the pattern: seen by any of them, seen whole by all of them.
    seen = torch.zeros((), dtype=torch.bool, device=device)
    whole = torch.ones((), dtype=torch.bool, device=device)
    for step in range(0, FLEX_QUERY_BLOCK + size, size):
        queries = (starts + step).minimum(ends)
        in_sight = pattern.sees(numbers, queries // size * size + size - 1, key_starts)
        seen, whole = seen | in_sight, whole & in_sight
    whole = whole & (key_starts + size - 1 <= starts) & (key_starts + size <= num_keys)
    seen = seen.unflatten(-1, (columns, -1)).any(dim=-1)
    whole = whole.unflatten(-1, (columns, -1)).all(dim=-1)
    # In 32 bits, as FlexAttention's own indices are: 64 would double the registers that a tile of a mask takes.
    place, head = (torch.tensor(number, dtype=torch.int32, device=device) for number in (first, heads[0]))

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return pattern.sees(h + head, q + place, k)

    partly = seen & ~whole
    lengths, sizes = (num_queries, num_keys), (FLEX_QUERY_BLOCK, key_block)
    by_keys = (*_ordered(partly.mT), *_ordered(whole.mT)) if gradients else (None,) * 4
    blocks = *_ordered(partly), *_ordered(whole), *by_keys
    held: dict[str, Any] = dict(zip(BLOCK_TENSORS, blocks, strict=True))
    mask = BlockMask(seq_lengths=lengths, BLOCK_SIZE=sizes, mask_mod=mask_mod, **held)
    return FlexBlocks(mask=mask, pattern=pattern, place=place, head=head, options=tuple(sorted(options.items())))


_FORWARD_TILES = {"BLOCK_M": 128, "BLOCK_N": 64}
"""No larger than the blocks of the mask."""


def _quotient(numbers: torch.Tensor, divisor: int) -> torch.Tensor:
    """Of numbers from 0 on; by powers of two without the division that kernels would do in several steps."""
    shift = divisor.bit_length() - 1
    return numbers >> shift if divisor == 1 << shift else numbers // divisor


def _remainder(numbers: torch.Tensor, divisor: int) -> torch.Tensor:
    """Likewise what is left."""
    return numbers & (divisor - 1) if divisor & (divisor - 1) == 0 else numbers % divisor


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many columns each row takes (1, H, rows) and which, those first (1, H, rows, columns)."""
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None].contiguous(), order[None].contiguous()


def _with_mask(plan: BlockSparsePlan) -> BlockSparsePlan:
    """The plan with its exact mask, where that is small."""
    (batch, length), (first, end) = plan.queries.shape, plan.heads
    if batch * (end - first) * length * plan.keys.shape[1] > MASK_ELEMENTS:
        return plan
    return dataclasses.replace(plan, mask=_exact_mask(plan, slice(None)))


def _exact_mask(plan: BlockSparsePlan, part: slice) -> torch.Tensor:
    """(B or 1, H, T', n) bool for a stretch of the queries."""
    heads = torch.arange(*plan.heads, device=plan.queries.device)[:, None, None]
    return plan.pattern.sees(heads, plan.queries[:, None, part, None], plan.keys[:, None, None, :])


def _sample_by_sample(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: PackedPlan,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attention within each sample of packed rows; padding attends to itself."""
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (queries, keys, values)]  # (B T, heads, d)
    # One split, not slices: the backward pass of a slice writes a tensor of the whole's size.
    attended = []
    for piece in zip(*(tensor.split(plan.rows.segments) for tensor in flat), strict=True):
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in piece)  # (1, heads, n, d)
        size = query.shape[2]
        if size in plan.plans:
            one = attend_block_sparse(query, key, value, plan.plans[size], scale, dropout)
        else:
            gqa = query.shape[1] != key.shape[1]
            one = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=size > 1, scale=scale, enable_gqa=gqa
            )
        attended.append(one.squeeze(0).transpose(0, 1))
    return torch.cat(attended).unflatten(0, (queries.shape[0], plan.rows.length)).transpose(1, 2)
