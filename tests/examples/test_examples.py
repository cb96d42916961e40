"""Every file in examples/ runs as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {
    "two_images.py": ["which image shows a red circle? -> first", "same shape? -> no"],
    "model_from_a_preset.py": ["41,873,153,344", "same logits after save and load: True"],
    "peft_and_trl.py": ["learned: True"],
    "chat_and_stream.py": ["same seed, same text: True"],
}


def test_every_example_is_listed_here() -> None:
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(name: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "model")] if name == "model_from_a_preset.py" else []
    environment = {key: value for key, value in os.environ.items() if key != "PHI35_MODEL"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    for text in EXPECTED[name]:
        assert text in result.stdout, result.stdout
