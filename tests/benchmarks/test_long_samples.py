"""The benchmark of long samples runs tiny on two processes of a CPU, and both forms agree."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

from distributed import run_distributed

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "long_samples.py"


def run_script(rank, world_size):
    """What the script prints as one of two ranks of a launcher."""
    sys.argv = [str(SCRIPT), "--device", "cpu", "--rounds", "2"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return printed.getvalue()


def test_one_process_and_two_agree() -> None:
    first, second = run_distributed(run_script, 2, init=False)
    record = json.loads(first.splitlines()[-1])
    (line,) = record["lengths"]
    assert not second and record["ranks"] == 2 and "times as fast" in first
    # Measured: the same loss, gradients at most 5.8e-7 of a tensor's norm apart.
    assert line["loss_difference"] < 1e-5 and line["gradient_error"] < 1e-5
    assert line["together"]["tokens_per_second"] > 0
