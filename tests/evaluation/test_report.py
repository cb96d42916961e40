"""The report card: scores beside the published ones, needles, speed; pages that hold what they say."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phi35.cli.eval import app
from phi35.evaluation.needle_run import plot
from phi35.evaluation.report import PUBLISHED, collect, write


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    """One file of each kind."""
    harness = {
        "results": {
            "mmlu": {"alias": "mmlu", "acc,none": 0.512, "acc_stderr,none": 0.004},
            "arc_challenge": {"acc,none": 0.4, "acc_norm,none": 0.61, "acc_norm_stderr,none": 0.01},
            "own_task": {"f1,none": 0.25},
        },
        "n-shot": {"mmlu": 5, "arc_challenge": 10},
    }
    (tmp_path / "scores.json").write_text(json.dumps(harness))
    demo = {"single_image": {"count": 9, "accuracy": 0.875}, "two_images": None, "kinds": {}, "seconds": 1.0}
    (tmp_path / "demo.log").write_text("a table\nof lines\n" + json.dumps(demo) + "\n")
    record = {
        "environment": {"device": "a <GPU>", "commit": "abc", "command": "python benchmarks/decode.py"},
        "rows": [{"case": "128 + 512", "tokens_per_s": 467.07, "of_bound": 0.8365, "peak_gib": 7.39, "extra": [1]}],
    }
    (tmp_path / "decode.json").write_text(json.dumps(record))
    lines = [{"task": "single", "length": 4096, "depth": depth, "score": depth} for depth in (0.0, 1.0)]
    (tmp_path / "needles").mkdir()
    (tmp_path / "needles" / "needles.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    plot(lines, tmp_path / "needles" / "needles.png")
    return [tmp_path / name for name in ("scores.json", "demo.log", "decode.json", "needles")]


def test_scores_stand_beside_the_published_ones(results: list[Path]) -> None:
    card = collect("phi-3.5-moe", results)
    assert list(card.tables) == ["Scores", "decode", "Long context"]
    scores = {row["task"]: row for row in card.tables["Scores"]}
    assert scores["MMLU"] == {
        "task": "MMLU",
        "shots": 5,
        "metric": "acc",
        "score": "51.2",
        "error": "0.4",
        "published": "78.9",
    }
    assert scores["ARC Challenge"]["score"] == "61.0" and scores["ARC Challenge"]["published"] == "91.0"
    assert scores["own_task"]["score"] == "25.0" and scores["own_task"]["published"] == ""
    assert scores["easy-vqa, one image"]["score"] == "87.5"
    assert card.tables["Long context"][-1]["4,096"] == 94.8
    assert card.tables["decode"] == [
        {"case": "128 + 512", "tokens_per_s": "467.1", "of_bound": "0.837", "peak_gib": "7.390"}
    ]


def test_pages_hold_tables_and_pictures(results: list[Path], tmp_path: Path) -> None:
    card = collect("phi-3.5-moe", results)
    write(card, tmp_path / "card.html")
    page = (tmp_path / "card.html").read_text()
    assert "data:image/png;base64,iVBOR" in page and "<td>51.2</td>" in page
    assert "a &lt;GPU&gt;" in page and "<GPU>" not in page
    write(card, tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text()
    assert "| MMLU | 5 | acc | 51.2 | 0.4 | 78.9 |" in text and "needles.png" in text
    with pytest.raises(ValueError, match="md or .html"):
        write(card, tmp_path / "card.pdf")


def test_all_unreadable_inputs_are_named(results: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"(?s)broken.json.*other.json.*absent"):
        collect("phi-3.5-mini", [*results, *(tmp_path / name for name in ("broken.json", "other.json", "absent"))])
    with pytest.raises(ValueError, match="at least one"):
        collect("phi-3.5-mini", [])


def test_the_command_writes_the_page(results: list[Path], tmp_path: Path) -> None:
    arguments = ["report", *map(str, results), "--output", str(tmp_path / "card.html")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Scores (4 rows)" in result.output


def test_published_scores_are_percentages() -> None:
    for known in json.loads(PUBLISHED.read_text()).values():
        assert all(0 < score < 100 for score in (*known["scores"].values(), *known["ruler"].values()))
