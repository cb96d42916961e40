"""The files of a training checkpoint: written aside, hashed, renamed into place, verified before they are read.

A checkpoint is a folder ``step-00000100`` with

- ``tensors-*.safetensors``: one logical tensor per parameter name and kind (float32 master "parameter", "exp_avg",
  "exp_avg_sq"); an expert-parallel rank writes its experts as a piece with an offset,
- ``random-*.safetensors``: every rank's random state,
- ``trainer.json``: step, data position, configs, versions,
- ``manifest.json``: the tensors' places and each file's size and SHA-256, written last.

The folder gets its name only when all of it is on disk, so that a folder of that name is complete.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
BYTES_PER_FILE = 2**30
_NAME = re.compile(r"step-(\d{8,})")


class TensorWriter:
    """Writes tensors to safetensors files of bounded size, holding at most one file's worth in memory.

    Args:
        folder: where the files go.
        label: distinguishes this rank's files.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.folder, self.label = folder, label
        self.pieces: list[dict[str, Any]] = []
        self.files: list[str] = []
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0

    def add(self, kind: str, name: str, tensor: torch.Tensor, *, offset: int = 0, rows: int | None = None) -> None:
        """Queues a tensor.

        Args:
            kind: what it is of the parameter.
            name: the parameter's name.
            tensor: a whole tensor, or rows of it along dim 0.
            offset: first row that this piece holds.
            rows: rows of the whole tensor; None where ``tensor`` is whole.
        """
        whole = list(tensor.shape) if rows is None else [rows, *tensor.shape[1:]]
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending[f"{kind}.{name}"] = tensor
        self._pending_bytes += tensor.numel() * tensor.element_size()
        piece = {"kind": kind, "name": name, "shape": whole, "offset": offset, "rows": list(tensor.shape)[:1]}
        self.pieces.append({**piece, "file": self._file_name()})
        if self._pending_bytes >= BYTES_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Writes what is queued."""
        from safetensors.torch import save_file

        if self._pending:
            name = self._file_name()
            save_file(self._pending, self.folder / name)
            self.files.append(name)
            self._pending, self._pending_bytes = {}, 0

    def _file_name(self) -> str:
        return f"tensors-{self.label}-{len(self.files):05d}.safetensors"


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
        if verify:
            self.verify()
        self.trainer: dict[str, Any] = json.loads((self.folder / TRAINER).read_text())
        self._pieces: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for piece in self.manifest["tensors"]:
            self._pieces.setdefault((piece["kind"], piece["name"]), []).append(piece)
        self._open: dict[str, Any] = {}

    def verify(self) -> None:
        """Compares every file with the manifest.

        Raises:
            ValueError: naming each file that is missing or altered.
        """
        problems = []
        for name, expected in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != expected["bytes"]:
                problems.append(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
            elif file_digest(path) != expected["sha256"]:
                problems.append(f"{name} is altered: its SHA-256 differs from the manifest's")
        if problems:
            raise ValueError(f"checkpoint {str(self.folder)!r} is damaged: " + "; ".join(problems))

    def names(self, kind: str) -> set[str]:
        """Parameters that have a tensor of this kind."""
        return {name for found, name in self._pieces if found == kind}

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
        from safetensors import safe_open

        if piece["file"] not in self._open:
            self._open[piece["file"]] = safe_open(self.folder / piece["file"], framework="pt")
        opened, key = self._open[piece["file"]], f"{kind}.{name}"
        return opened.get_tensor(key) if rows is None else opened.get_slice(key)[rows]


def folder_name(step: int) -> str:
    """Name of the checkpoint after ``step`` updates."""
    return f"step-{step:08d}"


def complete_checkpoints(root: str | Path) -> list[Path]:
    """Complete checkpoints below ``root``, oldest first, found by looking, not by a pointer file."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / MANIFEST).is_file()]


def begin(root: Path, step: int) -> Path:
    """A fresh folder to write a checkpoint into, beside the complete ones; leftovers of dead writers go."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover)
    folder = root / f".writing-{folder_name(step)}"
    folder.mkdir()
    return folder


def commit(
    folder: Path, step: int, *, trainer: dict[str, Any], pieces: list[dict[str, Any]], files: dict[str, dict[str, Any]]
) -> Path:
    """Writes the manifest, brings everything to disk and gives the folder its name.

    Args:
        folder: from ``begin``, with all ranks' files.
        step: updates made.
        trainer: trainer state, plain data.
        pieces: places of all tensors.
        files: size and SHA-256 of each file written so far.
    """
    (folder / TRAINER).write_text(json.dumps(trainer, indent=1))
    files = {**files, TRAINER: describe_file(folder / TRAINER)}
    body = {"format": FORMAT, "step": step, "files": files, "tensors": pieces}
    (folder / MANIFEST).write_text(json.dumps({**body, "sha256": _text_digest(body)}))
    _sync(folder / MANIFEST)
    _sync(folder)
    final = folder.with_name(folder_name(step))
    replaced = _put_away(final) if final.exists() else None  # the same step of an earlier run
    folder.rename(final)
    _sync(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)
    return final


def prune(root: Path, keep_last: int) -> list[Path]:
    """Removes all but the newest ``keep_last`` complete checkpoints (0 keeps all); returns what was removed."""
    removed = complete_checkpoints(root)[:-keep_last] if keep_last else []
    for folder in removed:
        shutil.rmtree(_put_away(folder))
    return removed


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


def _put_away(folder: Path) -> Path:
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
