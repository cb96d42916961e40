"""The decoding kernels against their plain forms, on the CPU in Triton's interpreter."""

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
ATTENTION = ["one", "one_whole", "one_paged", "grouped", "grouped_window", "grouped_paged"]
CHOICES = ["greedy", "penalty", "temperature", "tiny_temperature", "top_k", "top_p", "all", "masked", "masked all"]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Errors of every case, from one process under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "interpreted_decoding.py"
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", ["rmsnorm", "layernorm", *ATTENTION])
def test_float32_products_and_attention_equal_the_plain_form(report: dict[str, Any], case: str) -> None:
    # Measured: at most 2.2e-7; "arrived" counts what the splits must leave at zero.
    assert len(report[case]) >= 4
    assert max(report[case].values()) < 1e-6


@pytest.mark.parametrize("case", ["shared_keys", "shared_keys_grouped", "shared_keys_window"])
def test_tokens_side_by_side_see_the_keys_up_to_themselves(report: dict[str, Any], case: str) -> None:
    # Measured: at most 1.3e-7.
    assert max(report[case].values()) < 1e-6


@pytest.mark.parametrize("case", ["prompt", "prompt_grouped", "prompt_paged"])
def test_prompts_are_rotated_and_stored_as_the_plain_form_does(report: dict[str, Any], case: str) -> None:
    # Measured: at most 4.0e-8.
    assert set(report[case]) == {"projected", "keys", "values"}
    assert max(report[case].values()) < 1e-6


@pytest.mark.parametrize("case", ["half", "grouped_half"])
def test_float16_equals_the_plain_form_within_rounding(report: dict[str, Any], case: str) -> None:
    # Measured: at most 8.8e-4; half of float16's spacing is 4.9e-4.
    assert max(report[case].values()) < 3e-3


@pytest.mark.parametrize("case", ["sparsemixer", "sparsemixer_biased", "topk", "topk_biased"])
def test_sparse_feed_forward_chooses_and_computes_as_the_layer(report: dict[str, Any], case: str) -> None:
    # Measured: at most 5.4e-7, and the same experts in the same order.
    assert set(report[case]) == {"indices", "weights", "hidden", "arrived"}
    assert max(report[case].values()) < 2e-6


@pytest.mark.parametrize("case", ["step", "sparse_step", "batched_step", "batcher"])
def test_whole_steps_equal_the_plain_path(report: dict[str, Any], case: str) -> None:
    # Measured: at most 6.9e-7. Rows of 40, 12 and 31 tokens under both factor sets.
    assert report[case]["wrong"] == 0
    assert report[case]["logits"] < (2e-5 if case == "batcher" else 3e-6)  # the batcher's are log-probabilities


def test_drafts_through_the_kernels_give_the_plain_loops_choices(report: dict[str, Any]) -> None:
    """Sampled with a penalty, by the device's sampler; measured error of a log-probability: 4.8e-7."""
    assert report["drafts"]["taken"] == 1
    assert report["drafts"]["wrong"] == 0
    assert report["drafts"]["logits"] < 5e-6


@pytest.mark.parametrize("case", CHOICES)
def test_the_sampler_chooses_what_the_host_chooses(report: dict[str, Any], case: str) -> None:
    """Also among equal scores ("all" and "top_p" are rounded); measured error of a log-probability: 2.4e-7."""
    found = report[f"choose {case}"]
    assert found["wrong"] == 0
    assert found["logprobs"] < 2e-6
