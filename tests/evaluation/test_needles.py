"""The needle suite: prompts fill their length, needles lie at their depth, answers are counted, a run goes on."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import phi35
from phi35 import presets
from phi35.cli.eval import app
from phi35.evaluation.needle_run import NeedleSuite, evaluate, plot, table
from phi35.evaluation.needles import TASKS, make_sample
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer

SMALL_MODEL = Path(presets.__file__).parent / "small_model"


def count(prompt: str) -> int:
    tokenizer = Tokenizer.from_folder(SMALL_MODEL)
    return len(tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": prompt}])))


@pytest.fixture(scope="module")
def loaded() -> tuple[object, Processor]:
    model = phi35.create("tiny-phi-3.5-mini", seed=3)
    return model.eval(), Processor.from_folder(SMALL_MODEL, model.config)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_fills_its_length_and_hides_what_is_asked(task: str) -> None:
    for depth in (0.0, 0.5, 1.0):
        sample = make_sample(task, 1500, depth, 0, count)
        assert sample.num_tokens == count(sample.prompt) and 1440 < sample.num_tokens <= 1500
        text, question = sample.prompt.split("\n\n")[1:]
        for expected in sample.expected:
            assert text.count(expected) >= 1 and expected not in question
        assert len(sample.expected) == (1 if task in ("single", "multi_key") else 4)
        if task in ("single", "multi_key"):
            found = text.index(sample.expected[0]) / len(text)
            assert abs(found - depth) < 0.2  # measured: at most 0.12, several needles beside it
            (key,) = [word for word in question.split() if "-" in word]
            assert f"number for {key.rstrip('?')} is {sample.expected[0]}" in text
        assert sample.score(" ".join(sample.expected)) == 1
        assert sample.score("nothing") == 0


def test_variables_hold_the_value_by_following_the_chain() -> None:
    """The answer by executing the assignments, not by how they were drawn."""
    sample = make_sample("variable_tracking", 1200, 0.5, 1, count, num_needles=5)
    values: dict[str, str] = {}
    for sentence in sample.prompt.split(". "):
        if sentence.startswith("VAR "):
            name, source = sentence.removeprefix("VAR ").rstrip(".").split(" = ")
            values[name] = values[source.removeprefix("VAR ")] if source.startswith("VAR") else source
    asked = sample.prompt.split("value ")[-1].split("?")[0]
    assert {name for name, value in values.items() if value == asked} == set(sample.expected)
    assert len(values) == 10 and len(sample.expected) == 5


def test_samples_are_the_same_again_and_differ_from_each_other() -> None:
    first = make_sample("multi_key", 800, 0.25, 0, count)
    assert first == make_sample("multi_key", 800, 0.25, 0, count)
    others = [make_sample("multi_key", 800, 0.25, 1, count), make_sample("multi_key", 800, 0.25, 0, count, seed=1)]
    assert len({first.expected, *(other.expected for other in others)}) == 3


def test_a_given_haystack_is_used() -> None:
    sample = make_sample("single", 400, 0.5, 0, count, haystack=["One line.", "Another line."])
    assert "One line. Another line. One line." in sample.prompt


def test_bad_values_are_named() -> None:
    for arguments, message in (
        (("single", 800, 1.5, 0), "depth"),
        (("double", 800, 0.5, 0), "task"),
        (("multi_key", 60, 0.5, 0), "too short"),
    ):
        with pytest.raises(ValueError, match=message):
            make_sample(*arguments, count)
    with pytest.raises(ValueError, match=r"(?s)tasks.*depths.*samples"):
        NeedleSuite(tasks=("double",), depths=(2.0,), samples=0)


def test_a_run_is_kept_and_goes_on(loaded: tuple[object, Processor], tmp_path: Path) -> None:
    suite = NeedleSuite(tasks=("single", "multi_value"), lengths=(300, 400), depths=(0, 1), samples=1, max_new_tokens=4)
    lines = evaluate(*loaded, suite, tmp_path)
    assert len(lines) == 8 and {line["length"] for line in lines} == {300, 400}
    kept = tmp_path / "needles.jsonl"
    text = kept.read_text()
    written = text.splitlines()
    kept.write_text("\n".join(written[:5]) + "\n" + written[5][:40])  # killed in the sixth line
    seen: list[int] = []
    again = evaluate(*loaded, suite, tmp_path, progress=lambda done, total: seen.append(done))
    strip = [{**line, "seconds": 0} for line in lines]
    assert [{**line, "seconds": 0} for line in again] == strip
    assert [json.loads(line) | {"seconds": 0} for line in kept.read_text().splitlines()] == strip
    with pytest.raises(ValueError, match="another"):
        evaluate(*loaded, NeedleSuite(lengths=(300,), samples=1), tmp_path)
    with pytest.raises(ValueError, match="positions"):
        evaluate(*loaded, NeedleSuite(lengths=(10**6,)))


def test_scores_are_tabled_and_drawn(tmp_path: Path) -> None:
    lines = [
        {"task": task, "length": length, "depth": depth, "score": score}
        for task, length, depth, score in (
            ("single", 4096, 0.0, 1.0),
            ("single", 4096, 1.0, 0.5),
            ("single", 8192, 0.0, 0.0),
            ("multi_key", 4096, 0.0, 0.25),
        )
    ]
    rows = table(lines)
    assert rows[0] == {"task": "single", "4,096": "75.0", "8,192": "0.0", "all": "50.0"}
    assert rows[1] == {"task": "multi_key", "4,096": "25.0", "8,192": "-", "all": "25.0"}
    assert rows[2]["all"] == "43.8"
    plot(lines, tmp_path / "needles.png")
    assert (tmp_path / "needles.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_asks_the_small_model(tmp_path: Path) -> None:
    options = ["--lengths", "200", "--samples", "1", "--depths", "0.5", "--tasks", "single", "--max-new-tokens", "3"]
    result = CliRunner().invoke(app, ["needles", "--output", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert "single" in result.output and (tmp_path / "needles.png").exists()
