"""The benchmark of packed rows runs small on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "packed_rows.py"


def test_measures_attention_model_and_reading() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--small"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads(result.stdout.splitlines()[-1])
    assert len(record["attention"]) == 2 * (4 * 2 + 1) and all(line["ms"] > 0 for line in record["attention"])
    assert [line["rows"] for line in record["model"]][:2] == ["plain", "whole rows"] and len(record["model"]) == 5
    assert record["reading"]["filled"] > 0.99
