"""Where the published configs and tokenizers lie, for tests that compare with them.

They are data of others and not part of the project: a folder ``shared`` beside the checkout (or the one named
by PHI35_PUBLISHED_FILES) may hold them; tests skip where it is absent.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("PHI35_PUBLISHED_FILES", Path(__file__).resolve().parents[3] / "shared"))


def published_file(relative: str) -> Path:
    """Path of a published file or folder, e.g. ``tokenizers/phi-3-mini``; skips the test where it is absent."""
    path = ROOT / relative
    if not path.exists():
        pytest.skip(f"published file {relative} is not at hand (set PHI35_PUBLISHED_FILES to the folder that holds it)")
    return path
