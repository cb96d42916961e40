"""Damaged checkpoints, forged ones, and disks that are full."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from distributed import RankError, _free_port, run_distributed

from phi35.training import checkpoint_files
from phi35.training.checkpoint_files import CheckpointReader, complete_checkpoints

ROOT = Path(__file__).resolve().parents[2]


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
        "save_interval": 2,
        "keep_last": 0,
        "output_dir": str(output),
        "export": False,
        "trackers": [],
    }
    return {**base, **changes}


def losses_and_warnings(rank, world_size, values):
    """Losses by step as hex, and what went to stderr."""
    import contextlib
    import io

    from phi35.training.config import TrainingConfig
    from phi35.training.run import train

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        summary = train(TrainingConfig(**values), device="cpu")
    losses = {} if summary is None else {line["step"]: line["loss"].hex() for line in summary.history}
    return losses, said.getvalue()


@pytest.fixture(scope="module")
def whole_run(text_folder, tmp_path_factory):
    """Two ranks' checkpoints after two and four steps, and the losses of six."""
    folder = tmp_path_factory.mktemp("whole")
    losses, _ = run_distributed(losses_and_warnings, 2, settings(text_folder, folder, max_steps=6))[0]
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    return folder, losses


def flip_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    path.write_bytes(bytes(content))


def test_one_flipped_bit_in_any_file_is_named_and_the_checkpoint_before_is_taken(text_folder, tmp_path, whole_run):
    whole, losses = whole_run
    files = sorted((whole / "checkpoints" / "step-00000004").iterdir())
    assert {path.name.split("-")[0].split(".")[0] for path in files} == {"tensors", "random", "trainer", "manifest"}
    for number, path in enumerate(files):
        copy = tmp_path / path.name
        shutil.copytree(whole / "checkpoints" / "step-00000004", copy)
        flip_bit(copy / path.name, 7919 * (number + 1))
        with pytest.raises(ValueError, match=path.name):
            CheckpointReader(copy)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damaged = run / "checkpoints" / "step-00000004"
    flip_bit(damaged / files[-1].name, 5555)
    got, said = run_distributed(losses_and_warnings, 2, settings(text_folder, run, max_steps=6))[0]
    assert f"warning: checkpoint {str(damaged)!r} is damaged: {files[-1].name} is altered" in said
    assert f"goes on from {str(damaged.with_name('step-00000002'))!r}" in said
    assert got == losses
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged-step-00000004", *(f"step-0000000{step}" for step in (2, 4, 6))]


def test_when_all_are_damaged_all_are_named(text_folder, tmp_path, whole_run):
    run = tmp_path / "run"
    shutil.copytree(whole_run[0], run)
    for step in (2, 4):
        flip_bit(run / "checkpoints" / f"step-0000000{step}" / "trainer.json", 100 * step)
    with pytest.raises(RankError, match=r"(?s)no good checkpoint is left.*step-00000004.*step-00000002"):
        run_distributed(losses_and_warnings, 2, settings(text_folder, run))
    assert len(complete_checkpoints(run / "checkpoints")) == 2  # nothing is put aside without one to go on from


class Payload:
    """Pickled, it makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def forge(folder, change):
    """Rewrites a manifest with valid checksums, as an attacker could."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = checkpoint_files.describe_file(folder / name)
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    manifest["sha256"] = checkpoint_files._text_digest(body)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_pickles_in_a_checkpoint_never_run(text_folder, tmp_path, whole_run):
    run, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(whole_run[0], run)
    newest = run / "checkpoints" / "step-00000004"
    for name in ("pytorch_model.bin", "optimizer.pt", "random-00000.pkl", "mp_rank_00_model_states.pt"):
        (newest / name).write_bytes(pickle.dumps(Payload(ran)))  # beside the files: not read
    losses, said = run_distributed(losses_and_warnings, 2, settings(text_folder, run, max_steps=6))[0]
    assert losses == whole_run[1] and "warning" not in said and not ran.exists()

    def renamed(manifest):
        manifest["files"]["optimizer.pt"] = {}

    forge(newest, renamed)
    with pytest.raises(ValueError, match=r"refused.*optimizer\.pt.*never pickles"):
        CheckpointReader(newest)

    def outside(manifest):
        del manifest["files"]["optimizer.pt"]
        manifest["tensors"][0]["file"] = "../../../secret.safetensors"

    forge(newest, outside)
    with pytest.raises(ValueError, match="refused.*secret"):
        CheckpointReader(newest)
    older = run / "checkpoints" / "step-00000002"
    tensors = next(older.glob("tensors-00000-*"))
    tensors.write_bytes(pickle.dumps(Payload(ran)))  # in the place of tensors, with the right checksum
    forge(older, lambda manifest: None)
    reader = CheckpointReader(older)
    name = next(piece["name"] for piece in reader.manifest["tensors"] if piece["file"] == tensors.name)
    with pytest.raises(ValueError, match=f"{tensors.name}.*cannot be read"):
        reader.read("parameter", name)
    torch.save(Payload(ran), newest / "x.safetensors")
    assert not ran.exists()
    with open(newest / "optimizer.pt", "rb") as file:
        pickle.load(file)
    assert ran.exists()  # the payload would have worked


def test_no_code_of_the_framework_unpickles():
    """Every call that could: torch.load (weights only or not), pickle, numpy with pickles, joblib, dill."""
    forbidden = ("pickle.load", "torch.load(", "joblib", "dill", "allow_pickle=True", "Unpickler", "marshal.load")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("phi35", "moe", "vision", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if any(word in line for word in forbidden) and "weights_only=True" not in line
    ]
    assert found == []


def run_on_a_full_disk(rank, world_size, values, full_from):
    """A training in which no file can grow beyond a few kilobytes (as on a full disk) from a step on."""
    from phi35.training.engine import Engine

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails with an error
    step, calls = Engine.step, []

    def limited_step(self, *arguments):
        calls.append(1)
        if len(calls) == full_from - 2:
            time.sleep(1)  # until what is written beside the training is on disk
        low = full_from <= len(calls) < full_from + 2
        limit = 20_000 if low else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return step(self, *arguments)

    Engine.step = limited_step
    return losses_and_warnings(rank, world_size, values)


def message_of_a_full_disk(rank, world_size, values, full_from):
    from phi35.training.saving import SaveError

    try:
        run_on_a_full_disk(rank, world_size, values, full_from)
    except SaveError as error:
        return str(error)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(text_folder, tmp_path, asynchronous):
    values = settings(text_folder, tmp_path / "run", max_steps=9, save_interval=3, async_save=asynchronous)
    (losses, said), _ = run_distributed(run_on_a_full_disk, 2, values, 6)
    root = tmp_path / "run" / "checkpoints"
    assert "warning: the checkpoint after step 6 could not be written (rank 0:" in said and "the run goes on" in said
    assert f"the newest complete checkpoint is {str(root / 'step-00000003')!r}" in said
    assert sorted(path.name for path in root.iterdir()) == ["step-00000003", "step-00000009"]
    for folder in root.iterdir():
        CheckpointReader(folder)
    roomy = {**values, "output_dir": str(tmp_path / "roomy")}
    assert run_distributed(losses_and_warnings, 2, roomy)[0][0] == losses and len(losses) == 9


def run_with_its_log_on_the_full_disk(rank, world_size, values, folder):
    """A process whose own output cannot be written from step 3 on, nor anything else: status and log."""
    from rank_processes import Ranks

    def main(_):
        from phi35.cli.train import run
        from phi35.training.engine import Engine

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        step, calls = Engine.step, []

        def limited_step(self, *arguments):
            calls.append(1)
            limit = 100 if 3 <= len(calls) < 6 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return step(self, *arguments)

        Engine.step = limited_step
        os.environ.pop("TQDM_DISABLE")
        return run(values, ["--device", "cpu"])

    (ended,) = Ranks(1, _free_port(), Path(folder), main).wait_for(timeout=60)
    return ended.status, ended.output


def test_a_log_on_the_full_disk_does_not_end_the_run(text_folder, tmp_path):
    values = settings(text_folder, tmp_path / "run", max_steps=8, trackers=["tensorboard"])
    ((status, output),) = run_distributed(run_with_its_log_on_the_full_disk, 1, values, str(tmp_path), init=False)
    assert status == 0, output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000006", "step-00000008"]


def test_a_full_disk_at_the_end_stops_with_a_message(text_folder, tmp_path):
    values = settings(text_folder, tmp_path)
    for message in run_distributed(message_of_a_full_disk, 2, values, 4):
        assert re.search(r"the checkpoint after step 4 could not be written.*step-00000002", message)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    CheckpointReader(tmp_path / "checkpoints" / "step-00000002")


def test_numbers_wait_for_room_on_the_disk(tmp_path, capsys):
    """A real file that cannot grow: nothing is lost when it can again, and no half line stays."""
    from phi35.training.line_file import LineFile

    lines = [{"step": step, "loss": step / 3} for step in range(1, 9)]
    file = LineFile(tmp_path / "metrics.jsonl", 0)
    file.append(lines[:2])
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        file.append(lines[2:4])
        file.append(lines[4:5])
        assert (tmp_path / "metrics.jsonl").stat().st_size <= size + 10
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    file.append(lines[5:])
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines
    file.rewind(3)
    file.append(lines[3:4])
    assert LineFile(tmp_path / "metrics.jsonl", 100).lines == lines[:4]
