"""The MegaBlocks backend: packing, refusals, and MegaBlocks' published Python sources on the CPU.

``make test`` unpacks the sources beside the environment; PHI35_MEGABLOCKS_SOURCES names another folder.
"""

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
SOURCES = Path(os.environ.get("PHI35_MEGABLOCKS_SOURCES", ROOT / ".venv" / "megablocks-sources"))


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
    not all((SOURCES / name).is_dir() for name in ("megablocks", "stk", "grouped_gemm")),
    reason=f"no sources of megablocks, stk and grouped_gemm in {SOURCES} (scripts/build_megablocks.py --unpack)",
)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_dropless_mlp_with_our_routing_equals_the_loop() -> None:
    path = [str(ROOT), str(SOURCES), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    script = ROOT / "tests" / "support" / "megablocks_on_cpu.py"
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert set(report) == {"balanced", "skewed", "one_token"}
    # Measured: at most 6e-3; bfloat16's half spacing is 3.9e-3.
    assert max(value for case in report.values() for value in case.values()) < 2e-2
