"""scripts/build_megablocks.py says what is missing and exits with a status that make notices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_megablocks.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own."""
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    result = run("--source", str(tmp_path), "--arch", "9.0", CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    assert "nvcc was not found" in result.stderr
    assert ("built without CUDA" in result.stderr) == (torch.version.cuda is None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers for its compute capability")
def test_unknown_compute_capability_is_named(tmp_path: Path) -> None:
    result = run("--source", str(tmp_path), CUDA_HOME=str(tmp_path), TORCH_CUDA_ARCH_LIST="")
    assert result.returncode == 1
    assert "--arch" in result.stderr


def test_forced_header_drops_the_argument_that_cub_no_longer_takes() -> None:
    text = SCRIPT.read_text()
    for name in ("ExclusiveSum", "InclusiveSum"):
        assert f"#define {name}(t, b, i, o, n, s, d) {name}(t, b, i, o, n, s)" in text
