"""Ending a run in good order: signals and dead launchers become a request, which all ranks see between two steps.

DeepSpeed's launcher is a chain of processes: ``deepspeed`` starts ``deepspeed.launcher.launch``, which starts the
ranks. SIGTERM or SIGINT to the first ends it alone; to the second it is passed on to all ranks and their data
loaders, which are killed 30 s later. So a signal here does nothing but set a flag, and a launcher that is gone sets it
too. The ranks compare their flags at every step, save between two steps, and end together.
"""

import atexit
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed

from phi35.training.environment import Environment

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECONDS_TO_SECOND_INTERRUPT = 1.0
"""A terminal's Ctrl-C reaches a rank twice, through the launcher as well; a second one counts after this time."""
_LAUNCH_MODULES = ("deepspeed.launcher.launch", "torch.distributed.run", "torch.distributed.launch")


class RunStopped(Exception):
    """A run that was asked to stop has saved and stopped.

    Attributes:
        exit_status: for the process: 128 + the signal's number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


class StopRequest:
    """Whether this process was asked to stop, by a signal or by the death of its launcher.

    Within ``with`` the signals are caught (in the main thread alone; elsewhere Python forbids it). Data-loader
    processes forked there inherit handlers that do nothing, so that they outlive the signal until the rank has saved.

    Args:
        launchers: (process, its parent) pairs that must stay as they are; None finds this process's own.

    Attributes:
        signal_number: of the first signal (SIGTERM for a dead launcher), 0 before.
        reason: in words.
    """

    def __init__(self, launchers: list[tuple[int, int]] | None = None) -> None:
        self.signal_number, self.reason = 0, ""
        self._launchers = launcher_chain() if launchers is None else launchers
        self._pid = os.getpid()
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def request(self, signal_number: int, reason: str) -> None:
        """Asks for a stop; the first request counts."""
        if not self.signal_number:
            self.signal_number, self.reason, self._since = signal_number, reason, time.monotonic()

    def check_launchers(self) -> None:
        """Asks for a stop if a launcher is gone."""
        for process, parent in self._launchers:
            if parent_of(process) != parent:
                self.request(signal.SIGTERM, f"its launcher (process {parent}) is gone")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a data loader: it ends with its rank
        again = self.signal_number and time.monotonic() - self._since > SECONDS_TO_SECOND_INTERRUPT
        if number == signal.SIGINT and self.signal_number == signal.SIGINT and again:
            raise KeyboardInterrupt
        self.request(number, f"{signal.Signals(number).name} received")


class Agreement:
    """Small numbers of all ranks, compared at every step on the hosts, without waiting for a device.

    Args:
        environment: this process's place.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self._values = torch.zeros(0)
        self._work: Any = None

    def begin(self, values: list[int]) -> None:
        """Starts the comparison; all ranks give as many values."""
        self._values = torch.tensor(values, dtype=torch.int64)
        if self.environment.world_size > 1:
            self._work = distributed.all_reduce(
                self._values, op=distributed.ReduceOp.MAX, group=self.environment.control_group, async_op=True
            )

    def end(self) -> list[int]:
        """The largest of each value over all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [int(value) for value in self._values.tolist()]


def ignore_stop_signals() -> None:
    """For data-loading processes: a signal to all processes of a run must not end them before their rank has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def close_at_exit(batches: Generator[Any, Any, Any]) -> None:
    """Ends the data-loading processes behind a generator when this process ends, however it lies around then.

    Python would end them by a signal, which they ignore, and wait for them for ever.
    """
    reference = weakref.ref(batches)

    def close() -> None:
        still_there = reference()
        if still_there is not None:
            still_there.close()

    atexit.register(close)


def launcher_chain(command_of: Callable[[int], list[str]] | None = None) -> list[tuple[int, int]]:
    """The launchers above this process, as (process, its parent) pairs; empty where a shell or a user started it.

    Args:
        command_of: gives a process's command line; None reads it from /proc.
    """
    command_of = command_of or command_line
    parent = os.getppid()
    command = command_of(parent)
    is_torchrun = any(Path(word).name == "torchrun" for word in command[:2])
    if not is_torchrun and not any(module in command for module in _LAUNCH_MODULES):
        return []
    chain = [(os.getpid(), parent)]
    above = parent_of(parent)
    if "deepspeed.launcher.launch" in command and above is not None:
        words = command_of(above)
        is_runner = "deepspeed.launcher.runner" in words or any(Path(word).name == "deepspeed" for word in words[:2])
        if is_runner:
            chain.append((parent, above))
        elif above == 1:
            chain.append((parent, 0))  # orphaned before it was looked at: no process has the parent 0 but init
    return chain


def parent_of(process: int) -> int | None:
    """Parent of a process; None if the process is gone."""
    if process == os.getpid():
        return os.getppid()
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])


def command_line(process: int) -> list[str]:
    """Words of a process's command line; empty if it is gone or not ours to read."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
