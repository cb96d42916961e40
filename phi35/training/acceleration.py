"""What makes a training pass fast: which kernels run, what is kept for the backward pass, what is compiled."""

import contextlib
from typing import Any

import torch

from phi35.training.config import TrainingConfig


def accelerate(model: Any, config: TrainingConfig, device: torch.device) -> None:
    """Applies the config's choices to a model, in place.

    Args:
        model: a ``CausalLM`` on its device.
        config: resolved.
        device: where it trains.
    """
    if config.gradient_checkpointing:
        model.gradient_checkpointing = config.gradient_checkpointing
    kernels = config.kernels
    if kernels == "auto":
        kernels = "fused" if device.type == "cuda" and not config.compile else "torch"
    fuse(model, kernels == "fused")
    if config.compile:
        compile_layers(model)


def fuse(model: Any, enabled: bool = True) -> None:
    """Lets a model's modules take their fused forms (``phi35.fused``), in place."""
    for module in model.modules():
        if hasattr(type(module), "fused"):
            module.fused = enabled


def compile_layers(model: Any) -> None:
    """Compiles each decoder layer and each block of an image tower by itself, in place.

    All layers share one compiled form. Whole graphs only: a break would cost more than compiling gains.
    """
    layers = list(model.model.layers)
    embedding = model.model.vision_embed_tokens
    if embedding is not None:
        layers += list(embedding.img_processor.blocks)
    for layer in layers:
        layer.compile(dynamic=False, fullgraph=True)


def fast_attention(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it, attention prefers cuDNN's kernels, then flash attention, where they take the inputs."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)
