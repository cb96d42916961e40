"""Augmentation of training pictures that keeps their answers.

Content is moved only over a uniform background and never out of the picture, so that a circle stays a circle
and a photograph stays as it is; mirroring is for questions that do not speak of left and right.
"""

import random
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Which changes a training picture may undergo.

    Attributes:
        flip: probability of mirroring left to right.
        shift: probability of moving the content to a uniformly drawn place on its background.
        rotate: probability of a turn by 90, 180 or 270 degrees.
        brightness: largest change of all channels together, in grey levels of 255.
    """

    flip: float = 0.5
    shift: float = 0.9
    rotate: float = 0.0
    brightness: int = 0

    def __post_init__(self) -> None:
        for name in ("flip", "shift", "rotate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} is a probability in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.brightness <= 255:
            raise ValueError(f"augmentation.brightness must lie in 0..255 grey levels, got {self.brightness}")

    def __call__(self, image: np.ndarray, rng: random.Random) -> np.ndarray:
        """One changed copy.

        Args:
            image: (H, W, 3) uint8; not written to.
            rng: the only source of randomness.
        """
        if rng.random() < self.shift:
            image = shift_content(image, rng)
        if rng.random() < self.flip:
            image = image[:, ::-1]
        if self.rotate and rng.random() < self.rotate:
            image = np.rot90(image, rng.randrange(1, 4))
        if self.brightness:
            change = rng.randint(-self.brightness, self.brightness)
            image = np.clip(image.astype(np.int16) + change, 0, 255).astype(np.uint8)
        return image


def shift_content(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """The content's bounding box at another place of its background.

    The background is the colour of the corners; where they differ, or the box fills the picture, nothing moves.

    Args:
        image: (H, W, 3) uint8.
        rng: draws the place.
    """
    background = _background(image)
    if background is None:
        return image
    differs = image != background
    content = differs[:, :, 0] | differs[:, :, 1] | differs[:, :, 2]
    rows, columns = np.flatnonzero(content.any(axis=1)), np.flatnonzero(content.any(axis=0))
    if not len(rows):
        return image
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = bottom - top, right - left
    new_top = rng.randint(0, image.shape[0] - int(height))
    new_left = rng.randint(0, image.shape[1] - int(width))
    moved = np.empty_like(image)
    moved[:] = background
    moved[new_top : new_top + height, new_left : new_left + width] = image[top:bottom, left:right]
    return moved


def _background(image: np.ndarray) -> np.ndarray | None:
    """(3,) the colour that at least three corners share; None where they do not."""
    corners = (image[0, 0], image[0, -1], image[-1, 0], image[-1, -1])
    colors = [corner.tobytes() for corner in corners]
    for index in (0, 1):
        if colors.count(colors[index]) >= 3:
            return corners[index]
    return None
