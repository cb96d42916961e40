"""Reading webdataset shards: an index over local tar files, then random access to single members.

A shard is an uncompressed tar whose members belong together by key: ``{key}.json`` beside ``{key}.0.png``,
``{key}.1.jpg`` and so on, the form that webdataset writes and reads. Only those members are ever looked at:
nothing is unpickled, no command is run, no URL is opened, links and special files are passed over. What is
broken is left out and counted.
"""

import glob
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MAX_JSON_BYTES = 16 * 2**20
MAX_OPEN_FILES = 64
_PARTIAL = ".partial"
_MEMBER = re.compile(rf"(?P<key>[^.]+)\.(?:(?P<json>json)|(?P<number>\d{{1,4}})\.(?:{'|'.join(IMAGE_SUFFIXES)}))")


@dataclass(frozen=True)
class Member:
    """Where one file of a sample lies: shard number, offset and size in bytes."""

    shard: int
    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """One complete sample: its key, its description and its images in order of their numbers."""

    key: str
    description: Member
    images: tuple[Member, ...]


@dataclass
class Defects:
    """What the index left out.

    Attributes:
        incomplete: samples without a description or with a gap in the numbers of their images.
        foreign: members of other kinds (other suffixes, links, folders, devices).
        truncated: shards that end before their last member does.
    """

    incomplete: int = 0
    foreign: int = 0
    truncated: int = 0


@dataclass
class _Parts:
    description: Member | None = None
    images: dict[int, Member] = field(default_factory=dict)


class ShardIndex:
    """All complete samples of a list of shards, with access to their bytes.

    Args:
        data: folder of ``*.tar`` files, one file, a glob pattern, or a list of these.

    Raises:
        ValueError: if nothing matches, a source is a URL or a ``pipe:`` command, a shard is no uncompressed tar,
            or no sample is complete.
    """

    def __init__(self, data: str | Path | Sequence[str | Path]) -> None:
        self.paths = find_shards(data)
        self.defects = Defects()
        self.samples: list[Sample] = []
        for number, path in enumerate(self.paths):
            self.samples += self._scan(number, path)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()
        if not self.samples:
            raise ValueError(
                f"no complete sample in {[str(path) for path in self.paths]}: expected members named KEY.json and "
                f"KEY.0.png, without further dots in KEY ({self.defects})"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def read(self, member: Member) -> bytes:
        """The bytes of one member, by position, so that processes may share the file."""
        if self._process != os.getpid():  # a forked worker opens its own files
            self._files, self._process = OrderedDict(), os.getpid()
        if member.shard not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[member.shard] = os.open(self.paths[member.shard], os.O_RDONLY)
        self._files.move_to_end(member.shard)
        content = os.pread(self._files[member.shard], member.size, member.offset)
        if len(content) != member.size:
            raise ValueError(f"{self.paths[member.shard]} ended early: it was changed while it was in use")
        return content

    def describe(self, sample: Sample) -> Any:
        """The parsed description of a sample.

        Raises:
            ValueError: if it is not JSON or larger than 16 MiB.
        """
        if sample.description.size > MAX_JSON_BYTES:
            raise ValueError(f"sample {sample.key!r}: its JSON exceeds {MAX_JSON_BYTES} bytes")
        try:
            return json.loads(self.read(sample.description))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"sample {sample.key!r}: its description is not JSON ({error})") from error

    def close(self) -> None:
        """Closes the files that reading opened."""
        while self._files and self._process == os.getpid():
            os.close(self._files.popitem()[1])

    def _scan(self, number: int, path: Path) -> list[Sample]:
        parts: dict[str, _Parts] = {}
        length = path.stat().st_size
        try:
            with tarfile.open(path, mode="r:") as archive:
                try:
                    for member in archive:
                        self._note(number, member, length, parts)
                except tarfile.ReadError:
                    self.defects.truncated += 1
                    if parts:  # the last sample may have lost pictures
                        parts.popitem()
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"shard {path} is no uncompressed tar file: {error}") from error
        samples = []
        for key, part in parts.items():
            if part.description is None or sorted(part.images) != list(range(len(part.images))):
                self.defects.incomplete += 1
                continue
            images = tuple(part.images[index] for index in range(len(part.images)))
            samples.append(Sample(key, part.description, images))
        return samples

    def _note(self, shard: int, member: tarfile.TarInfo, length: int, parts: dict[str, _Parts]) -> None:
        match = _MEMBER.fullmatch(member.name.removeprefix("./"))
        if match is None or not member.isreg() or member.issparse() or member.size == 0:
            self.defects.foreign += 1
            return
        place = Member(shard, member.offset_data, member.size)
        part = parts.setdefault(match["key"], _Parts())
        if member.offset_data + member.size > length:
            self.defects.truncated += 1
        elif match["json"]:
            part.description = place
        else:
            part.images[int(match["number"])] = place


def find_shards(data: str | Path | Sequence[str | Path]) -> list[Path]:
    """The tar files that a folder, a file, a glob pattern or a list of these names, sorted within each.

    Raises:
        ValueError: for a URL, a ``pipe:`` command, or a source that matches no file.
    """
    sources = [data] if isinstance(data, str | Path) else list(data)
    paths: list[Path] = []
    for source in sources:
        text = str(source)
        if text.startswith("pipe:") or re.match(r"[a-z][a-z0-9+.-]*://", text):
            raise ValueError(f"shards are read from local files only, got {text!r}: copy them to a folder first")
        if Path(text).is_dir():
            found = sorted(Path(text).glob("*.tar"))
        else:
            found = [Path(text)] if Path(text).is_file() else sorted(map(Path, glob.glob(text)))
        if not found:
            raise ValueError(f"no shards at {text!r}: expected a folder of *.tar files, a tar file or a glob pattern")
        paths += found
    if not paths:
        raise ValueError("expected at least one shard, got an empty list")
    return paths


class ShardWriter:
    """Writes samples to numbered shards of a bounded number of samples, the same bytes for the same samples.

    Shards get their names when the with-block ends, so that half the data is never taken for the whole.

    Args:
        folder: made if absent; shards of an earlier run in it are removed.
        samples_per_shard: a new file begins after so many.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000) -> None:
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        self.paths: list[Path] = []
        self._archive: tarfile.TarFile | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (*self.folder.glob("shard-*.tar"), *self.folder.glob(f"shard-*.tar{_PARTIAL}")):
            old.unlink()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object = None, *error: object) -> None:
        self._close()
        if kind is None:
            for path in self.paths:
                path.with_name(path.name + _PARTIAL).rename(path)

    def _close(self) -> None:
        if self._archive is not None:
            self._archive.close()

    def write(self, key: str, description: dict[str, Any], images: Sequence[tuple[str, bytes]]) -> None:
        """Adds one sample.

        Args:
            key: without dots or slashes.
            description: becomes ``{key}.json``.
            images: (suffix, encoded bytes) of each image, in order.

        Raises:
            ValueError: for a key that webdataset would split.
        """
        if not key or "." in key or "/" in key:
            raise ValueError(f"a sample's key must not be empty nor hold dots or slashes, got {key!r}")
        if self.num_samples % self.samples_per_shard == 0:
            self._close()
            self.paths.append(self.folder / f"shard-{len(self.paths):05d}.tar")
            partial = self.paths[-1].with_name(self.paths[-1].name + _PARTIAL)
            self._archive = tarfile.open(partial, mode="w", format=tarfile.USTAR_FORMAT)
        members = [("json", json.dumps(description, ensure_ascii=False).encode())]
        members += [(f"{number}.{suffix}", content) for number, (suffix, content) in enumerate(images)]
        for suffix, content in members:
            self._add(f"{key}.{suffix}", content)
        self.num_samples += 1

    def _add(self, name: str, content: bytes) -> None:
        import io

        assert self._archive is not None
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._archive.addfile(info, io.BytesIO(content))
