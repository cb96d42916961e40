"""Pictures between the reading process and the tower: bytes up to the device, crops from there on.

A reading process decodes, resizes and pads (``vision.image_transform.padded_picture``); what crosses to the device is
that picture, 3 bytes a pixel. There ``CropMaker`` does the rest for a whole batch at once: normalising, the global
view, the tiles. Sent as finished float32 crops a picture would take five times the bytes, and its bicubic reduction
most of the reading process's time. On a CPU the result has the bits of ``vision.image_transform.ImageTransform``; a
GPU's bicubic rounds otherwise in the last place.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from phi35.config import VisionConfig
from vision.image_transform import tile_grid


class CropMaker:
    """Crops of padded pictures, on whatever device these are.

    Args:
        config: gives the tile side and the normalisation.
    """

    def __init__(self, config: VisionConfig) -> None:
        self.config = config
        self._statistics: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, pictures: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(C, 3, S, S) float32 crops of all pictures, in order, each global view first.

        Args:
            pictures: (sum of H * W * 3,) uint8, padded pictures one after the other, each (H, W, 3).
            sizes: (H, W) of each.
        """
        side = self.config.image_size
        grids = [tile_grid(height, width, self.config) for height, width in sizes]
        starts = list(accumulate((height * width * 3 for height, width in sizes), initial=0))
        first_crops = list(accumulate((1 + rows * columns for rows, columns in grids), initial=0))
        same: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            same.setdefault(size, []).append(index)
        whole = len(same) == 1
        crops = pictures.new_empty((first_crops[-1], 3, side, side), dtype=torch.float32)
        for (height, width), members in same.items():
            if whole:
                group = pictures.view(-1, height, width, 3)
            else:
                pieces = [pictures[starts[index] : starts[index + 1]] for index in members]
                group = torch.stack(pieces).view(-1, height, width, 3)
            made = self._of_one_size(group)  # (n, 1 + h * w, 3, S, S)
            if whole:
                return made.flatten(0, 1)
            for index, of_one in zip(members, made, strict=True):
                crops[first_crops[index] : first_crops[index + 1]] = of_one
        return crops

    def _of_one_size(self, pictures: Tensor) -> Tensor:
        """(n, H, W, 3) uint8 to (n, 1 + h * w, 3, S, S) float32."""
        side = self.config.image_size
        count, height, width, _ = pictures.shape
        rows, columns = height // side, width // side
        whole, mean, std = self._constants(pictures.device)
        plane = pictures.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        plane = plane.div_(whole).sub_(mean).div_(std)
        crops = plane.new_empty(count, 1 + rows * columns, 3, side, side)
        # At one tile the global view is the picture: bicubic resampling at scale 1 returns its input exactly.
        is_one = rows == columns == 1
        crops[:, 0] = plane if is_one else F.interpolate(plane, size=(side, side), mode="bicubic", align_corners=False)
        tiles = plane.view(count, 3, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        crops[:, 1:].view(count, rows, columns, 3, side, side).copy_(tiles)
        return crops

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._statistics:
            # 255 as a tensor: by a number, a GPU multiplies with the reciprocal, which rounds otherwise.
            self._statistics[device] = (
                torch.tensor(255.0, device=device),
                torch.tensor(self.config.image_mean, device=device).view(3, 1, 1),
                torch.tensor(self.config.image_std, device=device).view(3, 1, 1),
            )
        return self._statistics[device]
