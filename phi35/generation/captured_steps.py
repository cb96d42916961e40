"""Steps of a generation from a CUDA graph, queued ahead of the host.

All rows step together; a row that has ended is computed on until the batch is halved, and what it gives is dropped. The
host reads the tokens of a step some steps after it has queued it, so that neither waits for the other; what was queued
beyond an end is dropped too. The graph is left where a row crosses to LongRoPE's long factors (its ids run again, and
the others take their step), where the cache must grow, and where half of the rows have ended.
"""

import collections
import dataclasses
import functools
import logging
from typing import Any

import torch

from phi35.generation import step_pool
from phi35.generation.fast_prefill import Prompt, prefill, to_device
from phi35.generation.fast_step import CannotCaptureError, DecodeStep, any_waits_for_host, limit
from phi35.generation.plain_steps import PlainSteps
from phi35.generation.rows import Row, crosses, rope_length

logger = logging.getLogger(__name__)

AHEAD = 4
"""Steps queued beyond the one that is waited for."""
FIRST_TOKENS = 1024
"""New tokens that the cache has room for at first."""
DRAWN_AT_ONCE = 128
"""Uniform numbers that are drawn for a row at a time; the state's ring holds twice as many."""
WORTH_A_CAPTURE = 64
"""Steps that must be left for a smaller batch to be captured."""


@dataclasses.dataclass
class Queued:
    """A step that the device will have taken.

    Attributes:
        places: where the rows' tokens stand, in the order of the unfinished rows.
        slot: row of the histories.
        event: recorded behind the step; None where there is nothing to wait for.
        tokens: the tokens, once read.
        logprobs: their log-probabilities, once read.
    """

    places: list[int]
    slot: int
    event: torch.cuda.Event | None
    tokens: list[int] | None = None
    logprobs: list[float] = dataclasses.field(default_factory=list)


def steps_for(model: Any, options: Any, rows: list[Row]) -> "PlainSteps | CapturedSteps":
    """The steps that serve a model: captured where it and its device can.

    Raises:
        ValueError: if ``options.fast`` asks for a graph and the model cannot be captured.
    """
    if options.fast is False:
        return PlainSteps(model, options, rows)
    reason = limit(model, options.kv_cache_dtype)
    graph = not any_waits_for_host(model)
    if reason is None and options.fast and not graph:
        reason = "its experts lie in host memory"
    elif reason is None:
        return CapturedSteps(model, options, rows, graph=graph)
    if options.fast:
        raise ValueError(no_graph(reason))
    if model.device.type == "cuda":
        _say_once(reason)
    return PlainSteps(model, options, rows)


def no_graph(reason: str) -> str:
    """What a call with ``fast=True`` is told."""
    return f"fast=True, but the model's step cannot be captured in a CUDA graph: {reason}"


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("decoding without a CUDA graph, which is several times slower: %s", reason)


class CapturedSteps:
    """One token for each unfinished row at a time.

    Args:
        model: a ``phi35.model.CausalLM``.
        options: of the generation.
        rows: all rows.
        plain: torch's operations and no graph, on any device; greedy choice alone.
        graph: capture the step; else its kernels are launched one by one, and none is queued ahead.

    Raises:
        ValueError: if ``options.fast`` asks for a graph and a module of the model waits for the device.
    """

    def __init__(self, model: Any, options: Any, rows: list[Row], plain: bool = False, graph: bool = True) -> None:
        self.model, self.config, self.options, self.plain = model, model.config, options, plain
        self._graph, self._ahead = graph and not plain, AHEAD if graph else 0
        self._rows, self._places = list(rows), list(range(len(rows)))
        self._made, self._drawn = 0, 0
        self._queue: collections.deque[Queued] = collections.deque()
        capacity, kind = self._capacity(FIRST_TOKENS), options.kv_cache_dtype
        self.step = step_pool.take(model, len(rows), capacity, plain, kind)
        if options.fast:
            self._capture()
        self._set_up()

    def next(self) -> list[int]:
        """The next token of each unfinished row; their log-probabilities are added to the rows where asked for."""
        first = self._made == 0
        while len(self._queue) <= self._ahead and self._queue_one():
            if first and self._lacks_graph:
                break  # the first tokens do not wait for the capture
        queued = self._queue.popleft()
        tokens, logprobs = self._read(queued)
        if self.options.return_logprobs:
            for row, logprob in zip(self._rows, logprobs, strict=True):
                row.logprobs.append(logprob)
        return tokens

    def keep(self, places: list[int]) -> None:
        """Go on with these of the rows."""
        for queued in self._queue:
            self._read(queued)
            assert queued.tokens is not None
            queued.tokens = [queued.tokens[place] for place in places]
            queued.logprobs = [queued.logprobs[place] for place in places]
        self._rows = [self._rows[place] for place in places]
        self._places = [self._places[place] for place in places]
        if not places:
            self._queue.clear()
            step_pool.give(self.model, self.step)
        elif 2 * len(places) <= self.step.cache.batch_size and self._left() > WORTH_A_CAPTURE:
            self._shrink()

    def _queue_one(self) -> bool:
        """Queue one more step; False where there is none to take, or none before the queued ones are read."""
        if self._made == 0:
            self._first()
            return True
        if self._left() <= 0:
            return False
        ahead = len(self._queue)
        crossing = [place for place, row in enumerate(self._rows) if crosses(row, self.config, ahead)]
        full = max(len(row.ids) for row in self._rows) + ahead > self.step.cache.capacity
        if (crossing or full) and ahead:
            return False
        if full:
            self._grow()
        self._draw()
        if crossing:
            self._cross(crossing)
        else:
            self._capture()
            self.step.run()
            self._note()
        return True

    @property
    def _lacks_graph(self) -> bool:
        return self._graph and not self.step.is_captured

    def _capture(self) -> None:
        """Capture the step if it is not yet; where that cannot be, its kernels are launched one by one from here on."""
        if not self._lacks_graph:
            return
        try:
            self.step.capture()
        except CannotCaptureError as error:
            if self.options.fast:
                raise ValueError(no_graph(str(error))) from error
            _say_once(str(error))
            self._graph, self._ahead = False, 0

    def _left(self) -> int:
        """Steps that some row still needs, beyond those queued."""
        ahead = len(self._queue)
        room = max(self.config.max_position_embeddings - len(row.ids) for row in self._rows) - ahead
        return min(self.options.max_new_tokens - self._made, room)

    def _first(self) -> None:
        """Run the prompts and choose the first tokens."""
        self._draw()
        self._prompts(range(len(self._rows)), self.step.logits)
        self.step.choose()
        self._note()

    def _prompts(self, numbers: "range | list[int]", logits: torch.Tensor) -> None:
        """Run the whole ids of some rows into their places; logits (n, V) are written."""
        prompts = []
        for number in numbers:
            row = self._rows[number]
            row.rope_long = self.config.rope_scaling is not None and (
                rope_length(row, self.config, self.options) > self.config.original_max_position_embeddings
            )
            prompts.append(Prompt(row.ids, row.embeds, self._places[number], row.rope_long))
        cache, device = self.step.cache, self.model.device
        table = torch.tensor([[prompt.place, len(prompt.ids), prompt.use_long] for prompt in prompts]).T
        places, lengths, use_long = to_device(table, device).unbind()
        logits.copy_(prefill(self.model, cache, prompts, self.options.prefill_chunk_size, self.plain))
        cache.lengths[places] = lengths.to(cache.lengths.dtype)
        cache.rope_long[places] = use_long.to(cache.rope_long.dtype)

    def _cross(self, crossing: list[int]) -> None:
        """A step in which some rows change over to the long factors; nothing is queued."""
        places = torch.tensor([self._places[number] for number in crossing], device=self.model.device)
        state = self.step.state
        apart = state.select(places)
        if len(crossing) < len(self._rows):
            # The crossing rows take part and what they leave is overwritten.
            self.step.run()
        else:
            state.steps.add_(1)
        logits = self.step.logits.new_empty(len(crossing), self.config.vocab_size)
        self._prompts(crossing, logits)
        self.step.operations.choose(logits, apart)
        apart.lengths.copy_(state.lengths[places])
        apart.rope_long.copy_(state.rope_long[places])
        state.write(places, apart)
        self._synchronise()
        queued = self._note()
        self._read(queued)
        assert queued.tokens is not None
        slot = queued.slot % apart.history.shape[0]
        for number, token, logprob in zip(crossing, apart.history[slot], apart.logprobs[slot], strict=True):
            queued.tokens[number], queued.logprobs[number] = int(token), float(logprob)

    def _note(self) -> Queued:
        """Remember the step that was just given to the device."""
        event = None
        if self.model.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        queued = Queued(self._places, self._made % self.step.state.history.shape[0], event)
        self._made += 1
        self._queue.append(queued)
        return queued

    def _read(self, queued: Queued) -> tuple[list[int], list[float]]:
        """Wait for a step and read what it chose."""
        if queued.tokens is None:
            if queued.event is not None:
                queued.event.synchronize()
            state = self.step.state
            queued.tokens = state.history[queued.slot][queued.places].tolist()
            queued.logprobs = state.logprobs[queued.slot][queued.places].tolist()
        return queued.tokens, queued.logprobs

    def _set_up(self) -> None:
        """The state of a new generation."""
        state, options, vocab = self.step.state, self.options, self.config.vocab_size
        state.steps.zero_()
        for name, value in (
            ("temperature", options.temperature),
            ("top_k", vocab if options.top_k is None else min(options.top_k, vocab)),
            ("top_p", 1.0 if options.top_p is None else options.top_p),
            ("min_p", options.min_p or 0.0),
            ("penalty", options.repetition_penalty),
        ):
            getattr(state, name).fill_(value)
        state.seen.zero_()
        if options.repetition_penalty != 1:
            for place, row in zip(self._places, self._rows, strict=True):
                state.seen[place, torch.tensor(sorted(row.seen), dtype=torch.int64, device=state.seen.device)] = 1

    def _draw(self) -> None:
        """Make sure of the next step's uniform numbers."""
        if self.options.temperature == 0 or self._made < self._drawn:
            return
        draws = self.step.state.draws
        block = torch.zeros(DRAWN_AT_ONCE, draws.shape[1], dtype=draws.dtype)
        for place, row in zip(self._places, self._rows, strict=True):
            block[:, place] = torch.rand(DRAWN_AT_ONCE, generator=row.generator, dtype=draws.dtype)
        start = self._drawn % draws.shape[0]
        draws[start : start + DRAWN_AT_ONCE] = block.to(draws.device)
        self._drawn += DRAWN_AT_ONCE

    def _capacity(self, new_tokens: int) -> int:
        """Slots for the longest row and so many new tokens, or for all that will come where that is less."""
        longest = max(len(row.ids) for row in self._rows)
        end = max(row.prompt_length for row in self._rows) + self.options.max_new_tokens
        wanted = end if self.options.preallocate else min(end, -(-(longest + new_tokens) // 256) * 256)
        return min(wanted, self.config.max_position_embeddings)

    def _grow(self) -> None:
        """Make room for twice as many tokens; nothing is queued."""
        state, cache = self.step.state, self.step.cache
        self._synchronise()
        del self.step  # the graph, before its cache moves
        cache.resize(self._capacity(max(FIRST_TOKENS, cache.capacity)))
        self.step = DecodeStep(self.model, cache, plain=self.plain, state=state)

    def _shrink(self) -> None:
        """Go on with the unfinished rows alone; what is queued has been read."""
        places = torch.tensor(self._places, device=self.model.device)
        cache, state = self.step.cache.select_rows(places), self.step.state.select(places)
        del self.step
        self.step = DecodeStep(self.model, cache, plain=self.plain, state=state)
        self._places = list(range(len(self._rows)))

    def _synchronise(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
