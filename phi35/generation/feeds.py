"""Several tokens of each row at once: what speculation runs its drafts through, and a draft model its own steps.

A feed keeps the keys of a model for some rows and chooses after their last ids and after each drafted one, as the
loop without drafts would choose there: the same filters, and for sampling the same uniform number by the place of the
new token. What was drafted and not taken is overwritten. Rows that begin, or cross to LongRoPE's long factors, run
whole.
"""

from typing import Any, NamedTuple

import torch

from phi35.cache import KVCache
from phi35.generation.plain_steps import prefill
from phi35.generation.rows import Row, crosses
from phi35.generation.sampling import Draws, tokens_at


class Choice(NamedTuple):
    """A token and its log-probability under the model itself (0 where nobody asked for it)."""

    token: int
    logprob: float


class Feed:
    """What feeds of every make share.

    Args:
        model: a ``phi35.model.CausalLM``.
        options: of the generation.
        rows: the rows; their ids are what has been decided.
        draws: of each row, where sampling needs them; a draft model shares them with the model it drafts for.
    """

    def __init__(self, model: Any, options: Any, rows: list[Row], draws: list[Draws]) -> None:
        self.model, self.config, self.options = model, model.config, options
        self.rows, self.draws = list(rows), list(draws)
        self._fed: list[list[int]] = [[] for _ in rows]

    def choices(self, drafts: list[list[int]]) -> list[list[Choice]]:
        """Feed each row's ids as far as the cache lacks them, and its draft.

        Args:
            drafts: tokens that may follow each row; none for rows that begin or cross.

        Returns:
            For each row the choice after its last id, then after each drafted token as if it had been chosen.
        """
        fresh, starts, chunks = [], [], []
        for place, (row, draft) in enumerate(zip(self.rows, drafts, strict=True)):
            if not self._fed[place] or crosses(row, self.config):
                assert not draft
                fresh.append(place)
                self._fed[place] = []
            starts.append(self._known(place))
            chunks.append(row.ids[starts[-1] :] + draft)
            self._fed[place][starts[-1] :] = chunks[-1]
        return self._run(fresh, starts, chunks, drafts)

    def keep(self, places: list[int]) -> None:
        """Go on with these of the rows."""
        self.rows, self.draws = [self.rows[place] for place in places], [self.draws[place] for place in places]
        self._fed = [self._fed[place] for place in places]

    def _run(
        self, fresh: list[int], starts: list[int], chunks: list[list[int]], drafts: list[list[int]]
    ) -> list[list[Choice]]:
        raise AssertionError("a feed says how it runs")

    def _known(self, place: int) -> int:
        """How many of a row's ids are in the cache; the last one is fed again, whose logits are wanted."""
        ids, fed = self.rows[place].ids, self._fed[place]
        # Decided ids do not change: what was fed can differ from them in its last tokens alone.
        start = max(0, min(len(fed), len(ids)) - self.options.draft_tokens - 2)
        same = start
        while same < min(len(fed), len(ids)) and fed[same] == ids[same]:
            same += 1
        return min(same, len(ids) - 1)

    def _choose(self, place: int, logits: torch.Tensor, draft: list[int]) -> list[Choice]:
        """The host's choices from logits (1 + k, V) of one row."""
        row, options = self.rows[place], self.options
        seen: list[set[int]] = []
        if options.repetition_penalty != 1:
            text = row.seen | set(row.ids[row.prompt_length :])
            seen = [text | set(draft[:count]) for count in range(len(draft) + 1)]
        numbers = [] if options.temperature == 0 else self._numbers(place, len(draft) + 1)
        tokens = tokens_at(logits, options, seen, numbers)
        logprobs = [0.0] * len(tokens)
        if options.return_logprobs:
            chosen = torch.tensor(tokens, device=logits.device)[:, None]
            logprobs = logits.float().log_softmax(dim=-1).gather(1, chosen).flatten().tolist()
        return [Choice(*pair) for pair in zip(tokens, logprobs, strict=True)]

    def _numbers(self, place: int, count: int) -> list[float]:
        """The uniform numbers of a row's next choices."""
        row = self.rows[place]
        first = len(row.ids) - row.prompt_length
        return [self.draws[place].at(first + number) for number in range(count)]


class PlainFeed(Feed):
    """By the model's forward pass: any device, any module, a growing cache, choices on the host."""

    def __init__(self, model: Any, options: Any, rows: list[Row], draws: list[Draws]) -> None:
        super().__init__(model, options, rows, draws)
        self._limit = max(row.prompt_length for row in rows) + options.max_new_tokens
        self._cache: KVCache | None = None

    def keep(self, places: list[int]) -> None:
        """See ``Feed``."""
        super().keep(places)
        if self._cache is not None:
            self._cache = self._cache.select_rows(torch.tensor(places, device=self.model.device)) if places else None

    def _run(
        self, fresh: list[int], starts: list[int], chunks: list[list[int]], drafts: list[list[int]]
    ) -> list[list[Choice]]:
        count = len(self.rows)
        logits: list[torch.Tensor] = [torch.empty(0)] * count
        rest = [place for place in range(count) if place not in fresh]
        if fresh:
            part, last = prefill(self.model, [self.rows[place] for place in fresh], self.options, self._limit)
            for place, row in zip(fresh, last, strict=True):
                logits[place] = row[None]
            if not rest:
                self._cache = part
            else:
                assert self._cache is not None
                self._cache.reset_rows(torch.tensor(fresh, device=self.model.device))
        if rest:
            assert self._cache is not None
            places = torch.tensor(rest, device=self.model.device)
            cache = self._cache if not fresh else self._cache.select_rows(places)
            fed = self._feed(cache, [starts[place] for place in rest], [chunks[place] for place in rest])
            for place, rows in zip(rest, fed, strict=True):
                logits[place] = rows[-1 - len(drafts[place]) :]
            if fresh:
                self._cache.write_rows(places, cache)
                self._cache.write_rows(torch.tensor(fresh, device=self.model.device), part)
        return [self._choose(place, logits[place], drafts[place]) for place in range(count)]

    def _feed(self, cache: KVCache, starts: list[int], chunks: list[list[int]]) -> list[torch.Tensor]:
        """Logits (n, V) of each row's tokens, fed behind the given numbers of its cached ones."""
        device, longest = self.model.device, max(map(len, chunks))
        cache.crop(torch.arange(len(starts), device=device), torch.tensor(starts, device=device))
        ids = torch.tensor([chunk + [0] * (longest - len(chunk)) for chunk in chunks], device=device)
        mask = None
        if any(len(chunk) < longest for chunk in chunks):
            mask = torch.tensor([[1] * len(chunk) + [0] * (longest - len(chunk)) for chunk in chunks], device=device)
        logits = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        return [row[: len(chunk)] for row, chunk in zip(logits, chunks, strict=True)]
