"""Experts with additions on the Triton kernels against torch's products in float64, in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Errors of every case, from one process under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "interpreted_low_rank.py"
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "case",
    [
        "rank 16",
        "rank 3, ragged, gelu",
        "two tiles, two adapters",
        "rank 128",
        "gate_up alone",
        "down alone",
        "int4",
    ],
)
def test_output_and_gradients_equal_torchs_products(report: dict[str, Any], case: str) -> None:
    factors = 8 if "two adapters" in case else 2 if "alone" in case else 4
    assert len(report[case]) == 3 + factors
    assert max(report[case].values()) < 2e-6  # measured: at most 8e-7


def test_float16_is_within_rounding(report: dict[str, Any]) -> None:
    # Measured: at most 9.9e-4; half of float16's spacing is 4.9e-4.
    assert max(report["half"].values()) < 2e-3


@pytest.mark.parametrize("case", ["checkpointed", "odd address", "one factor"])
def test_the_same_bits(report: dict[str, Any], case: str) -> None:
    """When the layer is computed again, when factors lie at odd addresses, and when one factor alone is trained."""
    assert report["other"][case] == 0
