"""What scripts/finetune_demo.py asks and how it counts; the runs themselves take minutes (make proof)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "finetune_demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("finetune_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("top", "left", "place"), [(2, 50, "upper right"), (28, 26, "middle center"), (50, 5, "lower left")]
)
def test_places_are_read_off_the_pixels(demo, top, left, place, tmp_path):
    pixels = np.full((64, 64, 3), 230, dtype=np.uint8)
    pixels[top : top + 10, left : left + 10] = (10, 120, 30)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    assert demo.place_of(tmp_path / "one.png") == place
    assert all(
        sum(a != b for a, b in zip(one.split(), place.split(), strict=True)) == 1 for one in demo.neighbours(place)
    )


def test_the_table_has_a_column_for_each_stage(demo):
    scores = {"place": 0.5, "row": 0.75, "column": 0.625, "easy-vqa": 1.0}
    lines = demo.table({"scores": {"before": scores, "after SFT": scores}, "majority": 0.2}).splitlines()
    assert lines[1].split()[-2:] == ["50.0", "50.0"] and "most: 20.0" in lines[1] and len(lines) == 5
