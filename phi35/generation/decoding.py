"""The decoding loop over a KV cache, for batches of prompts with and without images.

A batch gives each row what it gives alone: rows are compact in the cache, each row has its own generator, and
finished rows leave the batch. LongRoPE (facts of arXiv 2402.13753 as published: long factors from token number
original + 1 on) has two modes:

- "reference": a row is computed under the short factors until the step that feeds token number
  ``original_max_position_embeddings + 1``; there its cache is dropped and its whole ids run again under the long
  ones. Every step equals the uncached forward pass of the row.
- "pinned": the factors are chosen once, by prompt length + max_new_tokens.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from phi35.cache_codes import kind_problem
from phi35.generation.captured_steps import CapturedSteps, steps_for
from phi35.generation.drafting import draft_problems
from phi35.generation.plain_steps import PlainSteps
from phi35.generation.rows import Row, finish_reason
from phi35.generation.sampling import SamplingOptions, row_generators, seed_problems
from phi35.generation.speculation import SpeculationStatistics, SpeculativeSteps
from phi35.generation.stopping import stop_problems, stop_strings
from phi35.generation.streaming import TextStream
from phi35.module_walk import set_evaluation
from phi35.tokenizer import Tokenizer

ROPE_MODES = ("reference", "pinned")
SPECULATIONS = ("prompt_lookup", "draft_model")
DRAFTED_FROM_TEXT, DRAFTED_BY_A_MODEL = 8, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingOptions(SamplingOptions):
    """Everything about a generation but its inputs.

    Attributes:
        max_new_tokens: most tokens added to a row; a row also ends at ``max_position_embeddings``.
        stop_token_ids: ids that end a row; None takes the config's.
        stop: strings that end a row (they need ``tokenizer``); the ids keep the tokens that spelled them.
        seed: one number for all rows, one for each, or None for fresh ones.
        rope_mode: "reference" or "pinned".
        prefill_chunk_size: tokens of the prompts that run at once, which bounds the memory of long prompts; None takes
            2,048, or 8,192 with the kernels.
        preallocate: allocate the cache for prompt + max_new_tokens at once instead of letting it grow.
        return_logprobs: keep the log-probabilities of new tokens (``Decoding.logprobs``).
        kv_cache_dtype: "int8" or "fp8" holds keys and values in eight bits (``phi35.cache_codes``), which halves the
            cache and changes the text a little; None holds them in the model's dtype.
        fast: take steps from a CUDA graph: None where the model and its device can, True or an error, False never.
        speculation: "prompt_lookup" drafts tokens from the row's own text, "draft_model" by ``draft_model`` (which
            alone means it); None drafts nothing. The text stays that without (``phi35.generation.speculation``).
        draft_model: a smaller ``phi35.model.CausalLM`` of the same vocabulary, put into evaluation mode.
        num_draft_tokens: most tokens that are drafted at a time; None takes 8 from text and 4 from a model.
    """

    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    seed: int | Sequence[int] | None = None
    rope_mode: str = "reference"
    prefill_chunk_size: int | None = None
    preallocate: bool = False
    return_logprobs: bool = False
    kv_cache_dtype: str | None = None
    fast: bool | None = None
    speculation: str | None = None
    draft_model: Any = None
    num_draft_tokens: int | None = None

    @property
    def speculates(self) -> bool:
        """Whether tokens are drafted."""
        return self.speculation is not None or self.draft_model is not None

    @property
    def draft_tokens(self) -> int:
        """Most tokens of a draft."""
        if self.num_draft_tokens is not None:
            return self.num_draft_tokens
        return DRAFTED_FROM_TEXT if self.draft_model is None else DRAFTED_BY_A_MODEL

    def all_problems(self, num_rows: int, vocab_size: int) -> list[str]:
        """What is wrong with the values, one message each."""
        problems = list(self.problems())
        for name in ("max_new_tokens", "prefill_chunk_size", "num_draft_tokens"):
            value = getattr(self, name)
            if value is None and name != "max_new_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.append(f"{name} must be a positive whole number, got {value!r}")
        if self.rope_mode not in ROPE_MODES:
            problems.append(f"rope_mode must be one of {ROPE_MODES}, got {self.rope_mode!r}")
        if (problem := kind_problem(self.kv_cache_dtype)) is not None:
            problems.append(problem)
        if self.speculation not in (None, *SPECULATIONS):
            problems.append(f"speculation must be None or one of {SPECULATIONS}, got {self.speculation!r}")
        elif self.speculation == "draft_model" and self.draft_model is None:
            problems.append("speculation='draft_model' needs draft_model=, a smaller model of the same vocabulary")
        elif self.speculation == "prompt_lookup" and self.draft_model is not None:
            problems.append("speculation='prompt_lookup' and draft_model= came together: give one of them")
        elif self.num_draft_tokens is not None and not self.speculates:
            problems.append("num_draft_tokens= needs speculation= or draft_model=")
        outside = [token for token in self.stop_token_ids or () if not 0 <= token < vocab_size]
        if outside:
            problems.append(f"stop_token_ids {outside} lie outside the vocabulary of {vocab_size}")
        return problems + stop_problems(self.stop) + list(seed_problems(self.seed, num_rows))


def generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    image_sizes: torch.Tensor | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    on_token: Callable[[int, int], None] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Continue prompts.

    Args:
        model: a ``phi35.model.CausalLM``.
        input_ids: (B, T) int64, padding on either side; -i stands for features of the row's image i.
        attention_mask: (B, T), nonzero for real tokens; None for no padding.
        pixel_values: (C, 3, S, S) crops of all images.
        image_sizes: (N, 2) heights and widths after padding.
        tokenizer: needed by stop strings alone.
        on_token: called with (row, token id) for every new token, stop tokens included.
        **options: fields of ``DecodingOptions``.

    Returns:
        (B, T + new) int64 on the model's device: the inputs as they came, then each row's new tokens (a stop token
        among them) and the pad id after a row has ended.

    Raises:
        ValueError: for bad arguments, all of them at once, before anything is computed.
    """
    decoding = Decoding(model, input_ids, attention_mask, pixel_values, image_sizes, tokenizer=tokenizer, **options)
    while not decoding.done:
        for row, token_id in decoding.step():
            if on_token is not None:
                on_token(row, token_id)
    return decoding.output()


class Decoding:
    """A generation in progress, one token for every unfinished row at each ``step``.

    Arguments are those of ``generate``.

    Attributes:
        image_digests: digest of each picture's content, where the model keeps image features by content.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> None:
        self.model, self.config = model, model.config
        self.options = _options(options)
        for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if not isinstance(value, torch.Tensor) and (value is not None or name == "input_ids"):
                raise ValueError(f"{name} must be a tensor (B, T), got {type(value).__name__}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check(input_ids, mask, pixel_values, tokenizer)
        self.options.warn_without_effect()
        stop_ids = self.options.stop_token_ids
        self.stop_ids = frozenset(self.config.stop_token_ids if stop_ids is None else stop_ids)
        self._input_ids = input_ids.to(model.device)
        # On the host, and read before the tower's work is queued, which any question to the device would wait for.
        host_ids, keep = input_ids.cpu(), mask.cpu().bool()
        self.image_digests: list[bytes] = []
        embeds = self._embeds(model, pixel_values, image_sizes)
        image_id = None if self.config.vision is None else self.config.vision.image_token_id
        generators = row_generators(self.options.seed, len(input_ids))
        self.rows = []
        for index, generator in enumerate(generators):
            ids = host_ids[index][keep[index]].tolist()
            text = TextStream(tokenizer, self.options.stop) if tokenizer is not None and self.options.stop else None
            row_embeds = None if embeds is None else _kept(embeds[index], keep[index])
            seen = {token for token in ids if token >= 0 and token != image_id}
            self.rows.append(Row(index, ids, len(ids), row_embeds, generator, text, seen))
        self._active = list(self.rows)
        self._steps: PlainSteps | CapturedSteps | SpeculativeSteps | None = None
        draft = self.options.draft_model
        draft_embeds = None if draft is None else self._embeds(draft, pixel_values, image_sizes)
        self._draft_embeds = [
            None if draft_embeds is None else _kept(draft_embeds[index], keep[index]) for index in range(len(self.rows))
        ]

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return not self._active

    def new_ids(self, row: int) -> list[int]:
        """The tokens added to a row so far."""
        return self.rows[row].ids[self.rows[row].prompt_length :]

    def logprobs(self, row: int) -> list[float]:
        """Log-probabilities of ``new_ids(row)`` under the model itself: before penalty, temperature and filters.

        Raises:
            ValueError: if the generation was not asked for them.
        """
        if not self.options.return_logprobs:
            raise ValueError("the log-probabilities were not kept: give return_logprobs=True")
        return self.rows[row].logprobs

    def output(self) -> torch.Tensor:
        """(B, T + new) int64: the inputs, the new tokens and padding."""
        new = [self.new_ids(row.index) for row in self.rows]
        longest = max(map(len, new))
        pad_id = self.config.pad_token_id
        added = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in new], device=self._input_ids.device)
        return torch.cat((self._input_ids, added.long()), dim=1)

    @torch.no_grad()
    def step(self) -> list[tuple[int, int]]:
        """Add one token to every unfinished row, or several where tokens were drafted: (row, token id) pairs."""
        training = self.model.training
        if training or self._steps is None:
            # Not at every step: even a short walk over all modules costs a part of a captured step.
            set_evaluation(self.model)
        try:
            if self._steps is None:
                self._steps = self._first_steps()
            tokens = self._steps.next()
        finally:
            if training:
                self.model.train()
        new, staying = list[tuple[int, int]](), list[int]()
        given = [[found] if isinstance(found, int) else found for found in tokens]
        for place, (row, found) in enumerate(zip(self._active, given, strict=True)):
            ended = False
            for token_id in found:
                row.ids.append(token_id)
                row.seen.add(token_id)
                new.append((row.index, token_id))
                ended = self._ended(row)
                if ended:
                    break  # what was drafted beyond the end is no part of the text
            del row.logprobs[len(row.ids) - row.prompt_length :]
            if not ended:
                staying.append(place)
        if len(staying) < len(self._active):
            self._active = [self._active[place] for place in staying]
            self._steps.keep(staying)
        return new

    @property
    def speculation(self) -> SpeculationStatistics | None:
        """How many drafted tokens were taken; None before the first step, and where none are drafted."""
        return self._steps.statistics if isinstance(self._steps, SpeculativeSteps) else None

    def _first_steps(self) -> "PlainSteps | CapturedSteps | SpeculativeSteps":
        if self.options.speculates:
            return SpeculativeSteps(self.model, self.options, self._active, self._draft_embeds)
        return steps_for(self.model, self.options, self._active)

    @torch.no_grad()
    def _embeds(
        self, model: Any, pixel_values: torch.Tensor | None, image_sizes: torch.Tensor | None
    ) -> torch.Tensor | None:
        """(B, T, D) embeddings with image features, computed once: they serve every chunk and every rerun."""
        if pixel_values is None or len(pixel_values) == 0:
            return None
        ids = self._input_ids.to(model.device)
        embeds = model.model.embed_tokens(ids.clamp(min=0))
        training = model.training
        set_evaluation(model)
        try:
            pixels, embedding = pixel_values.to(embeds.device, embeds.dtype), model.model.vision_embed_tokens
            cache = model.image_feature_cache
            with embedding.tower_from_graphs(self.options.fast is not False):
                if cache is None or training or model.spread is not None:
                    placed: torch.Tensor = embedding(ids, embeds, pixels, image_sizes)
                    return placed.to(embeds.device)
                placement = embedding.place(ids, pixels, image_sizes)  # reads ids, which would wait for the tower
                features, digests = cache.features(embedding, pixels, image_sizes)
            self.image_digests = digests if model is self.model else self.image_digests
            return embedding(ids, embeds, image_features=features, placement=placement)
        finally:
            if training:
                model.train()

    def _ended(self, row: Row) -> bool:
        return finish_reason(row, self.options, self.stop_ids, self.config.max_position_embeddings) is not None

    def _check(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        pixel_values: torch.Tensor | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be (B, T) whole numbers, at least one each, got {tuple(input_ids.shape)}")
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask must be {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        problems = self.options.all_problems(len(input_ids), self.config.vocab_size)
        if self.model.device.type == "meta":
            problems.append("the model's weights are on the meta device: load or create it on a real one")
        if self.options.stop and tokenizer is None:
            problems.append("stop strings need tokenizer=, to know the text of tokens")
        lengths = mask.bool().sum(dim=1).tolist()
        limit = self.config.max_position_embeddings
        for index, length in enumerate(lengths):
            if length == 0:
                problems.append(f"prompt {index} is empty: give at least one token")
            elif length >= limit:
                problems.append(f"prompt {index} has {length} tokens; with one more it passes the model's {limit}")
        real = input_ids[mask.bool()]
        if real.numel() and int(real.max()) >= self.config.vocab_size:
            problems.append(f"input_ids hold {int(real.max())}, outside the vocabulary of {self.config.vocab_size}")
        if self.config.vision is None and (pixel_values is not None or (real < 0).any()):
            problems.append("the model reads text only and images were given")
        if (draft := self.options.draft_model) is not None:
            problems += draft_problems(self.model, draft, pixel_values is not None)
        if problems:
            raise ValueError("cannot generate: " + "; ".join(problems))


def _kept(embeds: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """(n, D) of the real tokens of embeddings (T, D), a view where they are a run; ``keep`` (T,) lies on the host."""
    places = keep.nonzero().flatten()
    start, end = int(places[0]), int(places[-1]) + 1
    return embeds[start:end] if end - start == len(places) else embeds[places.to(embeds.device)]


def _options(given: dict[str, Any]) -> DecodingOptions:
    known = inspect.signature(DecodingOptions).parameters
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown options {unknown}; known are {sorted(known)}")
    given = {**given, "stop": stop_strings(given.get("stop"))}
    stop_ids = given.get("stop_token_ids")
    if stop_ids is not None:
        listed = isinstance(stop_ids, list | tuple | set | frozenset)
        if not listed or not all(type(token) is int for token in stop_ids):
            raise ValueError(f"stop_token_ids must be a list of token ids (int), got {stop_ids!r}")
        given["stop_token_ids"] = tuple(stop_ids)
    return DecodingOptions(**given)
