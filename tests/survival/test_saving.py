"""Saving at once and beside the training: the same files, at every ZeRO stage and expert split; what is kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_distributed

from phi35.training.checkpoint_files import CheckpointReader

MOE = {"model": "tiny-phi-3.5-moe", "router_aux_loss_coef": 0.01}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.py").write_text("\n".join(f"value_{line} = compute({line * 7 % 13})" for line in range(160)))
    return str(folder)


def settings(text_folder, output, **changes):
    base = {
        "data": text_folder,
        "sequence_length": 16,
        "global_batch_size": 4,
        "max_steps": 4,
        "warmup_steps": 1,
        "output_dir": str(output),
        "export": False,
        "keep_last": 0,
    }
    return {**base, **changes}


def losses_of(rank, world_size, values):
    from phi35.training.config import TrainingConfig
    from phi35.training.run import train

    summary = train(TrainingConfig(**values), device="cpu")
    return None if summary is None else [line["loss"].hex() for line in summary.history]


def both_ways(rank, world_size, values):
    """The run with saving at once and beside the training, in one process each."""
    return [
        losses_of(rank, world_size, {**values, "output_dir": f"{values['output_dir']}/{name}", "async_save": beside})
        for name, beside in (("sync", False), ("async", True))
    ]


def contents(folder):
    """Tensors by kind and name, and each rank's random state."""
    reader = CheckpointReader(folder)
    tensors = {
        (kind, name): reader.read(kind, name)
        for kind in ("parameter", "exp_avg", "exp_avg_sq")
        for name in reader.names(kind)
    }
    for name in reader.manifest["files"]:
        if name.startswith("random"):
            tensors |= {(name, key): value for key, value in reader.read_file(name).items()}
    return reader, tensors


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 0},
        {"zero_stage": 1, "dtype": "bfloat16"},
        {"zero_stage": 2, **MOE, "ep_size": 2},
        {"zero_stage": 3},
    ],
    ids=["zero0", "zero1-bf16", "zero2-ep2", "zero3"],
)
def test_saving_beside_the_training_changes_nothing(text_folder, tmp_path, changes):
    values = settings(text_folder, tmp_path, save_interval=1, **changes)
    at_once, beside = run_distributed(both_ways, 2, values)[0]
    assert at_once == beside and len(beside) == 4
    names = [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    for name in names:
        (reader, one), (_, other) = (contents(tmp_path / way / "checkpoints" / name) for way in ("sync", "async"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        sizes = {}
        for piece in reader.manifest["tensors"]:
            rank = piece["file"].split("-")[1]
            sizes[rank] = sizes.get(rank, 0) + one[piece["kind"], piece["name"]].numel()
        assert min(sizes.values()) > 0.6 * max(sizes.values())  # both ranks write
    assert sorted(path.name for path in (tmp_path / "async" / "checkpoints").iterdir()) == names


def test_a_saved_run_goes_on_from_what_was_written_beside_it(text_folder, tmp_path):
    values = settings(text_folder, tmp_path / "whole", save_interval=2, async_save=True, zero_stage=1)
    whole = run_distributed(losses_of, 2, values)[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "parted")
    shutil.rmtree(tmp_path / "parted" / "checkpoints" / "step-00000004")
    assert run_distributed(losses_of, 2, {**values, "output_dir": str(tmp_path / "parted")})[0] == whole


def test_every_nth_checkpoint_is_kept(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, max_steps=7, save_interval=1, keep_last=1, keep_every=3, async_save=True)
    run_distributed(losses_of, 1, values)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000006", "step-00000007"]


def slow_writes(rank, world_size, values):
    """A training whose disk is slow: each file takes a while, in the thread that writes it."""
    import threading
    import time

    from phi35.training import saving, tensor_writer

    written_by = []
    write = tensor_writer.write_hashed

    def slow_write(path, tensors):
        written_by.append(threading.current_thread().name)
        time.sleep(0.5)
        return write(path, tensors)

    saving.write_hashed = tensor_writer.write_hashed = slow_write
    waits = []  # what the training waits for: each save, and each end of a save that was in flight
    for name in ("save", "finish"):
        method = getattr(saving.CheckpointSaver, name)

        def timed(self, *arguments, method=method, name=name):
            in_flight, began = self.in_flight, time.perf_counter()
            method(self, *arguments)
            if name == "save" or in_flight:
                waits.append((name, time.perf_counter() - began))
            assert not (name == "finish" and self.in_flight)

        setattr(saving.CheckpointSaver, name, timed)
    losses_of(rank, world_size, values)
    return waits, set(written_by)


def test_the_steps_wait_for_the_copy_alone_and_one_save_is_in_flight(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, save_interval=1, async_save=True, max_steps=3)
    ((waits, threads),) = run_distributed(slow_writes, 1, values)
    assert threads == {"checkpoint"}
    # A save is two files of 0.5 s each: no save waits for its own, each next one first waits for the one before.
    assert [name for name, _ in waits] == ["save", "finish"] * 3
    assert all(seconds < 0.5 for name, seconds in waits if name == "save")
    assert all(seconds > 0.3 for name, seconds in waits if name == "finish")
    assert len(json.loads(Path(tmp_path, "checkpoints/step-00000003/manifest.json").read_text())["files"]) == 3
