"""Crops by content: a picture that was seen before is neither resized nor cut again.

A picture file goes by a digest of its bytes, so that it is not even decoded; a picture in memory by one of its pixels.
The cache is bounded in bytes and gives up what was used longest ago first.
"""

import collections
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

from PIL import Image

DEFAULT_BYTES = 2**28
"""256 MiB of the host: 11 pictures of 16 tiles of phi-3.5-vision."""


class CropCache:
    """What ``vision.image_transform.ImageTransform`` made of pictures; safe between threads.

    Args:
        max_bytes: most bytes of pixels.

    Attributes:
        hits: pictures that were there.
        misses: pictures that were not.

    Raises:
        ValueError: for a negative bound.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"max_bytes must be a whole number of at least 0, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self.hits, self.misses, self.num_bytes = 0, 0, 0
        self._crops: collections.OrderedDict[tuple[bytes, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CropCache":
        return CropCache(self.max_bytes)

    def __reduce__(self) -> tuple[type["CropCache"], tuple[int]]:
        return CropCache, (self.max_bytes,)

    def __len__(self) -> int:
        """Pictures held."""
        return len(self._crops)

    def find(self, digest: bytes, num_crops: int) -> Any:
        """The crops of a picture at a limit of tiles, or None."""
        with self._lock:
            found = self._crops.get((digest, num_crops))
            if found is None:
                return None
            self._crops.move_to_end((digest, num_crops))
            self.hits += 1
            return found

    def keep(self, digest: bytes, num_crops: int, crops: Any) -> None:
        """Keep crops that ``find`` did not have; ``crops.pixel_values`` must not be written any more."""
        size = crops.pixel_values.nbytes
        with self._lock:
            self.misses += 1
            if size > self.max_bytes or (digest, num_crops) in self._crops:
                return
            self._crops[digest, num_crops] = crops
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, dropped = self._crops.popitem(last=False)
                self.num_bytes -= dropped.pixel_values.nbytes


def file_digest(source: Any) -> bytes | None:
    """A digest of a picture file's bytes, given as such or by its path; None for what is neither.

    A file that cannot be read has None too: opening it says why.
    """
    if isinstance(source, str | os.PathLike):
        try:
            path = Path(source)
            source = path.read_bytes() if path.is_file() else None
        except (OSError, ValueError):
            return None
    if not isinstance(source, bytes | bytearray | memoryview):
        return None
    return hashlib.sha256(b"file" + bytes(source)).digest()


def pixel_digest(picture: Image.Image) -> bytes:
    """A digest of an RGB picture's size and pixels."""
    digest = hashlib.sha256(f"pixels {picture.size}".encode())
    digest.update(picture.tobytes())
    return digest.digest()
