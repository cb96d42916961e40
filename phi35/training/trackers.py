"""Where the numbers of a run go besides ``metrics.jsonl``: the terminal, TensorBoard, Weights & Biases.

A tracker lives on rank 0 alone. It takes finished lines of plain numbers, so that none of them touches the device.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Line = Mapping[str, Any]

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""The trackers that a config may name, and the package that each needs."""

GIGABYTE = 1e9
_SPEEDS = ("tokens_per_second", "samples_per_second", "seconds", "mfu")
_ROUTING = ("load_max_over_mean", "routing_entropy", "expert_weight_sum")


class Tracker(Protocol):
    """Takes the lines of a run as they are written."""

    def log(self, lines: Sequence[Line]) -> None:
        """Takes lines of ``metrics.jsonl``, in order."""

    def log_evaluation(self, line: Line) -> None:
        """Takes a line of ``evaluations.jsonl``."""

    def rewind(self, step: int) -> None:
        """Forgets the steps after ``step``, where the tracker can."""

    def close(self) -> None:
        """Brings everything to its place."""


def choose_trackers(names: Sequence[str] | None) -> tuple[str, ...]:
    """The trackers of a run.

    Args:
        names: what the config says; None takes TensorBoard where its package is installed.

    Raises:
        ValueError: for a tracker whose package is missing.
    """
    if names is None:
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    missing = [name for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        packages = " ".join(PACKAGES[name] for name in missing)
        raise ValueError(f"trackers {missing} need packages that are not installed: pip install {packages}")
    return tuple(names)


def open_trackers(
    names: Sequence[str],
    folder: Path,
    *,
    max_steps: int,
    first_step: int = 0,
    config: Mapping[str, Any] | None = None,
    wandb_options: Mapping[str, Any] | None = None,
) -> list[Tracker]:
    """The progress bar and the trackers that a config names.

    Args:
        names: of ``choose_trackers``.
        folder: of the run.
        max_steps: steps of the run.
        first_step: steps made before; later values of an earlier attempt are dropped where the tracker can.
        config: shown beside the curves.
        wandb_options: keyword arguments of ``wandb.init``, such as project and mode.

    Raises:
        ValueError: if Weights & Biases cannot start.
    """
    trackers: list[Tracker] = [ProgressBar(max_steps, first_step)]
    if "tensorboard" in names:
        trackers.append(TensorBoard(folder / "tensorboard", first_step))
    if "wandb" in names:
        trackers.append(WeightsAndBiases(folder, config or {}, wandb_options or {}))
    return trackers


class ProgressBar:
    """One line in the terminal: steps, time left, speed and the last numbers."""

    def __init__(self, max_steps: int, first_step: int = 0) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm
        self._bar: Any = tqdm(total=max_steps, initial=first_step, unit="step", desc="training", dynamic_ncols=True)

    def log(self, lines: Sequence[Line]) -> None:
        """Moves on by the lines and shows the last one."""
        last = lines[-1]
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        shown = {"loss": loss, "tokens/s": f"{last['tokens_per_second']:.0f}"}
        if "mfu" in last:
            shown["MFU"] = f"{last['mfu']:.1%}"
        shown["lr"] = f"{last['learning_rate']:.2e}"
        if last.get("gradient_norm") is not None:
            shown["norm"] = f"{last['gradient_norm']:.2f}"
        if "memory_peak" in last:
            shown["GB"] = f"{last['memory_peak'] / GIGABYTE:.1f}"
        if last.get("skipped_steps"):
            shown["skipped steps"] = str(last["skipped_steps"])
        skips = sum(last.get("data_skips", {}).values())
        if skips:
            shown["skipped"] = str(skips)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(len(lines))

    def log_evaluation(self, line: Line) -> None:
        """Prints a line above the bar."""
        values = [f"{name.replace('_', ' ')} {line[name]:.4f}" for name in ("loss", "accuracy") if name in line]
        best = " (best so far)" if line.get("best") else ""
        self._tqdm.write(f"step {line['step']}: held-out {', '.join(values)}{best}")

    def rewind(self, step: int) -> None:
        """Moves the bar back."""
        self._bar.n = step
        self._bar.refresh()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


class TensorBoard:
    """Scalars and the experts' load as histograms, in ``<run>/tensorboard``."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        self.folder = folder
        self._open(first_step + 1 if first_step else None)

    def log(self, lines: Sequence[Line]) -> None:
        """Writes the lines' numbers."""
        for line in lines:
            for name, value in scalars(line).items():
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def log_evaluation(self, line: Line) -> None:
        """Writes the numbers under ``evaluation/``."""
        for name, value in evaluation_scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """Begins an event file that hides the later values."""
        self._writer.close()
        self._open(step + 1)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(self.folder), purge_step=purge_step)


class WeightsAndBiases:
    """The same scalars at wandb.ai, or in ``<run>/wandb`` with ``mode: offline``; a resumed run goes on there."""

    def __init__(self, folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        import wandb

        remembered = folder / "wandb_run.json"
        identity = json.loads(remembered.read_text())["id"] if remembered.is_file() else None
        chosen = {"project": "phi35", "dir": str(folder), "resume": "allow", "id": identity, **options}
        try:
            self._run: Any = wandb.init(config=dict(config), settings=wandb.Settings(silent=True), **chosen)
        except (wandb.errors.Error, TypeError) as error:
            raise ValueError(
                f"Weights & Biases did not start: {error}; check wandb_options={dict(options)} (mode: offline needs "
                "no account), or leave 'wandb' out of trackers"
            ) from error
        remembered.write_text(json.dumps({"id": self._run.id}) + "\n")

    def log(self, lines: Sequence[Line]) -> None:
        """Sends the lines' numbers."""
        for line in lines:
            self._run.log(scalars(line), step=line["step"])

    def log_evaluation(self, line: Line) -> None:
        """Sends the numbers under ``evaluation/``."""
        self._run.log(evaluation_scalars(line), step=line["step"])

    def rewind(self, step: int) -> None:
        """Nothing: what was sent stays, and Weights & Biases takes no earlier steps again."""

    def close(self) -> None:
        """Waits until everything is written or sent."""
        self._run.finish()


def scalars(line: Line) -> dict[str, float]:
    """The plain numbers of a line of ``metrics.jsonl`` under names in groups, as trackers show them."""
    found: dict[str, float] = {}
    for name in ("loss", "gradient_norm", *sorted(name for name in line if name.endswith("_loss"))):
        if line.get(name) is not None:
            found[f"training/{name}"] = line[name]
    for name in _SPEEDS:
        if name in line:
            found[f"speed/{name}"] = line[name]
    for part, rate in line.get("learning_rates", {"all": line["learning_rate"]}).items():
        found[f"learning_rate/{part}"] = rate
    for name in ("memory_allocated", "memory_reserved", "memory_peak"):
        if name in line:
            found[f"memory_gb/{name.removeprefix('memory_')}"] = line[name] / GIGABYTE
    if "skipped_steps" in line:
        found["training/skipped_steps"] = line["skipped_steps"]
    for reason, count in line.get("data_skips", {}).items():
        found[f"data_skips/{reason}"] = count
    for name in _ROUTING:
        for layer, value in enumerate(line.get(name, ())):
            if value is not None:
                found[f"experts/{name}/layer_{layer:02d}"] = value
    return found


def evaluation_scalars(line: Line) -> dict[str, float]:
    """The numbers of a line of ``evaluations.jsonl``."""
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    return {f"evaluation/{name}": float(value) for name, value in numbers.items() if not isinstance(value, bool)}
