"""From tower features to the decoder's width: the 2x2 merge, the plane of tiles, the projection.

Shapes use C crops, n patches and m = n / 2 features along the side of a crop, W the tower's width, and h x w tiles.
"""

import torch
from torch import Tensor, nn

from phi35.config import ModelConfig


class ImageProjection(nn.Sequential):
    """Linear, exact GELU, linear: (..., 4 W) to (..., D). Its parameters are called ``0.*`` and ``2.*``."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.vision is not None
        super().__init__(
            nn.Linear(4 * config.vision.hidden_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )


def merge_patches(features: Tensor) -> Tensor:
    """Joins each 2x2 square of patches into one vector: upper left, upper right, lower left, lower right.

    Args:
        features: (C, n^2, W), row by row.

    Returns:
        (C, m, m, 4 W)
    """
    num_crops, num_patches, width = features.shape
    merged = int(num_patches**0.5) // 2
    squares = features.view(num_crops, merged, 2, merged, 2, width)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(num_crops, merged, merged, 4 * width)


def join_tiles(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lays tiles side by side, so that a row of the plane is a row of the picture.

    Args:
        tiles: (N * h * w, m, m, X), picture after picture, each row by row.
        grid: (h, w).

    Returns:
        (N, h * m, w * m, X)
    """
    rows, columns = grid
    merged, channels = tiles.shape[1], tiles.shape[3]
    squares = tiles.view(-1, rows, columns, merged, merged, channels)
    return squares.transpose(2, 3).reshape(-1, rows * merged, columns * merged, channels)


def end_rows(plane: Tensor, separator: Tensor) -> Tensor:
    """Puts the row separator after each row and writes the rows one after the other.

    Args:
        plane: (N, height, width, X).
        separator: (1, 1, 1, X).

    Returns:
        (N, height * (width + 1), X)
    """
    ends = separator.to(plane.dtype).expand(plane.shape[0], plane.shape[1], 1, -1)
    return torch.cat([plane, ends], dim=2).flatten(1, 2)
