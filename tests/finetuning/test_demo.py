"""What scripts/finetune_demo.py asks and how it counts; the runs themselves take minutes (make proof)."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "finetune_demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("finetune_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wrong_descriptions_differ_in_one_word(demo):
    found = demo.others("red circle")
    assert len(found) == len(set(found)) == 9 and "red circle" not in found
    assert all(sum(a != b for a, b in zip(one.split(), ("red", "circle"), strict=True)) == 1 for one in found)


def test_pictures_are_described_by_what_their_questions_tell(demo):
    split = demo.load_split("test")
    known = demo.described(split)
    assert len(known) > 500
    for question in split.questions:
        if question.answer in demo.COLORS + demo.SHAPES and question.images[0] in known:
            assert question.answer in known[question.images[0]].split()


def test_the_table_has_a_column_for_each_stage(demo):
    scores = {"description": 0.5, "color": 0.75, "shape": 0.625, "easy-vqa": 1.0}
    lines = demo.table({"scores": {"before": scores, "after SFT": scores}, "majority": 0.2}).splitlines()
    assert lines[1].split()[-2:] == ["50.0", "50.0"] and "most: 20.0" in lines[1] and len(lines) == 5
