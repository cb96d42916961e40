"""A model asked the questions of ``phi35.evaluation.needles``: scores by length and depth, kept as it goes, drawn."""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi35.evaluation.needles import TASKS, NeedleSample, make_sample
from phi35.generation.decoding import generate
from phi35.processor import Processor

Line = dict[str, Any]
RESULTS, SETTINGS = "needles.jsonl", "needles.json"


@dataclass(frozen=True, kw_only=True)
class NeedleSuite:
    """Which questions are asked.

    Attributes:
        tasks: of ``needles.TASKS``.
        lengths: tokens of a prompt, template included.
        depths: between 0 and 1.
        samples: questions of each task, length and depth.
        num_needles: needles of the tasks with several.
        max_new_tokens: most tokens of an answer.
        seed: of the questions.

    Raises:
        ValueError: for values out of range, all at once.
    """

    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 4
    num_needles: int = 4
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [f"{name} must name at least one" for name in ("tasks", "lengths", "depths") if not vars(self)[name]]
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            problems.append(f"tasks {unknown} are unknown; there are {TASKS}")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            problems.append(f"depths must lie between 0 and 1, got {self.depths}")
        for name in ("samples", "max_new_tokens"):
            if vars(self)[name] < 1:
                problems.append(f"{name} must be at least 1, got {vars(self)[name]}")
        if problems:
            raise ValueError("; ".join(problems))


def evaluate(
    model: Any,
    processor: Processor,
    suite: NeedleSuite,
    folder: Path | None = None,
    *,
    haystack: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **decoding: Any,
) -> list[Line]:
    """Asks a model every question of a suite, greedily, one at a time.

    Args:
        model: a ``phi35.model.CausalLM``.
        processor: the model's.
        suite: which questions.
        folder: results are appended to ``needles.jsonl`` there; questions that it holds answers to are not asked again.
        haystack: sentences to hide needles in; None for made-up ones.
        progress: called with (questions answered, questions in all).
        **decoding: further options of ``generate`` (``rope_mode``, ...).

    Returns:
        A line per question: task, length, depth, index, num_tokens, expected, answer, score, seconds.

    Raises:
        ValueError: if a length does not leave the model room for an answer, or the folder holds results of other
            settings.
    """
    room = model.config.max_position_embeddings - suite.max_new_tokens
    if max(suite.lengths) > model.config.max_position_embeddings:
        raise ValueError(
            f"lengths up to {max(suite.lengths)} pass the model's {model.config.max_position_embeddings} positions"
        )
    asked = list(itertools.product(suite.tasks, suite.lengths, suite.depths, range(suite.samples)))
    settings = json.loads(json.dumps(dataclasses.asdict(suite)))
    settings |= {"model": model.config.to_dict() if hasattr(model.config, "to_dict") else str(model.config)}
    lines = _kept(folder, settings) if folder is not None else {}
    for number, key in enumerate(asked):
        if key not in lines:
            task, length, depth, index = key
            # The longest prompts give way to the answer.
            sample = make_sample(
                task,
                min(length, room),
                depth,
                index,
                lambda prompt: len(_ids(processor, prompt)),
                seed=suite.seed,
                num_needles=suite.num_needles,
                haystack=haystack,
            )
            sample = dataclasses.replace(sample, length=length)
            lines[key] = _ask(model, processor, sample, suite.max_new_tokens, decoding)
            if folder is not None:
                with (folder / RESULTS).open("a") as file:
                    file.write(json.dumps(lines[key]) + "\n")
        if progress is not None:
            progress(number + 1, len(asked))
    return [lines[key] for key in asked]


def _ask(model: Any, processor: Processor, sample: NeedleSample, max_new_tokens: int, options: Line) -> Line:
    batch: Line = processor.pad([_ids(processor, sample.prompt)])
    began = time.perf_counter()
    ids = generate(model, **batch, max_new_tokens=max_new_tokens, **options)
    answer = processor.decode(ids[0, batch["input_ids"].shape[1] :].tolist())
    line = {name: value for name, value in dataclasses.asdict(sample).items() if name != "prompt"}
    seconds = round(time.perf_counter() - began, 3)
    return (
        line
        | {"expected": list(sample.expected), "answer": answer, "score": sample.score(answer)}
        | {"seconds": seconds}
    )


def _ids(processor: Processor, prompt: str) -> list[int]:
    text = processor.apply_chat_template([{"role": "user", "content": prompt}])
    return processor.tokenizer.encode(text)


def _kept(folder: Path, settings: Line) -> dict[tuple[str, int, float, int], Line]:
    """Answers of an earlier run of the same settings; a line that was cut off is asked again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{str(folder)!r} holds answers of another model or suite; give another folder or empty it")
    path.write_text(json.dumps(settings, indent=1) + "\n")
    results, found = folder / RESULTS, {}
    if results.exists():
        whole = [line for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]
        results.write_text("".join(whole))
        for line in map(json.loads, whole):
            found[line["task"], line["length"], line["depth"], line["index"]] = line
    return found


def table(lines: Sequence[Line]) -> list[Line]:
    """Rows for the command line: a task each, mean score in percent by length, and over all lengths."""
    lengths = sorted({line["length"] for line in lines})
    rows = []
    for task in [*dict.fromkeys(line["task"] for line in lines), "mean"]:
        mine = [line for line in lines if task in ("mean", line["task"])]
        row: Line = {"task": task}
        for length in lengths:
            row[f"{length:,}"] = _percent([line["score"] for line in mine if line["length"] == length])
        rows.append(row | {"all": _percent([line["score"] for line in mine])})
    return rows


def _percent(scores: Sequence[float]) -> str:
    return f"{100 * statistics.mean(scores):.1f}" if scores else "-"


def plot(lines: Sequence[Line], path: Path, title: str = "") -> None:
    """Draws mean scores by length and depth, a panel for each task.

    Args:
        lines: of ``evaluate``, at least one.
        path: picture to write; the suffix chooses the format.
        title: over the panels.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line["task"] for line in lines))
    lengths, depths = sorted({line["length"] for line in lines}), sorted({line["depth"] for line in lines})
    figure = Figure(figsize=(max(3.2, 0.62 * len(lengths) + 1.6) * len(tasks) + 0.8, 0.45 * len(depths) + 2.0))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    image = None
    for axis, task in zip(axes, tasks, strict=True):
        means = [[_mean(lines, task, length, depth) for length in lengths] for depth in depths]
        image = axis.imshow(means, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, values in enumerate(means):
            for column, value in enumerate(values):
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
        axis.set_title(task.replace("_", " "), fontsize=10)
        axis.set_xticks(range(len(lengths)), [_short(length) for length in lengths], fontsize=8)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=8)
    axes[0].set_ylabel("depth of the needle", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=list(axes), label="share found", shrink=0.9)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)


def _mean(lines: Sequence[Line], task: str, length: int, depth: float) -> float:
    scores = [one["score"] for one in lines if (one["task"], one["length"], one["depth"]) == (task, length, depth)]
    return statistics.mean(scores) if scores else float("nan")


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
