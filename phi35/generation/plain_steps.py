"""Steps of a generation by the model's forward pass: any device, any module, a growing cache, choices on the host."""

from typing import Any

import torch

from phi35.cache import KVCache
from phi35.generation.rows import Row, crosses, rope_length
from phi35.generation.sampling import next_tokens

CHUNK_SIZE = 2048
"""Tokens of the prompts that run at once."""


class PlainSteps:
    """One token for each unfinished row at a time.

    Args:
        model: a ``phi35.model.CausalLM``.
        options: of the generation.
        rows: all rows.
    """

    def __init__(self, model: Any, options: Any, rows: list[Row]) -> None:
        self.model, self.config, self.options = model, model.config, options
        self._limit = max(row.prompt_length for row in rows) + options.max_new_tokens
        self._rows = list(rows)
        self._cache: KVCache | None = None

    def next(self) -> list[int]:
        """The next token of each unfinished row; their log-probabilities are added to the rows where asked for."""
        logits = self._logits()
        rows = self._rows
        tokens = next_tokens(logits, self.options, [row.seen for row in rows], [row.generator for row in rows])
        if self.options.return_logprobs:
            chosen = torch.tensor(tokens, device=logits.device)[:, None]
            logprobs = logits.float().log_softmax(dim=-1).gather(1, chosen).flatten().tolist()
            for row, logprob in zip(rows, logprobs, strict=True):
                row.logprobs.append(logprob)
        return tokens

    def keep(self, places: list[int]) -> None:
        """Go on with these of the rows: a row ends once, so the copies cost less than steps on dead rows."""
        self._rows = [self._rows[place] for place in places]
        assert self._cache is not None
        self._cache = self._cache.select_rows(torch.tensor(places, device=self.model.device)) if places else None

    def _logits(self) -> torch.Tensor:
        """(n, V) logits after the last token of every unfinished row."""
        if self._cache is None:
            self._cache, logits = prefill(self.model, self._rows, self.options, self._limit)
            return logits
        crossing = [place for place, row in enumerate(self._rows) if crosses(row, self.config)]
        if not crossing:
            return self._feed(self._rows, self._cache)
        # The rows beside a crossing one take their step in a cache of their own, then all come together again.
        logits = torch.empty(len(self._rows), self.config.vocab_size, device=self.model.device)
        staying = [place for place in range(len(self._rows)) if place not in crossing]
        if staying:
            places = torch.tensor(staying, device=self.model.device)
            part = self._cache.select_rows(places)
            logits[places] = self._feed([self._rows[place] for place in staying], part).float()
            self._cache.write_rows(places, part)
        places = torch.tensor(crossing, device=self.model.device)
        self._cache.reset_rows(places)
        rows = [self._rows[place] for place in crossing]
        part, part_logits = prefill(self.model, rows, self.options, self._limit)
        self._cache.write_rows(places, part)
        logits[places] = part_logits.float()
        return logits

    def _feed(self, rows: list[Row], cache: KVCache) -> torch.Tensor:
        last = torch.tensor([[row.ids[-1]] for row in rows], device=self.model.device)
        return self.model(input_ids=last, past_key_values=cache, logits_to_keep=1).logits[:, -1]


def prefill(model: Any, rows: list[Row], options: Any, limit: int) -> tuple[KVCache, torch.Tensor]:
    """Run the whole ids of some rows, chunk by chunk: their cache and the last logits (n, V)."""
    device, longest = model.device, max(len(row.ids) for row in rows)
    lengths = [rope_length(row, model.config, options) for row in rows]
    cache = model.new_cache(len(rows), limit if options.preallocate else None, options.kv_cache_dtype)
    mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in rows], device=device)
    inputs = _inputs(model, rows, longest)
    logits = None
    chunk = options.prefill_chunk_size or CHUNK_SIZE
    for start in range(0, longest, chunk):
        part = slice(start, start + chunk)
        logits = model(
            **{name: value[:, part] for name, value in inputs.items()},
            attention_mask=mask[:, part],
            past_key_values=cache,
            rope_lengths=torch.tensor(lengths, device=device),
            logits_to_keep=1,
        ).logits[:, -1]
    assert logits is not None
    for row, length in zip(rows, lengths, strict=True):
        row.rope_long = length > model.config.original_max_position_embeddings
    return cache, logits


def _inputs(model: Any, rows: list[Row], longest: int) -> dict[str, torch.Tensor]:
    """Left-padded ids, or embeddings where a row has images."""
    ids = torch.tensor([[0] * (longest - len(row.ids)) + row.ids for row in rows], device=model.device)
    if all(row.embeds is None for row in rows):
        return {"input_ids": ids}
    embeds = model.model.embed_tokens(ids.clamp(min=0))
    for place, row in enumerate(rows):
        if row.embeds is not None:
            start = longest - len(row.ids)
            embeds[place, start : start + row.prompt_length] = row.embeds
    return {"inputs_embeds": embeds}
