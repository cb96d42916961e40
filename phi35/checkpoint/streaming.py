"""A checkpoint's tensors read one at a time, for conversions that never hold a model."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from phi35.checkpoint.reader import StoredTensor, match_headers, read_headers, stored_dtype
from phi35.checkpoint.rules import CheckpointPlan, Placement, check_repeats
from phi35.config import ModelConfig


class StoredWeights:
    """The tensors of a checkpoint folder under their memory names.

    Args:
        folder: the checkpoint.
        config: its config.

    Attributes:
        plan: names and shapes.
        stored: disk name -> place, shape and dtype.
        main_dtype: the dtype of most tensors.

    Raises:
        ValueError: if the checkpoint does not fit its config, or repeats a tensor with other values.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.plan = CheckpointPlan(config)
        self.stored: Mapping[str, StoredTensor] = read_headers(folder)
        self.main_dtype = stored_dtype(self.stored)
        match = match_headers(self.plan, self.stored, folder)
        self._parts: dict[str, list[Placement]] = {}
        for placement in match.load:
            self._parts.setdefault(placement.memory_name, []).append(placement)
        check_repeats(
            p.disk_name for p in match.verify if not torch.equal(p.take(self.tensor(p.memory_name)), self._read(p))
        )

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Memory name to dtype as stored."""
        return {name: self.stored[parts[0].disk_name].dtype for name, parts in self._parts.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The memory tensor ``name``, put together from what the disk holds."""
        parts = self._parts[name]
        if parts == [Placement(parts[0].disk_name, name)]:
            return self._read(parts[0])
        whole = torch.empty(self.plan.shapes[name], dtype=self.stored[parts[0].disk_name].dtype)
        for part in parts:
            part.put(whole, self._read(part))
        return whole

    def verbatim(self, name: str) -> tuple[Path, str] | None:
        """File and disk name of memory tensor ``name`` where it is stored just as memory holds it, else None."""
        first, *others = self._parts[name]
        if others or first != Placement(first.disk_name, name):
            return None
        return self.stored[first.disk_name].file, first.disk_name

    def part(self, name: str, placement: Placement) -> torch.Tensor:
        """The part of memory tensor ``name`` that ``placement`` takes of a tensor laid out alike.

        Read alone where the disk stores it so, which spares reading all experts for one.
        """
        for stored in self._parts[name]:
            same = (stored.index, stored.window, stored.groups) == (placement.index, placement.window, placement.groups)
            if same and not (stored.leading_ones or stored.transpose):
                return self._read(stored)
        return placement.take(self.tensor(name))

    def _read(self, placement: Placement) -> torch.Tensor:
        file = self.stored[placement.disk_name].file
        # Opened for each tensor: an open shard keeps the pages that it has read.
        with safe_open(str(file), framework="pt", device="cpu") as shard:
            return shard.get_tensor(placement.disk_name)


def check_target(source: Path, target: Path) -> None:
    """Check that a conversion may write into ``target``.

    Raises:
        ValueError: if it is a file, or the source itself.
    """
    if target.exists() and (not target.is_dir() or target.resolve() == source.resolve()):
        raise ValueError(f"{target} is {'the source itself' if target.is_dir() else 'a file'}: give another folder")


def check_space(target: Path, needed: int) -> None:
    """Check that the disk of a folder, which need not exist yet, has room.

    Raises:
        ValueError: if it has not.
    """
    existing = target
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(f"the weights take {needed:,} bytes and {existing} has {free:,} free")


def copy_companions(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy files such as tokenizer and template that a conversion leaves as they are."""
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
