"""Training scripts under real launchers, several of them as if on several machines, to be signalled and killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


class Launched:
    """Launchers of one run, each in a session of its own.

    Args:
        commands: of the launchers.
        folder: to run in; gets a log.
    """

    def __init__(self, commands: list[list[str]], folder: Path) -> None:
        self.log = folder / "launched.log"
        leave = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in leave}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        environment |= {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", "PYTHONPATH": str(ROOT)}
        with open(self.log, "w") as log:
            self.launchers = [
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=heed_interrupts,
                )
                for command in commands
            ]
        self.all: set[int] = {launcher.pid for launcher in self.launchers}

    def wait_until(self, text: str, timeout: float = 240) -> None:
        """Waits until the log holds a text, and finds the processes."""
        deadline = time.monotonic() + timeout
        while text not in self.log.read_text():
            if time.monotonic() > deadline or any(launcher.poll() is not None for launcher in self.launchers):
                self.kill()
                raise AssertionError(f"{text!r} did not come:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)
        started = [psutil.Process(launcher.pid) for launcher in self.launchers]
        below = [child for process in started for child in process.children(recursive=True)]
        self.all |= {child.pid for child in below}
        parents = {process.pid for process in started}
        # The ranks: children of the launchers, or of what DeepSpeed's launcher puts between.
        between = {child.pid for child in below if "deepspeed.launcher.launch" in child.cmdline()}
        self.between = [child for child in below if child.pid in between]
        ranks = [child for child in below if child.ppid() in parents | between and child.pid not in between]
        self.ranks = sorted(ranks, key=lambda child: int(child.environ()["RANK"]))

    def seconds_until_gone(self, limit: float) -> float:
        """How long the last process lived on; all are killed after ``limit`` seconds."""
        began = time.monotonic()
        while [pid for pid in self.all if runs(pid)]:
            for launcher in self.launchers:
                launcher.poll()
            if time.monotonic() - began > limit:
                left = [" ".join(psutil.Process(pid).cmdline()) for pid in self.all if runs(pid)]
                self.kill()
                raise AssertionError(f"{len(left)} live on after {limit} s: {left}\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)
        for launcher in self.launchers:
            launcher.wait()
        return time.monotonic() - began

    def kill(self) -> None:
        """Ends everything that was found."""
        for pid in self.all:
            if runs(pid):
                os.kill(pid, signal.SIGKILL)


def heed_interrupts() -> None:
    """A shell that starts these tests in the background makes them, and all they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
