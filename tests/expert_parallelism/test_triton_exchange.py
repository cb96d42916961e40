"""The exchange with the Triton kernels, on two processes on the CPU in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_values_and_gradients_equal_a_float64_loop_over_all_experts(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "interpreted_exchange.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "rendezvous"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (text, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-3000:]
        for case, errors in json.loads(text).items():
            print(case, errors)
            assert max(errors.values()) <= 2e-6, (case, errors)
