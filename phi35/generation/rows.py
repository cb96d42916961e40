"""The rows of a generation: what each prompt is, and the ids it has by now."""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch

from phi35.config import ModelConfig
from phi35.generation.streaming import TextStream


@dataclasses.dataclass
class Row:
    """One prompt and its continuation.

    Attributes:
        index: place in the batch.
        ids: prompt and new tokens, without padding.
        prompt_length: how many of them are the prompt's.
        embeds: (prompt_length, D) embeddings of a prompt with image features in place; None for text.
        generator: of this row's draws.
        text: finds stop strings; None where there are none.
        seen: ids that the repetition penalty counts: those of text, not of images.
        rope_long: whether the cached keys stand under the long factors.
        logprobs: log-probabilities of the new tokens under the model, before penalty, temperature and filters.
    """

    index: int
    ids: list[int]
    prompt_length: int
    embeds: torch.Tensor | None
    generator: torch.Generator
    text: TextStream | None
    seen: set[int]
    rope_long: bool = False
    logprobs: list[float] = dataclasses.field(default_factory=list)


def rope_length(row: Row, config: ModelConfig, options: Any) -> int:
    """The length that chooses the row's LongRoPE factors, counted from its present ids."""
    if options.rope_mode == "reference":
        return len(row.ids)
    return min(row.prompt_length + options.max_new_tokens, config.max_position_embeddings)


def crosses(row: Row, config: ModelConfig, ahead: int = 0) -> bool:
    """Whether the row's last token, ``ahead`` tokens from now, is one that belongs under the long factors.

    Its keys stand under the short ones: the row must be computed anew.
    """
    switches = config.rope_scaling is not None
    return switches and not row.rope_long and len(row.ids) + ahead > config.original_max_position_embeddings


def finish_reason(row: Row, options: Any, stop_ids: Collection[int], max_length: int) -> str | None:
    """Why a row ends with its last token, to be called once for every new token: "stop", "length" or None."""
    if row.text is not None:
        row.text.feed(row.ids[-1])
    if row.ids[-1] in stop_ids or (row.text is not None and row.text.stopped):
        return "stop"
    if len(row.ids) - row.prompt_length >= options.max_new_tokens or len(row.ids) >= max_length:
        return "length"
    return None
