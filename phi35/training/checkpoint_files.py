"""The files of a training checkpoint: written aside, hashed, renamed into place, verified before they are read.

A checkpoint is a folder ``step-00000100`` with

- ``tensors-*.safetensors``: one logical tensor per parameter name and kind (float32 master "parameter", "exp_avg",
  "exp_avg_sq"); an expert-parallel rank writes its experts as a piece with an offset,
- ``random-*.safetensors``: every rank's random state,
- ``trainer.json``: step, data position, configs, versions,
- ``manifest.json``: the tensors' places and each file's size and SHA-256, written last.

The folder gets its name only when all of it is on disk, files and directories, so that a folder of that name is
complete. Nothing but safetensors and JSON is ever opened; a file that the manifest does not list is not read.
"""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
HASHING_THREADS = 4
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointReader:
    """A checkpoint's contents, verified.

    Args:
        folder: a complete checkpoint.
        verify: compare every file with its SHA-256 first.

    Raises:
        ValueError: if the folder is no checkpoint or a file is missing or altered, naming it.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            raise ValueError(f"{str(folder)!r} is no complete training checkpoint: it has no {MANIFEST}")
        try:
            self.manifest = json.loads(manifest.read_text())
            body = {key: value for key, value in self.manifest.items() if key != "sha256"}
            intact = self.manifest["sha256"] == _text_digest(body) and self.manifest["format"] == FORMAT
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise ValueError(f"{str(manifest)!r} is altered or of another format; use another checkpoint")
        self._refuse_foreign_files()
        if verify:
            self.verify()
        self._pieces: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for piece in self.manifest["tensors"]:
            self._pieces.setdefault((piece["kind"], piece["name"]), []).append(piece)

    @functools.cached_property
    def trainer(self) -> dict[str, Any]:
        """Step, data position, configs, versions."""
        try:
            return json.loads((self.folder / TRAINER).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(self.folder / TRAINER)!r} cannot be read: {error}") from error

    def verify(self) -> None:
        """Compares every file with the manifest.

        Raises:
            ValueError: naming each file that is missing or altered.
        """
        problems = self.damage(self.manifest["files"])
        if problems:
            raise ValueError(damage_message(self.folder, problems))

    def damage(self, names: Iterable[str]) -> list[str]:
        """What is wrong with some of the manifest's files, a line for each that is missing or altered."""
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            return [problem for problem in pool.map(self._file_damage, names) if problem]

    def _file_damage(self, name: str) -> str | None:
        path, expected = self.folder / name, self.manifest["files"][name]
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if file_digest(path) != expected["sha256"]:
                return f"{name} is altered: its SHA-256 differs from the manifest's"
        except OSError as error:
            return f"{name} cannot be read ({error})"
        return None

    def _refuse_foreign_files(self) -> None:
        """A manifest that was forged could name any file; none outside, and none of another format, is opened."""
        listed = {*self.manifest["files"], *(piece["file"] for piece in self.manifest["tensors"])}
        outside = sorted(name for name in listed if Path(name).name != name or name in ("", ".", ".."))
        foreign = sorted(name for name in listed if not name.endswith((".safetensors", ".json")))
        if outside or foreign:
            raise ValueError(
                f"checkpoint {str(self.folder)!r} is refused: its manifest names {[*outside, *foreign][:5]}; only "
                "safetensors and JSON files inside the folder are opened, never pickles"
            )

    def names(self, kind: str) -> set[str]:
        """Parameters that have a tensor of this kind."""
        return {name for found, name in self._pieces if found == kind}

    def has(self, kind: str, name: str) -> bool:
        """Whether a parameter has a tensor of this kind."""
        return (kind, name) in self._pieces

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._pieces[kind, name][0]["shape"])

    def read(self, kind: str, name: str, offset: int = 0, rows: int | None = None) -> torch.Tensor:
        """A tensor, or rows [offset, offset + rows) of it, put together from its pieces.

        Raises:
            ValueError: if the checkpoint lacks it, or some of the rows.
        """
        pieces = self._pieces.get((kind, name))
        if pieces is None:
            raise ValueError(f"checkpoint {str(self.folder)!r} has no {kind} of {name!r}")
        shape = pieces[0]["shape"]
        if not shape:
            return self._slice(pieces[0], kind, name, None)
        stop = shape[0] if rows is None else offset + rows
        parts = []
        position = offset
        for piece in sorted(pieces, key=lambda piece: piece["offset"]):
            start, end = piece["offset"], piece["offset"] + piece["rows"][0]
            low, high = max(position, start), min(stop, end)
            if low < high and low == position:
                parts.append(self._slice(piece, kind, name, slice(low - start, high - start)))
                position = high
        if position != stop:
            raise ValueError(f"checkpoint {str(self.folder)!r} lacks rows {position} to {stop} of {kind} of {name!r}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_file(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of a file that is listed in the manifest."""
        from safetensors.torch import load_file

        if name not in self.manifest["files"]:
            raise ValueError(f"checkpoint {str(self.folder)!r} has no file {name!r}")
        return load_file(self.folder / name)

    def _slice(self, piece: dict[str, Any], kind: str, name: str, rows: slice | None) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        key = f"{kind}.{name}"
        try:
            # Opened for each tensor: an open file keeps every page in memory that was read of it.
            with safe_open(self.folder / piece["file"], framework="pt") as opened:
                return opened.get_tensor(key) if rows is None else opened.get_slice(key)[rows]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{piece['file']} of checkpoint {str(self.folder)!r} cannot be read: {error}") from error


def damage_message(folder: Path, problems: list[str]) -> str:
    """How damage to a checkpoint's files is reported."""
    return f"checkpoint {str(folder)!r} is damaged: " + "; ".join(problems)


def folder_name(step: int) -> str:
    """Name of the checkpoint after ``step`` updates."""
    return f"step-{step:08d}"


def writing_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` updates is written before it gets its name."""
    return root / f".writing-{folder_name(step)}"


def random_file(rank: int) -> str:
    """Name of the file with a rank's random state."""
    return f"random-{rank:05d}.safetensors"


def step_of(folder: Path) -> int:
    """Updates made before a checkpoint, by its name."""
    match = _NAME.fullmatch(folder.name)
    assert match, f"{folder} is not named like a checkpoint"
    return int(match[1])


def complete_checkpoints(root: str | Path) -> list[Path]:
    """Complete checkpoints below ``root``, oldest first, found by looking, not by a pointer file."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / MANIFEST).is_file()]


def begin(root: Path, step: int) -> Path:
    """A fresh folder to write a checkpoint into, beside the complete ones; leftovers of dead writers go."""
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        _sync(root.parent)
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover)
    folder = writing_folder(root, step)
    folder.mkdir()
    return folder


def commit(
    folder: Path, step: int, *, trainer: str, pieces: list[dict[str, Any]], files: dict[str, dict[str, Any]]
) -> Path:
    """Writes the manifest, brings everything to disk and gives the folder its name.

    Args:
        folder: from ``begin``, with all ranks' files.
        step: updates made.
        trainer: trainer state, JSON.
        pieces: places of all tensors.
        files: size and SHA-256 of each file written so far.
    """
    (folder / TRAINER).write_text(trainer)
    files = {**files, TRAINER: describe_file(folder / TRAINER)}
    body = {"format": FORMAT, "step": step, "files": files, "tensors": pieces}
    (folder / MANIFEST).write_text(json.dumps({**body, "sha256": _text_digest(body)}))
    _sync(folder / MANIFEST)
    _sync(folder)
    final = folder.with_name(folder_name(step))
    replaced = hide(final) if final.exists() else None  # the same step of an earlier run
    folder.rename(final)
    _sync(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)
    return final


def outdated(root: Path, keep_last: int, keep_every: int = 0, protected: Collection[int] = ()) -> list[Path]:
    """Complete checkpoints beyond the newest ``keep_last`` (0 keeps all), but for every ``keep_every``-th step's and
    those of the ``protected`` steps."""
    found = complete_checkpoints(root)[:-keep_last] if keep_last else []
    found = [folder for folder in found if step_of(folder) not in protected]
    return [folder for folder in found if not keep_every or step_of(folder) % keep_every]


def put_aside(folder: Path, why: str) -> Path:
    """Renames a checkpoint to ``<why>-step-...``, in place of an earlier one, so that it counts no more."""
    aside = folder.with_name(f"{why}-{folder.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return folder.rename(aside)


def set_aside(root: Path) -> Path | None:
    """Makes room for a run that starts anew: what earlier runs saved moves to ``<root>-replaced``, in place of
    what was there before; returns that folder, or None where there was nothing.

    Left where they are, later steps of an earlier run would count as newer than the new run's checkpoints.
    """
    if not root.is_dir() or not any(root.iterdir()):
        return None
    replaced = root.with_name(f"{root.name}-replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    return root.rename(replaced)


def hide(folder: Path) -> Path:
    """Takes a checkpoint's name away at once, so that one half removed never counts; ``begin`` clears leftovers."""
    away = folder.with_name(f".writing-removed-{folder.name}")
    if away.exists():
        shutil.rmtree(away)
    return folder.rename(away)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, which is brought to disk first."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
