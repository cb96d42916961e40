"""Writing webdataset shards, each with its index beside it."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vision.shard_index import index_path, scan_shard, write_index

_PARTIAL = ".partial"


class ShardWriter:
    """Writes samples to numbered shards of a bounded number of samples, the same bytes for the same samples.

    Shards get their names when the with-block ends, so that half the data is never taken for the whole.

    Args:
        folder: made if absent; shards of an earlier run in it are removed.
        samples_per_shard: a new file begins after so many.

    Attributes:
        num_samples: written so far.
        paths: of the shards.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000) -> None:
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        self.paths: list[Path] = []
        self._file: ShardFile | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("shard-*"):
            if old.name.endswith((".tar", _PARTIAL, ".index.npz")):
                old.unlink()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object = None, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            for path in self.paths:
                finish_shard(_partial(path), path)

    def write(self, key: str, description: dict[str, Any], images: Sequence[tuple[str, bytes]]) -> None:
        """Adds one sample; see ``ShardFile.write``."""
        if self.num_samples % self.samples_per_shard == 0 or self._file is None:
            if self._file is not None:
                self._file.close()
            self.paths.append(self.folder / f"shard-{len(self.paths):05d}.tar")
            self._file = ShardFile(_partial(self.paths[-1]))
        self._file.write(key, description, images)
        self.num_samples += 1


class ShardFile:
    """One shard that is being written.

    Args:
        path: of the tar file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._archive = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    def write(self, key: str, description: dict[str, Any], images: Sequence[tuple[str, bytes]]) -> None:
        """Adds one sample.

        Args:
            key: at most 80 bytes, without dots or slashes.
            description: becomes ``{key}.json``.
            images: (suffix, encoded bytes) of each image, in order.

        Raises:
            ValueError: for a key that webdataset would split or tar cannot hold.
        """
        if not key or "." in key or "/" in key or len(key.encode()) > 80:
            raise ValueError(f"a sample's key must have 1 to 80 bytes and no dots or slashes, got {key!r}")
        members = [("json", json.dumps(description, ensure_ascii=False).encode())]
        members += [(f"{number}.{suffix}", content) for number, (suffix, content) in enumerate(images)]
        for suffix, content in members:
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(content)
            self._archive.addfile(info, io.BytesIO(content))

    def close(self) -> None:
        """Ends the archive and brings it to disk."""
        if not self._file.closed:
            self._archive.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def finish_shard(partial: Path, path: Path) -> None:
    """Gives a finished shard its name, and writes its index."""
    index_path(path).unlink(missing_ok=True)
    partial.rename(path)
    write_index(path, *scan_shard(path))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)
