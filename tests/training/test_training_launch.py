"""The scripts as a user starts them: through DeepSpeed's launcher and without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["max_steps=6", "warmup_steps=1", "global_batch_size=4", "sequence_length=32", "save_interval=3"]


def launch(command, tmp_path, text=None):
    folder = tmp_path / "text"
    folder.mkdir(exist_ok=True)
    (folder / "a.py").write_text("def answer(question):\n    return question * 6\n" * 60)
    keep = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**keep, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)


def test_mistakes_end_in_one_line(tmp_path):
    script = str(ROOT / "scripts" / "train_moe.py")
    done = launch([sys.executable, script, "max_step=3"], tmp_path)
    assert done.returncode == 2 and "max_step" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_launcher_starts_two_ranks_with_expert_parallelism(tmp_path):
    script = str(ROOT / "scripts" / "train_moe.py")
    output = tmp_path / "run"
    arguments = [*QUICK, f"data={tmp_path / 'text'}", f"output_dir={output}"]
    done = launch(["deepspeed", "--num_gpus", "2", script, *arguments], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ep_size: 2" in done.stdout
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert all(abs(sum(row) - 1) < 1e-3 for row in lines[0]["expert_load"])
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    for name in ("curves.png", "training_config.yaml", "run.json", "model/config.json", "model/model.safetensors"):
        assert (output / name).is_file(), name
    import phi35

    assert isinstance(phi35.generate(prompt="def", model=str(output / "model"), max_new_tokens=4, device="cpu"), str)


@pytest.mark.slow
def test_the_launcher_without_a_number_of_processes_and_a_ready_file(tmp_path):
    script = str(ROOT / "scripts" / "train_moe.py")
    output = tmp_path / "run"
    ready = ROOT / "deepspeed_configs" / "float32_zero1.json"
    arguments = [*QUICK, f"data={tmp_path / 'text'}", f"output_dir={output}", f"--deepspeed_config={ready}"]
    done = launch(["deepspeed", script, *arguments], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (output / "model" / "model.safetensors").is_file()
