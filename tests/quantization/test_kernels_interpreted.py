"""The kernels for weights in few bits against restored weights, on the CPU in Triton's interpreter."""

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
FORMATS = ["int4", "int4_g32_zeros", "int4_rows", "int4_bytes_zeros", "int8", "int8_zeros", "int8_bytes", "fp8"]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Errors of every case, from one process under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "interpreted_few_bits.py"
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", [*FORMATS, "fp8_groups"])
def test_products_with_one_vector(report: dict[str, Any], name: str) -> None:
    errors = report[f"vector {name}"]
    assert set(errors) == {"add", "gate_up", "query", "keys", "values"}
    # Measured: integers at most 4.2e-5, from the vector's rounding to 2^-16 of its largest of 16; e4m3 3.2e-7.
    assert max(errors.values()) < (2e-6 if "fp8" in name else 2e-4)


@pytest.mark.parametrize("name", [*FORMATS, "fp8_groups"])
def test_products_with_several_vectors_and_restored_rows(report: dict[str, Any], name: str) -> None:
    errors = report[f"matrix {name}"]
    # Measured: at most 8.8e-8.
    assert errors.pop("restored") == 0 and max(errors.values()) < 1e-6


@pytest.mark.parametrize("name", ["int4", "zeros", "bytes", "fp8"])
def test_experts(report: dict[str, Any], name: str) -> None:
    errors = report[f"experts {name}"]
    # Measured: at most 1.5e-7.
    assert errors["empty"] == 0 and max(errors["few"], errors["many"]) < 1e-6


@pytest.mark.parametrize("name", ["matrix", "experts"])
def test_half_precision_within_rounding(report: dict[str, Any], name: str) -> None:
    # Measured: at most 4.7e-4; half of float16's spacing is 4.9e-4.
    assert max(report[f"half {name}"].values()) < 2e-3


@pytest.mark.parametrize("name", ["dense", "in one group", "sparse", "mixed"])
def test_whole_steps_equal_the_forward_pass(report: dict[str, Any], name: str) -> None:
    errors = report[f"step {name}"]
    # Measured: at most 1.8e-4, two layers deep.
    assert errors["wrong"] == 0 and errors["logits"] < 5e-4
    # The two products of a dense feed-forward and, but for the first layer, qkv find their vector prepared. LayerNorms
    # are not left, and nothing is for codes of 8 bits unless that is asked for.
    assert errors["prepared"] == {"dense": 5, "in one group": 5, "sparse": 0, "mixed": 0}[name]
