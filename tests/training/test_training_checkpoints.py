"""Training checkpoints: exact resume, other world sizes, stages and expert splits, damage, export."""

import json
import shutil

import pytest
import torch
from distributed import run_distributed

from phi35.training import checkpoint_files
from phi35.training.checkpoint_files import CheckpointReader
from phi35.training.tensor_writer import TensorWriter

NOISY = {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
STILL_MOE = {"router_type": "topk", "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        lines = [f"value_{number}_{line} = compute({line * 7 % 13})" for line in range(40)]
        (folder / f"file_{number}.py").write_text("\n".join(lines))
    return str(folder)


def settings(text_folder, output, **changes):
    base = {
        "model": "tiny-phi-3.5-mini",
        "data": text_folder,
        "sequence_length": 16,
        "global_batch_size": 4,
        "max_steps": 6,
        "warmup_steps": 2,
        "adam_epsilon": 1e-4,
        "output_dir": str(output),
        "export": False,
        "keep_last": 0,
    }
    return {**base, **changes}


def train_and_read(rank, world_size, values):
    """Losses as hex by step, of a run in this process."""
    from phi35.training.config import TrainingConfig
    from phi35.training.run import train

    summary = train(TrainingConfig(**values), device="cpu")
    return None if summary is None else {line["step"]: line["loss"].hex() for line in summary.history}


def tensors_of(folder):
    reader = CheckpointReader(folder)
    return {
        (kind, name): reader.read(kind, name)
        for kind in ("parameter", "exp_avg", "exp_avg_sq")
        for name in reader.names(kind)
    }


def assert_same_tensors(first, second):
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"zero_stage": 0, "model_overrides": NOISY}),
        (1, {"zero_stage": 0, "model_overrides": NOISY, "dtype": "bfloat16"}),
        (1, {"model_overrides": NOISY, "dtype": "bfloat16", "optimizer_dtype": "bfloat16", "kernels": "fused"}),
        (2, {"zero_stage": 0, "model": "tiny-phi-3.5-moe", "dtype": "bfloat16", "micro_batch_size": 1}),
        (2, {"zero_stage": 1, "model_overrides": NOISY, "dtype": "bfloat16", "micro_batch_size": 1}),
        (2, {"zero_stage": 3, "model_overrides": NOISY}),
        (2, {"zero_stage": 2, "model": "tiny-phi-3.5-moe", "ep_size": 2, "router_aux_loss_coef": 0.01}),
        (2, {"zero_stage": 1, "model": "tiny-phi-3.5-moe", "ep_size": 2, "dtype": "bfloat16"}),
    ],
    ids=["zero0", "zero0-bf16", "bf16-states", "zero0-ep2-bf16", "zero1-bf16", "zero3", "zero2-ep2", "zero1-ep2-bf16"],
)
def test_three_steps_and_three_more_equal_six_to_the_bit(text_folder, tmp_path, world_size, changes):
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    values = settings(text_folder, straight, **changes, save_interval=3)
    losses = run_distributed(train_and_read, world_size, values)[0]
    shutil.copytree(straight, parted)
    shutil.rmtree(parted / "checkpoints" / "step-00000006")
    assert run_distributed(train_and_read, world_size, {**values, "output_dir": str(parted)})[0] == losses
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert_same_tensors(straight / "checkpoints" / "step-00000006", parted / "checkpoints" / "step-00000006")


def test_saving_changes_nothing(text_folder, tmp_path):
    changes = {"zero_stage": 1, "dtype": "bfloat16", "model_overrides": NOISY}
    seldom = run_distributed(train_and_read, 1, settings(text_folder, tmp_path / "a", **changes))
    often = run_distributed(train_and_read, 1, settings(text_folder, tmp_path / "b", **changes, save_interval=1))
    assert seldom == often
    assert_same_tensors(tmp_path / "a/checkpoints/step-00000006", tmp_path / "b/checkpoints/step-00000006")


MOE = {"model": "tiny-phi-3.5-moe", "model_overrides": STILL_MOE, "router_aux_loss_coef": 0.0}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((2, {**MOE, "zero_stage": 1, "ep_size": 2}), [(1, {**MOE, "zero_stage": 1}), (2, {**MOE, "zero_stage": 3})]),
        ((1, {**MOE, "zero_stage": 0}), [(2, {**MOE, "zero_stage": 2, "ep_size": 2})]),
        ((2, {"zero_stage": 1}), [(1, {"zero_stage": 3}), (1, {"zero_stage": 0}), (3, {"zero_stage": 2})]),
        ((2, {"zero_stage": 3}), [(1, {"zero_stage": 1}), (3, {"zero_stage": 3})]),
    ],
    ids=["ep2", "ep1", "zero1", "zero3"],
)
def test_any_world_size_stage_and_expert_split_continues(text_folder, tmp_path, saved, loaded):
    world_size, changes = saved
    first = tmp_path / "first"
    values = settings(text_folder, first, **changes, save_interval=3, global_batch_size=6)
    losses = run_distributed(train_and_read, world_size, values)[0]
    shutil.rmtree(first / "checkpoints" / "step-00000006")
    for number, (other_size, other) in enumerate(loaded):
        again = tmp_path / f"again-{number}"
        shutil.copytree(first, again)
        values = settings(text_folder, again, **other, global_batch_size=6)
        got = run_distributed(train_and_read, other_size, values)[0]
        for step in (4, 5, 6):  # measured: at most 5e-7 of a loss of 7
            assert float.fromhex(got[step]) == pytest.approx(float.fromhex(losses[step]), abs=1e-6)


@pytest.fixture
def small_checkpoint(tmp_path):
    folder = checkpoint_files.begin(tmp_path, 7)
    writer = TensorWriter(folder, "00000")
    writer.add("parameter", "a.weight", torch.arange(12.0).view(4, 3))
    writer.add("parameter", "experts", torch.ones(2, 3), offset=2, rows=4)
    writer.add("parameter", "experts_other", torch.zeros(1))
    writer.finish_copies()
    other = TensorWriter(folder, "00001")
    other.add("parameter", "experts", torch.zeros(2, 3), offset=0, rows=4)
    other.finish_copies()
    described = {**writer.files, **other.files}
    pieces = writer.pieces + other.pieces
    return checkpoint_files.commit(folder, 7, trainer='{"step": 7}', pieces=pieces, files=described)


def test_pieces_are_put_together_and_cut_anew(small_checkpoint):
    reader = CheckpointReader(small_checkpoint)
    assert reader.shape("parameter", "experts") == (4, 3)
    assert torch.equal(reader.read("parameter", "experts"), torch.tensor([0.0, 0, 1, 1])[:, None].expand(4, 3))
    assert reader.read("parameter", "experts", offset=1, rows=2)[:, 0].tolist() == [0.0, 1.0]
    assert torch.equal(reader.read("parameter", "a.weight", offset=1, rows=1), torch.tensor([[3.0, 4.0, 5.0]]))
    with pytest.raises(ValueError, match="no exp_avg of 'a.weight'"):
        reader.read("exp_avg", "a.weight")


def test_an_altered_byte_in_any_file_is_named(small_checkpoint):
    for path in sorted(small_checkpoint.iterdir()):
        content = path.read_bytes()
        for position in (len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[position] ^= 1
            path.write_bytes(bytes(changed))
            with pytest.raises(ValueError, match=path.name):
                CheckpointReader(small_checkpoint)
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=path.name):
            CheckpointReader(small_checkpoint)
        path.write_bytes(content)
    CheckpointReader(small_checkpoint)


def test_missing_files_are_named(small_checkpoint):
    (small_checkpoint / "trainer.json").unlink()
    with pytest.raises(ValueError, match=r"trainer\.json is missing"):
        CheckpointReader(small_checkpoint)


def test_only_complete_checkpoints_count_and_old_ones_go(small_checkpoint):
    root = small_checkpoint.parent
    for step in (8, 12, 100):
        shutil.copytree(small_checkpoint, root / checkpoint_files.folder_name(step))
    (root / "step-00000100" / "manifest.json").unlink()
    (root / ".writing-step-00000200").mkdir()
    names = [path.name for path in checkpoint_files.complete_checkpoints(root)]
    assert names == ["step-00000007", "step-00000008", "step-00000012"]
    assert [path.name for path in checkpoint_files.outdated(root, keep_last=1)] == names[:2]
    assert [path.name for path in checkpoint_files.outdated(root, keep_last=1, keep_every=4)] == names[:1]
    assert checkpoint_files.outdated(root, keep_last=0, keep_every=4) == []
    checkpoint_files.begin(root, 201)
    assert not (root / ".writing-step-00000200").exists()


def test_damage_stops_a_resume_with_the_files_name(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, max_steps=1, warmup_steps=0)
    run_distributed(train_and_read, 1, values)
    path = tmp_path / "checkpoints" / "step-00000001" / "tensors-00000-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(RuntimeError, match=f"{path.name} is altered"):
        run_distributed(train_and_read, 1, {**values, "max_steps": 2})


def test_a_run_begun_anew_is_not_outlived_by_the_one_before(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, save_interval=3, keep_last=2)
    run_distributed(train_and_read, 1, values)
    anew = {**values, "resume": False, "max_steps": 4, "save_interval": 2, "export": True}
    run_distributed(train_and_read, 1, anew)
    names = [path.name for path in checkpoint_files.complete_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000002", "step-00000004"]
    assert (tmp_path / "checkpoints-replaced" / "step-00000006" / "manifest.json").is_file()
    losses = run_distributed(train_and_read, 1, {**values, "max_steps": 5})[0]
    assert sorted(losses) == [1, 2, 3, 4, 5]


def test_a_folder_that_cannot_be_written_is_named_on_every_rank(text_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match="output_dir .*file.* cannot be written"):
        run_distributed(train_and_read, 2, settings(text_folder, tmp_path / "file"))


def test_data_options_that_the_source_does_not_take_are_named(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, data_options={"augmentation": True})
    with pytest.raises(RuntimeError, match=r"augmentation.*open_text"):
        run_distributed(train_and_read, 1, values)


def test_another_models_checkpoint_is_refused(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, max_steps=1, warmup_steps=0)
    run_distributed(train_and_read, 1, values)
    with pytest.raises(RuntimeError, match="another model"):
        run_distributed(train_and_read, 1, {**values, "model_overrides": {"num_hidden_layers": 1}})


def test_export_gives_the_trained_weights(text_folder, tmp_path):
    import phi35
    from phi35.training.export import export

    values = settings(text_folder, tmp_path, **MOE, zero_stage=1, ep_size=2, max_steps=2, export=True)
    run_distributed(train_and_read, 2, values)
    stored = {
        name: value
        for (kind, name), value in tensors_of(tmp_path / "checkpoints" / "step-00000002").items()
        if kind == "parameter"
    }
    again = export(tmp_path, tmp_path / "again")
    for folder in (tmp_path / "model", again):
        model, processor = phi35.load(str(folder), device="cpu", dtype="float32")
        assert {name for name, _ in model.named_parameters()} == set(stored)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, stored[name]), name
        assert processor is not None and processor.tokenizer.encode("x")
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["world_size"] == 2 and "torch" in described["versions"]
