"""Prompts of a batch without padding: tokens of all rows one after another, in chunks, straight into a cache.

A chunk holds up to a given number of tokens, of one long prompt or of many short ones; keys and values go to their row
of the cache, and attention runs prompt by prompt, over the cache where a prompt has begun in an earlier chunk. Every
row stands under the LongRoPE factors that its announced length chooses. Only last tokens reach the head.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from phi35.block_sparse import BlockSparsePlan, attend_block_sparse, block_pattern, plan_sequence
from phi35.cache import KVCache
from phi35.generation.fast_step import needs_modules
from phi35.generation.split_attention import attend_in_two, takes_two_parts
from phi35.kernels import reference
from phi35.kernels.operands import LayerCache, Rope, norm_of
from phi35.kernels.operations import BatchOperations, ModuleOperations, PlainOperations
from phi35.kernels.reference import normed
from phi35.kernels.tuning import DEFAULT
from phi35.packed_attention import attend_packed, packed_rows
from phi35.paged_cache import PagedCache

CHUNK_SIZE = 8192
"""Tokens that run at once."""


@dataclass(frozen=True)
class Prompt:
    """A prompt on its way into the cache.

    Attributes:
        ids: its tokens.
        embeds: (n, D) embeddings of its first n tokens, where they are not the ids' own (images); or None.
        place: its row of the cache.
        use_long: whether it stands under the long factors.
    """

    ids: Sequence[int]
    embeds: torch.Tensor | None
    place: int
    use_long: bool


@dataclass(frozen=True)
class Segment:
    """Tokens [start, start + length) of a prompt, which ends with them where ``last``."""

    prompt: int
    start: int
    length: int
    last: bool


def segments(lengths: Sequence[int], chunk_size: int) -> Iterator[list[Segment]]:
    """Prompts of these lengths, in order, cut into chunks of at most ``chunk_size`` tokens."""
    chunk: list[Segment] = []
    room = chunk_size
    for prompt, length in enumerate(lengths):
        start = 0
        while start < length:
            part = min(room, length - start)
            chunk.append(Segment(prompt, start, part, start + part == length))
            start, room = start + part, room - part
            if room == 0:
                yield chunk
                chunk, room = [], chunk_size
    if chunk:
        yield chunk


@torch.no_grad()
def prefill(
    model: Any,
    cache: "KVCache | PagedCache",
    prompts: Sequence[Prompt],
    chunk_size: int | None = None,
    plain: bool = False,
) -> torch.Tensor:
    """Fill rows of a cache.

    Args:
        model: a ``phi35.model.CausalLM``.
        cache: with room for the prompts; the rows' keys and values are overwritten, its bookkeeping is left alone.
        prompts: at least one; no two in one place.
        chunk_size: tokens that run at once; None takes ``CHUNK_SIZE``.
        plain: torch's operations alone.

    Returns:
        (n, V) float32 logits after each prompt.
    """
    work = PromptPass(model, cache, prompts, plain)
    last: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for chunk in segments([len(prompt.ids) for prompt in prompts], chunk_size or CHUNK_SIZE):
        hidden, end = work.run(chunk), 0
        for segment in chunk:
            end += segment.length
            if segment.last:
                # Cloned: a slice would keep the whole chunk.
                last[segment.prompt] = hidden[end - 1].clone()
    return work.logits(torch.stack(last))


class PromptPass:
    """The layers over one chunk after the other, of prompts on their way into a cache; arguments as of ``prefill``."""

    def __init__(
        self, model: Any, cache: "KVCache | PagedCache", prompts: Sequence[Prompt], plain: bool = False
    ) -> None:
        self.model, self.config, self.cache, self.prompts = model, model.config, cache, prompts
        self.rope = Rope(*model.model.rope.tables(cache.keys[0].device))
        act, window, heads = self.config.hidden_act, self.config.sliding_window, self.config.num_attention_heads
        self.operations: PlainOperations
        if plain:
            self.operations, self.rotate = PlainOperations(act, window), reference.rotate_prompt
        else:
            from phi35.kernels.batched import rotate_prompt

            make = ModuleOperations if needs_modules(self.config) else BatchOperations
            self.operations, self.rotate = make(act, window, cache.layer(0), heads, DEFAULT), rotate_prompt
        self._pattern = block_pattern(self.config)
        self._plans: dict[tuple[int, int, int], BlockSparsePlan] = {}

    @torch.no_grad()
    def run(self, chunk: list[Segment]) -> torch.Tensor:
        """Hidden states (N, D) of a chunk's tokens after the last layer; one segment a prompt."""
        decoder = self.model.model
        hidden = torch.cat([self._embeddings(segment) for segment in chunk])
        tokens = self._token_table(chunk, hidden.device)
        with sdpa_kernel(_BACKENDS, set_priority=True):
            for number, layer in enumerate(decoder.layers):
                self._layer(number, layer, hidden, tokens, chunk)
        self._plans.clear()
        return hidden

    def _layer(
        self,
        number: int,
        layer: Any,
        hidden: torch.Tensor,
        tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        chunk: list[Segment],
    ) -> None:
        """One layer over a chunk; ``hidden`` (N, D) is written."""
        ops, cache = self.operations, self.cache.layer(number)
        projected = layer.self_attn.qkv_proj(normed(hidden, norm_of(layer.input_layernorm)))
        self.rotate(projected, self.rope, *tokens, cache, self.config.num_attention_heads)
        attended = self._attend(projected, cache, chunk, layer.self_attn)
        del projected
        ops.project_add(attended, layer.self_attn.o_proj, hidden)
        feed_forward = ops.sparse if self.config.is_sparse_layer(number) else ops.dense
        feed_forward(hidden, norm_of(layer.post_attention_layernorm), layer.mlp)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, V) float32 of hidden states (n, D)."""
        logits = torch.empty(len(hidden), self.config.vocab_size, dtype=torch.float32, device=hidden.device)
        self.operations.project_logits(hidden, norm_of(self.model.model.norm), self.model.lm_head, logits)
        return logits

    def _embeddings(self, segment: Segment) -> torch.Tensor:
        """(n, D) of a segment's tokens, in memory of their own: the layers write into them."""
        prompt, end = self.prompts[segment.prompt], segment.start + segment.length
        given = 0 if prompt.embeds is None else len(prompt.embeds)
        parts = []
        if prompt.embeds is not None and segment.start < given:
            parts.append(prompt.embeds[segment.start : end])
        if end > given:
            ids = torch.tensor(list(prompt.ids[max(segment.start, given) : end]))
            parts.append(self.model.model.embed_tokens(to_device(ids, self.cache.keys[0].device)))
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def _token_table(
        self, chunk: list[Segment], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Position, row and factor set of every token, (N,) int32 each, by one copy to the device."""
        rows = []
        for segment in chunk:
            prompt = self.prompts[segment.prompt]
            table = torch.empty(3, segment.length, dtype=torch.int32)
            table[0] = torch.arange(segment.start, segment.start + segment.length)
            table[1], table[2] = prompt.place, int(prompt.use_long)
            rows.append(table)
        positions, places, use_long = to_device(torch.cat(rows, dim=1), device).unbind()
        return positions, places, use_long

    def _attend(self, projected: torch.Tensor, cache: LayerCache, chunk: list[Segment], attention: Any) -> torch.Tensor:
        """(N, H d) attention of every token over its prompt up to itself."""
        head_dim, num_heads = cache.head_dim, self.config.num_attention_heads
        heads = projected.view(len(projected), -1, head_dim)
        split = (num_heads, cache.num_kv, cache.num_kv)
        parts, end = [], 0
        for begun, run in itertools.groupby(chunk, lambda segment: segment.start > 0):
            lengths = []
            for segment in run:
                start, end = end, end + segment.length
                if begun:
                    past = cache.read(self.prompts[segment.prompt].place, segment.start + segment.length)
                    plan = self._plan(attention, segment.start, segment.length)
                    window = self.config.sliding_window
                    parts.append(_over_cache(heads[start:end, :num_heads], *past, window, attention.scale, plan))
                lengths.append(segment.length)
            if not begun:
                fresh = heads[end - sum(lengths) : end].split(split, dim=1)
                query, key, value = (part.transpose(0, 1)[None] for part in fresh)
                parts.append(self._fresh(query, key, value, lengths, attention))
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).flatten(1)

    def _plan(self, attention: Any, start: int, length: int) -> BlockSparsePlan | None:
        """What tokens [start, start + length) of a prompt see of it in a layer; None for all before them."""
        pattern, end = self._pattern, start + length
        if pattern is None or not attention.is_block_sparse or end <= pattern.dense_length:
            return None
        key = start, length, end
        if key not in self._plans:
            heads = 0, self.config.num_attention_heads
            self._plans[key] = plan_sequence(pattern, heads, start, length, end, self.cache.keys[0].device)
        return self._plans[key]

    def _fresh(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: list[int], attention: Any
    ) -> torch.Tensor:
        """(n, H, d) causal attention within prompts that begin here; queries (1, H, n, d)."""
        window, scale = self.config.sliding_window, attention.scale
        if any(self._plan(attention, 0, length) is not None for length in lengths):
            pieces = zip(queries.split(lengths, 2), keys.split(lengths, 2), values.split(lengths, 2), strict=True)
            attended = torch.cat([self._one(*piece, attention) for piece in pieces], dim=2)
            return attended[0].transpose(0, 1)
        if len(lengths) == 1 and (window is None or lengths[0] <= window):
            gqa = keys.shape[1] != queries.shape[1]
            attended = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=scale, enable_gqa=gqa
            )
        else:
            rows = packed_rows(torch.tensor([lengths]), 1, queries.shape[2], queries.device)
            attended = attend_packed(queries, keys, values, rows, window, scale=scale)
        return attended[0].transpose(0, 1)

    def _one(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Any) -> torch.Tensor:
        """(1, H, n, d) of one prompt that begins here, in a block-sparse layer."""
        plan, gqa = self._plan(attention, 0, query.shape[2]), key.shape[1] != query.shape[1]
        if plan is not None:
            return attend_block_sparse(query, key, value, plan, attention.scale)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=attention.scale, enable_gqa=gqa)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device; what is queued there, as the image tower's work, is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _over_cache(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    scale: float | None,
    plan: BlockSparsePlan | None,
) -> torch.Tensor:
    """(T, H, d) attention of a chunk's queries (T, H, d) over n cached keys (1, K, n, d), the chunk's own the last."""
    length, total = queries.shape[0], keys.shape[2]
    queries = queries.transpose(0, 1)[None]
    if plan is not None:
        return attend_block_sparse(queries, keys, values, plan, scale)[0].transpose(0, 1)
    gqa = keys.shape[1] != queries.shape[1]
    if queries.device.type == "cuda" and (window is None or total <= window):
        if takes_two_parts(queries, keys, values):
            return attend_in_two(queries, keys, values, scale)[0].transpose(0, 1)
        bias: Any = causal_lower_right(length, total)
    else:
        last = torch.arange(total - length, total, device=queries.device)[:, None]
        slots = torch.arange(total, device=queries.device)
        bias = slots <= last
        if window is not None:
            bias = bias & (slots > last - window)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale, enable_gqa=gqa)
    return attended[0].transpose(0, 1)
