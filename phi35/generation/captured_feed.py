"""A feed from CUDA graphs: a step over some rows takes one token of each, or a fixed number of them side by side.

The tokens of a row are rows of a batch to the kernels and share the row's pages of the cache; keys and values are
stored before any token attends, each up to its own position. A row with fewer tokens repeats its last one, which
touches no further expert and writes what stands there. Where no row has more than one token to feed, the step of one
token runs.
"""

from typing import Any

import torch

from phi35.generation import step_pool
from phi35.generation.fast_prefill import Prompt, prefill
from phi35.generation.fast_step import DecodeStep
from phi35.generation.feeds import Choice, Feed
from phi35.generation.rows import Row, rope_length
from phi35.generation.sampling import Draws
from phi35.kernels.operands import StepState
from phi35.paged_cache import PAGE_SIZE, PagedCache, RepeatedRows

FeedKey = tuple[int, int, int, str | None]
"""Rows, tokens of a row in the wide step, longest length in steps of ``LENGTH_STEP``, and kind of the cache."""
FIRST_TOKENS = 1024
"""New tokens that the cache has room for at first."""
WORTH_A_CAPTURE = 64
"""Tokens that must be left for a smaller batch to be captured."""
LENGTH_STEP = 2048
"""Longest lengths are rounded up to a multiple of this, so that the next generation can use the same graphs."""


class CapturedFeed(Feed):
    """Rows over a paged cache.

    Args:
        model: a ``phi35.model.CausalLM`` in evaluation mode.
        options: of the generation.
        rows: the rows.
        draws: of the rows.
        width: tokens of a row in the wide step.
        plain: torch's operations, no graph, and the host's choices, on any device.

    Raises:
        CannotCaptureError: if a module of the model waits for the device.
    """

    def __init__(
        self, model: Any, options: Any, rows: list[Row], draws: list[Draws], width: int, plain: bool = False
    ) -> None:
        super().__init__(model, options, rows, draws)
        self.width, self.plain = width, plain
        longest = max(row.prompt_length for row in rows)
        end = min(longest + options.max_new_tokens, self.config.max_position_embeddings) + width
        self._most_tokens = end
        first = end if options.preallocate else min(end, longest + FIRST_TOKENS)
        key = (len(rows), width, -(-end // LENGTH_STEP), options.kv_cache_dtype)
        parts = _take(model, key, plain)
        if parts is None:
            max_length = key[2] * LENGTH_STEP
            num_pages = len(rows) * -(-first // PAGE_SIZE) + 1
            sizes = (len(rows), num_pages, max_length)
            cache = PagedCache(self.config, *sizes, model.device, model.dtype, options.kv_cache_dtype)
            parts = FeedParts(model, cache, key, plain)
        self._parts = parts
        self.cache = self._parts.cache
        self._slots = list(range(len(rows)))
        self._parts.set_filters(options)
        self._reserve(first)
        if not plain:
            # Before anything is computed: a model that cannot be captured takes another feed.
            self._parts.step(width)
            self._parts.step(1)

    def keep(self, places: list[int]) -> None:
        """See ``Feed``."""
        super().keep(places)
        for slot in set(self._slots) - {self._slots[place] for place in places}:
            self.cache.release(slot)
        self._slots = [self._slots[place] for place in places]
        if not places:
            _give(self.model, self._parts)
        elif 2 * len(places) <= self.cache.num_rows and self._tokens_left() > WORTH_A_CAPTURE:
            self.cache.select_rows(self._slots)
            self._slots = list(range(len(places)))
            self._parts.capture_again()

    def _tokens_left(self) -> int:
        """Tokens that some row may still get."""
        return self.options.max_new_tokens - min(len(row.ids) - row.prompt_length for row in self.rows)

    def _run(
        self, fresh: list[int], starts: list[int], chunks: list[list[int]], drafts: list[list[int]]
    ) -> list[list[Choice]]:
        self._reserve(max(start + len(chunk) for start, chunk in zip(starts, chunks, strict=True)))
        found: list[list[Choice]] = [[] for _ in self.rows]
        rest = [place for place in range(len(self.rows)) if place not in fresh]
        done = dict.fromkeys(rest, 0)
        while rest:
            left = {place: len(chunks[place]) - done[place] for place in rest}
            width = 1 if max(left.values()) == 1 else self.width
            parts = {}
            for place in rest:
                first = done[place]
                parts[place] = (starts[place] + first, chunks[place][first : first + width])
                done[place] += len(parts[place][1])
            choices = self._take_step(width, parts, drafts)
            ended = [place for place in rest if done[place] == len(chunks[place])]
            for place in ended:
                found[place] = choices[place]
            rest = [place for place in rest if place not in ended]
        if fresh:
            # Last: the steps of the others leave something in the slots of these.
            for place, row in zip(fresh, self._prompts(fresh).split(1), strict=True):
                found[place] = self._choose(place, row, [])
        return found

    def _take_step(
        self, width: int, parts: dict[int, tuple[int, list[int]]], drafts: list[list[int]]
    ) -> dict[int, list[Choice]]:
        """Feed a part of some rows; the choices after its last token and the drafted ones before it."""
        step = self._parts.step(width)
        count = self.cache.num_rows
        tokens, lengths = ([[0] * width for _ in range(count)] for _ in range(2))
        numbers = [[0.0] * width for _ in range(count)]
        sampling = self.options.temperature != 0
        for place, slot in enumerate(self._slots):
            fed = self._fed[place]
            start, chunk = parts.get(place, (len(fed) - 1, fed[-1:] or [0]))
            repeated = width - len(chunk)
            tokens[slot] = chunk + chunk[-1:] * repeated
            lengths[slot] = [*range(start, start + len(chunk)), *[max(0, start + len(chunk) - 1)] * repeated]
            if sampling and place in parts:
                asked = min(len(drafts[place]) + 1, len(chunk))
                numbers[slot][len(chunk) - asked : len(chunk)] = self._numbers(place, asked)
        state = self._parts.fill(step, width, tokens, lengths, numbers if sampling else None)
        if self.options.repetition_penalty != 1 and not self.plain:
            self._show_seen(state, width, drafts, parts)
        step.run_layers() if self.plain else step.run()
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()
        found = {}
        for place, (_, chunk) in parts.items():
            asked = min(len(drafts[place]) + 1, len(chunk))
            first = self._slots[place] * width + len(chunk) - asked
            if self.plain:
                found[place] = self._choose(place, step.logits[first : first + asked], drafts[place][: asked - 1])
            else:
                rows = slice(first, first + asked)
                pairs = zip(state.history[0, rows].tolist(), state.logprobs[0, rows].tolist(), strict=True)
                found[place] = [Choice(*pair) for pair in pairs]
        return found

    def _show_seen(
        self, state: StepState, width: int, drafts: list[list[int]], parts: dict[int, tuple[int, list[int]]]
    ) -> None:
        """What the repetition penalty counts before each choice: a row's text, and its draft so far."""
        state.seen.zero_()
        rows, ids = [], []
        for place, (_, chunk) in parts.items():
            row = self.rows[place]
            text = row.seen | set(row.ids[row.prompt_length :])
            asked = min(len(drafts[place]) + 1, len(chunk))
            first = self._slots[place] * width + len(chunk) - asked
            for number in range(asked):
                shown = text | set(drafts[place][:number])
                rows += [first + number] * len(shown)
                ids += list(shown)
        state.seen[torch.tensor(rows, device=state.seen.device), torch.tensor(ids, device=state.seen.device)] = 1

    def _prompts(self, places: list[int]) -> torch.Tensor:
        """Run the whole ids of some rows into their pages: logits (n, V) after the last."""
        prompts = []
        for place in places:
            row = self.rows[place]
            row.rope_long = self.config.rope_scaling is not None and (
                rope_length(row, self.config, self.options) > self.config.original_max_position_embeddings
            )
            prompts.append(Prompt(row.ids, row.embeds, self._slots[place], row.rope_long))
            self.cache.rope_long[self._slots[place]] = row.rope_long
        self._parts.refresh()
        return prefill(self.model, self.cache, prompts, self.options.prefill_chunk_size, self.plain)

    def _reserve(self, num_tokens: int) -> None:
        """Pages of every unfinished row for so many tokens."""
        wanted = min(self._most_tokens, -(-num_tokens // PAGE_SIZE) * PAGE_SIZE)
        missing = sum(self.cache.missing(slot, wanted) for slot in self._slots)
        if not missing:
            return
        if missing > self.cache.num_free:
            # Twice the tokens, so that growing, and capturing anew, is rare.
            wanted = min(self._most_tokens, 2 * wanted)
            missing = sum(self.cache.missing(slot, wanted) for slot in self._slots)
            self._parts.grow(max(0, missing - self.cache.num_free))
        for slot in self._slots:
            reserved = self.cache.reserve(slot, wanted)
            assert reserved
        self._parts.refresh()


class FeedParts:
    """A cache and the steps over it, which outlive a generation.

    Args:
        model: whose steps they are.
        cache: of the rows.
        key: what a generation must agree in to use them.
        plain: without graphs and kernels.
    """

    def __init__(self, model: Any, cache: PagedCache, key: FeedKey, plain: bool) -> None:
        self.model, self.cache, self.key, self.plain = model, cache, key, plain
        self._options: Any = None
        self._steps: dict[int, DecodeStep] = {}
        self._inputs: dict[int, torch.Tensor] = {}

    @property
    def is_current(self) -> bool:
        """Whether the model's weights still lie where the steps read them."""
        return all(step.is_current for step in self._steps.values())

    def step(self, width: int) -> DecodeStep:
        """The step of so many tokens a row, captured when it is first asked for."""
        if width not in self._steps:
            count, pinned = self.cache.num_rows, self.model.device.type == "cuda"
            state = StepState.new(count * width, self.model.config.vocab_size, self.model.device)
            rows = RepeatedRows(self.cache, count, width)
            step = DecodeStep(self.model, rows, plain=self.plain, state=state)
            if not self.plain:
                rows.table.zero_()  # the step that is taken to capture it must not write to the rows
                step.capture()
            self._steps[width] = step
            self._set_filters(state)
            self._refresh(step)
            self._inputs[width] = torch.zeros(2, count * width, dtype=torch.int64, pin_memory=pinned)
        return self._steps[width]

    def fill(
        self,
        step: DecodeStep,
        width: int,
        tokens: list[list[int]],
        lengths: list[list[int]],
        numbers: list[list[float]] | None,
    ) -> StepState:
        """Write what a step reads; the last one must have ended."""
        state, inputs = step.state, self._inputs[width]
        inputs.copy_(torch.tensor([tokens, lengths]).flatten(1))
        state.tokens.copy_(inputs[0], non_blocking=True)
        state.lengths.copy_(inputs[1], non_blocking=True)
        state.steps.zero_()
        if numbers is not None:
            state.draws[0].copy_(torch.tensor(numbers, dtype=state.draws.dtype).flatten())
        return state

    def set_filters(self, options: Any) -> None:
        """How a generation chooses."""
        self._options = options
        for step in self._steps.values():
            self._set_filters(step.state)

    def _set_filters(self, state: StepState) -> None:
        options, vocab = self._options, self.model.config.vocab_size
        state.temperature.fill_(options.temperature)
        state.top_k.fill_(vocab if options.top_k is None else min(options.top_k, vocab))
        state.top_p.fill_(1.0 if options.top_p is None else options.top_p)
        state.min_p.fill_(options.min_p or 0.0)
        state.penalty.fill_(options.repetition_penalty)

    def refresh(self) -> None:
        """Follow the rows' pages and factor sets."""
        for step in self._steps.values():
            self._refresh(step)

    def _refresh(self, step: DecodeStep) -> None:
        step.cache.refresh()
        step.state.rope_long.copy_(self.cache.rope_long.repeat_interleave(step.cache.width))

    def grow(self, num_pages: int) -> None:
        """More pages; the steps are captured anew."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        widths = list(self._steps)
        self._steps.clear()  # the graphs, before their cache moves
        self.cache.add_pages(num_pages)
        for width in widths:
            self.step(width)

    def capture_again(self) -> None:
        """Steps of the rows that the cache has by now."""
        self.key = (self.cache.num_rows, *self.key[1:])
        widths = list(self._steps)
        self._steps.clear()
        for width in widths:
            self.step(width)


def _take(model: Any, key: FeedKey, plain: bool) -> FeedParts | None:
    """The kept parts, where they serve."""
    kept = model.__dict__.pop(step_pool.FEED_ATTRIBUTE, step_pool.KeptStep()).step
    return kept if kept is not None and not plain and kept.key == key and kept.is_current else None


def _give(model: Any, parts: FeedParts) -> None:
    """Keep parts for the next generation, if their cache is small."""
    if parts.cache.nbytes <= step_pool.KEPT_BYTES and model.device.type == "cuda":
        model.__dict__[step_pool.FEED_ATTRIBUTE] = step_pool.KeptStep(parts)
