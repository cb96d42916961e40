"""The training benchmark: it runs on tiny models, names what fails and goes on, and counts operations as it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "train_step.py"


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, SCRIPT, "--tiny", "--steps", "1", "--warmup", "1", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])["cases"]


def test_cases_run_and_a_failing_one_is_named():
    (moe,) = run("--cases", "moe-8")
    assert moe["losses"][0] == pytest.approx(7.0, abs=0.2)
    assert {"forward", "backward", "update", "total"} <= set(moe["ms"])
    (late,) = run("--cases", "mini", "--case-limit", "0.01")
    assert late["error"].startswith("over 0 s")


def test_operations_are_six_per_active_parameter_and_causal_attention(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from train_step_cases import CASES, flops_per_step

    tokens = 4 * 4096
    attention = 6 * 32 * 3072 * 4097
    mini = flops_per_step(CASES["mini"])["with embeddings"] / tokens
    norms = 6 * 65 * 3072  # vectors are parameters without a product
    assert mini == pytest.approx(6 * 3_821_079_552 - norms + attention, rel=1e-9)
    moe = flops_per_step(CASES["moe-8"])["with embeddings"] / tokens
    assert moe == pytest.approx(6 * 1.857e9 + 6 * 8 * 4096 * 4097, rel=1e-3)
    assert flops_per_step(CASES["vision"])["needed"] > 1.15 * 24.7e9 * 6 * 2048
