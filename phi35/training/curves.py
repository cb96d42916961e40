"""The curves of a run as one picture, from the lines it wrote."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
GIGABYTE = 1e9


def read_lines(path: Path) -> list[Line]:
    """The lines of a ``metrics.jsonl``; an unfinished last line (of a killed run) is left out."""
    lines: list[Line] = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def plot(history: Sequence[Line], path: Path, evaluations: Sequence[Line] = ()) -> list[str]:
    """Draws what the lines hold: losses, learning rates, gradient norm, speed, MFU, memory, the experts' load.

    Args:
        history: lines of ``metrics.jsonl``, at least one.
        path: picture file to write; the suffix chooses the format.
        evaluations: lines of ``evaluations.jsonl``.

    Returns:
        Titles of the panels that were drawn.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if panel[1](history, evaluations)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, series, unit) in zip(axes, panels, strict=False):
        drawn = series(history, evaluations)
        for label, steps, values in drawn:
            marker = "o" if len(steps) < 3 or label.startswith("held-out") else None
            axis.plot(steps, values, label=label, linewidth=1, marker=marker, markersize=3)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit, fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if 1 < len(drawn) <= 8:
            axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)
    return [title for title, _, _ in panels]


Series = list[tuple[str, list[int], list[float]]]
_Reader = Callable[[Sequence[Line], Sequence[Line]], Series]


def _column(lines: Sequence[Line], name: str, label: str | None = None, scale: float = 1.0) -> Series:
    """A field over the steps, where at least one line has it."""
    points = [(line["step"], line[name] * scale) for line in lines if isinstance(line.get(name), int | float)]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    return [(label or name.replace("_", " "), list(steps), list(values))]


def _losses(history: Sequence[Line], evaluations: Sequence[Line]) -> Series:
    return _column(history, "loss", "training") + _column(evaluations, "loss", "held-out")


def _auxiliary(history: Sequence[Line], evaluations: Sequence[Line]) -> Series:
    names = sorted({name for line in history for name in line if name.endswith("_loss")})
    return [series for name in names for series in _column(history, name)]


def _rates(history: Sequence[Line], evaluations: Sequence[Line]) -> Series:
    parts = sorted({part for line in history for part in line.get("learning_rates", {})})
    if not parts:
        return _column(history, "learning_rate")
    flat = [{"step": line["step"], **line.get("learning_rates", {})} for line in history]
    merged: Series = []  # parts with one rate share a line, which would else hide all but the last
    for label, steps, values in [series for part in parts for series in _column(flat, part)]:
        same = next((one for one in merged if one[1:] == (steps, values)), None)
        if same is None:
            merged.append((label, steps, values))
        else:
            merged[merged.index(same)] = (f"{same[0]}, {label}", steps, values)
    return merged


def _memory(history: Sequence[Line], evaluations: Sequence[Line]) -> Series:
    names = (("memory_peak", "peak"), ("memory_reserved", "reserved"), ("memory_allocated", "allocated"))
    return [series for name, label in names for series in _column(history, name, label, 1 / GIGABYTE)]


def _busiest(history: Sequence[Line], evaluations: Sequence[Line]) -> Series:
    lines = [line for line in history if "load_max_over_mean" in line]
    layers = len(lines[0]["load_max_over_mean"]) if lines else 0
    steps = [line["step"] for line in lines]
    return [(f"sparse layer {i}", steps, [line["load_max_over_mean"][i] for line in lines]) for i in range(layers)]


def _skips(history: Sequence[Line], evaluations: Sequence[Line]) -> Series:
    reasons = sorted({reason for line in history for reason in line.get("data_skips", {})})
    flat = [{"step": line["step"], **dict.fromkeys(reasons, 0), **line.get("data_skips", {})} for line in history]
    return [series for reason in reasons for series in _column(flat, reason)]


def _skipped_updates(history: Sequence[Line], evaluations: Sequence[Line]) -> Series:
    """Only where there are any."""
    return _column(history, "skipped_steps") if any(line.get("skipped_steps") for line in history) else []


def _named(name: str, label: str | None = None, scale: float = 1.0) -> _Reader:
    return lambda history, evaluations: _column(history, name, label, scale)


_PANELS: tuple[tuple[str, _Reader, str], ...] = (
    ("loss", _losses, "nats per token"),
    ("router losses", _auxiliary, "unweighted"),
    ("held-out accuracy", lambda history, evaluations: _column(evaluations, "accuracy"), "share"),
    ("learning rate", _rates, ""),
    ("gradient norm", _named("gradient_norm"), "before clipping"),
    ("tokens per second", _named("tokens_per_second"), "tokens/s"),
    ("MFU", _named("mfu", None, 100.0), "% of peak"),
    ("memory per device", _memory, "GB"),
    ("busiest expert", _busiest, "tokens / mean"),
    ("skipped samples", _skips, "since the start"),
    ("skipped updates", _skipped_updates, "since the start"),
)
