"""The Triton kernels against the float64 loop, on the CPU in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import experts
from moe.kernels import backend

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Errors of every case, from one process under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "interpreted_kernels.py"
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "case", ["many", "ragged_gelu", "one_token", "two_tiles", "one_choice", "eight_choices", "strips"]
)
def test_float32_output_and_gradients_equal_the_loop(report: dict[str, Any], case: str) -> None:
    # Measured: at most 6e-7. "many" also runs the large-batch path forward only.
    assert ("forward" in report[case]) == (case == "many")
    assert set(report[case]) >= {"output", "decode", "hidden_states", "expert_weights", "gate_up", "down"}
    assert max(report[case].values()) < 2e-6


def test_float16_output_and_gradients_equal_the_loop_within_rounding(report: dict[str, Any]) -> None:
    # Measured: at most 5.1e-4; half of float16's spacing is 4.9e-4.
    assert max(report["half"].values()) < 2e-3


@pytest.mark.parametrize("size", ["3/4", "1100/5"])
def test_plan_is_a_stable_sort_in_whole_tiles(report: dict[str, Any], size: str) -> None:
    assert report["plans"][size] == dict.fromkeys(
        ("counts", "starts", "places", "sources", "empty", "tile_starts", "tiles"), True
    )


def test_frozen_experts_still_pass_gradients_to_tokens(report: dict[str, Any]) -> None:
    # Measured: 1.7e-7.
    assert report["other"]["frozen"] < 2e-6


def test_recomputation_under_checkpointing_gives_the_same_bits(report: dict[str, Any]) -> None:
    assert report["other"]["checkpointed"] == 0


def test_no_tokens_give_zero_gradients(report: dict[str, Any]) -> None:
    assert report["other"]["empty"] == 0


def test_weights_at_odd_addresses_give_the_same_bits(report: dict[str, Any]) -> None:
    assert report["other"]["odd_address"] == 0


def test_choices_that_ran_one_by_one_are_added_to_the_same_bits(report: dict[str, Any]) -> None:
    assert report["other"]["combined"] == 0


@pytest.mark.parametrize("case", ["sharp", "flat", "negative", "two"])
def test_sparsemixers_fused_choice_is_the_plain_one(report: dict[str, Any], case: str) -> None:
    """The same experts from the same noise, and the gradient of the published rule."""
    found = report["mixer"][case]
    assert found["differing"] == 0
    assert found["used"] == {"sharp": 16, "flat": 16, "negative": 5, "two": 2}[case]
    assert max(found[name] for name in ("weights", "chances", "gradient")) < 1e-6  # measured: at most 1.5e-7


def test_no_expert_is_chosen_that_is_none(report: dict[str, Any]) -> None:
    assert 0 <= report["mixer of NaN"] < 5


def test_operators_are_registered_as_torch_wants_them(report: dict[str, Any]) -> None:
    assert report["registration"] is True


def test_compiled_call_is_one_graph_with_the_same_bits(report: dict[str, Any]) -> None:
    assert report["other"]["compiled"] == 0
    assert report["other"]["compiled_grad"] == 0


def test_backend_refuses_what_it_cannot_run() -> None:
    if backend.missing() is not None:
        with pytest.raises(ValueError, match="'triton' cannot run"):
            experts.check_backend("triton")
    tokens = torch.zeros(2, 64)
    weights = torch.zeros(3, 128, 64), torch.zeros(3, 64, 64)
    with pytest.raises(ValueError, match="tokens are on cpu"):
        backend.triton_kernels(tokens, torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2), *weights)
