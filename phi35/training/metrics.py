"""What a run shows while it runs: one JSON line per step, and the trackers that take the same lines.

Values stay on the device until ``log_interval`` steps have gathered; then one reduction and one copy bring them all,
so that the hot loop does not wait for the device.
"""

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from phi35.training.console import warn
from phi35.training.engine import StepResult
from phi35.training.environment import Environment
from phi35.training.flops import TrainingFlops, Work
from phi35.training.health import Outcome
from phi35.training.line_file import LineFile
from phi35.training.routing import describe_routing, plot_expert_load, routing_totals
from phi35.training.trackers import ProgressBar, Tracker

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
        trackers: of rank 0; None for the progress bar alone.
        flops: operations of a batch; None leaves them and MFU out.
        peak_flops: a device's peak per second; None leaves MFU out.
        skips: this rank's samples left out by the data source since the start, by reason; None where it counts none.
        waited: seconds that this rank has waited for data since the start; None where nobody counts them.

    Attributes:
        num_skipped: updates left out so far, as far as the numbers have been read; may be set to those of before.
    """

    def __init__(
        self,
        folder: Path,
        environment: Environment,
        *,
        max_steps: int,
        first_step: int = 0,
        log_interval: int = 1,
        trackers: Sequence[Tracker] | None = None,
        flops: TrainingFlops | None = None,
        peak_flops: float | None = None,
        skips: Callable[[], Mapping[str, int]] | None = None,
        waited: Callable[[], float] | None = None,
    ) -> None:
        self.path, self.environment, self.log_interval = folder / "metrics.jsonl", environment, log_interval
        self.evaluation_path = folder / "evaluations.jsonl"
        self.heat_map_path = folder / "expert_load.png"
        self.num_skipped = 0
        self._lines: LineFile | None = None
        self._evaluation_lines: LineFile | None = None
        self._outcomes: list[Outcome] = []
        self.flops, self.peak_flops, self.skips, self.waited = flops, peak_flops, skips, waited
        self._waited_before = 0.0
        self._pending: list[tuple[dict[str, Any], list[torch.Tensor], list[str]]] = []
        self._since = time.perf_counter()
        self._drawn = time.monotonic()
        self._trackers: Sequence[Tracker] = ()
        if environment.is_main:
            self._lines = LineFile(self.path, first_step)
            self._evaluation_lines = LineFile(self.evaluation_path, first_step)
            self._trackers = [ProgressBar(max_steps, first_step)] if trackers is None else trackers

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, on rank 0."""
        return self._lines.lines if self._lines is not None else []

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of ``evaluations.jsonl``, on rank 0."""
        return self._evaluation_lines.lines if self._evaluation_lines is not None else []

    def take_outcomes(self) -> list[Outcome]:
        """What the last reads brought and nobody has taken yet; the same on every rank."""
        taken, self._outcomes = self._outcomes, []
        return taken

    def rewind(self, step: int) -> None:
        """Forgets the steps after ``step``, which will be made again."""
        self._pending, self._outcomes = [], []
        for lines in (self._lines, self._evaluation_lines):
            if lines is not None:
                lines.rewind(step)
        self._tell_trackers(lambda tracker: tracker.rewind(step))
        self.restart_clock()

    def add(
        self,
        step: int,
        result: StepResult,
        *,
        learning_rate: float,
        num_tokens: torch.Tensor | int,
        num_samples: int,
        attention_masks: list[torch.Tensor | None],
        learning_rates: Mapping[str, float] | None = None,
        work: Work | None = None,
    ) -> None:
        """Takes a step's numbers, and writes all that are waiting when it is time.

        Args:
            step: updates made, this one included.
            result: of ``Engine.step``.
            learning_rate: the decoder's.
            num_tokens: label tokens of the global batch.
            num_samples: samples of the global batch.
            attention_masks: of this rank's micro-batches.
            learning_rates: of each part that is trained.
            work: of this rank's micro-batches together.
        """
        device, world_size = result.loss.device, self.environment.world_size
        names, values = ["loss"], [result.loss.reshape(1)]
        for name, value in result.auxiliary.items():
            names.append(f"{name}_loss")
            values.append(value.reshape(1) / world_size)
        for name, value in result.numbers.items():
            names.append(name)
            values.append(value.reshape(1) / world_size)
        norm = result.gradient_norm
        if norm is not None:
            names.append("gradient_norm")
            values.append(torch.as_tensor(norm, dtype=torch.float32, device=device).reshape(1) / world_size)
        if isinstance(num_tokens, torch.Tensor):
            names.append("tokens")
            values.append(num_tokens.reshape(1) / world_size)
        if work is not None:
            names.append("input_tokens")
            counted = [float(work.tokens)]
            if self.flops is not None:
                names.append("model_flops")
                counted.append(self.flops(work))
            values.append(torch.tensor(counted, device=device))
        if self.waited is not None:
            so_far = self.waited()
            names.append("data_wait")
            values.append(torch.tensor([(so_far - self._waited_before) / world_size], device=device))
            self._waited_before = so_far
        totals = routing_totals(result.outputs, attention_masks)
        host: dict[str, Any] = {"step": step, "learning_rate": learning_rate, "samples": num_samples}
        if learning_rates:
            host["learning_rates"] = dict(learning_rates)
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
        shared = {**self._memory(), **self._skipped()}
        lines = []
        for host, values, names in self._pending:
            count = sum(value.numel() for value in values)
            read = dict(zip(names, numbers, strict=False))
            outcome = Outcome(host["step"], read["loss"], read.get("gradient_norm"))
            self._outcomes.append(outcome)
            self.num_skipped += not outcome.is_finite
            if self.environment.is_main:
                line = _line(host, names, numbers[:count], seconds)
                if self.peak_flops and "model_flops" in line:
                    line["mfu"] = line["model_flops"] / (seconds * self.environment.world_size * self.peak_flops)
                lines.append(_finite({**line, **shared, "skipped_steps": self.num_skipped}))
            numbers = numbers[count:]
        if self.environment.is_main:
            self._write(lines)
        self._pending = []
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Leaves what was done since the last ``flush`` (a checkpoint, an evaluation) out of the speeds."""
        self._since = time.perf_counter()

    def add_evaluation(self, line: dict[str, Any]) -> None:
        """Takes the numbers of an evaluation, with their ``step``; called after ``flush``, written by rank 0."""
        if self._evaluation_lines is not None:
            self._evaluation_lines.append([line])
            self._tell_trackers(lambda tracker: tracker.log_evaluation(line))

    def close(self) -> None:
        """Writes what is waiting and closes the trackers."""
        self.flush()
        self._tell_trackers(lambda tracker: tracker.close())
        if self.environment.is_main:
            self._draw_expert_load()

    def _memory(self) -> dict[str, int]:
        """Bytes of the fullest rank: of its GPU, or of its process on a CPU (which reserves nothing)."""
        device = self.environment.device
        if device.type == "cuda":
            read = (torch.cuda.memory_allocated, torch.cuda.memory_reserved, torch.cuda.max_memory_allocated)
            found = {
                name: int(one(device))
                for name, one in zip(("memory_allocated", "memory_reserved", "memory_peak"), read, strict=True)
            }
        else:
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found = {"memory_peak": kilobytes if sys.platform == "darwin" else kilobytes * 1024}
        if self.environment.world_size > 1:
            most = torch.tensor(list(found.values()), dtype=torch.int64, device=device)
            distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
            found = dict(zip(found, most.tolist(), strict=True))
        return found

    def _skipped(self) -> dict[str, dict[str, int]]:
        """Samples that all ranks' sources left out since the start, by reason."""
        if self.skips is None:
            return {}
        mine = dict(self.skips())
        gathered: list[Any] = [mine]
        if self.environment.world_size > 1:
            gathered = [None] * self.environment.world_size
            distributed.all_gather_object(gathered, mine)
        total: Counter[str] = Counter()
        for one in gathered:
            total.update(one)
        return {"data_skips": dict(sorted(total.items()))}

    def _write(self, lines: list[dict[str, Any]]) -> None:
        assert self._lines is not None
        self._lines.append(lines)
        self._tell_trackers(lambda tracker: tracker.log(lines))
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_HEAT_MAPS:
            self._draw_expert_load()

    def _tell_trackers(self, action: Callable[[Tracker], None]) -> None:
        """A tracker that cannot write any more, as on a full disk, is left out from then on."""
        for tracker in self._trackers:
            try:
                action(tracker)
            except OSError as error:
                self._trackers = [other for other in self._trackers if other is not tracker]
                warn(f"{type(tracker).__name__} is left out from now on: {error}")

    def _draw_expert_load(self) -> None:
        if self.history and "expert_tokens" in self.history[-1]:
            try:
                plot_expert_load(self.history, self.heat_map_path)
            except OSError as error:
                warn(f"{self.heat_map_path} cannot be written ({error})")
        self._drawn = time.monotonic()


def _line(host: dict[str, Any], names: list[str], numbers: list[float], seconds: float) -> dict[str, Any]:
    line = dict(host)
    shape = line.pop("routing_shape", None)
    line.update(zip(names, numbers, strict=False))
    for name in ("tokens", "input_tokens"):
        if name in line:
            line[name] = round(line[name])
    line["tokens_per_second"] = line.get("input_tokens", line["tokens"]) / seconds
    line["samples_per_second"] = line["samples"] / seconds
    line["seconds"] = seconds
    if "data_wait" in line:
        line["data_wait"] /= seconds
    if shape is not None:
        layers, columns = shape
        totals = numbers[len(names) :]
        line.update(describe_routing([totals[layer * columns : (layer + 1) * columns] for layer in range(layers)]))
    return line


def _finite(value: Any) -> Any:
    """Plain data with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
