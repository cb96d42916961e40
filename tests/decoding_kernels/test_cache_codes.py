"""The kernels over caches of codes against their plain forms, on the CPU in Triton's interpreter."""

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
KINDS = ["int8", "fp8"]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Errors of every case, from one process under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "interpreted_cache_codes.py"
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["one", "one window", "grouped"])
def test_tokens_are_stored_and_attended_to_as_the_plain_form_does(report: dict[str, Any], case: str, kind: str) -> None:
    """Also a head of zeros, a row past its end, shuffled pages. Measured: every code the same, errors 1.5e-7."""
    found = report[f"{case} {kind}"]
    assert found["codes"] == 0
    assert max(found["query"], found["attention"]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_float16_queries_differ_by_rounding_alone(report: dict[str, Any], kind: str) -> None:
    """Measured: 8.4e-4 of the codes are neighbours, where float16 inputs were rounded otherwise; errors 3.6e-4."""
    found = report[f"grouped half {kind}"]
    assert found["codes"] < 3e-3
    assert max(found["query"], found["attention"]) < 2e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["prompt", "prompt paged"])
def test_a_prompts_own_chunk_sees_what_the_cache_holds(report: dict[str, Any], case: str, kind: str) -> None:
    found = report[f"{case} {kind}"]
    assert found["codes"] == 0 and found["as_read"] == 0
    assert found["projected"] < 1e-6  # measured: 2.5e-8


@pytest.mark.parametrize("case", ["step", "batched_step"])
def test_whole_steps_equal_the_plain_path(report: dict[str, Any], case: str) -> None:
    assert report[case]["wrong"] == 0
    assert report[case]["logits"] < 3e-6  # measured: 1.1e-6
