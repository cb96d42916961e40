"""Names of quantized tensors on disk."""

import torch

from phi35.checkpoint.rules import CheckpointPlan, Placement

PACKED, SHAPE = "weight_packed", "weight_shape"


def packed_shapes(plan: CheckpointPlan) -> dict[str, torch.Tensor]:
    """Disk name -> shape (rows, columns) of each packed weight, which compressed-tensors stores beside it as int64."""
    quantization, shapes = plan.config.quantization, {}
    assert quantization is not None, "a plain model packs no weights"
    for placement in plan.written():
        if placement.disk_name.endswith(PACKED):
            one = quantization.format_of(placement.memory_name)
            assert one is not None, "only a quantized weight has packed codes"
            rows, words = plan.disk_shape(placement)
            name = placement.disk_name.removesuffix(PACKED) + SHAPE
            shapes[name] = torch.tensor((rows, words * one.per_word))
    return shapes


def plain_name(name: str) -> str:
    """The memory name of the unquantized tensor that a quantized one's name comes from."""
    for suffix in ("_packed", "_zero_point", "_row_scale", "_scale"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def suffix_of(placement: Placement) -> str:
    """What a quantized tensor's memory name has beyond ``plain_name``."""
    return placement.memory_name.removeprefix(plain_name(placement.memory_name))
