"""Weights to safetensors files: sharded by size, streamed tensor by tensor, put in place by renaming.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, a JSON header, the raw
tensors. It is written here directly, because the library's own writer first copies a whole shard to bytes; this
one holds a single tensor on the host at a time, wherever the model lies.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi35.checkpoint.reader import INDEX_FILE, SHARD_NAME, SINGLE_FILE

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class DeferredTensor:
    """A tensor that is made when its turn to be written comes.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        make: returns it; called once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize


Writable = torch.Tensor | DeferredTensor


def write_weights(folder: Path, tensors: Mapping[str, Writable], max_shard_size: int | str = "5GB") -> list[Path]:
    """Write a state as ``model.safetensors``, or as numbered shards with an index.

    New files are complete on disk before the first is renamed into place, and the index comes last. Weight files
    of an earlier save into the same folder are removed then.

    Args:
        folder: where to; made if absent.
        tensors: disk name -> tensor on any device; views are fine, and so are tensors not made yet.
        max_shard_size: bytes per file, e.g. "5GB" (10^9 bytes), "300MiB" or a number; one larger tensor has a file
            of its own.

    Returns:
        The weight files.

    Raises:
        ValueError: for a size that cannot be understood, before anything is written.
    """
    shards = plan_shards(tensors, parse_size(max_shard_size))
    folder.mkdir(parents=True, exist_ok=True)
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    files = [folder / name for name in ([SINGLE_FILE] if count == 1 else names)]
    waiting = [file.with_name(f".{file.name}.{os.getpid()}.part") for file in files]
    try:
        for part, shard in zip(waiting, shards, strict=True):
            write_safetensors(part, {name: tensors[name] for name in shard}, metadata={"format": "pt"})
        (folder / INDEX_FILE).unlink(missing_ok=True)
        for part, file in zip(waiting, files, strict=True):
            os.replace(part, file)
    finally:
        for part in waiting:
            part.unlink(missing_ok=True)
    for stale in folder.glob("model*.safetensors"):
        if stale not in files and (stale.name == SINGLE_FILE or SHARD_NAME.fullmatch(stale.name)):
            stale.unlink()
    if count > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


def plan_shards(tensors: Mapping[str, Writable], max_bytes: int) -> list[list[str]]:
    """Names per shard, in the given order, each shard within ``max_bytes`` unless one tensor exceeds it alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_safetensors(
    path: Path, tensors: Mapping[str, Writable], metadata: Mapping[str, str] | None = None, digest: Any = None
) -> None:
    """Write one safetensors file, one tensor on the host at a time, and flush it to the disk.

    Args:
        path: the file.
        tensors: name -> tensor on any device; views are fine, and so are tensors not made yet.
        metadata: strings for the header.
        digest: a ``hashlib`` object that is fed the file's bytes as they are written.

    Raises:
        ValueError: for a dtype the format lacks, before the file is opened.
    """
    unknown = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype not in _DTYPE_NAMES}
    if unknown:
        raise ValueError(f"cannot write these dtypes as safetensors: {unknown}")
    text = _header(tensors, metadata)
    with open(path, "wb") as file:

        def write(content: Any) -> None:
            file.write(content)
            if digest is not None:
                digest.update(content)

        write(len(text).to_bytes(8, "little") + text)
        for name in _ordered(tensors):
            flat = _made(name, tensors[name]).detach().to("cpu").contiguous().reshape(-1)
            write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def checkpoint_bytes(tensors: Mapping[str, Writable], max_shard_size: int | str = "5GB") -> int:
    """Bytes of the files that ``write_weights`` would write, headers included, the index left out; nothing is made."""
    total = 0
    for shard in plan_shards(tensors, parse_size(max_shard_size)):
        part = {name: tensors[name] for name in shard}
        total += 8 + len(_header(part, {"format": "pt"}))
        total += sum(tensor.numel() * tensor.element_size() for tensor in part.values())
    return total


def _ordered(tensors: Mapping[str, Writable]) -> list[str]:
    """Widest elements first, so that each tensor starts at a multiple of its element size."""
    return sorted(tensors, key=lambda name: -tensors[name].element_size())


def _header(tensors: Mapping[str, Writable], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in _ordered(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _made(name: str, tensor: Writable) -> torch.Tensor:
    if isinstance(tensor, torch.Tensor):
        return tensor
    made = tensor.make()
    assert (tuple(made.shape), made.dtype) == (tensor.shape, tensor.dtype), f"{name} is not what was announced"
    return made


def write_json(path: Path, data: object) -> None:
    """Write a JSON file by way of a temporary name."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def parse_size(size: int | str, name: str = "max_shard_size") -> int:
    """Bytes from "5GB", "300MiB", "1000" or a number; ``name`` is what a message calls it.

    Raises:
        ValueError: for anything else, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"{name} {size!r} is not a size: give bytes, or e.g. '5GB', '300MiB'")
    return int(float(match[1]) * unit)
