"""What the ready files of ``deepspeed_configs/`` can train: the table of its README, planned.

The README says for which case a file is, on how many GPUs and with which further settings; the largest model that then
fits a GPU, and the memory it takes there, are worked out here. ``scripts/plan_ready_files.py`` writes them down.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi35 import presets
from phi35.config import ModelConfig
from phi35.planning.memory import MemoryPlan, plan_memory
from phi35.planning.plan import GPUS, fits
from phi35.training.config import TrainingConfig, read_settings
from phi35.training.deepspeed_config import config_fields, read_deepspeed_file

MODELS = ("phi-3.5-moe", "phi-3-medium-4k", "phi-3.5-mini")
"""Presets that are tried, the largest first."""
DEFAULTS = {"sequence_length": 4096, "micro_batch_size": 1, "gradient_checkpointing": True}
"""Settings of a row that neither the file nor the row decides."""
KINDS = ("h100", "h200")
"""GPUs of the table's last columns, by their names in ``phi35.planning.plan.GPUS``."""


@dataclass(frozen=True)
class Row:
    """A row of the table as it is given: the file, what it serves, the GPUs, and settings as ``key=value``."""

    file: str
    case: str
    num_gpus: int
    settings: str

    @classmethod
    def parse(cls, line: str) -> "Row":
        """Reads a line of the table.

        Raises:
            ValueError: if it has not as many cells.
        """
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 4 + len(KINDS):
            raise ValueError(f"a row of the table has {4 + len(KINDS)} cells, got {len(cells)}: {line!r}")
        return cls(cells[0].strip("`"), cells[1], int(cells[2]), cells[3].strip("`"))

    def render(self, cells: list[str]) -> str:
        """The line, with the planned cells."""
        settings = f"`{self.settings}`" if self.settings else ""
        return "| " + " | ".join([f"`{self.file}`", self.case, str(self.num_gpus), settings, *cells]) + " |"


@dataclass(frozen=True)
class Fitting:
    """The largest model that fits.

    Attributes:
        model: preset.
        num_layers: of its decoder, all or as many as fit; 0 where not one does.
        memory: of one GPU.
    """

    model: str
    num_layers: int
    memory: MemoryPlan

    def cell(self) -> str:
        """For the table."""
        if not self.num_layers:
            return "nothing"
        all_layers = presets.get(self.model).num_hidden_layers
        part = "" if self.num_layers == all_layers else f", {self.num_layers} of {all_layers} layers"
        host = f", host {self.memory.host / 1e9:.1f}" if self.memory.host else ""
        return f"{self.model}{part}: {self.memory.peak / 1e9:.1f}{host}"


def rows(readme: Path) -> list[Row]:
    """The table's rows in a README."""
    return [Row.parse(line) for line in readme.read_text().splitlines() if line.startswith("| `")]


def largest(row: Row, folder: Path, kind: str) -> Fitting:
    """The largest model of ``MODELS`` that fits, whole; of the smallest, or of the one that the row's settings name,
    as many layers as fit.

    Args:
        row: of the table.
        folder: of the ready files.
        kind: of GPU.
    """
    values = _settings(row, folder)
    names = [values["model"]] if "model" in values else [name for name in MODELS if _can(values, name)]
    for name in names:
        whole = presets.get(name).num_hidden_layers
        memory = memory_of(row, folder, name, whole)
        if fits(memory, GPUS[kind]):
            return Fitting(name, whole, memory)
    below, above = 0, whole
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(memory_of(row, folder, name, middle), GPUS[kind]) else (below, middle)
    return Fitting(name, below, memory_of(row, folder, name, max(1, below)))


@functools.lru_cache(maxsize=256)
def memory_of(row: Row, folder: Path, model: str, num_layers: int) -> MemoryPlan:
    """Memory of one GPU with a row's file and settings.

    Args:
        row: of the table.
        folder: of the ready files.
        model: preset.
        num_layers: of its decoder.
    """
    values = {**_settings(row, folder), "model": model}
    values.setdefault("global_batch_size", values["micro_batch_size"] * row.num_gpus)
    model_config: ModelConfig = presets.get(model).replace(num_hidden_layers=num_layers)
    config = TrainingConfig(**values).resolve(
        world_size=row.num_gpus,
        num_experts=model_config.num_local_experts,
        router_aux_loss_coef=model_config.router_aux_loss_coef,
    )
    return plan_memory(model_config, config, row.num_gpus)


def _settings(row: Row, folder: Path) -> dict[str, Any]:
    return read_settings(
        None, row.settings.split(), {**DEFAULTS, **config_fields(read_deepspeed_file(folder / row.file))}
    )


def _can(values: Mapping[str, Any], model: str) -> bool:
    """Whether a model is one the settings are for: experts spread over ranks need a model with experts."""
    return presets.get(model).is_sparse or values.get("ep_size", 1) == 1
