"""The batcher in a thread of its own, and the event loop's side of it.

The thread owns the batcher: it takes requests and cancellations between steps and hands out tokens, one call into the
event loop for all of a step. Requests that do not fit yet wait here, where they hold no memory of the device.
"""

import asyncio
import collections
import dataclasses
import logging
import threading
from typing import Any

import torch

from phi35.generation.batcher import Batcher
from phi35.generation.constraints import TokenConstraint
from phi35.generation.requests import Emitted
from phi35.serving.errors import ApiError, invalid, too_busy, unavailable

logger = logging.getLogger(__name__)

CLOSING = "the server is stopping"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One answer to be made.

    Attributes:
        inputs: ``input_ids`` (T,) int64, and with pictures ``pixel_values`` and ``image_sizes``.
        options: fields of ``DecodingOptions``.
        constraint: of the answer's form.
        num_alternatives: most likely tokens to tell beside each token.
    """

    inputs: dict[str, torch.Tensor]
    options: dict[str, Any]
    constraint: TokenConstraint | None = None
    num_alternatives: int = 0


class Job:
    """The answers of one call, and the tokens that have come for them; lives in the event loop.

    Args:
        engine: that made it.
        count: answers.
    """

    def __init__(self, engine: "Engine", count: int) -> None:
        self.engine, self.num_open = engine, count
        self._events: list[tuple[int, Emitted]] = []
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    async def events(self, timeout: float) -> list[tuple[int, Emitted]]:
        """Tokens since the last time, with the number of their answer; empty after so many seconds without one.

        Raises:
            ApiError: if the engine refused the call or failed.
        """
        if not self._events and self._error is None:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        if self._error is not None:
            raise self._error
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Cancel what has not ended, and make room for others."""
        if not self._closed:
            self._closed = True
            self.engine.release(self)

    def deliver(self, index: int, emitted: Emitted) -> None:
        """Take a token."""
        if emitted.finish_reason is not None:
            self.num_open -= 1
        self._events.append((index, emitted))
        self._wake()

    def fail(self, error: ApiError) -> None:
        """End with an error."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclasses.dataclass(eq=False)
class _Entry:
    job: Job
    index: int
    work: Work
    number: int | None = None


class Engine:
    """Serves jobs from a batcher.

    Args:
        batcher: not used by anyone else.
        max_waiting: most answers that wait for a row.
    """

    def __init__(self, batcher: Batcher, max_waiting: int) -> None:
        self.batcher, self.max_waiting = batcher, max_waiting
        self.max_rows = batcher.max_rows
        self.num_admitted = 0
        self.failure: str | None = None
        self.draining = False
        self._jobs: dict[Job, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # Shared between the sides, under the condition:
        self._waiting: collections.deque[_Entry] = collections.deque()
        self._leaving: set[Job] = set()
        self._stopped = False
        # The thread's own:
        self._entries: dict[int, _Entry] = {}

    @property
    def num_running(self) -> int:
        """Answers that have a row."""
        return self.batcher.num_active

    @property
    def num_waiting(self) -> int:
        """Answers that wait for one."""
        return len(self._waiting) + self.batcher.num_waiting

    def start(self) -> None:
        """Begin to serve; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._serve, name="phi35-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread; what still runs is cancelled."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def admit(self, count: int) -> Job:
        """Room for a call of so many answers; to be closed.

        Raises:
            ApiError: 429 if too many wait, 503 if the server stops or the engine has failed.
        """
        if self.failure is not None:
            raise unavailable(f"the engine has failed ({self.failure}): the server must be started again")
        if self.draining:
            raise unavailable(CLOSING)
        if self.num_admitted + count > self.max_rows + self.max_waiting:
            raise too_busy(
                f"{self.num_admitted} answers run or wait and at most {self.max_rows + self.max_waiting} may: try again"
            )
        self.num_admitted += count
        job = Job(self, count)
        self._jobs[job] = count
        return job

    def submit(self, job: Job, works: list[Work]) -> None:
        """Let a job's answers be made."""
        with self._changed:
            self._waiting += [_Entry(job, index, work) for index, work in enumerate(works)]
            self._changed.notify()

    def release(self, job: Job) -> None:
        """Forget a job; what has not ended is cancelled."""
        self.num_admitted -= self._jobs.pop(job)
        if job.num_open:
            with self._changed:
                self._leaving.add(job)
                self._changed.notify()

    def drain(self, seconds: float) -> None:
        """Refuse new calls, and end those that still run after so many seconds."""
        self.draining = True
        asyncio.get_running_loop().call_later(seconds, self._fail_jobs, unavailable(CLOSING))

    def _fail_jobs(self, error: ApiError) -> None:
        for job in list(self._jobs):
            job.fail(error)

    def _serve(self) -> None:
        try:
            if self.batcher.model.device.type == "cuda":
                torch.cuda.set_device(self.batcher.model.device)
            while self._wait():
                self._leave()
                self._enter()
                self._hand_out(self.batcher.step())
        except Exception as error:  # whatever it is, callers must hear of it, and /health tell it
            logger.exception("the engine has failed")
            self.failure = f"{type(error).__name__}: {error}"
            self._in_loop(self._fail_jobs, ApiError(500, f"the engine has failed: {self.failure}", "engine_failed"))

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False at the end."""
        with self._changed:
            while not self._stopped and self.batcher.idle and not self._waiting and not self._leaving:
                self._changed.wait()
            return not self._stopped

    def _leave(self) -> None:
        """Cancel the answers of jobs that have been closed."""
        with self._changed:
            leaving, self._leaving = self._leaving, set()
            if leaving:
                self._waiting = collections.deque(entry for entry in self._waiting if entry.job not in leaving)
        if leaving:
            for number, entry in list(self._entries.items()):
                if entry.job in leaving:
                    self.batcher.cancel(number)

    def _enter(self) -> None:
        """Give waiting answers to the batcher, no more than it has rows for."""
        while True:
            with self._changed:
                if not self._waiting or self.batcher.num_active + self.batcher.num_waiting >= self.max_rows:
                    return
                entry = self._waiting.popleft()
            work = entry.work
            try:
                number = self.batcher.submit(
                    **work.inputs,
                    constraint=work.constraint,
                    num_alternatives=work.num_alternatives,
                    **work.options,
                )
            except ValueError as error:
                self._in_loop(entry.job.fail, invalid(str(error)))
            except torch.OutOfMemoryError as error:  # of the image tower, before anything has begun
                logger.warning("no memory for the pictures of a call: %s", error)
                self._in_loop(entry.job.fail, unavailable("there is no memory for this call's pictures: try again"))
            else:
                self._entries[number] = entry

    def _hand_out(self, emitted: list[Emitted]) -> None:
        """Tokens to their jobs, in the event loop."""
        events = []
        for one in emitted:
            entry = self._entries[one.request]
            events.append((entry.job, entry.index, one))
            if one.finish_reason is not None:
                del self._entries[one.request]
        if events:
            self._in_loop(_deliver, events)

    def _in_loop(self, function: Any, argument: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)


def _deliver(events: list[tuple[Job, int, Emitted]]) -> None:
    for job, index, emitted in events:
        job.deliver(index, emitted)
