"""Faults under DeepSpeed's own launcher, kills of ranks that save together, a disk that is really full."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import _free_port, run_distributed
from launched_runs import ROOT, Launched
from picture_shards import write_picture_shards
from rank_processes import Ranks

from phi35.training.checkpoint_files import CheckpointReader, complete_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.faults]

VISION = ["model_overrides.vision={num_crops: 1}", "num_workers=2", "global_batch_size=4", "export=false"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_picture_shards(tmp_path_factory.mktemp("shards"))


def launched(script, arguments, folder):
    """``deepspeed --num_gpus 2`` on a script."""
    port = str(_free_port())
    return Launched([["deepspeed", "--num_gpus", "2", "--master_port", port, str(script), *arguments]], folder)


TARGETS = [
    ("the launcher", signal.SIGTERM),
    ("the launcher", signal.SIGINT),
    ("its child", signal.SIGTERM),
    ("its child", signal.SIGINT),
    ("rank 0", signal.SIGTERM),
    ("rank 1", signal.SIGINT),
    ("the terminal's whole group", signal.SIGINT),
    ("the launcher", signal.SIGKILL),
    ("its child", signal.SIGKILL),
]


@pytest.mark.parametrize(("target", "number"), TARGETS, ids=[f"{n.name} to {t}" for t, n in TARGETS])
def test_a_signal_anywhere_saves_and_leaves_no_process(shards, tmp_path, fault_report, target, number):
    output = tmp_path / "run"
    arguments = [*VISION, f"data={shards}", f"output_dir={output}", "max_steps=100000", "log_interval=2"]
    run = launched(ROOT / "scripts" / "train_vision.py", arguments, tmp_path)
    run.wait_until("2/100000")
    assert len(run.ranks) == 2 and len(run.all) >= 8  # two launchers, two ranks, four data loaders
    (launcher,), (child,) = run.launchers, run.between
    if target == "the terminal's whole group":
        os.killpg(launcher.pid, number)
    else:
        ranks = {f"rank {rank}": process for rank, process in enumerate(run.ranks)}
        os.kill({"the launcher": launcher, "its child": child, **ranks}[target].pid, number)
    seconds = run.seconds_until_gone(limit=30)
    (saved,) = complete_checkpoints(output / "checkpoints")
    CheckpointReader(saved)
    fault_report(
        f"{number.name} to {target}, 2 ranks with 2 data loaders each",
        saved=saved.name,
        processes_left=0,
        seconds_until_all_ended=round(seconds, 1),
    )


DYING = """
import os, sys, signal, time
sys.path.insert(0, {root!r})
from phi35.training.engine import Engine
step, calls = Engine.step, []
def told_step(self, *arguments):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        print("three steps are done", flush=True)
        time.sleep(4)  # until the processes have been looked at
        {action}
    return step(self, *arguments)
Engine.step = told_step
from phi35.cli.train import run
sys.exit(run({{"model": "tiny-phi-3.5-moe", "data": "stdlib"}}))
"""


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("raise KeyError('the cause of it all')", "rank 1 failed:\nTraceback"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ""),
        ("time.sleep(1000)", "rank 1 hangs: no progress for 10 s"),
    ],
    ids=["error", "SIGKILL", "hang"],
)
def test_a_rank_that_fails_takes_the_others_down(tmp_path, fault_report, action, said):
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(ROOT), action=action))
    arguments = [f"output_dir={tmp_path / 'run'}", "max_steps=100000", "export=false", "hang_timeout_seconds=10"]
    run = launched(script, [*arguments, "global_batch_size=4", "sequence_length=32"], tmp_path)
    run.wait_until("three steps are done")
    seconds = run.seconds_until_gone(limit=60)
    log = run.log.read_text()
    assert said in log
    if "raise" in action:
        assert "the cause of it all" in log
        assert log.index("Traceback") == log.index(said) + len(said) - len("Traceback")  # the first one printed
    fault_report(f"rank 1 of 2: {action}", seconds_until_all_ended=round(seconds, 1), printed_first=said or None)


def kill_together(rank, world_size, values, folder, num_kills):
    """Two ranks that save after every step, killed and started anew: newest checkpoint's step after each kill."""
    from phi35.cli.train import run

    root, rng = Path(values["output_dir"]) / "checkpoints", random.Random(1)
    steps, unfinished = [], 0
    for _ in range(num_kills):
        before = complete_checkpoints(root)[-1].name if complete_checkpoints(root) else ""
        ranks = Ranks(2, _free_port(), Path(folder), lambda _: run(values, ["--device", "cpu"]))
        deadline = time.monotonic() + 60
        while (complete_checkpoints(root) or [Path(before)])[-1].name == before:
            assert time.monotonic() < deadline, ranks.output(0)
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        for process in ranks.processes:
            os.kill(process, signal.SIGKILL)
        ranks.wait_for(timeout=10)
        found = complete_checkpoints(root)
        for folder_ in found:
            CheckpointReader(folder_)
        steps.append(int(found[-1].name[5:]))
        unfinished += any(path.name.startswith(".writing-step") for path in root.iterdir())
    return steps, unfinished


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_ranks_killed_while_they_save_together_go_on(tmp_path, fault_report, asynchronous):
    values = {
        "model": "tiny-phi-3.5-moe",
        "data": "stdlib",
        "sequence_length": 32,
        "global_batch_size": 4,
        "ep_size": 2,
        "max_steps": 100_000,
        "save_interval": 1,
        "async_save": asynchronous,
        "output_dir": str(tmp_path / "run"),
        "export": False,
        "trackers": [],
    }
    arguments = (values, str(tmp_path), 50)
    ((steps, unfinished),) = run_distributed(kill_together, 1, *arguments, init=False, timeout=900)
    assert steps == sorted(set(steps)) and len(steps) == 50  # every start went on from the newest and got further
    fault_report(
        f"kill -9 of 2 ranks (ep 2) at 50 random moments, saving {'asynchronously' if asynchronous else 'at once'}",
        restarts_that_went_on_from_the_newest=50,
        kills_that_left_an_unfinished_checkpoint=unfinished,
        last_step=steps[-1],
    )


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, for a file system of its own")
def test_a_disk_that_is_full(tmp_path, fault_report):
    """A file system of 6 MB that a few checkpoints fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = "sequence_length=32 global_batch_size=4 max_steps=12 save_interval=3 keep_last=0 export=false"
    train = f"{sys.executable} {ROOT / 'scripts' / 'train_moe.py'} output_dir={disk}/run trackers=[] {settings}"
    look = f"ls {disk}/run/checkpoints; cp -r {disk}/run {tmp_path}/kept; df {disk} | tail -1"
    command = f"mount -t tmpfs -o size=6m none {disk} || exit 99; {train}; echo status $?; {look}"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip("this machine lets no user mount a file system")
    assert "No space left on device" in done.stderr and "could not be written" in done.stderr
    assert "status 1" in done.stdout and "Traceback" not in done.stderr
    found = complete_checkpoints(tmp_path / "kept" / "checkpoints")
    assert found and found[-1].name != "step-00000012"
    for folder in found:
        CheckpointReader(folder)
    lines = [json.loads(line) for line in (tmp_path / "kept" / "metrics.jsonl").read_text().splitlines()]
    message = re.search("error: the checkpoint.*", done.stderr)
    assert message is not None
    fault_report(
        "a file system of 6 MB that fills up",
        intact_checkpoints=[folder.name for folder in found],
        metric_lines_on_disk=len(lines),
        message=message[0].replace(str(tmp_path), "..."),
    )
