"""Ranks as processes of their own that may be signalled, die and exit, forked from one that has torch imported.

To be used within ``run_distributed(..., 1, init=False)``: the forked ranks find everything loaded there.
"""

import faulthandler
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil


def allow_children() -> None:
    """Lets a process of ``run_distributed``, a daemon, start data loaders."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


@dataclass
class Ended:
    """How a rank ended.

    Attributes:
        status: exit status, negative for a signal.
        seconds: since ``wait_for`` began.
        output: what it printed.
    """

    status: int
    seconds: float
    output: str


class Ranks:
    """Processes that call ``main(rank)`` and exit with what it returns.

    Args:
        world_size: number of ranks.
        port: free, for their rendezvous.
        folder: gets a log per rank.
        main: the ranks' work.
    """

    def __init__(self, world_size: int, port: int, folder: Path, main: Callable[[int], int]) -> None:
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
        self.processes: list[int] = []
        for log in self.logs:
            log.touch()
        for rank in range(world_size):
            process = os.fork()
            if process == 0:
                _run(rank, world_size, port, self.logs[rank], main)
            self.processes.append(process)
        self.descendants: set[int] = set(self.processes)

    def note_descendants(self) -> list[int]:
        """Processes that the ranks have started (data loaders), remembered for ``left``."""
        started = [child.pid for process in self.processes for child in psutil.Process(process).children(True)]
        self.descendants |= set(started)
        return started

    def output(self, rank: int) -> str:
        """What a rank has printed so far."""
        return self.logs[rank].read_text()

    def wait_until(self, text: str, rank: int = 0, timeout: float = 60.0) -> None:
        """Waits until a rank has printed something."""
        deadline = time.monotonic() + timeout
        while text not in self.output(rank):
            if time.monotonic() > deadline or not all(map(_runs, self.processes)):
                self.kill()
                raise TimeoutError(f"rank {rank} did not print {text!r}:\n{self.output(rank)}")
            time.sleep(0.02)

    def wait_for(self, timeout: float) -> list[Ended]:
        """Waits until all have ended; kills them all after ``timeout`` seconds."""
        began = time.monotonic()
        ended: dict[int, Ended] = {}
        while len(ended) < len(self.processes):
            for rank, process in enumerate(self.processes):
                if rank not in ended and (found := os.waitpid(process, os.WNOHANG))[0]:
                    status = os.waitstatus_to_exitcode(found[1])
                    ended[rank] = Ended(status, time.monotonic() - began, self.output(rank))
            if time.monotonic() - began > timeout:
                self.kill()
                texts = [f"--- rank {rank} ---\n{self.output(rank)}" for rank in range(len(self.processes))]
                raise TimeoutError("ranks did not end:\n" + "\n".join(texts))
            time.sleep(0.02)
        return [ended[rank] for rank in sorted(ended)]

    def left(self, timeout: float) -> list[int]:
        """Ranks and their descendants that still run after ``timeout`` seconds; these are killed."""
        deadline = time.monotonic() + timeout
        while (alive := [pid for pid in self.descendants if _runs(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in alive:
            os.kill(process, signal.SIGKILL)
        return alive

    def kill(self) -> None:
        """Kills all ranks and what they started."""
        for process in self.processes:
            if _runs(process):
                for child in [*psutil.Process(process).children(True), psutil.Process(process)]:
                    child.kill()


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _run(rank: int, world_size: int, port: int, log: Path, main: Callable[[int], int]) -> None:
    status = 99
    try:
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(written, number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        faulthandler.register(signal.SIGUSR1, file=sys.stderr)
        allow_children()
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size, MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in place.items()})
        status = main(rank)
        multiprocessing.util._exit_function()  # as at the end of an interpreter: waits for what was started
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
