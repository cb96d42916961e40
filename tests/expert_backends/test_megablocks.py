"""The MegaBlocks backend: packing, refusals, and MegaBlocks itself on the CPU where its sources are installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe import experts, megablocks_backend

ROOT = Path(__file__).parents[2]


def test_packed_weights_are_gate_up_and_transposed_down() -> None:
    gate_up, down = torch.randn(3, 10, 4), torch.randn(3, 4, 5)
    packed = megablocks_backend.pack(gate_up, down)
    for expert in range(3):
        rows = slice(5 * expert, 5 * expert + 5)
        assert torch.equal(packed["mlp.w1"][rows], gate_up[expert, :5])
        assert torch.equal(packed["mlp.v1"][rows], gate_up[expert, 5:])
        assert torch.equal(packed["mlp.w2"][rows], down[expert].T)
    assert all(value.is_contiguous() for value in packed.values())


def test_refusal_names_what_is_missing() -> None:
    reason = megablocks_backend.missing()
    if reason is None:
        pytest.skip("MegaBlocks runs here")
    with pytest.raises(ValueError, match="'megablocks' cannot run: .*(make megablocks|CUDA)"):
        experts.check_backend("megablocks")
    tensors = torch.zeros(2, 8), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
    with pytest.raises(ValueError, match="take bfloat16, tokens are float32"):
        megablocks_backend.megablocks(*tensors, torch.zeros(2, 16, 8), torch.zeros(2, 8, 8))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("megablocks", "stk", "grouped_gemm")),
    reason="the sources of megablocks, stanford-stk and grouped-gemm are not installed",
)
def test_dropless_mlp_with_our_routing_equals_the_loop() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    script = ROOT / "tests" / "support" / "megablocks_on_cpu.py"
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert set(report) == {"balanced", "skewed", "one_token"}
    # Measured: at most 6e-3; bfloat16's half spacing is 3.9e-3.
    assert max(value for case in report.values() for value in case.values()) < 2e-2
