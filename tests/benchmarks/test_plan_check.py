"""The check of the planner on a GPU: it runs on tiny models, and its status tells of a plan that misses."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "plan_check.py"


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, SCRIPT, "--tiny", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_cases_run_through_the_engine_and_are_compared():
    done = run("--cases", "mini-8 ZeRO-1 checkpointing", "mini-8 ZeRO-2 selective", "moe-2")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    one, two, moe = record["cases"]
    assert abs(one["ratio"] - 1) < 0.03 and abs(two["ratio"] - 1) < 0.03 and abs(moe["ratio"] - 1) < 0.1
    assert one["all_gb"] >= one["measured_gb"] > 0 and one["at"] == "reduction of gradients"
    assert run("--cases", "mini-8", "--tolerance", "0.0001").returncode == 1
