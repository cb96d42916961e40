"""Choosing the next token: greedy, or by filters and one uniform draw.

Filters act in transformers' order: repetition penalty, temperature, top-k, top-p, min-p. Sampling inverts the
cumulative distribution at one number drawn from the row's own generator on the CPU, so that a row's text depends on
its seed and its own ids: neither on its neighbours in the batch nor on the device's generator.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: 0 for greedy, else the divisor of the logits.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the smallest set of tokens whose probabilities reach this sum; None keeps all.
        min_p: drop tokens less likely than this fraction of the most likely one; None drops none.
        repetition_penalty: divides positive and multiplies negative logits of tokens already in the row (1: off).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one message each."""
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            yield f"temperature must be 0 (greedy) or positive, got {self.temperature!r}"
        if self.top_k is not None and (not _is_whole(self.top_k) or self.top_k < 1):
            yield f"top_k must be a positive whole number or None, got {self.top_k!r}"
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            yield f"top_p must lie in (0, 1] or be None, got {self.top_p!r}"
        if self.min_p is not None and (not _is_number(self.min_p) or not 0 <= self.min_p <= 1):
            yield f"min_p must lie in [0, 1] or be None, got {self.min_p!r}"
        if not _is_number(self.repetition_penalty) or not 0 < self.repetition_penalty < math.inf:
            yield f"repetition_penalty must be positive (1 is off), got {self.repetition_penalty!r}"

    def warn_without_effect(self) -> None:
        """Warn of filters that greedy choice never reads."""
        idle = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and idle:
            warnings.warn(f"{', '.join(idle)} have no effect at temperature 0: give a temperature", stacklevel=4)


class Draws:
    """Uniform numbers of one row by the number of the new token that each chooses, from the row's own generator.

    Args:
        generator: of the row; numbers are taken from it in order, each once.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._numbers: list[float] = []

    def at(self, index: int) -> float:
        """The number of new token ``index``, counted from 0."""
        if len(self._numbers) <= index:
            count = max(64, index + 1 - len(self._numbers))
            self._numbers += torch.rand(count, generator=self._generator, dtype=torch.float64).tolist()
        return self._numbers[index]


def next_tokens(
    logits: torch.Tensor,
    options: SamplingOptions,
    seen: Iterable[Iterable[int]],
    generators: Iterable[torch.Generator],
) -> list[int]:
    """One token for each row.

    Args:
        logits: (B, V), any float dtype; computed with in float32.
        options: how to choose.
        seen: ids of each row's prompt and text so far; negative ones (images) are passed over.
        generators: one CPU generator a row; greedy choice draws nothing.
    """
    if options.temperature == 0:
        return tokens_at(logits, options, seen, ())
    draws = [float(torch.rand((), generator=generator, dtype=torch.float64)) for generator in generators]
    return tokens_at(logits, options, seen, draws)


def tokens_at(
    logits: torch.Tensor, options: SamplingOptions, seen: Iterable[Iterable[int]], draws: Sequence[float]
) -> list[int]:
    """One token for each row, as of ``next_tokens``, at given uniform numbers, which greedy choice does not read."""
    scores = logits.float()
    if options.repetition_penalty != 1:
        scores = torch.stack(
            [penalised(row, ids, options.repetition_penalty) for row, ids in zip(scores, seen, strict=True)]
        )
    if options.temperature == 0:
        return scores.argmax(dim=-1).tolist()
    # Counted from the best down, no score overflows upwards at a tiny temperature.
    probabilities = filtered(scores - scores.amax(dim=-1, keepdim=True), options).softmax(dim=-1)
    return _inverted(probabilities.cpu(), torch.tensor(draws, dtype=torch.float64)).tolist()


def penalised(scores: torch.Tensor, ids: Iterable[int], penalty: float) -> torch.Tensor:
    """Scores (V,) with the repetition penalty (arXiv 1909.05858) on the given ids."""
    present = torch.tensor(sorted({token for token in ids if token >= 0}), device=scores.device, dtype=torch.int64)
    values = scores[present]
    return scores.index_copy(0, present, torch.where(values < 0, values * penalty, values / penalty))


def filtered(scores: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Scores (B, V) after temperature, top-k, top-p and min-p; what is dropped is -inf. The best token stays."""
    # A smaller divisor counts as 0, and 0 / 0 is no score.
    scores = scores / max(options.temperature, torch.finfo(scores.dtype).tiny)
    if options.top_k is not None and options.top_k < scores.shape[-1]:
        threshold = scores.topk(options.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -math.inf)
    if options.top_p is not None and options.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped = before >= options.top_p
        dropped[:, 0] = False
        scores = scores.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)
    if options.min_p:
        probabilities = scores.softmax(dim=-1)
        floor = options.min_p * probabilities.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill(probabilities < floor, -math.inf)
    return scores


def row_generators(seed: Any, num_rows: int) -> list[torch.Generator]:
    """A CPU generator for each row: every row starts from ``seed``, or from its own number of a list; None is random.

    With one seed, equal prompts get equal texts, in a batch or alone.
    """
    if seed is None:
        seeds = torch.randint(2**62, (num_rows,)).tolist()
    else:
        seeds = [seed] * num_rows if isinstance(seed, int) else list(seed)
    return [torch.Generator("cpu").manual_seed(value) for value in seeds]


def seed_problems(seed: Any, num_rows: int) -> Iterator[str]:
    """What is wrong with a seed: None, a whole number, or one for each row."""
    seeds = [seed] if seed is None or isinstance(seed, int) else seed
    if not isinstance(seeds, list | tuple) or not all(value is None or _is_whole(value) for value in seeds):
        yield f"seed must be a whole number, None or a list of one a row, got {seed!r}"
    elif seeds is seed and (len(seeds) != num_rows or None in seeds):
        yield f"seed must hold one whole number for each of the {num_rows} rows, got {seed!r}"
    elif not all(value is None or -(2**63) <= value < 2**64 for value in seeds):
        yield f"seed must fit into 64 bits, got {seed!r}"


def _inverted(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The token (B,) at which each row's cumulative probability passes its draw in [0, 1)."""
    cumulative = probabilities.double().cumsum(dim=-1)
    targets = draws[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True)
    # Rounding may carry a draw just below 1 past the end; the last token with any probability is meant.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    return torch.minimum(tokens, last).squeeze(-1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
