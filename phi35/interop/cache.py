"""A cache of transformers over ``KVCache``, which holds what LongRoPE needs to compute a row anew.

transformers counts columns of the padded batch; ``KVCache`` counts each row's real tokens. A row whose length passes
the original one belongs under the other factors, and all its keys with it. So the ids, the image features and the mask
of what is cached are kept, as far as a row may still cross, and the rows that do are computed from them.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache

from phi35.cache import KVCache
from phi35.model import CausalLM
from phi35.outputs import CausalLMOutput, RouterOutput


class RowCache(Cache):
    """Keys and values of a batch, as ``generate`` of transformers hands them from step to step.

    Args:
        causal_lm: the model; its config says whether rows can cross.

    Attributes:
        rows: the cache itself; None before the first tokens.
    """

    is_compileable = False
    is_croppable = True
    is_initialized = True

    def __init__(self, causal_lm: CausalLM) -> None:
        super().__init__(layers=[])
        config = causal_lm.config
        self.rows: KVCache | None = None
        self._num_layers = config.num_hidden_layers
        self._original = config.original_max_position_embeddings
        self._switches = config.rope_scaling is not None
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._ids = torch.zeros(0, 0, dtype=torch.int64)
        self._embeds: torch.Tensor | None = None
        self._shortened = False

    def extend(
        self,
        causal_lm: CausalLM,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """One pass over a chunk, which is cached.

        Args:
            causal_lm: the model.
            input_ids: (B, T) int64; or
            inputs_embeds: (B, T, D).
            attention_mask: (B, T) or (B, columns + T), nonzero for real tokens; None for no padding.
            position_ids: (B, T); None for the running count of real tokens.
            logits_to_keep: compute logits for the last n positions alone; 0 for all.

        Returns:
            As ``CausalLM.forward``; hidden states and router outputs are the chunk's.

        Raises:
            ValueError: where the batch has another number of rows, or positions of its own in a row that crosses.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, length = given.shape[:2]
        if self.rows is None:
            self.rows = causal_lm.new_cache(batch)
        if self.rows.batch_size != batch:
            raise ValueError(f"the cache holds {self.rows.batch_size} rows and {batch} came")
        mask = torch.ones(batch, length, dtype=torch.bool, device=given.device)
        if attention_mask is not None:
            mask = attention_mask[:, -length:].to(given.device).bool()
        crossing = self._crossing(mask)
        if crossing is not None and position_ids is not None:
            self._check_positions(position_ids, mask, crossing)
        self._remember(causal_lm, input_ids, inputs_embeds, mask)
        inputs = {"inputs_embeds": inputs_embeds} if input_ids is None else {"input_ids": input_ids}
        inputs |= {"attention_mask": None if attention_mask is None else mask, "position_ids": position_ids}
        if crossing is None:
            return causal_lm(**inputs, past_key_values=self.rows, logits_to_keep=logits_to_keep, return_logits=True)
        return self._extend_apart(causal_lm, inputs, crossing, length, logits_to_keep)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch that are cached."""
        return self._mask.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns with a query's own, and the first of them."""
        return self.get_seq_length() + int(query_length), 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: it grows."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def __len__(self) -> int:
        """Number of layers."""
        return self._num_layers

    @property
    def is_linear(self) -> list[bool]:
        """No layer is a linear one."""
        return [False] * self._num_layers

    @property
    def is_sliding(self) -> list[bool]:
        """Every layer keeps all keys, whatever its window."""
        return [False] * self._num_layers

    def update(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refused: the attention of this package writes the cache itself.

        Raises:
            ValueError: always.
        """
        raise ValueError("this cache is written by the models of phi35 alone: hand it to their forward")

    def activate_past_recording(self) -> None:
        """Nothing to do: all that was cached can be cropped."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put the rows in a new order, as beam search asks for; rows may repeat."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        if self.rows is None:
            return
        indices = indices.to(self._mask.device)
        self.rows = self.rows.select_rows(indices)
        self._mask = self._mask[indices]
        self._ids = self._ids[indices] if self._switches else self._ids
        self._embeds = None if self._embeds is None else self._embeds[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.rows is not None:
            rows = torch.arange(self.rows.batch_size, device=self._mask.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Forget columns.

        Args:
            max_length: columns to keep; a negative number is the number of columns to forget, 0 forgets none.
        """
        columns = self.get_seq_length()
        keep = columns + max_length if max_length <= 0 else max_length
        if self.rows is None or not 0 <= keep < columns:
            return
        self._mask = self._mask[:, :keep]
        self._ids = self._ids[:, :keep]
        if self._embeds is not None:
            self._embeds = self._embeds[:, :keep]
        self.rows.crop(torch.arange(self.rows.batch_size, device=self._mask.device), self._mask.sum(dim=1))
        self._shortened = True

    def reset(self) -> None:
        """Forget everything."""
        self.rows, self._embeds, self._shortened = None, None, False
        self._mask, self._ids = self._mask[:0, :0], self._ids[:0, :0]

    def _crossing(self, mask: torch.Tensor) -> torch.Tensor | None:
        """(B,) bool: cached rows that this chunk puts under the other factors; None where there are none."""
        rows = self.rows
        assert rows is not None
        if not self._switches or rows.num_slots == 0:
            return None
        if rows.num_slots + mask.shape[1] <= self._original and not self._shortened:
            return None
        long = rows.lengths + mask.sum(dim=1) > self._original
        crossing = (rows.lengths > 0) & (long != rows.rope_long)
        self._shortened = False
        return crossing if bool(crossing.any()) else None

    def _check_positions(self, position_ids: torch.Tensor, mask: torch.Tensor, crossing: torch.Tensor) -> None:
        assert self.rows is not None
        running = self.rows.lengths[:, None] + mask.long().cumsum(dim=1) - 1
        if bool(((running != position_ids.to(running.device)) & mask & crossing[:, None]).any()):
            raise ValueError(
                "a row passes the original length of LongRoPE and must be computed anew, with positions that count its "
                "real tokens: leave out position_ids"
            )

    def _remember(
        self,
        causal_lm: CausalLM,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mask: torch.Tensor,
    ) -> None:
        columns = self._mask.shape[1]
        self._mask = torch.cat((self._mask, mask), dim=1) if columns else mask
        if not self._switches:
            return
        ids = input_ids if input_ids is not None else mask.new_zeros(mask.shape, dtype=torch.int64)
        if inputs_embeds is not None:
            before = self._history(causal_lm, torch.arange(len(mask), device=mask.device)) if columns else None
            self._embeds = inputs_embeds if before is None else torch.cat((before, inputs_embeds), dim=1)
            self._embeds = self._embeds.detach()
        self._ids = torch.cat((self._ids, ids), dim=1) if columns else ids

    def _history(self, causal_lm: CausalLM, rows: torch.Tensor) -> torch.Tensor:
        """(n, columns, D) embeddings of what the rows hold."""
        embeds = causal_lm.model.embed_tokens(self._ids[rows].clamp(min=0))
        if self._embeds is None:
            return embeds
        return torch.cat((self._embeds[rows].to(embeds), embeds[:, self._embeds.shape[1] :]), dim=1)

    def _extend_apart(
        self,
        causal_lm: CausalLM,
        inputs: dict[str, torch.Tensor | None],
        crossing: torch.Tensor,
        length: int,
        logits_to_keep: int,
    ) -> CausalLMOutput:
        """Crossing rows from their beginning, the others by their chunk, each in a cache of its own."""
        assert self.rows is not None
        options: dict[str, Any] = {"logits_to_keep": logits_to_keep or length, "return_logits": True}
        parts: list[tuple[torch.Tensor, CausalLMOutput]] = []
        staying = (~crossing).nonzero().flatten()
        if len(staying):
            part = self.rows.select_rows(staying)
            chunk = {name: None if value is None else value[staying] for name, value in inputs.items()}
            parts.append((staying, causal_lm(**chunk, past_key_values=part, **options)))
            self.rows.write_rows(staying, part)
        anew = crossing.nonzero().flatten()
        part = causal_lm.new_cache(len(anew))
        history = self._history(causal_lm, anew)
        output = causal_lm(inputs_embeds=history, attention_mask=self._mask[anew], past_key_values=part, **options)
        parts.append((anew, output))
        self.rows.reset_rows(anew)
        self.rows.write_rows(anew, part)
        return CausalLMOutput(
            logits=_merged([(rows, output.logits) for rows, output in parts], logits_to_keep or length),
            past_key_values=self.rows,
            router_outputs=_merged_routing(parts, length),
            hidden_states=_merged([(rows, output.hidden_states) for rows, output in parts], length),
        )


def _merged(parts: list[tuple[torch.Tensor, Any]], length: int) -> torch.Tensor:
    """(B, length, ...) from the last columns of each part's rows."""
    first = parts[0][1]
    merged = first.new_empty(sum(len(rows) for rows, _ in parts), length, *first.shape[2:])
    for rows, values in parts:
        merged[rows.to(merged.device)] = values[:, -length:]
    return merged


def _merged_routing(parts: list[tuple[torch.Tensor, CausalLMOutput]], length: int) -> tuple[RouterOutput, ...]:
    merged = []
    for layer in range(len(parts[0][1].router_outputs)):
        routed = [(rows, output.router_outputs[layer]) for rows, output in parts]
        fields = []
        for name in ("logits", "expert_indices", "expert_weights"):
            values = [(rows, getattr(routing, name).unflatten(0, (len(rows), -1))) for rows, routing in routed]
            fields.append(_merged(values, length).flatten(0, 1))
        merged.append(RouterOutput(*fields))
    return tuple(merged)
