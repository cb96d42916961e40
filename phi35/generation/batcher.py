"""Continuous batching: requests join and leave a running batch over a paged cache.

Every request gets the text it would get alone. A step serves all running requests; prompts are read in chunks between
steps, first come first served. A request that crosses to LongRoPE's long factors goes back to reading its whole ids,
and so does the youngest one when pages run out. On CUDA steps come from graphs of 1, 2, 4, ... rows over one state,
queued ahead of the host; elsewhere from the plain operations.
"""

import collections
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch

from phi35.generation.choices import MAX_ALTERNATIVES, alternatives, choose_on_host
from phi35.generation.constraints import ConstraintError, TokenConstraint
from phi35.generation.decoding import Decoding
from phi35.generation.fast_prefill import Prompt, PromptPass, Segment
from phi35.generation.fast_step import DecodeStep, any_waits_for_host, limit
from phi35.generation.request_state import RequestState
from phi35.generation.requests import Emitted, Queued, Request
from phi35.generation.rows import crosses, finish_reason, rope_length
from phi35.image_cache import ImageFeatureCache
from phi35.kernels.operands import StepState
from phi35.paged_cache import PAGE_SIZE, PagedCache, PagedRows
from phi35.prefix_cache import PageKeys, PrefixStatistics
from phi35.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

AHEAD = 2
"""Steps queued beyond the one that is waited for."""


class Batcher:
    """Serves requests, a step at a time; not thread-safe.

    Args:
        model: a ``phi35.model.CausalLM``, put into evaluation mode.
        max_rows: most requests that run at a time.
        max_tokens: tokens that the cache holds for all of them.
        max_length: most tokens of one request; None takes as many as cache and model allow.
        chunk_size: most prompt tokens that are read between two steps.
        tokenizer: needed by stop strings alone.
        mode: "graphs", "kernels" (without graphs) or "plain"; None takes graphs where the model and its device can.
        prefix_caching: keep full pages when requests end, and let those that begin alike use them (the weights must
            stay as they are, or ``cache.forget()`` be called). Pictures count by content, so that a vision model
            without an ``image_feature_cache`` is given one.
        kv_cache_dtype: "int8" or "fp8" holds all requests' keys and values in eight bits; None in the model's dtype.

    Raises:
        ValueError: for sizes below 1, an unknown ``kv_cache_dtype``, or "graphs" where they cannot be had.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_rows: int = 32,
        max_tokens: int = 65536,
        max_length: int | None = None,
        chunk_size: int = 2048,
        tokenizer: Tokenizer | None = None,
        mode: str | None = None,
        prefix_caching: bool = True,
        kv_cache_dtype: str | None = None,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens), ("chunk_size", chunk_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        self.model, self.config, self.tokenizer = model.eval(), model.config, tokenizer
        num_pages = -(-max_tokens // PAGE_SIZE)
        longest = min(self.config.max_position_embeddings, num_pages * PAGE_SIZE)
        self.max_length = longest if max_length is None else min(max_length, longest)
        self.chunk_size, self.mode = chunk_size, self._mode(mode, kv_cache_dtype)
        device, vocab = model.device, self.config.vocab_size
        pages = (max_rows, num_pages + 1, self.max_length)
        self.cache = PagedCache(self.config, *pages, device, model.dtype, kv_cache_dtype)
        state = StepState.new(max_rows, vocab, device)
        self.state = dataclasses.replace(state, lengths=self.cache.lengths, rope_long=self.cache.rope_long)
        self._requests = RequestState(self.state)
        self._steps: dict[int, DecodeStep] = {}
        self._slots: list[Request | None] = [None] * max_rows
        self._waiting: collections.deque[Request] = collections.deque()
        self._reading: list[Request] = []
        self._queue: collections.deque[Queued] = collections.deque()
        self._ready: list[Emitted] = []
        self._count = 0
        self.prefix_caching = prefix_caching
        if prefix_caching and self.config.vision is not None and model.image_feature_cache is None:
            model.image_feature_cache = ImageFeatureCache()

    @property
    def prefix_statistics(self) -> PrefixStatistics:
        """How many of the prompts' tokens had their keys in the cache already."""
        return self.cache.index.statistics

    @property
    def max_rows(self) -> int:
        """Most requests that run at a time."""
        return len(self._slots)

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Requests that are read or run."""
        return sum(request is not None for request in self._slots)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.num_waiting or self.num_active or self._queue or self._ready)

    def submit(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        *,
        constraint: TokenConstraint | None = None,
        num_alternatives: int = 0,
        **options: Any,
    ) -> int:
        """Add a request.

        Args:
            input_ids: (T,) or (1, T) int64 without padding.
            pixel_values: (C, 3, S, S) crops of its images.
            image_sizes: (N, 2).
            constraint: says which tokens may come next, a new one for each request. While constrained requests run,
                steps are not queued ahead: each needs its last token.
            num_alternatives: how many of the most likely tokens to tell beside each token, up to 20.
            **options: fields of ``DecodingOptions``.

        Returns:
            The request's number, by which ``step`` names its tokens.

        Raises:
            ValueError: for bad arguments, or a prompt that the cache cannot hold.
        """
        whole = isinstance(num_alternatives, int) and not isinstance(num_alternatives, bool)
        if not whole or not 0 <= num_alternatives <= MAX_ALTERNATIVES:
            raise ValueError(f"num_alternatives must lie in 0..{MAX_ALTERNATIVES}, got {num_alternatives!r}")
        ids = input_ids[None] if isinstance(input_ids, torch.Tensor) and input_ids.dim() == 1 else input_ids
        if options.get("kv_cache_dtype") is not None:
            raise ValueError("kv_cache_dtype belongs to the batcher, whose requests share one cache: give it there")
        checked = Decoding(self.model, ids, None, pixel_values, image_sizes, tokenizer=self.tokenizer, **options)
        if checked.options.speculates:
            raise ValueError("the batcher drafts no tokens: leave out speculation= and draft_model=")
        if len(checked.rows) != 1:
            raise ValueError(f"submit takes one prompt at a time, got {len(checked.rows)} rows")
        row = checked.rows[0]
        if row.prompt_length >= self.max_length:
            raise ValueError(
                f"the prompt has {row.prompt_length} tokens and a request of this batcher at most {self.max_length}: "
                "shorten it, or give the batcher a larger max_tokens or max_length"
            )
        request = Request(
            self._count,
            row,
            checked.options,
            checked.stop_ids,
            constraint=constraint,
            num_alternatives=num_alternatives,
            images=tuple(checked.image_digests),
        )
        self._count += 1
        self._waiting.append(request)
        return request.number

    def cancel(self, number: int) -> bool:
        """End a request; False if it has ended before or never was."""
        for request in [*self._waiting, *(one for one in self._slots if one is not None)]:
            if request.number == number:
                self._ready.append(Emitted(number, -1, 0.0, "cancelled"))
                self._end(request, "cancelled")
                return True
        return False

    @torch.no_grad()
    def step(self) -> list[Emitted]:
        """Read some of the prompts, take a step, and return the tokens that are there by now."""
        self._admit()
        worked = self._read()
        worked = self._advance() or worked
        while self._queue and not self._ready and (len(self._queue) > AHEAD or not worked):
            self._collect()
        emitted, self._ready = self._ready, []
        return emitted

    def run(self) -> Iterator[Emitted]:
        """Step until there is nothing left to do."""
        while not self.idle:
            yield from self.step()

    def _admit(self) -> None:
        """Give free rows to those that wait, as long as there are pages for their ids and one more."""
        while self._waiting and None in self._slots:
            request = self._waiting[0]
            wanted = -(-(len(request.row.ids) + 1) // PAGE_SIZE)
            if self.prefix_caching:
                wanted -= self.cache.num_shared(self._choose_factors(request))
            if wanted > self.cache.num_free and self.num_active:
                return
            slot = self._slots.index(None)
            self._slots[slot] = self._waiting.popleft()
            request.slot, request.num_read = slot, 0
            self._reading.append(request)

    def _read(self) -> bool:
        """Read one chunk of the prompts that are on the way; those that end with it begin to run."""
        for request in self._running():
            if crosses(request.row, self.config, request.pending) and not request.pending:
                self._read_again(request)
        chunk: list[Segment] = []
        prompts: list[Prompt] = []
        readers: list[Request] = []
        room = self.chunk_size
        while self._reading and room:
            request = self._reading[0]
            if request.num_read == 0:
                self._begin_reading(request)
            part = min(room, len(request.row.ids) - request.num_read)
            # A request whose part is in the chunk already must not be sent back for the sake of another.
            assert request.slot is not None
            end = request.num_read + part
            if not (self.cache.reserve(request.slot, end) if chunk else self._make_room(request, end)):
                break
            whole = request.num_read + part == len(request.row.ids)
            chunk.append(Segment(len(prompts), request.num_read, part, whole))
            prompts.append(Prompt(request.row.ids, request.row.embeds, request.slot, request.row.rope_long))
            readers.append(request)
            request.num_read, room = request.num_read + part, room - part
            if whole:
                self._reading.pop(0)
        if not chunk:
            return False
        work = PromptPass(self.model, self.cache, prompts, self.mode == "plain")
        hidden = work.run(chunk)
        self.prefix_statistics.prompt_tokens += len(hidden)
        for request in readers:
            self._register(request)
        ends = torch.tensor([segment.length for segment in chunk]).cumsum(0).tolist()
        done = [place for place, segment in enumerate(chunk) if segment.last]
        if done:
            self._begin([readers[place] for place in done], work.logits(hidden[[ends[place] - 1 for place in done]]))
        return True

    def _choose_factors(self, request: Request) -> list[bytes]:
        """Decide the LongRoPE factors under which a request is read next; the keys of its ids' full pages.

        The last id is always read, whose logits are wanted.
        """
        row = request.row
        row.rope_long = self.config.rope_scaling is not None and (
            rope_length(row, self.config, request.options) > self.config.original_max_position_embeddings
        )
        if not self.prefix_caching or (row.embeds is not None and not request.images):
            return []  # pictures of unknown content are nobody else's
        if request.page_keys is None or request.page_keys.use_long != row.rope_long:
            image_id = None if self.config.vision is None else self.config.vision.image_token_id
            request.page_keys = PageKeys(PAGE_SIZE, row.rope_long, request.images, image_id)
        return request.page_keys.first(row.ids, (len(row.ids) - 1) // PAGE_SIZE)

    def _begin_reading(self, request: Request) -> None:
        """Choose a request's factors and take what other requests have read of its ids."""
        assert request.slot is not None
        keys = self._choose_factors(request)
        if self.prefix_caching and not self.cache.num_owned(request.slot):
            request.num_read = PAGE_SIZE * self.cache.adopt(request.slot, keys)
            self.prefix_statistics.prompt_tokens += request.num_read
            self.prefix_statistics.hit_tokens += request.num_read

    def _register(self, request: Request) -> None:
        """Let others find the full pages of a request."""
        if self.prefix_caching and request.slot is not None and request.page_keys is not None:
            count = request.num_cached // PAGE_SIZE
            self.cache.register(request.slot, request.page_keys.first(request.row.ids, count))

    def _begin(self, requests: list[Request], logits: torch.Tensor) -> None:
        """Choose the first tokens after prompts that have been read, and let steps serve them."""
        able = [self._constrained(request) for request in requests]
        if not all(able):
            requests = [request for request, one in zip(requests, able, strict=True) if one]
            logits = logits[torch.tensor(able, device=logits.device)]
        if not requests:
            return
        slots = [request.slot for request in requests if request.slot is not None]
        for request, slot in zip(requests, slots, strict=True):
            self.cache.set_stepped(slot, True)
            request.running = True
        tokens = choose_on_host(requests, logits) if self.mode == "plain" else None
        apart = self._requests.enter(requests, slots, logits, tokens)
        self._note(requests, slots, apart, tokens, logits)

    def _advance(self) -> bool:
        """Queue one step for the running requests that want one."""
        wanting = []
        running = self._running()
        if any(request.constraint is not None and request.pending for request in running):
            while self._queue:
                self._collect()
        for request in running:
            if not request.running:
                continue  # sent back to make room for an older one
            ended = request.length - request.row.prompt_length >= request.options.max_new_tokens
            if ended or request.length >= self.max_length or crosses(request.row, self.config, request.pending):
                continue
            if self._make_room(request, request.length):
                wanting.append(request)
        wanting = [request for request in wanting if request.running and self._constrained(request)]
        if not wanting:
            return False
        slots = [request.slot for request in wanting if request.slot is not None]
        step = self._step(max(slots) + 1)
        tokens = None
        if self.mode == "plain":
            step.cache.columns = -(-max(request.length for request in wanting) // PAGE_SIZE)
            step.run_layers()
            tokens = choose_on_host(wanting, step.logits[slots])
            self._requests.advance(slots, tokens)
        else:
            self._requests.draw(wanting, slots)
            self._requests.constrain(wanting, slots)
            step.run()
        self._note(wanting, slots, self.state, tokens, step.logits)
        return True

    def _constrained(self, request: Request) -> bool:
        """Ask a request's constraint, if it has one, what may come next; False if that ends the request."""
        if request.constraint is None:
            return True
        try:
            request.mask = request.constraint.allowed()
        except ConstraintError as error:
            self._fail(request, error)
            return False
        return True

    def _note(
        self,
        requests: list[Request],
        slots: list[int],
        state: StepState,
        tokens: list[tuple[int, float]] | None,
        logits: torch.Tensor,
    ) -> None:
        """Remember what was given to the device, which chooses from the rows of ``logits`` in the state's places."""
        places = list(range(len(slots))) if state is not self.state else slots
        others = None
        if any(request.num_alternatives for request in requests):
            others = alternatives(requests, logits[places])
        event = None
        if self.model.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        ring = state.history.shape[0]
        marks = [(one.length - one.row.prompt_length) % ring for one in requests]
        self._queue.append(Queued(list(zip(requests, marks, places, strict=True)), state, event, tokens, others))
        for request in requests:
            request.pending += 1
        if tokens is not None:
            # The next choice counts these tokens in the repetition penalty.
            self._collect()

    def _collect(self) -> None:
        """Wait for the oldest queued step and hand its tokens out."""
        queued = self._queue.popleft()
        if queued.event is not None:
            queued.event.synchronize()
        for number, (request, mark, place) in enumerate(queued.rows):
            request.pending -= 1
            if request.finished is not None:
                continue
            if queued.tokens is not None:
                token, logprob = queued.tokens[number]
            else:
                token = int(queued.state.history[mark, place])
                logprob = float(queued.state.logprobs[mark, place])
            others: tuple[tuple[int, float], ...] = ()
            if queued.alternatives is not None:
                others = queued.alternatives.of(number, request.num_alternatives)
            self._take(request, token, logprob, others)

    def _take(self, request: Request, token: int, logprob: float, others: tuple[tuple[int, float], ...]) -> None:
        """Add a token to its request, and see whether it ends there."""
        row = request.row
        row.ids.append(token)
        row.seen.add(token)
        reason = finish_reason(row, request.options, request.stop_ids, self.max_length)
        error = None
        if request.constraint is not None and reason is None:
            try:
                reason = "stop" if request.constraint.advance(token) else None
            except ConstraintError as problem:
                reason, error = "error", str(problem)
        self._ready.append(Emitted(request.number, token, logprob, reason, others, error))
        if reason is not None:
            self._end(request, reason)

    def _fail(self, request: Request, error: ConstraintError) -> None:
        self._ready.append(Emitted(request.number, -1, 0.0, "error", error=str(error)))
        self._end(request, "error")

    def _make_room(self, request: Request, num_slots: int) -> bool:
        """Pages for a request, if need be those of younger ones; False if it was sent back to wait itself."""
        assert request.slot is not None
        while not self.cache.reserve(request.slot, num_slots):
            # What has been queued may end requests, and the youngest needs all of its ids to begin again.
            while self._queue:
                self._collect()
            if request.finished is not None or request.slot is None:
                return False
            if self.cache.reserve(request.slot, num_slots):
                return True
            youngest = max((one for one in self._slots if one is not None), key=lambda one: one.number)
            self._send_back(youngest)
            if youngest is request:
                return False
        return True

    def _send_back(self, request: Request) -> None:
        """Take a request's pages; it waits, first in the line, and its ids will be read again."""
        self._leave(request)
        self._waiting.appendleft(request)

    def _read_again(self, request: Request) -> None:
        """A running request whose keys are to be computed anew; others may go on using its pages."""
        assert request.slot is not None
        self._register(request)
        self.cache.release(request.slot)
        request.running, request.num_read = False, 0
        # Behind one that has been read in part, which would wait for it otherwise.
        begun = bool(self._reading) and self._reading[0].num_read > 0
        self._reading.insert(int(begun), request)

    def _end(self, request: Request, reason: str) -> None:
        request.finished = reason
        if request in self._waiting:
            self._waiting.remove(request)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        if request in self._reading:
            self._reading.remove(request)
        if request.slot is not None:
            self._register(request)
            self.cache.release(request.slot)
            self._slots[request.slot] = None
        request.slot, request.running, request.num_read = None, False, 0

    def _running(self) -> list[Request]:
        """Running requests, the oldest first."""
        running = [request for request in self._slots if request is not None and request.running]
        return sorted(running, key=lambda request: request.number)

    def _step(self, num_rows: int) -> DecodeStep:
        """The step of the smallest power of two rows that holds so many."""
        count = min(1 << (num_rows - 1).bit_length(), len(self._slots))
        if count not in self._steps:
            step = DecodeStep(
                self.model,
                PagedRows(self.cache, count),
                plain=self.mode == "plain",
                state=self.state.first(count),
            )
            if self.mode == "graphs":
                step.capture()
            self._steps[count] = step
        return self._steps[count]

    def _mode(self, mode: str | None, kv_cache_dtype: str | None) -> str:
        if mode not in (None, "graphs", "kernels", "plain"):
            raise ValueError(f"mode must be 'graphs', 'kernels', 'plain' or None, got {mode!r}")
        if self.model.spread is not None:
            raise ValueError("the batcher needs a model on one device, and this one's parts are spread over several")
        reason = limit(self.model, kv_cache_dtype) if mode in (None, "graphs") else None
        if reason is None and any_waits_for_host(self.model):
            if mode == "graphs":
                reason = "its experts lie in host memory"
            mode = mode or "kernels"
        if mode == "graphs" and reason is not None:
            raise ValueError(f"mode='graphs', but the model's step cannot be captured: {reason}")
        if mode is None and reason is not None and self.model.device.type == "cuda":
            logger.info("batching without CUDA graphs: %s", reason)
        return mode or ("plain" if reason is not None else "graphs")
