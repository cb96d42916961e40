"""The benchmark of the whole sparse model runs on a tiny one, with the experts frozen."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "full_moe.py"


def test_builds_reads_generates_and_trains() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--steps", "2", "--new-tokens", "4"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["training"]["last_loss"] < record["training"]["first_loss"]
    assert record["training"]["frozen_tensors"] == 2 * 2  # gate_up_proj and down_proj of two layers
    assert record["training"]["trained_parameters"] < record["build"]["parameters"]
    assert record["generate"]["new_tokens"] == 4 and record["forward"]["milliseconds"] > 0
