"""The HD transform of Phi-3-vision and Phi-3.5-vision: one picture becomes a global view and a grid of tiles.

Follows the published image processor pixel for pixel: the longer side spans s tiles, where s is the largest
integer with s * ceil(s / ratio) <= num_crops, the shorter side is padded with white to whole tiles, and the
global view is a bicubic reduction (without antialias) of the padded, normalised picture. It departs in three
points: tile and patch sizes come from the configuration, a batch holds no padded crops, and a picture too
narrow to keep one row of pixels is refused by name.
"""

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from phi35.config import VisionConfig
from vision.crop_cache import CropCache, file_digest, pixel_digest
from vision.decode import open_image

_WHITE = 255
_MOST_THREADS = 16
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ImageCrops:
    """What the transform makes of one picture.

    Attributes:
        pixel_values: (1 + h * w, 3, S, S) float32, normalised: the global view, then the tiles row by row.
        image_size: (H, W) in pixels of the padded picture, multiples of the tile side S.
        num_tokens: how many positions the picture takes in the prompt.
    """

    pixel_values: Tensor
    image_size: tuple[int, int]
    num_tokens: int


class ImageTransform:
    """Turns pictures into crops for the tower.

    Args:
        config: gives tile side, patch side, normalisation and the default of ``num_crops``.
        threads: most threads that open, resize and cut the pictures of a call; None takes as many as torch does.

    Attributes:
        cache: keeps crops by content (``vision.crop_cache``), whose tensors are then shared and must not be written;
            None, as at first, keeps none.
    """

    def __init__(self, config: VisionConfig, threads: int | None = None) -> None:
        self.config, self.threads = config, threads
        self.cache: CropCache | None = None
        self._open: Callable[[Any], Image.Image] = open_image
        self._mean = np.array(config.image_mean, dtype=np.float32).reshape(3, 1, 1)
        self._std = np.array(config.image_std, dtype=np.float32).reshape(3, 1, 1)

    def __call__(self, image: Any, num_crops: int | None = None) -> ImageCrops:
        """Opens, resizes, pads, normalises and cuts one picture.

        Args:
            image: anything ``vision.decode.open_image`` takes.
            num_crops: largest number of tiles (the global view not counted); None takes the configured one.

        Raises:
            ValueError: for an unreadable picture, ``num_crops`` below 1, or an aspect ratio so extreme that the
                shorter side would be resized to no pixel at all.
        """
        return self.many([image], [num_crops])[0]

    def many(self, images: Sequence[Any], num_crops: Sequence[int | None]) -> list[ImageCrops]:
        """Crops of several pictures, made side by side by threads; the results are those of one after the other.

        Args:
            images: as in the call.
            num_crops: of each picture, as in the call.

        Raises:
            ValueError: as in the call, for the first picture that has something wrong.
        """
        limits = [self.config.num_crops if limit is None else limit for limit in num_crops]
        begun = self._each(lambda pair: self._begin(*pair), list(zip(images, limits, strict=True)))
        fresh = [one for one in begun if isinstance(one, _Picture)]
        self._each(self._cut, [(one, tile) for one in fresh for tile in range(one.num_tiles)])
        return [self._finish(one) if isinstance(one, _Picture) else one for one in begun]

    def opened_by(self, opener: Callable[[Any], Image.Image]) -> "ImageTransform":
        """A transform like this one, without a cache, whose pictures another function than ``open_image`` opens."""
        twin = copy.copy(self)
        twin._open, twin.cache = opener, None
        return twin

    def num_tokens(self, width: int, height: int, num_crops: int | None = None) -> int:
        """Prompt positions that a picture of this size takes, from its size alone.

        Args:
            width: pixels, after EXIF orientation.
            height: pixels, after EXIF orientation.
            num_crops: as in the call.

        Raises:
            ValueError: as in the call.
        """
        limit = self.config.num_crops if num_crops is None else num_crops
        resized_width, resized_height = resized_size(max(width, height), min(width, height), limit, self.config)
        padded_height = whole_tiles(resized_height, self.config.image_size)
        if width < height:
            return num_image_tokens(resized_width, padded_height, self.config)
        return num_image_tokens(padded_height, resized_width, self.config)

    def _begin(self, image: Any, limit: int) -> "ImageCrops | _Picture":
        """Crops that are kept, or the picture opened, resized and padded."""
        digest = None
        if self.cache is not None:
            digest = file_digest(image)
            if digest is not None and (kept := self.cache.find(digest, limit)) is not None:
                return kept
        picture = self._open(image)
        if self.cache is not None and digest is None:
            digest = pixel_digest(picture)
            if (kept := self.cache.find(digest, limit)) is not None:
                return kept
        return _Picture(padded_picture(picture, limit, self.config), self.config, limit, digest)

    def _cut(self, part: "tuple[_Picture, int]") -> None:
        """One tile: divided by 255, minus the mean, divided by the deviation, in float32.

        By numpy, tile by tile: what a tile takes stays in a core's cache, and torch's own threads are left out of it.
        """
        picture, number = part
        side = self.config.image_size
        row, column = divmod(number, picture.columns)
        there = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
        tile = picture.pixel_values[1 + number].numpy()
        np.copyto(tile, picture.canvas[there].transpose(2, 0, 1))
        tile /= np.float32(255)
        tile -= self._mean
        tile /= self._std
        picture.plane.numpy()[:, *there] = tile

    def _finish(self, picture: "_Picture") -> ImageCrops:
        """The global view, beside the tiles."""
        side = self.config.image_size
        view = F.interpolate(picture.plane[None], size=(side, side), mode="bicubic", align_corners=False)
        picture.pixel_values[0] = view[0]
        height, width = picture.plane.shape[1:]
        crops = ImageCrops(picture.pixel_values, (height, width), num_image_tokens(height, width, self.config))
        if self.cache is not None and picture.digest is not None:
            self.cache.keep(picture.digest, picture.limit, crops)
        return crops

    def _each(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """The function of each item, by threads where there are several."""
        most = torch.get_num_threads() if self.threads is None else self.threads
        threads = min(most, _MOST_THREADS, len(items))
        if threads <= 1:
            return list(map(function, items))
        with ThreadPoolExecutor(threads, "phi35-pictures") as pool:
            return list(pool.map(function, items))


class _Picture:
    """A padded picture on its way to crops: ``plane`` (3, H, W) and ``pixel_values`` are to be filled."""

    def __init__(self, canvas: np.ndarray, config: VisionConfig, limit: int, digest: bytes | None) -> None:
        self.canvas, self.limit, self.digest = canvas, limit, digest
        height, width = canvas.shape[:2]
        rows, self.columns = height // config.image_size, width // config.image_size
        self.num_tiles = rows * self.columns
        self.plane = torch.empty(3, height, width)
        self.pixel_values = torch.empty(1 + self.num_tiles, 3, config.image_size, config.image_size)


def padded_picture(picture: Image.Image | np.ndarray, num_crops: int, config: VisionConfig) -> np.ndarray:
    """(H, W, 3) uint8: resized with the longer side in whole tiles, the shorter one padded with white.

    Args:
        picture: RGB, as ``vision.decode.open_image`` gives it, or (h, w, 3) uint8.
        num_crops: limit of tiles.
        config: gives the tile side.

    Raises:
        ValueError: as ``resized_size``.
    """
    array = picture if isinstance(picture, np.ndarray) else None
    size = picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])
    upright = size[0] < size[1]
    width, height = resized_size(max(size), min(size), num_crops, config)
    padded_height = whole_tiles(height, config.image_size)
    if (max(size), min(size)) == (width, height) == (width, padded_height):
        return np.asarray(picture)
    if array is not None:
        picture = Image.fromarray(np.ascontiguousarray(array))
    assert isinstance(picture, Image.Image)
    # The published code transposes portraits and resizes them lying: Pillow filters rows first and rounds
    # in between, so that resizing them upright would give other pixels.
    if upright:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    canvas = np.full((padded_height, width, 3), _WHITE, dtype=np.uint8)
    top = (padded_height - height) // 2
    canvas[top : top + height] = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    return canvas.transpose(1, 0, 2) if upright else canvas


def resized_size(width: int, height: int, num_crops: int, config: VisionConfig) -> tuple[int, int]:
    """Size (width, height) in pixels that a landscape picture is resized to, before padding.

    The height is truncated in floating point as published: a 24:17 picture on one tile of 336 gets 237 rows,
    not 238.

    Raises:
        ValueError: if ``num_crops`` is below 1 or the height comes out as 0.
    """
    if isinstance(num_crops, bool) or not isinstance(num_crops, Integral) or num_crops < 1:
        raise ValueError(f"num_crops must be an integer of at least 1, got {num_crops!r}")
    if height < 1 or width < height:
        raise ValueError(f"expected a landscape or square size of at least one pixel, got {width}x{height}")
    ratio = width / height
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    new_width = scale * config.image_size
    new_height = int(new_width / ratio)
    if new_height == 0:
        raise ValueError(
            f"aspect ratio {width}:{height} is too extreme: at num_crops={num_crops} the longer side becomes "
            f"{new_width} pixels and the shorter side none. Crop the picture, pad it, or raise num_crops to "
            f"{math.ceil(ratio / config.image_size)}"
        )
    return new_width, new_height


def num_image_tokens(height: int, width: int, config: VisionConfig) -> int:
    """Prompt positions of a padded picture: (h * w + 1) * m^2 features, 1 between, (h + 1) * m row ends.

    Args:
        height: pixels after padding, a multiple of ``config.image_size``.
        width: pixels after padding, a multiple of ``config.image_size``.
        config: gives the tile side and m, the features along one side of a crop.

    Raises:
        ValueError: if a side is not a positive multiple of the tile side.
    """
    rows, columns = tile_grid(height, width, config)
    merged = config.merged_grid_size
    return (rows * columns + 1) * merged**2 + 1 + (rows + 1) * merged


def tile_grid(height: int, width: int, config: VisionConfig) -> tuple[int, int]:
    """(rows, columns) of tiles in a padded picture.

    Raises:
        ValueError: if a side is not a positive multiple of the tile side.
    """
    side = config.image_size
    if height < side or width < side or height % side or width % side:
        raise ValueError(
            f"image size (height, width) must be positive multiples of the tile side {side}, got ({height}, {width}): "
            "give the size after padding, as ImageTransform returns it"
        )
    return height // side, width // side


def whole_tiles(length: int, side: int) -> int:
    """The smallest multiple of ``side`` that is at least ``length``."""
    return -(-length // side) * side
