"""kill -9 at any moment of a save: the newest complete checkpoint is intact, and the next run goes on from it."""

import os
import random
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from stepped_engines import build_engine, make_steps

from phi35.training.checkpoint import open_newest
from phi35.training.checkpoint_files import CheckpointReader, complete_checkpoints
from phi35.training.environment import Environment
from phi35.training.saving import CheckpointSaver

NUM_KILLS = 50
ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def fill(engine, step):
    """Weights and moments from which the step can be read back."""
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(step)
            engine.base_optimizer.state[parameter]["exp_avg"].fill_(-step)


def step_in(folder):
    """The step that a checkpoint's tensors hold, after its files have been compared with their SHA-256."""
    reader = CheckpointReader(folder)
    values = {abs(value) for kind in ("parameter", "exp_avg") for value in tensor_values(reader, kind)}
    assert values == {float(reader.trainer["step"])}
    return reader.trainer["step"]


def tensor_values(reader, kind):
    for name in sorted(reader.names(kind)):
        yield from reader.read(kind, name).unique().tolist()


def save_on_and_on(engine, root, first_step, asynchronous, notice):
    """A run that saves after every step; each completed checkpoint is noted in the pipe before the next begins."""
    saver = CheckpointSaver(root, engine, keep_last=2, asynchronous=asynchronous)
    for step in range(first_step, first_step + 1000):
        fill(engine, step)
        os.write(notice, f"begin {step}\n".encode())
        saver.save(step, {"note": "x" * 100})
        if asynchronous:
            fill(engine, 10_000 + step)  # the training goes on while the thread writes
            saver.finish()
        os.write(notice, f"end {step}\n".encode())


def start_writer(engine, root, first_step, asynchronous):
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        try:
            save_on_and_on(engine, root, first_step, asynchronous, writing)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    return process, os.fdopen(reading)


def kill(process):
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def seconds_of_a_save(engine, root, asynchronous):
    process, notes = start_writer(engine, root, 1, asynchronous)
    times = []
    for _ in notes:
        times.append(time.perf_counter())
        if len(times) == 16:
            break
    kill(process)
    lengths = sorted(end - begin for begin, end in zip(times[2::2], times[3::2], strict=True))
    return lengths[len(lengths) // 2]


def kill_again_and_again(rank, world_size, folder, asynchronous):
    """Kills processes that are forked from this one, and so have an engine for nothing, while they save."""
    engine = build_engine({"zero_stage": 0, "micro_batch_size": 2})
    make_steps(rank, engine, left_out=(1, 2, 3))
    root = Path(folder) / "checkpoints"
    length = seconds_of_a_save(engine, Path(folder) / "measured", asynchronous)
    rng = random.Random(0)
    newest, interrupted = 0, 0
    for number in range(NUM_KILLS):
        process, notes = start_writer(engine, root, newest + 1, asynchronous)
        saves_before = rng.randrange(2)
        moment = (number + rng.random()) / NUM_KILLS * 1.1 * length  # spread over one save and a little beyond
        for line in notes:
            if line == f"begin {newest + 1 + saves_before}\n":
                break
        time.sleep(moment)
        kill(process)
        told = [int(line.split()[1]) for line in notes if line.startswith("end")]  # what the pipe still holds
        completed = max([newest + saves_before, *told])
        interrupted += any(path.name.startswith(".writing-step") for path in root.iterdir())
        found = complete_checkpoints(root)
        if found:
            reader = open_newest(root, ALONE)
            assert reader is not None and reader.trainer["step"] == step_in(found[-1])
            assert completed <= reader.trainer["step"] <= completed + 1
            assert [step_in(folder) for folder in found[:-1]] == sorted(step_in(folder) for folder in found[:-1])
            newest = reader.trainer["step"]
        else:
            assert completed == 0
    assert newest > NUM_KILLS // 2 and interrupted >= NUM_KILLS // 3
    process, notes = start_writer(engine, root, newest + 1, asynchronous)  # leftovers do not keep a new run from saving
    assert next(line for line in notes if line.startswith("end")) == f"end {newest + 1}\n"
    kill(process)
    assert step_in(complete_checkpoints(root)[-1]) >= newest + 1
    return f"{NUM_KILLS} kills over saves of {length * 1000:.0f} ms, {interrupted} left an unfinished folder"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_fifty_kills_lose_no_complete_checkpoint(tmp_path, asynchronous):
    print(*run_distributed(kill_again_and_again, 1, str(tmp_path), asynchronous))
