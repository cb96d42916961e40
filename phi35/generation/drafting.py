"""Where drafts come from: the row's own text, or a smaller model."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

from phi35.config import ModelConfig
from phi35.generation.feeds import Feed
from phi35.generation.rows import Row

LONGEST_NGRAM = 3
SHORTEST_NGRAM = 2
"""A single token that occurred before tells too little of what follows."""


class Drafter(Protocol):
    """Guesses how rows go on."""

    def propose(self, counts: list[int]) -> list[list[int]]:
        """At most so many tokens for each row."""

    def keep(self, places: list[int]) -> None:
        """Go on with these of the rows."""


class PromptLookup:
    """What followed the last time that a row's last tokens stood there, as in prompt lookup decoding.

    The longest n-gram counts first. A draft that reaches the row's end goes on with its own beginning, so that text
    that repeats itself is drafted in full.

    Args:
        rows: the rows.
        unlike_text: ids besides negative ones that stand for pictures; they are never drafted.
    """

    def __init__(self, rows: list[Row], unlike_text: frozenset[int] = frozenset()) -> None:
        self._texts = [_Text(row, unlike_text) for row in rows]

    def propose(self, counts: list[int]) -> list[list[int]]:
        """See ``Drafter``."""
        return [text.following(count) if count > 0 else [] for text, count in zip(self._texts, counts, strict=True)]

    def keep(self, places: list[int]) -> None:
        """See ``Drafter``."""
        self._texts = [self._texts[place] for place in places]


class _Text:
    """One row and the places of its n-grams."""

    def __init__(self, row: Row, unlike_text: frozenset[int]) -> None:
        self.row, self.unlike_text = row, unlike_text
        self._ends: dict[tuple[int, ...], int] = {}
        self._noted = 0

    def following(self, count: int) -> list[int]:
        """Up to ``count`` tokens that may come next."""
        ids = self.row.ids
        # The row's last n-grams are noted only once a token follows them.
        for end in range(max(self._noted, 1), len(ids)):
            for length in range(SHORTEST_NGRAM, LONGEST_NGRAM + 1):
                if length <= end:
                    self._ends[tuple(ids[end - length : end])] = end
        self._noted = len(ids)
        for length in range(min(LONGEST_NGRAM, len(ids)), SHORTEST_NGRAM - 1, -1):
            place = self._ends.get(tuple(ids[-length:]))
            if place is not None:
                return self._copied(place, count)
        return []

    def _copied(self, start: int, count: int) -> list[int]:
        ids, draft = self.row.ids, list[int]()
        for place in range(start, start + count):
            token = ids[place] if place < len(ids) else draft[place - len(ids)]
            if token < 0 or token in self.unlike_text:
                break
            draft.append(token)
        return draft


class DraftModel:
    """A smaller model of the same vocabulary, which chooses as the large one does: same filters, same random numbers.

    Args:
        targets: the rows that it drafts for.
        embeds: (T, D) embeddings of each row's prompt under the smaller model, where it has pictures.
        feed: makes the feed of the smaller model's own rows.
    """

    def __init__(
        self,
        targets: list[Row],
        embeds: list[torch.Tensor | None],
        feed: Callable[[list[Row]], Feed],
    ) -> None:
        self._targets = list(targets)
        self._rows = [
            dataclasses.replace(row, ids=list(row.ids), embeds=own, rope_long=False, text=None, logprobs=[])
            for row, own in zip(targets, embeds, strict=True)
        ]
        self._decided = [len(row.ids) for row in targets]
        self._feed = feed(self._rows)

    def propose(self, counts: list[int]) -> list[list[int]]:
        """See ``Drafter``."""
        for place, (row, target) in enumerate(zip(self._rows, self._targets, strict=True)):
            decided = self._decided[place]
            row.ids[decided:] = target.ids[decided:]
            self._decided[place] = len(target.ids)
        drafts: list[list[int]] = [[] for _ in self._rows]
        none: list[list[int]] = [[] for _ in self._rows]
        for turn in range(max(counts)):
            for place, choices in enumerate(self._feed.choices(none)):
                if turn < counts[place]:
                    drafts[place].append(choices[0].token)
                    self._rows[place].ids.append(choices[0].token)
        return drafts

    def keep(self, places: list[int]) -> None:
        """See ``Drafter``."""
        self._targets, self._rows = [self._targets[p] for p in places], [self._rows[p] for p in places]
        self._decided = [self._decided[place] for place in places]
        self._feed.keep(places)


def draft_problems(model: Any, draft: Any, has_images: bool) -> list[str]:
    """Why a model cannot draft for another, one message each."""
    config = getattr(draft, "config", None)
    if not isinstance(config, ModelConfig) or not hasattr(draft, "new_cache"):
        return [f"draft_model must be a phi35.model.CausalLM, got {type(draft).__name__}"]
    problems = []
    if draft is model:
        problems.append("draft_model is the model itself: give a smaller one, or speculation='prompt_lookup'")
    if config.vocab_size != model.config.vocab_size:
        problems.append(
            f"draft_model has a vocabulary of {config.vocab_size} and the model one of {model.config.vocab_size}: both "
            "must read the same token ids"
        )
    if has_images and config.vision is None:
        problems.append(
            "draft_model reads text only and images were given: give one that reads images, or "
            "speculation='prompt_lookup'"
        )
    return problems
