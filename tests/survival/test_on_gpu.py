"""On a GPU: updates left out without asking the device, asynchronous checkpoints, ranks that die in NCCL."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed import _free_port
from rank_processes import Ranks

from phi35.training.checkpoint_files import CheckpointReader

CASES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 states": {"dtype": "bfloat16", "optimizer_dtype": "bfloat16"},
}


ROOT = Path(__file__).resolve().parents[2]


def in_its_own_process(name, *arguments):
    """What a function of this file returns in a fresh process: one that has used a GPU cannot be forked."""
    paths = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, name, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def build(changes):
    from phi35.loading import create
    from phi35.training.config import TrainingConfig
    from phi35.training.engine import Engine
    from phi35.training.environment import start

    place = start("cuda")
    base = {"global_batch_size": 2, "max_steps": 4, "warmup_steps": 0, "zero_stage": 0}
    config = TrainingConfig(**{**base, **changes}).resolve(world_size=1)
    return Engine(create(config.model, device="cpu", dtype="float32", seed=0), config, place)


def state_of(engine):
    from phi35.training.optimizer_state import PARAMETER, OptimizerState

    state = OptimizerState(engine)
    return {
        (kind, name): state.read(parameter, kind).clone()
        for name, parameter in engine.model.named_parameters()
        for kind in (PARAMETER, *state.moments_of(parameter))
    } | {("steps", ""): torch.tensor(state.num_steps)}


def steps(engine, which, spoilt=None):
    import dataclasses

    def spoil(module, inputs, result):
        return result[0], dataclasses.replace(result[1], loss=result[1].loss + torch.inf)

    norms = []
    for step in which:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 900, (2, 16), generator=generator).cuda()
        engine.set_learning_rate(step)
        hook = engine.model.register_forward_hook(spoil) if step == spoilt else None
        result = engine.step([{"input_ids": ids, "labels": ids}], [30], 30)
        if hook is not None:
            hook.remove()
            engine.note_skipped(1)
        norms.append(float(result.gradient_norm))
    return norms


def with_and_without(changes):
    engine, other = build(changes), build(changes)
    norms = steps(engine, range(4), spoilt=1)
    steps(other, (0, 2, 3))
    one, two = state_of(engine), state_of(other)
    different = [str(key) for key in one if not torch.equal(one[key], two[key])]
    guard = engine._guard
    for parameter in guard.parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # an update that waits for the device raises
    engine.base_optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    return norms, different


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_bad_step_leaves_no_trace_and_waits_for_nothing(case):
    norms, different = in_its_own_process("with_and_without", CASES[case])
    assert different == []
    assert [math.isfinite(norm) for norm in norms] == [True, False, True, True]


def save_both_ways(root):
    from phi35.training.saving import CheckpointSaver

    engine = build({"dtype": "bfloat16"})
    steps(engine, range(2))
    folders = []
    for asynchronous in (False, True):
        saver = CheckpointSaver(f"{root}/{asynchronous}", engine, asynchronous=asynchronous)
        saver.save(2, {})
        if asynchronous:
            steps(engine, range(2, 4))  # while the thread writes
        saver.finish()
        folders.append(str(saver.last))
    return folders


@pytest.mark.gpu
def test_saving_beside_the_training_gives_the_same_files(tmp_path):
    folders = in_its_own_process("save_both_ways", str(tmp_path))
    one, other = (CheckpointReader(folder) for folder in folders)
    for kind in ("parameter", "exp_avg", "exp_avg_sq"):
        assert one.names(kind) == other.names(kind)
        assert all(torch.equal(one.read(kind, name), other.read(kind, name)) for name in one.names(kind))


def die_in_nccl(values, folder, how):
    """Two ranks, of which the second dies or hangs while the first waits for it in a collective."""
    from phi35.cli.train import run

    def main(_):
        from phi35.training.engine import Engine

        step, calls = Engine.step, []

        def told_step(self, *arguments):
            calls.append(1)
            print(f"step {len(calls)} begins", flush=True)
            if len(calls) == 3 and os.environ["RANK"] == "1":
                if how == "SIGKILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(1000)
            return step(self, *arguments)

        Engine.step = told_step
        return run(values, ["--device", "cuda"])

    ranks = Ranks(2, _free_port(), Path(folder), main)
    ranks.wait_until("step 3 begins", rank=1, timeout=120)
    return [(one.status, one.seconds, one.output) for one in ranks.wait_for(timeout=90)]


@pytest.mark.multigpu
@pytest.mark.parametrize("how", ["SIGKILL", "hang"])
def test_a_rank_lost_in_nccl_takes_the_other_down(tmp_path, how):
    values = {
        "model": "tiny-phi-3.5-mini",
        "data": "stdlib",
        "sequence_length": 32,
        "global_batch_size": 4,
        "max_steps": 1000,
        "output_dir": str(tmp_path / "run"),
        "export": False,
        "hang_timeout_seconds": 20.0,
    }
    ended = in_its_own_process("die_in_nccl", values, str(tmp_path), how)
    (other, seconds, output), (status, _, _) = ended
    assert other != 0 and status != 0 and seconds < 60
    assert "rank 1" in output


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
