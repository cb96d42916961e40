"""The benchmarks of speculation and of pictures to the first token run on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def record_of(script: str, *options: str) -> dict[str, Any]:
    """The JSON line that a benchmark prints last."""
    command = [sys.executable, str(BENCHMARKS / script), "--small", "--commit", "none", *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads(result.stdout.splitlines()[-1])
    assert "failures" not in record
    return record


def test_speculation_takes_what_is_right() -> None:
    options = ("--models", "mini", "--counts", "3", "--chances", "1", "--draft-layers", "1", "--new-tokens", "17")
    rows = record_of("speculation.py", *options, "--prompt", "8")["rows"]
    assert [row["drafts"] for row in rows] == ["none", "free", "1 layers"]
    for row in rows[1:]:
        assert row["acceptance"] == 1 and row["otherwise"] == 0
        assert row["tokens_per_step"] == 4, "three drafted and one chosen: 16 tokens in 4 steps"


def test_first_token_times_are_beside_their_bounds() -> None:
    (row,) = record_of("vision_first_token.py", "--pictures", "2", "--crops", "4", "--rounds", "1")["rows"]
    assert row["crops"] == 10 and row["tokens"] == row["image_tokens"] + 64
    stages = row["tower_bound"] + row["projector_bound"] + row["prefill_bound"]
    assert 0 < row["bound"] == stages < row["first"]
    assert 0 < row["tower"] and 0 < row["again"]
