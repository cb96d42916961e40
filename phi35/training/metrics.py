"""What a run shows while it runs: progress bar, one JSON line per step, a picture of the curves at the end.

Values stay on the device until ``log_interval`` steps have gathered; then one reduction and one copy bring them all,
so that the hot loop does not wait for the device.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from phi35.training.engine import StepResult
from phi35.training.environment import Environment
from phi35.training.routing import describe_routing, plot_expert_load, routing_totals

SECONDS_BETWEEN_HEAT_MAPS = 60.0
"""The experts' heat map is drawn anew at a read of the numbers after this time, and at the end."""


class Metrics:
    """Collects, writes and shows the numbers of each step; all ranks call it alike.

    Args:
        folder: of the run; rank 0 appends to ``metrics.jsonl`` there.
        environment: this process's place.
        max_steps: steps of the run, for the progress bar.
        first_step: steps made before; later lines of an earlier attempt are dropped.
        log_interval: steps between two reads.
    """

    def __init__(
        self, folder: Path, environment: Environment, *, max_steps: int, first_step: int = 0, log_interval: int = 1
    ) -> None:
        self.path, self.environment, self.log_interval = folder / "metrics.jsonl", environment, log_interval
        self.heat_map_path = folder / "expert_load.png"
        self.history: list[dict[str, Any]] = []
        self._pending: list[tuple[dict[str, Any], list[torch.Tensor], list[str]]] = []
        self._since = time.perf_counter()
        self._drawn = time.monotonic()
        self._bar: Any = None
        if environment.is_main:
            from tqdm import tqdm

            self.history = [line for line in read_metrics(self.path) if line["step"] <= first_step]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.history))
            self._bar = tqdm(total=max_steps, initial=first_step, unit="step", desc="training", dynamic_ncols=True)

    def add(
        self,
        step: int,
        result: StepResult,
        *,
        learning_rate: float,
        num_tokens: torch.Tensor | int,
        num_samples: int,
        attention_masks: list[torch.Tensor | None],
    ) -> None:
        """Takes a step's numbers, and writes all that are waiting when it is time.

        Args:
            step: updates made, this one included.
            result: of ``Engine.step``.
            learning_rate: the decoder's.
            num_tokens: label tokens of the global batch.
            num_samples: samples of the global batch.
            attention_masks: of this rank's micro-batches.
        """
        device, world_size = result.loss.device, self.environment.world_size
        names, values = ["loss"], [result.loss.reshape(1)]
        for name, value in result.auxiliary.items():
            names.append(f"{name}_loss")
            values.append(value.reshape(1) / world_size)
        norm = result.gradient_norm
        if norm is not None:
            names.append("gradient_norm")
            values.append(torch.as_tensor(norm, dtype=torch.float32, device=device).reshape(1) / world_size)
        if isinstance(num_tokens, torch.Tensor):
            names.append("tokens")
            values.append(num_tokens.reshape(1) / world_size)
        totals = routing_totals(result.outputs, attention_masks)
        host: dict[str, Any] = {"step": step, "learning_rate": learning_rate, "samples": num_samples}
        if not isinstance(num_tokens, torch.Tensor):
            host["tokens"] = num_tokens
        if totals is not None:
            host["routing_shape"] = list(totals.shape)
            values.append(totals.flatten())
        self._pending.append((host, [value.detach().float() for value in values], names))
        if len(self._pending) >= self.log_interval:
            self.flush()

    def flush(self) -> None:
        """Brings all waiting numbers from the device and writes them."""
        if not self._pending:
            return
        flat = torch.cat([value for _, values, _ in self._pending for value in values])
        if self.environment.world_size > 1:
            distributed.all_reduce(flat)
        numbers = flat.tolist()
        seconds = (time.perf_counter() - self._since) / len(self._pending)
        if self.environment.is_main:
            lines = []
            for host, values, names in self._pending:
                lines.append(_line(host, names, numbers[: sum(value.numel() for value in values)], seconds))
                numbers = numbers[sum(value.numel() for value in values) :]
            self._write(lines)
        self._pending = []
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Leaves what was done since the last ``flush`` (writing a checkpoint) out of the speeds."""
        self._since = time.perf_counter()

    def close(self) -> None:
        """Writes what is waiting and ends the progress bar."""
        self.flush()
        if self._bar is not None:
            self._bar.close()
            self._draw_expert_load()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.history.extend(lines)
        last = lines[-1]
        shown = {"loss": f"{last['loss']:.4f}", "tokens/s": f"{last['tokens_per_second']:.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(len(lines))
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_HEAT_MAPS:
            self._draw_expert_load()

    def _draw_expert_load(self) -> None:
        if self.history and "expert_tokens" in self.history[-1]:
            plot_expert_load(self.history, self.heat_map_path)
        self._drawn = time.monotonic()


def _line(host: dict[str, Any], names: list[str], numbers: list[float], seconds: float) -> dict[str, Any]:
    line = dict(host)
    shape = line.pop("routing_shape", None)
    line.update(zip(names, numbers, strict=False))
    line["tokens"] = round(line["tokens"])
    line["tokens_per_second"] = line["tokens"] / seconds
    line["samples_per_second"] = line["samples"] / seconds
    line["seconds"] = seconds
    if shape is not None:
        layers, columns = shape
        totals = numbers[len(names) :]
        line.update(describe_routing([totals[layer * columns : (layer + 1) * columns] for layer in range(layers)]))
    return line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; an unfinished last line (of a killed run) is left out."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def plot(history: list[dict[str, Any]], path: Path) -> None:
    """Draws loss, learning rate, gradient norm and, for sparse models, the experts' load.

    Args:
        history: lines of ``metrics.jsonl``.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    panels = [name for name in ("loss", "learning_rate", "gradient_norm", "expert_load") if name in history[-1]]
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    steps = [line["step"] for line in history]
    for axis, name in zip(axes, panels, strict=True):
        if name == "expert_load":
            for layer in range(len(history[-1][name])):
                axis.plot(
                    steps, [max(line[name][layer]) for line in history], label=f"sparse layer {layer}", linewidth=1
                )
            axis.set_title("load of the busiest expert")
            if len(history[-1][name]) <= 8:
                axis.legend(fontsize=7)
        else:
            axis.plot(steps, [line[name] for line in history], linewidth=1)
            axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
