"""The decoder's Triton kernels against float64, on the CPU in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report():
    """Errors of every case, from one process under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "fused_kernels.py"
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("part", ["norms", "activations", "rotary", "head"])
def test_outputs_and_gradients_equal_float64(report, part):
    assert report[part]
    for name, errors in report[part].items():
        assert errors["outputs"] < 1e-6, name  # measured: at most 7e-8
        # Measured: at most 2.7e-7, and 2.7e-6 with 9,001 logits a row.
        assert errors["gradients"] < (1e-5 if name == "two blocks" else 1e-6), name


def test_optimizer_kernel_equals_torch(report):
    assert report["optimizer"]["float32 states"] < 1e-6  # measured: 4e-8
    assert report["optimizer"]["float32 states, weights"] < 2**-7  # a cast that cuts off
    # Stochastic rounding takes the same noise: nothing differs.
    assert report["optimizer"]["float32 states, left alone"] and report["optimizer"]["bfloat16 states, left alone"]
    assert report["optimizer"]["bfloat16 states"] == 0


def test_the_norm_of_gradients_equals_float64(report):
    assert len(report["gradient norm"]) == 20
    for name, error in report["gradient norm"].items():
        assert error < 1e-6, name  # measured: at most 6e-8


def test_squares_that_the_backward_pass_leaves_are_taken_where_they_are_the_whole_gradients(report):
    assert len(report["offered squares"]) == 5
    assert max(report["offered squares"].values()) < 1e-6  # measured: 4e-8


def test_whole_models_equal_the_plain_form(report):
    assert len(report["models"]) == 3
    assert max(report["models"].values()) < 1e-5  # measured: 8e-7
