"""Signals, dead launchers, dying and hanging ranks: what is saved, what is said, and that nobody is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import _free_port, run_distributed
from picture_shards import write_picture_shards
from rank_processes import Ranks, allow_children

from phi35.training.stopping import StopRequest, launcher_chain, parent_of

ENDLESS = 100_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_picture_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.py").write_text("\n".join(f"value_{line} = compute({line * 7 % 13})" for line in range(160)))
    return str(folder)


def vision_settings(shards, output, **changes):
    base = {
        "model": "tiny-phi-3.5-vision",
        "model_overrides": {"vision": {"num_crops": 1}},
        "data": shards,
        "num_workers": 2,
        "global_batch_size": 4,
        "max_steps": ENDLESS,
        "output_dir": str(output),
        "export": False,
    }
    return {**base, **changes}


def text_settings(text_folder, output, **changes):
    base = {
        "model": "tiny-phi-3.5-mini",
        "data": text_folder,
        "sequence_length": 16,
        "global_batch_size": 4,
        "max_steps": ENDLESS,
        "output_dir": str(output),
        "export": False,
    }
    return {**base, **changes}


def run_command(values, on_step=None):
    """``phi35 train`` in this process: exit status. ``on_step(number)`` runs before each step, from 1."""
    from phi35.cli.train import run
    from phi35.training.engine import Engine

    step, calls = Engine.step, []

    def told_step(self, *arguments):
        calls.append(1)
        print(f"step {len(calls)} begins", flush=True)
        if on_step is not None:
            on_step(len(calls))
        return step(self, *arguments)

    Engine.step = told_step
    return run(values, ["--device", "cpu"])


def signal_vision_run(rank, world_size, values, folder, number, target, with_workers):
    """Two ranks with two data loaders each; a signal to one of them when it is under way; how all end."""
    ranks = Ranks(2, _free_port(), Path(folder), lambda _: run_command(values))
    ranks.wait_until("step 3 begins", rank=target)
    workers = ranks.note_descendants()
    os.kill(ranks.processes[target], number)
    if with_workers:  # a launcher signals the whole tree
        for worker in workers:
            os.kill(worker, number)
    ended = ranks.wait_for(timeout=60)
    return [(one.status, one.seconds, one.output) for one in ended], len(workers), ranks.left(timeout=10)


@pytest.mark.parametrize(
    ("number", "target", "with_workers"),
    [(signal.SIGTERM, 1, True), (signal.SIGINT, 0, False)],
    ids=["SIGTERM to rank 1 and all data loaders", "SIGINT to rank 0"],
)
def test_a_signal_to_one_rank_saves_and_ends_all(shards, tmp_path, number, target, with_workers):
    values = vision_settings(shards, tmp_path / "run")
    arguments = (values, str(tmp_path), number, target, with_workers)
    ((ended, num_workers, left),) = run_distributed(signal_vision_run, 1, *arguments, init=False, timeout=120)
    assert num_workers >= 4 and left == []  # two each, and what counts their semaphores
    assert [status for status, _, _ in ended] == [128 + number] * 2
    assert max(seconds for _, seconds, _ in ended) < 30
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (saved / "manifest.json").is_file()
    assert f"stopped after step {int(saved.name[5:])}, saved as {saved}" in ended[0][2]
    assert all("Traceback" not in output for _, _, output in ended)


def lose_launcher(rank, world_size, values, folder):
    """A launcher that is killed while its rank trains: how the orphan ends."""
    from phi35.training import stopping

    stopping.launcher_chain = lambda: [(os.getpid(), os.getppid())]  # what it would find below a real launcher
    launcher = os.fork()
    log = Path(folder) / "rank-0.log"
    if launcher == 0:
        Ranks(1, _free_port(), Path(folder), lambda _: run_command(values)).wait_for(timeout=120)
        os._exit(0)
    deadline = time.monotonic() + 60
    while "step 3 begins" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    while "the same command goes on" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    return log.read_text()


def test_a_rank_whose_launcher_is_gone_saves_and_ends(text_folder, tmp_path):
    values = text_settings(text_folder, tmp_path / "run")
    (output,) = run_distributed(lose_launcher, 1, values, str(tmp_path), init=False)
    assert "its launcher" in output and "is gone: stopped after step" in output
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (saved / "manifest.json").is_file()


def stop_in_the_middle(rank, world_size, values, folder):
    """Two ranks of which one is signalled during step 3, then the same run anew; each step's loss as hex."""

    def interrupt(step):
        if step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    first = Ranks(2, _free_port(), Path(folder), lambda _: run_command(values, interrupt)).wait_for(timeout=60)
    second = Ranks(2, _free_port(), Path(folder), lambda _: run_command(values)).wait_for(timeout=60)
    assert [one.status for one in (*first, *second)] == [143, 143, 0, 0], [one.output for one in (*first, *second)]
    lines = (Path(values["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def whole_losses(rank, world_size, values):
    from phi35.training.config import TrainingConfig
    from phi35.training.run import train

    allow_children()
    summary = train(TrainingConfig(**values), device="cpu")
    return None if summary is None else [line["loss"] for line in summary.history]


def test_a_stopped_run_goes_on_to_the_bit(shards, tmp_path):
    values = vision_settings(
        shards, tmp_path / "stopped", max_steps=7, warmup_steps=2, zero_stage=2, async_save=True, save_interval=2
    )
    (losses,) = run_distributed(stop_in_the_middle, 1, values, str(tmp_path), init=False)
    whole = run_distributed(whole_losses, 2, {**values, "output_dir": str(tmp_path / "whole")})[0]
    assert [loss.hex() for loss in losses] == [loss.hex() for loss in whole] and len(whole) == 7


def die_in_step_three(rank, world_size, values, folder, how):
    """Two ranks of which rank 1 fails; the other stands in what never ends, as in a collective on a GPU."""
    from phi35.training import watchdog

    watchdog.SILENCE_SECONDS, watchdog.GRACE_SECONDS = 4.0, 1.0

    def fail(step):
        if step == 3 and os.environ["RANK"] == "1":
            if how == "error":
                raise KeyError("the cause of it all")
            os.kill(os.getpid(), signal.SIGKILL)
        elif step == 3:
            time.sleep(100)

    ranks = Ranks(2, _free_port(), Path(folder), lambda _: run_command(values, fail))
    ranks.wait_until("step 3 begins", rank=1)
    return [(one.status, one.seconds, one.output) for one in ranks.wait_for(timeout=60)]


def test_a_failing_rank_says_why_and_takes_the_others_down(text_folder, tmp_path):
    values = text_settings(text_folder, tmp_path / "run")
    (ended,) = run_distributed(die_in_step_three, 1, values, str(tmp_path), "error", init=False)
    (other, other_seconds, other_output), (status, seconds, output) = ended
    assert (status, other) == (1, 1) and max(seconds, other_seconds) < 20
    assert "rank 1 failed:\nTraceback" in output and "the cause of it all" in output
    assert "rank 0 stops: rank 1 failed: KeyError" in other_output
    assert seconds < other_seconds  # the cause is printed first


def test_a_killed_rank_takes_the_others_down(text_folder, tmp_path):
    values = text_settings(text_folder, tmp_path / "run")
    (ended,) = run_distributed(die_in_step_three, 1, values, str(tmp_path), "SIGKILL", init=False)
    (other, other_seconds, other_output), (status, _, _) = ended
    assert (status, other) == (-signal.SIGKILL, 1) and other_seconds < 20
    assert "rank 1 has given no sign of life for 4 s" in other_output


def fail_outside_the_steps(rank, world_size, values, folder, where):
    """Rank 1 fails before the first step, or rank 0 behind the last one, where the other waits for it for days."""
    from phi35.training import run, watchdog

    watchdog.SILENCE_SECONDS, watchdog.GRACE_SECONDS = 4.0, 1.0
    name, failing = ("build_model", "1") if where == "before" else ("export", "0")
    work = getattr(run, name)

    def told(*arguments, **options):
        if os.environ["RANK"] == failing:
            raise KeyError("the cause of it all")
        return work(*arguments, **options)

    setattr(run, name, told)
    ranks = Ranks(2, _free_port(), Path(folder), lambda _: run_command(values))
    return [(one.status, one.seconds, one.output) for one in ranks.wait_for(timeout=60)]


@pytest.mark.parametrize(("where", "failing"), [("before", 1), ("behind", 0)])
def test_a_rank_that_fails_outside_the_steps_takes_the_other_down(text_folder, tmp_path, where, failing):
    values = text_settings(text_folder, tmp_path / "run", max_steps=2, warmup_steps=1, export=True)
    (ended,) = run_distributed(fail_outside_the_steps, 1, values, str(tmp_path), where, init=False)
    assert [status for status, _, _ in ended] == [1, 1] and max(seconds for _, seconds, _ in ended) < 40
    assert f"rank {failing} failed:\nTraceback" in ended[failing][2] and "the cause of it all" in ended[failing][2]
    if where == "before":  # behind the last step gloo may tell the other sooner
        assert "rank 0 stops: rank 1 failed: KeyError" in ended[0][2]
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir() == (where == "behind")


def hang_in_step_three(rank, world_size, values, folder):
    def hang_here(step):
        if step == 3 and os.environ["RANK"] == "1":
            time.sleep(100)

    ranks = Ranks(2, _free_port(), Path(folder), lambda _: run_command(values, hang_here))
    ranks.wait_until("step 3 begins", rank=1)
    return [(one.status, one.seconds, one.output) for one in ranks.wait_for(timeout=60)]


def test_a_hang_is_detected_and_shown(text_folder, tmp_path):
    values = text_settings(text_folder, tmp_path / "run", hang_timeout_seconds=3.0)
    (ended,) = run_distributed(hang_in_step_three, 1, values, str(tmp_path), init=False)
    assert [status for status, _, _ in ended] == [1, 1]
    assert max(seconds for _, seconds, _ in ended) < 20
    assert "rank 1 hangs: no progress for 3 s" in ended[1][2] and "in hang_here" in ended[1][2]
    assert "in hang_here" in (tmp_path / "run" / "stacks-rank-00001.txt").read_text()


def test_a_second_interrupt_ends_without_saving():
    with StopRequest([]) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # from the launcher, which passes it on
        assert stop.signal_number == signal.SIGINT
        stop._since -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_launchers_are_told_from_shells():
    here, parent = os.getpid(), os.getppid()
    above = parent_of(parent)
    launch = ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=..."]
    runner = ["/venv/bin/python", "/venv/bin/deepspeed", "--num_gpus", "2", "train.py"]
    chain = launcher_chain({parent: launch, above: runner}.get)
    assert chain == [(here, parent), (parent, above)]
    assert launcher_chain({parent: launch, above: ["/bin/bash"]}.get) == [(here, parent)]
    assert launcher_chain({parent: ["python", "/venv/bin/torchrun", "train.py"]}.get) == [(here, parent)]
    assert launcher_chain({parent: ["bash", "-c", "python train.py deepspeed"]}.get) == []


def test_a_dead_process_has_no_parent():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert parent_of(process.pid) is None and parent_of(os.getpid()) == os.getppid()
