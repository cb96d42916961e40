"""How likely a model finds given continuations: ``phi35.score``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phi35.api import prompt_texts, refuse_tags_without_images, resolve_model

LOGITS_AT_ONCE = 2**26
"""Logits held in float32 at a time (256 MiB)."""


@dataclass(frozen=True)
class Score:
    """A continuation under a prompt.

    Attributes:
        token_ids: its tokens. The first may begin within the prompt's last characters, where the tokenizer joins them.
        logprobs: natural logarithm of each token's probability, given the prompt and the tokens before it.
        is_greedy: whether every token is the most likely one.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Of the whole continuation: the sum over its tokens."""
        return sum(self.logprobs)


def score(
    prompt: str | Sequence[str],
    continuation: str | Sequence[str],
    *,
    images: Sequence[Any] | None = None,
    model: Any = None,
    system: str | None = None,
    num_crops: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 8,
) -> Score | list[Score]:
    """Log-probabilities of continuations.

    Args:
        prompt: a text, or a list of texts, each with its own continuation; wrapped in a chat as by ``generate``.
        continuation: the answer to score; a list of answers to one prompt gives a list of scores.
        images: of the prompt, as for ``generate``.
        model: as for ``generate``.
        system: text of a system turn put first.
        num_crops: limit of tiles for the images.
        device: where a model named by folder or id is loaded.
        dtype: of its weights.
        batch_size: continuations that run at once.

    Returns:
        One score, or a list of them where either argument is a list.

    Raises:
        ValueError: for bad arguments, naming them.
    """
    single = isinstance(prompt, str) and isinstance(continuation, str)
    answers = _answers(prompt, continuation)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive whole number, got {batch_size!r}")
    loaded, processor = resolve_model(model, device, dtype)
    texts = prompt_texts(processor, prompt, images, system)
    refuse_tags_without_images(processor, texts)
    if isinstance(texts, str):
        texts = [texts] * len(answers)
        images = None if images is None else [list(images)] * len(answers)
    scores: list[Score] = []
    for first in range(0, len(answers), batch_size):
        rows = slice(first, first + batch_size)
        part = None if images is None else list(images[rows])
        crops = num_crops[rows] if isinstance(num_crops, list | tuple) and not isinstance(prompt, str) else num_crops
        contexts = processor(texts[rows], images=part, num_crops=crops)
        whole = [text + answer for text, answer in zip(texts[rows], answers[rows], strict=True)]
        scores += _scores(loaded, contexts, processor(whole, images=part, num_crops=crops))
    return scores[0] if single else scores


@torch.no_grad()
def token_logprobs(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    last: int | None = None,
    **inputs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token after those before it, and whether it was the most likely.

    Args:
        model: a ``phi35.model.CausalLM``.
        input_ids: (B, T) int64.
        attention_mask: (B, T), nonzero for real tokens.
        last: score the last so many tokens alone; None for all but the first.
        **inputs: the processor's other outputs.

    Returns:
        (B, n) float32 and (B, n) bool, n being ``last`` or T - 1; values at padding mean nothing.
    """
    training, device = model.training, model.device
    ids = input_ids.to(device)
    count = ids.shape[1] - 1 if last is None else last
    if not 1 <= count < ids.shape[1]:
        raise ValueError(
            f"last must lie between 1 and {ids.shape[1] - 1} (a token is scored after another), got {last}"
        )
    moved = {name: value.to(device) if name != "image_sizes" else value for name, value in inputs.items()}
    if "pixel_values" in moved:
        moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
    model.eval()
    try:
        hidden = model.model(ids, attention_mask=attention_mask, **moved)[0][:, -count - 1 : -1]
        targets = ids[:, -count:].clamp(min=0)
        logprobs, greedy = [], []
        # Rows of the batch side by side, so that a piece holds few enough logits.
        width = max(1, LOGITS_AT_ONCE // (model.config.vocab_size * len(ids)))
        for states, labels in zip(hidden.split(width, dim=1), targets.split(width, dim=1), strict=True):
            scores = model.lm_head(states).float().log_softmax(dim=-1)
            logprobs.append(scores.gather(-1, labels[..., None]).squeeze(-1))
            greedy.append(scores.argmax(dim=-1) == labels)
    finally:
        model.train(training)
    return torch.cat(logprobs, dim=1), torch.cat(greedy, dim=1)


def _answers(prompt: Any, continuation: Any) -> list[str]:
    """The continuations as a list as long as the prompts'."""
    answers = [continuation] if isinstance(continuation, str) else continuation
    if not isinstance(answers, list | tuple) or not answers or not all(isinstance(a, str) and a for a in answers):
        raise ValueError(f"continuation must be a non-empty str or a non-empty list of such, got {continuation!r}")
    if not isinstance(prompt, str) and (not isinstance(prompt, list | tuple) or len(prompt) != len(answers)):
        shown = len(prompt) if isinstance(prompt, list | tuple) else type(prompt).__name__
        raise ValueError(f"a list of prompts takes as many continuations, got {shown} prompts and {len(answers)}")
    return list(answers)


def _scores(model: Any, contexts: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> list[Score]:
    """Scores of left-padded prompts with their continuations."""
    counts = []
    for row in range(len(whole["input_ids"])):
        before, after = (
            batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() for batch in (contexts, whole)
        )
        shared = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
        counts.append(len(after) - shared)
    inputs = {name: value for name, value in whole.items() if name not in ("input_ids", "attention_mask")}
    logprobs, greedy = token_logprobs(model, whole["input_ids"], whole["attention_mask"], max(counts), **inputs)
    return [
        Score(
            tuple(whole["input_ids"][row, -count:].tolist()),
            tuple(logprobs[row, -count:].tolist()),
            bool(greedy[row, -count:].all()),
        )
        for row, count in enumerate(counts)
    ]
