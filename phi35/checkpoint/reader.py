"""Weights from safetensors files into a model, shard by shard.

The names, shapes and dtypes of all shards are read first and checked against the model, before anything is
allocated. Then every tensor is copied straight into its place in the target, on its device and in its dtype, and
each shard is closed before the next is opened: host memory never holds more than the weights and one shard.
Pickled weights (``.bin``, ``.pt``, ``.pth``) are never opened, since unpickling runs code from the file.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from phi35.checkpoint.rules import CheckpointPlan, Match, check_repeats, listed

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED_DTYPES = {"I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk.

    Attributes:
        file: the shard.
        shape: as stored.
        dtype: as stored.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of all tensors of a checkpoint folder; no weights are read.

    Raises:
        ValueError: if weights are absent, pickled, incomplete, damaged or stored twice; the file is named.
    """
    listed = _index(folder)
    files = sorted(set(listed.values())) if listed else _files_without_index(folder)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in stored:
                raise ValueError(f"tensor {name!r} stands both in {stored[name].file} and in {file}: keep one of them")
            stored[name] = tensor
    lost = [
        f"{name} in {file.name}" for name, file in listed.items() if name not in stored or stored[name].file != file
    ]
    if lost:
        raise ValueError(f"{folder / INDEX_FILE} lists tensors that its shards lack: {', '.join(lost[:20])}")
    return stored


def match_headers(plan: CheckpointPlan, stored: Mapping[str, StoredTensor], folder: Path) -> Match:
    """Says where each stored tensor goes.

    Raises:
        ValueError: for missing, unknown and misshapen tensors, all listed.
    """
    return plan.match({name: tensor.shape for name, tensor in stored.items()}, source=f"checkpoint {folder}")


def check_dtypes(match: Match, stored: Mapping[str, StoredTensor], state: Mapping[str, torch.Tensor]) -> None:
    """Check that codes go to codes and numbers to numbers.

    Args:
        match: from ``match_headers``.
        stored: from ``read_headers``.
        state: memory name -> tensor of the model, on any device.

    Raises:
        ValueError: if a quantized tensor has another dtype than the config says, or a plain one holds codes.
    """
    wrong = []
    for placement in (*match.load, *match.verify):
        found, wanted = stored[placement.disk_name].dtype, state[placement.memory_name].dtype
        plain = wanted in _DTYPES.values() and not placement.memory_name.endswith("_scale")
        if found not in _DTYPES.values() if plain else found != wanted:
            wrong.append(f"{placement.disk_name} is {found}, expected {'plain numbers' if plain else wanted}")
    if wrong:
        raise ValueError(f"the checkpoint's tensors are not of the kind its config says: {listed(wrong)}")


def fill(model: torch.nn.Module, match: Match, stored: Mapping[str, StoredTensor]) -> None:
    """Copy stored tensors into the parameters of an allocated model, on their device and in their dtype.

    Args:
        model: the model whose parameters are overwritten; of a parameter with ``expert_shard`` = (first expert, number
            of all experts), which holds some of them alone, only those are read.
        match: from ``match_headers``.
        stored: from ``read_headers``.

    Raises:
        ValueError: if a shard cannot be read, or a tensor that stands twice has two values.
    """
    targets = dict(model.state_dict())
    named = (*model.named_parameters(), *model.named_buffers())
    parts = {name: tensor.expert_shard[0] for name, tensor in named if hasattr(tensor, "expert_shard")}
    by_file: dict[Path, list[Any]] = {}
    for placement in match.load:
        by_file.setdefault(stored[placement.disk_name].file, []).append(placement)
    with torch.no_grad():
        for file, placements in by_file.items():
            with _opened(file) as shard:
                for placement in placements:
                    memory = targets[placement.memory_name]
                    first = parts.get(placement.memory_name)
                    if first is None:
                        placement.put(memory, _tensor(shard, placement.disk_name, file))
                    elif placement.index is None:  # all experts as one tensor on disk too
                        rows = slice(first, first + memory.shape[0])
                        placement.put(memory, _tensor(shard, placement.disk_name, file, rows))
                    elif first <= placement.index < first + memory.shape[0]:
                        here = dataclasses.replace(placement, index=placement.index - first)
                        here.put(memory, _tensor(shard, placement.disk_name, file))
        different = []
        for placement in match.verify:
            target = placement.take(targets[placement.memory_name])
            file = stored[placement.disk_name].file
            with _opened(file) as shard:
                if not torch.equal(target, _tensor(shard, placement.disk_name, file).to(target)):
                    different.append(placement.disk_name)
    check_repeats(different)


def stored_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of most of a checkpoint's tensors, codes and scales of quantized weights left out.

    Raises:
        ValueError: if no tensor holds plain numbers.
    """
    dtypes = [
        tensor.dtype
        for name, tensor in stored.items()
        if tensor.dtype in _DTYPES.values() and not name.endswith("_scale")
    ]
    if not dtypes:
        raise ValueError(f"the checkpoint holds no tensor of {sorted(_DTYPES)}, as the norms of any model are")
    return max(set(dtypes), key=dtypes.count)


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name -> shard, from the index file; empty where a single file or no index is there."""
    path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists() or not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        listed = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of safetensors shards (a JSON object with 'weight_map')") from error
    outside = sorted({file for file in listed.values() if Path(file).name != file or file in ("", ".", "..")})
    if outside:
        raise ValueError(f"{path} names files outside its own folder, which are never opened: {outside[:5]}")
    absent = sorted({file for file in listed.values() if not (folder / file).is_file()})
    if absent:
        raise ValueError(f"{folder} lacks {len(absent)} of the shards its index names: {absent}; download them again")
    if not listed:
        raise ValueError(f"{path} lists no tensors")
    return {name: folder / file for name, file in listed.items()}


def _files_without_index(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    shards = {path: SHARD_NAME.fullmatch(path.name) for path in sorted(folder.glob("model-*.safetensors"))}
    numbered = {path: match for path, match in shards.items() if match}
    if numbered:
        totals = {int(match[2]) for match in numbered.values()}
        numbers = {int(match[1]) for match in numbered.values()}
        if len(totals) > 1 or numbers != set(range(1, max(totals) + 1)):
            raise ValueError(
                f"{folder} has no {INDEX_FILE} and its shards are not one complete set: "
                f"{[path.name for path in numbered]}"
            )
        warnings.warn(
            f"{folder} has no {INDEX_FILE}; its {len(numbered)} shards are complete and are read", stacklevel=2
        )
        return list(numbered)
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} holds only pickled weights ({', '.join(pickled[:5])}), which can run code when opened. Get the "
            "safetensors version of the checkpoint; or, on a machine you can afford to lose, open them with "
            "torch.load(file, weights_only=True) and write them with safetensors.torch.save_file"
        )
    raise ValueError(
        f"{folder} holds no weights: expected {SINGLE_FILE}, or {INDEX_FILE} with its shards; found "
        f"{sorted(path.name for path in folder.iterdir())[:20]}"
    )


def _header(file: Path) -> dict[str, StoredTensor]:
    header: dict[str, StoredTensor] = {}
    with _opened(file) as shard:
        for name in shard.keys():  # noqa: SIM118  (safe_open is no mapping)
            piece = shard.get_slice(name)
            dtype = (_DTYPES | _QUANTIZED_DTYPES).get(piece.get_dtype())
            if dtype is None:
                raise ValueError(
                    f"tensor {name!r} in {file} is stored as {piece.get_dtype()}: only "
                    f"{sorted(_DTYPES | _QUANTIZED_DTYPES)} are read"
                )
            header[name] = StoredTensor(file, tuple(piece.get_shape()), dtype)
    return header


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}): it is damaged or cut off") from error


def _tensor(shard: Any, name: str, file: Path, rows: slice | None = None) -> torch.Tensor:
    try:
        return shard.get_tensor(name) if rows is None else shard.get_slice(name)[rows]
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"tensor {name!r} of {file} cannot be read ({error}): the file changed or is damaged"
        ) from error
