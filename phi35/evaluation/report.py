"""A model's report card: one page of scores beside the published ones, speed and memory, from files of earlier runs.

Inputs are what the project's commands write: results of ``phi35 eval tasks`` (or any results file of
lm-evaluation-harness), the folder of ``phi35 eval needles``, the JSON line of ``phi35 eval demo``, and records of
``benchmarks/``. The page is Markdown or, with pictures inside, HTML.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from phi35.evaluation import needle_run

PUBLISHED = Path(__file__).with_name("published_scores.json")
TASKS = {
    "mmlu": "MMLU",
    "mmlu_pro": "MMLU-Pro",
    "gsm8k": "GSM8K",
    "arc_challenge": "ARC Challenge",
    "boolq": "BoolQ",
    "hellaswag": "HellaSwag",
    "openbookqa": "OpenBookQA",
    "piqa": "PIQA",
    "social_iqa": "Social IQA",
    "truthfulqa_mc2": "TruthfulQA",
    "winogrande": "WinoGrande",
    "bbh": "BigBench Hard",
    "humaneval": "HumanEval",
    "mbpp": "MBPP",
    "mmmu_val": "MMMU",
    "scienceqa_img": "ScienceQA",
    "ai2d": "AI2D",
    "chartqa": "ChartQA",
    "textvqa_val": "TextVQA",
    "pope": "POPE",
}
"""The harnesses' names of published benchmarks."""
METRICS = ("exact_match,strict-match", "exact_match,flexible-extract", "exact_match,none", "acc_norm,none", "acc,none")
SHOWN = (
    "case model side kind part format name rows tokens new_tokens tokens_per_s tokens_per_second first_token_s ms "
    "of_bound of_dense mfu peak_gib device_gib gib"
).split()
"""Fields of benchmark rows that a page shows, in this order."""

Row = dict[str, Any]


@dataclass
class Card:
    """What a page holds: tables by title, pictures, notes below the tables."""

    model: str
    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)


def collect(model: str, inputs: Sequence[Path]) -> Card:
    """Reads results.

    Args:
        model: preset whose published scores stand beside, or any other name for none.
        inputs: files and folders as the module says; at least one.

    Raises:
        ValueError: for inputs that are absent or of no known kind, all of them at once.
    """
    published = json.loads(PUBLISHED.read_text()).get(model, {"scores": {}, "ruler": {}, "source": ""})
    card, problems = Card(model), []
    if not inputs:
        problems.append("give at least one file or folder of results")
    scores: list[Row] = []
    for path in inputs:
        if path.is_dir() and (path / needle_run.RESULTS).is_file():
            _add_needles(card, path, published)
            continue
        try:
            record = _read(path)
        except (OSError, ValueError) as error:
            problems.append(f"{str(path)!r} cannot be read as results: {error}")
            continue
        if isinstance(record.get("results"), dict):
            scores += _harness_rows(record, published["scores"])
        elif "single_image" in record or "two_images" in record:
            scores += _demo_rows(record)
        elif "environment" in record:
            _add_benchmark(card, path, record)
        else:
            problems.append(f"{str(path)!r} holds neither scores nor a benchmark's record")
    if problems:
        raise ValueError("; ".join(problems))
    if scores:
        card.tables = {"Scores": scores, **card.tables}
        if any(row["published"] for row in scores):
            card.notes["Scores"] = f"Published: {published['source']}; prompts and shots may differ."
    return card


def _read(path: Path) -> Row:
    """The JSON of a file: the whole of it, or its last line, as commands print it."""
    text = path.read_text()
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        record = json.loads(lines[-1] if lines else "")
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got a {type(record).__name__}")
    return record


def _harness_rows(record: Row, published: dict[str, float]) -> list[Row]:
    rows = []
    shots = record.get("n-shot", {})
    for task, values in record["results"].items():
        metric = next((name for name in METRICS if name in values), None)
        metric = metric or next((name for name in values if isinstance(values[name], float) and "," in name), None)
        if metric is None:
            continue
        error = values.get(metric.replace(",", "_stderr,", 1))
        known = published.get(TASKS.get(task, ""))
        rows.append(
            {
                "task": TASKS.get(task, task),
                "shots": shots.get(task, ""),
                "metric": metric.split(",")[0],
                "score": f"{100 * values[metric]:.1f}",
                "error": f"{100 * error:.1f}" if isinstance(error, float) else "",
                "published": "" if known is None else f"{known:.1f}",
            }
        )
    return rows


def _demo_rows(record: Row) -> list[Row]:
    names = {"single_image": "easy-vqa, one image", "two_images": "easy-vqa pictures, two images"}
    return [
        {
            "task": title,
            "shots": 0,
            "metric": "accuracy",
            "score": f"{100 * record[name]['accuracy']:.1f}",
            "error": "",
            "published": "",
        }
        for name, title in names.items()
        if record.get(name)
    ]


def _add_needles(card: Card, folder: Path, published: Row) -> None:
    lines = [json.loads(line) for line in (folder / needle_run.RESULTS).read_text().splitlines()]
    if not lines:
        return
    rows = needle_run.table(lines)
    lengths = sorted({line["length"] for line in lines})
    known = {f"{length:,}": published["ruler"].get(str(length), "") for length in lengths}
    if any(known.values()):
        rows.append({"task": "published (RULER, all of its tasks)", **known, "all": ""})
    card.tables["Long context"] = rows
    if (folder / "needles.png").is_file():
        card.pictures["Long context"] = folder / "needles.png"


def _add_benchmark(card: Card, path: Path, record: Row) -> None:
    environment = record["environment"]
    found = [value for value in record.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    rows = [row for table in found for row in table]
    rows += [
        {"part": name, **value}
        for name, value in record.items()
        if isinstance(value, dict) and name not in ("environment",)
    ]
    names = [name for name in SHOWN if any(isinstance(row.get(name), int | float | str) for row in rows)]
    shown = [{name: _short(row.get(name, "")) for name in names} for row in rows]
    shown = [row for row in shown if sum(bool(value) for value in row.values()) > 1]
    if shown:
        card.tables[path.stem] = shown
        card.notes[path.stem] = (
            f"{environment.get('device')}, commit {environment.get('commit')}: `{environment.get('command')}`"
        )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return "" if isinstance(value, dict | list) or value is None else str(value)


def write(card: Card, path: Path) -> None:
    """Writes the page: Markdown for ``.md`` (pictures by their path), HTML for ``.html`` (pictures inside).

    Raises:
        ValueError: for another suffix.
    """
    templates = {".md": _MARKDOWN, ".html": _HTML}
    if path.suffix not in templates:
        raise ValueError(f"the report is .md or .html, got {path.name!r}")
    pictures = {
        title: "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        if path.suffix == ".html"
        else str(picture)
        for title, picture in card.pictures.items()
    }
    environment = jinja2.Environment(autoescape=path.suffix == ".html", trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(templates[path.suffix]).render(card=card, pictures=pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


_MARKDOWN = """# {{ card.model }}
{% for title, rows in card.tables.items() %}

## {{ title }}
| {{ rows[0].keys() | join(" | ") }} |
|{% for _ in rows[0] %}---|{% endfor %}

{% for row in rows %}
| {{ row.values() | join(" | ") }} |
{% endfor %}
{% if title in card.notes %}

{{ card.notes[title] }}
{% endif %}
{% if title in pictures %}

![{{ title }}]({{ pictures[title] }})
{% endif %}
{% endfor %}
"""

_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ card.model }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.6em 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25em 0.8em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.note { color: #666; font-size: 0.9em; }
</style>
</head>
<body>
<h1>{{ card.model }}</h1>
{% for title, rows in card.tables.items() %}
<h2>{{ title }}</h2>
<table>
<tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% if title in card.notes %}<p class="note">{{ card.notes[title] }}</p>{% endif %}
{% if title in pictures %}<p><img src="{{ pictures[title] }}" alt="{{ title }}"></p>{% endif %}
{% endfor %}
</body>
</html>
"""
