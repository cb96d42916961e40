"""Export of any training checkpoint: what the running model computes, all experts, bounded memory, no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from stepped_engines import build_engine, make_steps

ROOT = Path(__file__).resolve().parents[2]


def logits_and_checkpoint(rank, world_size, changes, root):
    """Logits of a model in training after two steps, and its checkpoint."""
    from phi35.training.checkpoint import model_config_to_dict
    from phi35.training.saving import save

    engine = build_engine(changes)
    make_steps(rank, engine, left_out=(2, 3))
    state = {
        "data": {},
        "training_config": engine.config.to_dict(),
        "model_config": model_config_to_dict(engine.model.config),
    }
    folder = save(root, 2, engine, state)
    engine.deepspeed.eval()
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        logits = engine.deepspeed(input_ids=ids).logits.float()
    return str(folder), logits


MOE = {"model": "tiny-phi-3.5-moe", "router_aux_loss_coef": 0.01}


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"zero_stage": 0}),
        (2, {"zero_stage": 3}),
        (2, {**MOE, "zero_stage": 1, "ep_size": 2}),
        (4, {**MOE, "zero_stage": 2, "ep_size": 4}),
        (2, {**MOE, "zero_stage": 1, "ep_size": 2, "dtype": "bfloat16"}),
    ],
    ids=["zero0", "zero3", "zero1-ep2", "zero2-ep4", "zero1-ep2-bf16"],
)
def test_an_exported_checkpoint_computes_what_the_run_did(tmp_path, world_size, changes):
    import phi35
    from phi35.training.export import export

    results = run_distributed(logits_and_checkpoint, world_size, {**changes, "global_batch_size": 8}, str(tmp_path))
    folder, logits = results[0]
    exported = export(folder, tmp_path / "exported")
    model, _ = phi35.load(exported, device="cpu", dtype="auto")
    assert model.dtype == getattr(torch, changes.get("dtype", "float32"))
    with torch.no_grad():
        got = model(input_ids=torch.arange(5, 25).view(2, 10)).logits.float()
    error = float((got - logits).abs().max())
    print(f"{changes}: logits differ by at most {error:.1e}")  # measured: 0, with four ranks 1.2e-7
    assert error <= 1e-6


EXPORT = """
import sys
from phi35.training.export import export
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
import phi35.training.run, tokenizers, jinja2, safetensors.torch  # loaded before the measurement
export(sys.argv[1], sys.argv[2] + "-first")  # what is loaded on first use, and its memory
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
export(sys.argv[3], sys.argv[2])
print(status("VmHWM") - before)
"""


def write_checkpoint(root, config):
    """A complete checkpoint of random weights, the experts in two pieces, as two ranks would write them."""
    from phi35.loading import create
    from phi35.training import checkpoint_files as files
    from phi35.training.checkpoint import model_config_to_dict
    from phi35.training.config import TrainingConfig
    from phi35.training.tensor_writer import TensorWriter

    folder = files.begin(root, 1)
    writers = [TensorWriter(folder, f"{rank:05d}", expected_bytes=2**27) for rank in range(2)]
    model = create(config, device="cpu", dtype="float32", seed=0)
    for name, parameter in model.named_parameters():
        if ".mlp.experts." not in name:
            writers[0].add("parameter", name, parameter)
            continue
        rows = parameter.shape[0]
        for rank, half in enumerate(parameter.chunk(2)):
            writers[rank].add("parameter", name, half, offset=rank * rows // 2, rows=rows)
    for writer in writers:
        writer.finish_copies()
    training = TrainingConfig(model="tiny-phi-3.5-moe", dtype="bfloat16").to_dict()
    trainer = {"step": 1, "training_config": training, "model_config": model_config_to_dict(model.config)}
    described = {name: entry for writer in writers for name, entry in writer.files.items()}
    pieces = [piece for writer in writers for piece in writer.pieces]
    files.commit(folder, 1, trainer=json.dumps(trainer), pieces=pieces, files=described)
    sizes = {name: parameter.numel() * 4 for name, parameter in model.named_parameters()}
    return files.complete_checkpoints(root)[-1], sizes


def test_exporting_holds_a_few_tensors_and_not_the_model(tmp_path):
    from phi35 import presets

    tiny = presets.get("tiny-phi-3.5-moe")
    small, _ = write_checkpoint(tmp_path / "small", tiny)
    larger = {"hidden_size": 256, "num_local_experts": 16, "num_hidden_layers": 6, "intermediate_size": 768}
    larger |= {"num_attention_heads": 16, "num_key_value_heads": 4}  # the tiny preset's head size
    folder, sizes = write_checkpoint(tmp_path / "large", tiny.replace(**larger))
    command = [sys.executable, "-c", EXPORT, str(small), str(tmp_path / "exported"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, total, largest = int(done.stdout.split()[-1]), sum(sizes.values()), max(sizes.values())
    print(
        f"{total / 2**20:.0f} MiB of weights, largest tensor {largest / 2**20:.0f}: peak {peak / 2**20:.0f} MiB above"
    )
    assert total > 9 * largest
    assert peak < largest  # measured: 7 MiB; one of the 16 experts in the largest tensor has 1.5
    names = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert names["num_local_experts"] == 16
    import phi35

    model, _ = phi35.load(tmp_path / "exported", device="cpu", dtype="auto")
    from phi35.training.checkpoint_files import CheckpointReader

    reader = CheckpointReader(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reader.read("parameter", name).bfloat16()), name
