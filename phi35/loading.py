"""Models from presets, folders and hub ids, and back to folders."""

from typing import Any

import torch

from phi35 import presets
from phi35.config import ModelConfig
from phi35.device import pick_device, pick_dtype
from phi35.model import CausalLM


def create(
    preset_or_config: str | ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    seed: int | None = None,
    **changes: Any,
) -> CausalLM:
    """A model with random weights.

    Args:
        preset_or_config: name of a preset, or a config.
        device: where the weights are drawn; "meta" allocates nothing.
        dtype: of the weights; by default float32 on a CPU and bfloat16 on a GPU.
        seed: makes the weights reproducible on one kind of device; None draws from torch's global generator.
        **changes: config fields to change, e.g. ``num_hidden_layers=2``.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: for an unknown preset, field, device or dtype, before memory is allocated.
    """
    if isinstance(preset_or_config, ModelConfig):
        config = preset_or_config
    elif isinstance(preset_or_config, str):
        config = presets.get(preset_or_config)
    else:
        raise ValueError(f"expected a preset's name or a ModelConfig, got {type(preset_or_config).__name__}")
    if changes:
        config = config.replace(**changes)
    picked_device = pick_device(device)
    model = empty_model(config, picked_device, pick_dtype(dtype, picked_device))
    if picked_device.type != "meta":
        generator = None if seed is None else torch.Generator(picked_device).manual_seed(seed)
        model.init_weights(generator)
    return model


def empty_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """A model in evaluation mode whose weights are allocated but not set.

    Built on the meta device first, so that no weight is drawn or cast on the way.
    """
    with torch.device("meta"):
        model = CausalLM(config).to(dtype)
    if device.type != "meta":
        model.to_empty(device=device)
    model.tie_weights()
    return model.eval()
