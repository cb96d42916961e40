"""Tensors of a checkpoint to safetensors files: copied to host buffers first, written then or later.

A buffer holds the tensors of one file, at most ``BYTES_PER_FILE`` where no single tensor is larger. Written at once,
one buffer serves all files. Written later, all of them wait in memory, pinned on a GPU's host so that the copy runs at
the bus's speed, and are kept for the next checkpoint.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from phi35.checkpoint.writer import write_safetensors

BYTES_PER_FILE = 2**30
_ALIGNMENT = 8


class HostBuffers:
    """Host memory that is lent out and comes back.

    Args:
        pinned: page-locked, for copies from a GPU.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._free: list[torch.Tensor] = []

    def take(self, size: int) -> torch.Tensor:
        """A flat uint8 buffer of at least ``size`` bytes."""
        for place, buffer in enumerate(self._free):
            if buffer.numel() >= size:
                return self._free.pop(place)
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Returns a buffer that nobody reads any more."""
        self._free.append(buffer)


class TensorWriter:
    """Copies tensors to the host and writes them to files of bounded size.

    Args:
        folder: where the files go.
        label: distinguishes this rank's files.
        expected_bytes: of all tensors to come, as far as known; buffers are no larger than that.
        buffers: where host memory comes from.
        deferred: keep everything in memory until ``write_all``.

    Attributes:
        pieces: places of the tensors added so far.
        files: size and SHA-256 of each file written.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        *,
        expected_bytes: int = 0,
        buffers: HostBuffers | None = None,
        deferred: bool = False,
    ) -> None:
        self.folder, self.label, self.deferred = folder, label, deferred
        self.buffers = HostBuffers() if buffers is None else buffers
        self.pieces: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, Any]] = {}
        self._expected = expected_bytes
        self._buffer: torch.Tensor | None = None
        self._filled = 0
        self._views: dict[str, torch.Tensor] = {}
        self._sealed: list[tuple[str, dict[str, torch.Tensor], torch.Tensor]] = []
        self._count = 0

    def add(self, kind: str, name: str, tensor: torch.Tensor, *, offset: int = 0, rows: int | None = None) -> None:
        """Copies a tensor to the host; where it fills a file, that is written, unless ``deferred``.

        Args:
            kind: what it is of the parameter.
            name: the parameter's name.
            tensor: a whole tensor, or rows of it along dim 0.
            offset: first row that this piece holds.
            rows: rows of the whole tensor; None where ``tensor`` is whole.

        Raises:
            OSError: if a file cannot be written.
        """
        tensor = tensor.detach()
        whole = list(tensor.shape) if rows is None else [rows, *tensor.shape[1:]]
        size = tensor.numel() * tensor.element_size()
        if self._buffer is not None and self._filled + size > self._buffer.numel():
            self._seal()
        if self._buffer is None:
            # Never a little over BYTES_PER_FILE: torch rounds pinned memory up to a power of two.
            self._buffer = self.buffers.take(max(size, min(BYTES_PER_FILE, self._expected)))
        part = self._buffer[self._filled : self._filled + size]
        view = part.view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor, non_blocking=self.buffers.pinned)
        self._views[f"{kind}.{name}"] = view
        self._filled += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._expected = max(0, self._expected - size)
        piece = {"kind": kind, "name": name, "shape": whole, "offset": offset, "rows": list(tensor.shape)[:1]}
        self.pieces.append({**piece, "file": self._file_name()})

    def finish_copies(self) -> None:
        """Ends the last file; afterwards the tensors that were added may change."""
        self._seal()
        if self.buffers.pinned:
            torch.cuda.current_stream().synchronize()

    def write_all(self) -> None:
        """Writes what waits, and returns the buffers.

        Raises:
            OSError: if a file cannot be written.
        """
        while self._sealed:
            self._write_first()

    def drop(self) -> None:
        """Returns the buffers without writing them."""
        for _, _, buffer in self._sealed:
            self.buffers.give_back(buffer)
        self._sealed = []

    def _seal(self) -> None:
        if self._buffer is None:
            return
        self._sealed.append((self._file_name(), self._views, self._buffer))
        self._buffer, self._filled, self._views = None, 0, {}
        self._count += 1
        if not self.deferred:
            if self.buffers.pinned:
                torch.cuda.current_stream().synchronize()
            self.write_all()

    def _write_first(self) -> None:
        name, views, buffer = self._sealed.pop(0)
        try:
            self.files[name] = write_hashed(self.folder / name, views)
        finally:
            self.buffers.give_back(buffer)

    def _file_name(self) -> str:
        return f"tensors-{self.label}-{self._count:05d}.safetensors"


def write_hashed(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes a safetensors file, brings it to disk, and gives its size and the SHA-256 of what was written."""
    digest = hashlib.sha256()
    write_safetensors(path, tensors, digest=digest)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
