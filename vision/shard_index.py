"""The index of a shard: where the members of its samples lie and what a loader must know before it reads them.

Columns of numbers, some 40 bytes a sample and 20 a picture, for all shards one after the other. ``ShardWriter``
writes each shard's part beside it (``shard-00000.index.npz``), so that millions of samples open in seconds; a shard
without one, or with one that does not belong to it, is scanned: headers, descriptions and the first bytes of each
picture, never the pixels. An index holds numbers alone: a wrong one leads to samples that are skipped, not to code.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from phi35.data.tar_members import tar_members
from vision.decode import ImageTooLargeError, picture_size
from vision.descriptions import SkippedSample, parse_description

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MAX_JSON_BYTES = 16 * 2**20
MAX_IMAGE_BYTES = 64 * 2**20
FORMAT = 1
_MEMBER = re.compile(
    rf"(?P<key>[^.]+)\.(?:(?P<json>json)|(?P<number>\d{{1,4}})\.(?:{'|'.join(IMAGE_SUFFIXES)}))", re.IGNORECASE
)
_PROBED = 65536


@dataclass(frozen=True)
class ShardTable:
    """The usable samples of one shard (or of several, joined), as columns.

    Attributes:
        description_offset: (N,) int64, bytes from the start of the shard.
        description_size: (N,) int32 bytes.
        text_length: (N,) int32 characters of a conversation, the mean of the alternatives.
        draws: (N,) int16 visits in an epoch.
        num_images: (N,) int16.
        image_offset: (M,) int64, sample after sample.
        image_size: (M,) int32 bytes.
        width: (M,) int32 pixels as a viewer shows them (after EXIF orientation).
        height: (M,) int32 pixels.
    """

    description_offset: np.ndarray
    description_size: np.ndarray
    text_length: np.ndarray
    draws: np.ndarray
    num_images: np.ndarray
    image_offset: np.ndarray
    image_size: np.ndarray
    width: np.ndarray
    height: np.ndarray

    def __len__(self) -> int:
        return len(self.description_offset)

    @classmethod
    def join(cls, tables: "list[ShardTable]") -> "ShardTable":
        """All samples of several shards."""
        return cls(*(np.concatenate([getattr(table, item.name) for table in tables]) for item in fields(cls)))


_DTYPES = dict(
    zip(
        (item.name for item in fields(ShardTable)),
        (np.int64, np.int32, np.int32, np.int16, np.int16, np.int64, np.int32, np.int32, np.int32),
        strict=True,
    )
)


@dataclass
class _Parts:
    """Members of one key: (offset, size) of the description and of each picture."""

    description: tuple[int, int] | None = None
    images: dict[int, tuple[int, int]] = field(default_factory=dict)


def scan_shard(path: Path) -> tuple[ShardTable, Counter[str]]:
    """Reads a shard through once.

    Args:
        path: an uncompressed tar file.

    Returns:
        The usable samples in the shard's order, and how much was left out, by reason:
        "unreadable_shard" (no uncompressed tar file), "truncated_shard" (it ends before its last member does),
        "foreign_member" (another suffix, a path with dots, a link, folder or device), "incomplete_sample" (no
        description, or a gap in the numbers of its pictures), "bad_description", "empty_text", "unreadable_image",
        "image_too_large" (of more than 64 MiB).
    """
    left_out: Counter[str] = Counter()
    rows: list[tuple[Any, ...]] = []
    images: list[tuple[int, int, int, int]] = []
    parts = _members(path, left_out)
    if left_out["unreadable_shard"]:
        return _table([], []), left_out
    try:
        with path.open("rb") as file:
            for part in parts.values():
                try:
                    row, pictures = _sample(file, part)
                except SkippedSample as error:
                    left_out[error.reason] += 1
                    continue
                rows.append(row)
                images += pictures
    except OSError:
        return _table([], []), left_out + Counter(unreadable_shard=1)
    return _table(rows, images), left_out


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(f"{shard.stem}.index.npz")


def write_index(shard: Path, table: ShardTable, left_out: Counter[str]) -> Path:
    """Writes a shard's index beside it, in one rename."""
    target = index_path(shard)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    header = {"format": FORMAT, "shard": _identity(shard), "left_out": dict(left_out)}
    columns = {item.name: getattr(table, item.name) for item in fields(ShardTable)}
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **columns)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(target)
    return target


def read_index(shard: Path) -> tuple[ShardTable, Counter[str]] | None:
    """The index beside a shard, or None where there is none that belongs to it."""
    path = index_path(shard)
    try:
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(archive["header"].tobytes())
            table = ShardTable(*(archive[name].astype(dtype, casting="same_kind") for name, dtype in _DTYPES.items()))
        known = header["format"] == FORMAT and header["shard"] == _identity(shard)
        left_out = Counter({str(reason): int(count) for reason, count in header["left_out"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        return None
    counts = {len(getattr(table, name)) for name in list(_DTYPES)[:5]}
    pictures = {len(getattr(table, name)) for name in list(_DTYPES)[5:]}
    fits = len(counts) == len(pictures) == 1 and int(table.num_images.sum()) == pictures.pop()
    return (table, left_out) if known and fits else None


def open_index(shard: Path) -> tuple[ShardTable, Counter[str]]:
    """The index of a shard: the one beside it, or that of a scan."""
    return read_index(shard) or scan_shard(shard)


def _identity(shard: Path) -> list[Any]:
    """Size and digest of both ends: enough to notice that an index belongs to another file."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        digest = hashlib.sha256(file.read(_PROBED))
        file.seek(max(0, size - _PROBED))
        digest.update(file.read(_PROBED))
    return [size, digest.hexdigest()]


def _members(path: Path, left_out: Counter[str]) -> dict[str, _Parts]:
    parts: dict[str, _Parts] = {}
    for member in tar_members(path, left_out):
        match = _MEMBER.fullmatch(member.name.removeprefix("./"))
        if match is None:
            left_out["foreign_member"] += 1
            continue
        part = parts.setdefault(match["key"], _Parts())
        if match["json"]:
            part.description = (member.offset, member.size)
        else:
            part.images[int(match["number"])] = (member.offset, member.size)
    if left_out["truncated_shard"] and parts:  # the last sample may have lost pictures
        parts.popitem()
    return parts


def _sample(file: Any, part: _Parts) -> tuple[tuple[Any, ...], list[tuple[int, int, int, int]]]:
    """A sample's row and its pictures' rows.

    Raises:
        SkippedSample: if it cannot be trained on.
    """
    if part.description is None or sorted(part.images) != list(range(len(part.images))):
        raise SkippedSample("incomplete_sample", "no description, or a gap in the numbers of the pictures")
    offset, size = part.description
    file.seek(offset)
    parsed = parse_description(parse_json(file.read(size) if size <= MAX_JSON_BYTES else b""), len(part.images))
    pictures = []
    for number in range(len(part.images)):
        place = part.images[number]
        if place[1] > MAX_IMAGE_BYTES:
            raise SkippedSample("image_too_large", f"a picture file takes {place[1]} bytes")
        try:
            width, height = picture_size(MemberFile(file, *place))
        except ImageTooLargeError as error:
            raise SkippedSample("image_too_large", str(error)) from error
        except ValueError as error:
            raise SkippedSample("unreadable_image", str(error)) from error
        pictures.append((*place, width, height))
    return (offset, size, min(parsed.text_length, 2**31 - 1), parsed.draws, len(pictures)), pictures


def parse_json(content: bytes) -> Any:
    """The parsed description.

    Raises:
        SkippedSample: if it is not JSON in UTF-8.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SkippedSample("bad_description", f"a description is not JSON in UTF-8 ({error})") from error


def _table(rows: list[tuple[Any, ...]], images: list[tuple[int, int, int, int]]) -> ShardTable:
    columns = [*np.array(rows, np.int64).reshape(-1, 5).T, *np.array(images, np.int64).reshape(-1, 4).T]
    return ShardTable(*(column.astype(dtype) for column, dtype in zip(columns, _DTYPES.values(), strict=True)))


class MemberFile(io.RawIOBase):
    """A window of an open file as a file of its own, for parsers that read only what they need."""

    def __init__(self, file: Any, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._offset + self._at)
        content: bytes = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
