"""The benchmark of the large sparse model on a small device runs on a tiny one."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "moe_on_80gb.py"


def test_generates_from_host_memory_what_experts_in_place_give() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--small", "--parts", "bf16", "check", "--budgets", "small"]
    command += ["--prompt", "24", "--new-tokens", "8"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    ahead, not_ahead, check = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert ahead["copied_ahead"] > 0 and not_ahead["copied_ahead"] == 0
    assert 0 < ahead["copied_when_needed"] < not_ahead["copied_when_needed"] <= 1
    assert check["layers_differ_1"] == check["layers_differ_500"] == 0
    assert check["prompt_difference"] == check["step_difference"] == 0 and check["same_greedy_tokens"] == 1
