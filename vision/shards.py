"""Reading webdataset shards: an index over local tar files, then random access to single members.

A shard is an uncompressed tar whose members belong together by key: ``{key}.json`` beside ``{key}.0.png``,
``{key}.1.jpg`` and so on, the form that webdataset writes and reads. Only those members are ever looked at:
nothing is unpickled, no command is run, no URL is opened, nothing is extracted, links and special files are passed
over. What is broken is left out and counted by reason.
"""

import hashlib
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi35.data.tar_members import local_files
from vision.descriptions import SkippedSample
from vision.shard_index import ShardTable, open_index, parse_json

MAX_OPEN_FILES = 64
_BLOCK = 512


class ShardIndex:
    """All usable samples of a list of shards, with access to their bytes.

    Args:
        data: folder of ``*.tar`` files, one file, a glob pattern, or a list of these.

    Attributes:
        paths: the shards.
        table: columns over all samples (see ``vision.shard_index``).
        shard: (N,) int32 shard of each sample, ascending.
        first_image: (N + 1,) int64 where each sample's pictures begin in the columns of pictures.
        left_out: what the index does not hold, by reason.

    Raises:
        ValueError: if nothing matches, a source is a URL or a ``pipe:`` command, or no sample is usable.
    """

    def __init__(self, data: str | Path | Sequence[str | Path]) -> None:
        self.paths = find_shards(data)
        self.left_out: Counter[str] = Counter()
        tables = []
        for path in self.paths:
            table, left_out = open_index(path)
            tables.append(table)
            self.left_out += left_out
        self.table = ShardTable.join(tables)
        self.shard = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])
        self.first_image = np.concatenate([[0], np.cumsum(self.table.num_images, dtype=np.int64)])
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()
        if not len(self):
            shown = [str(path) for path in self.paths[:5]]
            raise ValueError(
                f"no usable sample in {len(self.paths)} shards ({shown}): expected uncompressed tar files with members "
                f"named KEY.json and KEY.0.png, without further dots in KEY; left out: {dict(self.left_out)}"
            )

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def describe(self, number: int) -> Any:
        """The parsed description of a sample.

        Raises:
            SkippedSample: if it is no JSON, or the shard was changed.
        """
        place = (self.table.description_offset[number], self.table.description_size[number])
        return parse_json(self._read(int(self.shard[number]), *map(int, place)))

    def read_images(self, number: int) -> list[bytes]:
        """The picture files of a sample, in order.

        Raises:
            SkippedSample: if the shard was changed.
        """
        rows = range(int(self.first_image[number]), int(self.first_image[number + 1]))
        shard = int(self.shard[number])
        return [self._read(shard, int(self.table.image_offset[row]), int(self.table.image_size[row])) for row in rows]

    def name(self, number: int) -> str:
        """Shard and key of a sample, for messages."""
        shard = int(self.shard[number])
        header = self._read(shard, int(self.table.description_offset[number]) - _BLOCK, _BLOCK)
        key = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name.removesuffix(".json")
        return f"sample {key!r} of {self.paths[shard]}"

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return np.bincount(self.shard, minlength=len(self.paths)).tolist()

    @property
    def digest(self) -> str:
        """Names the samples and their order, wherever the shards lie."""
        digest = hashlib.sha256()
        for path, size in zip(self.paths, self.shard_sizes, strict=True):
            digest.update(f"{path.name} {size}\n".encode())
        for column in (self.table.description_offset, self.table.draws, self.table.image_offset):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]

    def close(self) -> None:
        """Closes the files that reading opened."""
        while self._files and self._process == os.getpid():
            os.close(self._files.popitem()[1])

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard, by position, so that processes may share the file."""
        if self._process != os.getpid():  # a forked worker opens its own files
            self._files, self._process = OrderedDict(), os.getpid()
        try:
            if shard not in self._files:
                if len(self._files) >= MAX_OPEN_FILES:
                    os.close(self._files.popitem(last=False)[1])
                self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
            self._files.move_to_end(shard)
            content = os.pread(self._files[shard], size, offset)
        except OSError as error:
            raise SkippedSample("unreadable_shard", f"{self.paths[shard]} cannot be read: {error}") from error
        if len(content) != size:
            raise SkippedSample(
                "unreadable_shard", f"{self.paths[shard]} ended early: it was changed while it was in use"
            )
        return content


def find_shards(data: str | Path | Sequence[str | Path]) -> list[Path]:
    """The tar files that a folder, a file, a glob pattern or a list of these names, sorted within each.

    Raises:
        ValueError: for a URL, a ``pipe:`` command, or a source that matches no file.
    """
    return local_files(data, "*.tar", "shards")
