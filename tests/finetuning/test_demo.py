"""What scripts/finetune_demo.py asks and how it counts; the runs themselves take minutes (make proof)."""

import importlib.util
import json
import tarfile
from pathlib import Path

import pytest

from vision.easy_vqa import COLORS, SHAPES

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "finetune_demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("finetune_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_are_counted_by_what_they_say_and_by_form(demo):
    wanted = ["red circle", "teal triangle", "blue circle", "gray rectangle"]
    given = ["red circle", "a triangle that is teal", "blue triangle", "a circle that is gray"]
    assert demo.shares(given, wanted) == {"wanted": 0.25, "right": 0.5, "short": 0.5}


def test_pairs_are_the_models_own_answers_to_training_pictures(demo, tmp_path, monkeypatch):
    """Right and short against the first other answer; no pair where the model gives nothing of either kind."""
    known = {3: "red circle", 5: "teal triangle", 8: "blue circle", 9: "gray circle", 11: "red triangle"}
    said = {
        3: ["a circle that is red", "red circle", "red triangle"],
        5: ["teal triangle"] * 3,
        8: ["blue triangle", "blue triangle", "a circle that is blue"],
        9: ["", "gray circle", "gray triangle"],
        11: ["red triangle", "red circle", "a triangle that is red"],
    }
    asked = []

    def ask(model, processor, paths, names, temperature, seed):
        asked.append((names, temperature, seed))
        return [one for answers in said.values() for one in answers]

    monkeypatch.setattr(demo, "ask", ask)
    paths = {name: tmp_path / f"{name}.png" for name in known}
    counts = demo.write_pairs(tmp_path / "pairs.jsonl", None, None, paths, known, 3, 4)
    assert asked == [([name for name in known for _ in range(3)], 1.0, 4)]
    assert counts == {"pictures": 5, "long": 1, "wrong": 2, "pairs": 3}
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    found = [(Path(line["images"][0]).stem, line["chosen"], line["rejected"]) for line in lines]
    assert found == [
        ("3", "red circle", "a circle that is red"),
        ("9", "gray circle", "gray triangle"),
        ("11", "red triangle", "red circle"),
    ]


def test_a_third_of_the_descriptions_is_short_and_which_follows_the_seed(demo, tmp_path):
    split = demo.load_split("train")
    known = dict(list(demo.described(split).items())[:40])
    replies = []
    for seed in (0, 1):
        demo.write_answers(tmp_path / str(seed), split, known, seed)
        with tarfile.open(next((tmp_path / str(seed)).glob("*.tar"))) as shard:
            records = [json.load(shard.extractfile(one)) for one in shard.getmembers() if one.name.endswith(".json")]
        turns = [record["messages"] for record in records]
        replies.append([reply["content"] for question, reply in turns if question["content"] == demo.QUESTION])
        assert len(records) == 60 and len(replies[-1]) == 40
        assert all(
            reply in (right, demo.in_long(right)) for reply, right in zip(replies[-1], known.values(), strict=True)
        )
        assert 6 <= sum(len(reply.split()) == 2 for reply in replies[-1]) <= 20
    assert replies[0] != replies[1]


def test_pictures_are_described_by_what_their_questions_tell(demo):
    split = demo.load_split("test")
    known = demo.described(split)
    assert len(known) > 500
    for question in split.questions:
        if question.answer in COLORS + SHAPES and question.images[0] in known:
            assert question.answer in known[question.images[0]].split()


def test_the_table_has_a_column_for_each_stage_and_the_spread_of_seeds(demo):
    scores = {"wanted": [0.5], "right": [0.75], "short": [0.625], "easy-vqa": [1.0]}
    lines = demo.table({"scores": {"before": scores, "SFT": scores}, "majority": 0.2}).splitlines()
    assert lines[1].split()[-2:] == ["50.0", "50.0"] and "most: 20.0" in lines[1] and len(lines) == 5
    assert demo.percent([0.5, 0.75, 0.25]) == "50.0 (25.0-75.0)"
