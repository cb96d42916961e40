"""One call from its JSON to its answers: checks, room in the queue, tokens, time limits, and the end."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator

from phi35.generation.decoding import DecodingOptions
from phi35.generation.requests import Emitted
from phi35.generation.stopping import stop_strings
from phi35.processor import Processor
from phi35.serving.engine import Engine, Job, Work
from phi35.serving.errors import ApiError, invalid, timed_out
from phi35.serving.grammar import GrammarCompiler, GrammarSpec, spec_of
from phi35.serving.metrics import Metrics, Stopwatch
from phi35.serving.prompts import Prompt, PromptBuilder
from phi35.serving.protocol import LARGEST_SEED, ChatRequest, CompletionRequest, Generation
from phi35.serving.settings import ServingSettings
from phi35.serving.text import AnswerText, Piece


@dataclasses.dataclass(frozen=True)
class Service:
    """What all calls share."""

    settings: ServingSettings
    engine: Engine
    processor: Processor
    prompts: PromptBuilder
    grammars: GrammarCompiler
    metrics: Metrics


class Call:
    """The answers of one call on their way; to be closed.

    Attributes:
        prompts: as they were read.
        answers: prompt after prompt, ``n`` of each.
    """

    def __init__(self, service: Service, request: Generation, job: Job, watch: Stopwatch) -> None:
        self.service, self.request, self.job = service, request, job
        self.prompts: list[Prompt] = []
        self.answers: list[AnswerText] = []
        self.deadline = time.monotonic() + service.settings.request_timeout
        self._watch = watch

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        prompt = sum(one.num_tokens for one in self.prompts)
        made = sum(answer.num_tokens for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    async def begin(self) -> None:
        """Read the prompts and let the answers be made.

        Raises:
            ApiError: for whatever is wrong with the call.
        """
        service, request = self.service, self.request
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                if isinstance(request, ChatRequest):
                    self.prompts = [await service.prompts.chat(request)]
                elif isinstance(request, CompletionRequest):
                    self.prompts = [await service.prompts.completion(one) for one in request.prompts()]
                spec = spec_of(request)
                if spec is not None:
                    await self._check_form(spec)
                works = []
                for prompt in self.prompts:
                    for number in range(request.n):
                        works.append(await self._work(prompt, number, spec))
        except TimeoutError:
            raise timed_out(service.settings.request_timeout) from None
        stops = stop_strings(request.stop)
        self.answers = [AnswerText(service.processor.tokenizer, stops) for _ in works]
        service.metrics.prompt_tokens.inc(sum(prompt.num_tokens for prompt in self.prompts))
        service.engine.submit(self.job, works)

    async def updates(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """New pieces by answer until all have ended; an empty list after a silence.

        Raises:
            ApiError: if the call fails or takes too long.
        """
        settings = self.service.settings
        while any(answer.finish_reason is None for answer in self.answers):
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise timed_out(settings.request_timeout)
            by_answer: dict[int, list[Emitted]] = {}
            for index, emitted in await self.job.events(min(left, settings.ping_seconds)):
                by_answer.setdefault(index, []).append(emitted)
            if by_answer:
                self._watch.tokens(sum(len(events) for events in by_answer.values()))
            yield [(index, self._piece(index, events)) for index, events in by_answer.items()]
        self._watch.finish(max(answer.num_tokens for answer in self.answers))

    def _piece(self, index: int, events: list[Emitted]) -> Piece:
        last = events[-1]
        if last.finish_reason is not None:
            self.service.metrics.ends.labels(last.finish_reason).inc()
        if last.finish_reason == "error":
            raise invalid(last.error or "the answer's form could not be kept", code="form_not_kept")
        return self.answers[index].feed(events)

    async def _check_form(self, spec: GrammarSpec) -> None:
        limit = self.service.settings.max_grammar_bytes
        if len(spec.text.encode()) > limit:
            raise invalid(f"the schema or grammar is larger than {limit} bytes", code="grammar_too_large")

    async def _work(self, prompt: Prompt, number: int, spec: GrammarSpec | None) -> Work:
        request = self.request
        options = request.decoding_options() | {"max_new_tokens": self._new_tokens(prompt)}
        if request.seed is not None:
            options["seed"] = min(request.seed + number, LARGEST_SEED)
        vocab = self.service.processor.config.vocab_size
        checked = DecodingOptions(**{**options, "stop": stop_strings(options["stop"])})
        problems = checked.all_problems(1, vocab)
        if problems:
            raise invalid("; ".join(problems))
        constraint = None
        if spec is not None:
            constraint = await self.service.prompts.run(self.service.grammars.constraint, spec)
        if isinstance(request, ChatRequest):
            alternatives = request.top_logprobs or 0
        else:
            alternatives = getattr(request, "logprobs", None) or 0
        return Work(inputs=prompt.inputs, options=options, constraint=constraint, num_alternatives=alternatives)

    def _new_tokens(self, prompt: Prompt) -> int:
        """How many tokens an answer may have."""
        longest = self.service.engine.batcher.max_length
        room, wanted = longest - prompt.num_tokens, self.request.output_tokens()
        if room < 1 or (wanted is not None and wanted > room):
            asked = "" if wanted is None else f" and {wanted} new ones were asked for"
            raise invalid(
                f"a request holds at most {longest} tokens; the prompt has {prompt.num_tokens}{asked}: shorten one",
                "messages" if isinstance(self.request, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        limit = self.service.settings.max_output_tokens or longest
        if wanted is not None and wanted > limit:
            raise invalid(f"max_tokens may be at most {limit} here, got {wanted}", "max_tokens")
        return min(room, limit) if wanted is None else wanted

    def close(self) -> None:
        """Cancel what has not ended."""
        if self.job.num_open and self.answers:
            self.service.metrics.ends.labels("cancelled").inc(self.job.num_open)
        self.job.close()


async def open_call(service: Service, request: Generation) -> Call:
    """A call whose answers are being made.

    Raises:
        ApiError: if it is refused.
    """
    settings = service.settings
    if request.model != settings.model_name:
        raise ApiError(
            404,
            f"the model {request.model!r} does not exist; this server has {settings.model_name!r}",
            "model_not_found",
            "model",
        )
    count = request.n * (len(request.prompts()) if isinstance(request, CompletionRequest) else 1)
    if count > settings.max_choices:
        raise invalid(f"a call may ask for {settings.max_choices} answers, got {count}", "n")
    watch = Stopwatch(service.metrics)
    call = Call(service, request, service.engine.admit(count), watch)
    try:
        await call.begin()
    except BaseException:
        call.close()
        raise
    return call
