"""A thread beside each rank that notices what the rank cannot: that it hangs, or that others are gone.

The ranks meet in a small key-value store of their own, since a collective is what hangs when something is wrong. A
rank that fails says so there; one that dies stops counting; both end the others, from a run's start to its end. While
it trains (``expect_progress``) a rank reports progress with ``beat``: without any for ``timeout_seconds`` the stacks of
all its threads are written and the process exits.
"""

import contextlib
import datetime
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import distributed

from phi35.training.environment import Environment
from phi35.training.stopping import StopRequest

POLL_SECONDS = 0.5
SILENCE_SECONDS = 40.0
"""A rank whose watchdog gave no sign for so long counts as dead."""
GRACE_SECONDS = 5.0
"""Between another rank's failure and this one's exit: time for its own error to be printed."""
EXIT_STATUS = 1


class Watchdog:
    """Watches this rank and, with the others, all ranks, within ``with``.

    Args:
        environment: this process's place; all ranks enter together.
        folder: gets ``stacks-rank-*.txt`` of a rank that hangs.
        timeout_seconds: without progress, after which this rank counts as hanging; 0 for never.
    """

    def __init__(self, environment: Environment, folder: Path, timeout_seconds: float) -> None:
        self.environment, self.folder, self.timeout_seconds = environment, folder, timeout_seconds
        self._stop: StopRequest | None = None
        self._store: Any = None
        self._last_beat = time.monotonic()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._count = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stderr = open(2, "w", closefd=False)  # noqa: SIM115  (whatever stands in for sys.stderr has no number)

    def __enter__(self) -> "Watchdog":
        self._store = _meeting_place(self.environment)
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._done.set()
        self._thread.join()
        failed = error is not None and isinstance(error, Exception) and not getattr(error, "exit_status", None)
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0
            if failed:
                self._report(f"rank {self.environment.rank} failed: {type(error).__name__}: {error}")
            elif self._store is not None:
                self._store.set(_key(self.environment.rank), "done")

    @contextlib.contextmanager
    def expect_progress(self, stop: StopRequest) -> Iterator[None]:
        """Within, this rank counts as hanging without a ``beat`` for too long.

        Args:
            stop: is told when a launcher is gone.
        """
        self.beat()
        self._stop = stop
        try:
            yield
        finally:
            self._stop = None
            if self.timeout_seconds:
                faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Says that this rank makes progress."""
        self._last_beat = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            if (stop := self._stop) is not None:
                self._look_at_this_rank(stop)
            problem = self._look_at_others() if self._store is not None else None
            if problem is not None and not self._done.wait(GRACE_SECONDS):
                self._exit(f"rank {self.environment.rank} stops: {problem}")

    def _look_at_this_rank(self, stop: StopRequest) -> None:
        stop.check_launchers()
        if not self.timeout_seconds:
            return
        silence = time.monotonic() - self._last_beat
        if silence > self.timeout_seconds:
            self._end_hanging(silence)
        # By a thread without Python, should one of Python's hold the interpreter.
        faulthandler.dump_traceback_later(self.timeout_seconds + 30, exit=True, file=self._stderr)
        if self._stop is None:  # the training has ended since
            faulthandler.cancel_dump_traceback_later()

    def _look_at_others(self) -> str | None:
        """What is wrong with another rank; rank 0 looks at all, the others at rank 0 and at what it says."""
        rank = self.environment.rank
        self._count += 1
        try:
            self._store.set(_key(rank), str(self._count))
            if self._store.check(["failed"]):
                return self._store.get("failed").decode()
            for other in range(1, self.environment.world_size) if rank == 0 else (0,):
                if self._is_silent(other):
                    problem = f"rank {other} has given no sign of life for {SILENCE_SECONDS:.0f} s"
                    self._report(problem)
                    return problem
        except RuntimeError as error:
            return f"rank 0 cannot be reached ({error})" if not self._done.is_set() else None
        return None

    def _is_silent(self, rank: int) -> bool:
        key, now = _key(rank), time.monotonic()
        value = self._store.get(key) if self._store.check([key]) else b""
        if key not in self._seen or self._seen[key][0] != value:
            self._seen[key] = (value, now)
        return value != b"done" and now - self._seen[key][1] > SILENCE_SECONDS

    def _report(self, message: str) -> None:
        if self._store is not None and not self._store.check(["failed"]):
            self._store.set("failed", message)

    def _end_hanging(self, silence: float) -> None:
        message = f"rank {self.environment.rank} hangs: no progress for {silence:.0f} s (hang_timeout_seconds)"
        print(f"{message}; its threads:", file=self._stderr, flush=True)
        faulthandler.dump_traceback(file=self._stderr, all_threads=True)
        path = self.folder / f"stacks-rank-{self.environment.rank:05d}.txt"
        with contextlib.suppress(OSError), open(path, "w") as file:  # the stacks are on stderr already
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
        with contextlib.suppress(RuntimeError):
            self._report(message)
        self._exit(None)

    def _exit(self, message: str | None) -> None:
        if message:
            print(message, file=self._stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_STATUS)


def _meeting_place(environment: Environment) -> Any:
    """A store that rank 0 serves on a free port; None for a single rank."""
    if environment.world_size == 1:
        return None
    host, timeout = os.environ["MASTER_ADDR"], datetime.timedelta(seconds=SILENCE_SECONDS)
    store = None
    if environment.is_main:
        store = distributed.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
    port = environment.broadcast(store.port if store is not None else None)
    return store or distributed.TCPStore(host, port, timeout=timeout, wait_for_workers=False)


def _key(rank: int) -> str:
    return f"beat/{rank}"
