"""Runs on two "machines" of this one, under a launcher each: torchrun, and DeepSpeed's with a hostfile.

A signal anywhere stops all with a checkpoint; a machine that is lost, and a rank that fails while the run starts, end
the others.
"""

import json
import os
import signal

import pytest
from distributed import _free_port
from launched_runs import ROOT, Launched

from phi35.training.checkpoint_files import CheckpointReader, complete_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.faults]

QUICK = ["global_batch_size=4", "sequence_length=32", "trackers=[]", "export=false", "warmup_steps=1"]


def on_two_machines(launcher, script, arguments, folder):
    """A launcher with one rank per machine."""
    port, rest = str(_free_port()), [str(script), *QUICK, *arguments]
    if launcher == "torchrun":
        common = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
        return Launched([[*common, "--master_port", port, "--node_rank", str(rank), *rest] for rank in (0, 1)], folder)
    hosts = folder / "hostfile"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    common = ["deepspeed", "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    return Launched([[*common, "--node_rank", str(rank), *rest] for rank in (0, 1)], folder)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_run_on_two_machines_trains_to_its_end(tmp_path, launcher, fault_report):
    run = on_two_machines(
        launcher, ROOT / "scripts" / "train_moe.py", [f"output_dir={tmp_path / 'run'}", "max_steps=4"], tmp_path
    )
    seconds = run.seconds_until_gone(limit=240)
    assert [one.returncode for one in run.launchers] == [0, 0], run.log.read_text()[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "ep_size: 2" in (tmp_path / "run" / "training_config.yaml").read_text()
    fault_report(f"none: two machines under {launcher}", steps=4, seconds=round(seconds, 1))


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_signal_to_one_machine_s_rank_saves_and_ends_both(tmp_path, launcher, fault_report):
    arguments = [f"output_dir={tmp_path / 'run'}", "max_steps=100000"]
    run = on_two_machines(launcher, ROOT / "scripts" / "train_moe.py", arguments, tmp_path)
    run.wait_until("loss=")
    os.kill(run.ranks[1].pid, signal.SIGTERM)
    seconds = run.seconds_until_gone(limit=30)
    (saved,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    CheckpointReader(saved)
    fault_report(
        f"SIGTERM to the rank of the second of two machines under {launcher}",
        saved=saved.name,
        processes_left=0,
        seconds_until_all_ended=round(seconds, 1),
    )


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_machine_that_is_lost_ends_the_other(tmp_path, launcher, fault_report):
    arguments = [f"output_dir={tmp_path / 'run'}", "max_steps=100000"]
    run = on_two_machines(launcher, ROOT / "scripts" / "train_moe.py", arguments, tmp_path)
    run.wait_until("loss=")
    second = run.launchers[1].pid
    lost = [pid for pid in run.all if os.getsid(pid) == second or pid == run.ranks[1].pid]
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    seconds = run.seconds_until_gone(limit=60)
    assert len(lost) >= 2 and run.launchers[0].returncode != 0
    fault_report(
        f"SIGKILL to all of the second of two machines under {launcher}", seconds_until_all_ended=round(seconds, 1)
    )


FAILING = """
import os, sys, time
sys.path.insert(0, {root!r})
from phi35.training import run
build = run.build_model
def told_build(*arguments):
    if os.environ["RANK"] == "1":
        print("the run starts", flush=True)
        time.sleep(4)  # until the processes have been looked at
        {action}
    return build(*arguments)
run.build_model = told_build
from phi35.cli.train import run
sys.exit(run({{"model": "tiny-phi-3.5-moe", "data": "stdlib"}}))
"""


@pytest.mark.parametrize(
    ("action", "said"),
    [("raise KeyError('the cause of it all')", "rank 1 failed:\nTraceback"), ("os.kill(os.getpid(), 9)", "rank 1")],
    ids=["error", "SIGKILL"],
)
def test_a_rank_that_fails_before_the_first_step_ends_the_other_machine(tmp_path, action, said, fault_report):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), action=action))
    arguments = [f"output_dir={tmp_path / 'run'}", "max_steps=100000"]
    run = on_two_machines("deepspeed", script, arguments, tmp_path)
    run.wait_until("the run starts")
    seconds = run.seconds_until_gone(limit=64)
    assert said in run.log.read_text()
    fault_report(
        f"rank 1, on the second of two machines, before the first step: {action}",
        seconds_until_all_ended=round(seconds - 4, 1),
    )
