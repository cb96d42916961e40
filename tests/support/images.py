"""Small vision models and pictures for the tests of the image path."""

import dataclasses

import torch
from torch import nn

from phi35.config import ModelConfig
from vision.presets import PRESETS

IMAGE_TOKEN = 1044


def small_config(**changes: object) -> ModelConfig:
    """The tiny vision preset; ``vision`` changes fields of its vision config."""
    return PRESETS["tiny-phi-3.5-vision"].replace(**changes)


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.05) -> None:
    """Draws all parameters anew, norms around 1, so that no part of the path has no effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)


def random_crops(config: ModelConfig, grids: list[tuple[int, int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pixel_values (C, 3, S, S) and image_sizes (N, 2) of pictures with these tile grids."""
    assert config.vision is not None
    side = config.vision.image_size
    num_crops = sum(1 + rows * columns for rows, columns in grids)
    pixel_values = torch.randn(num_crops, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return pixel_values, torch.tensor([[rows * side, columns * side] for rows, columns in grids]).view(-1, 2)


def with_vision(config: ModelConfig, **changes: object) -> ModelConfig:
    """A config with some fields of its vision part changed."""
    assert config.vision is not None
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))
