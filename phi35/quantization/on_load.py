"""A plain checkpoint loaded with its weights in few bits: read, rounded and put in place part by part.

What ``phi35 quantize`` writes to disk and ``phi35.load`` reads again, without the disk: beside the quantized model
memory holds one tensor of the checkpoint (one expert's, where the disk has them apart), on the host and on the device
that rounds it.
"""

import torch

from phi35.checkpoint.rules import CheckpointPlan, Placement
from phi35.checkpoint.streaming import StoredWeights
from phi35.config import ModelConfig
from phi35.quantization.codes import code_suffix, round_to_nearest
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.names import plain_name, suffix_of

NAMED = {
    "int4": WeightFormat(bits=4),
    "int8": WeightFormat(bits=8),
    "fp8": WeightFormat(bits=8, type="float", group_size=None),
}
"""Formats by short names: groups of 128 (fp8: rows), symmetric; embedding, head and tower stay as they are."""


def quantization_of(given: str | QuantizationConfig) -> QuantizationConfig:
    """The quantization that a caller means.

    Raises:
        ValueError: for an unknown name, or a method that needs calibration.
    """
    if isinstance(given, str):
        if given not in NAMED:
            raise ValueError(f"quantization must be one of {sorted(NAMED)} or a QuantizationConfig, got {given!r}")
        return QuantizationConfig(linear=NAMED[given])
    if not isinstance(given, QuantizationConfig):
        raise ValueError(f"quantization must be a name or a QuantizationConfig, got {type(given).__name__}")
    if given.method != "rtn":
        raise ValueError(f"method {given.method!r} needs calibration: run phi35 quantize and load what it writes")
    return given


def quantized_config(config: ModelConfig, given: str | QuantizationConfig) -> ModelConfig:
    """The config of a plain checkpoint's model with weights in few bits.

    Raises:
        ValueError: if the checkpoint is quantized already, or ``given`` cannot be had.
    """
    if config.quantization is not None:
        raise ValueError(f"the checkpoint is quantized already ({config.quantization.label}): leave out quantization")
    return config.replace(quantization=quantization_of(given))


@torch.no_grad()
def fill_rounded(model: torch.nn.Module, weights: StoredWeights, config: ModelConfig, device: torch.device) -> None:
    """Fill an allocated model from a plain checkpoint.

    Args:
        model: of ``config``, on any device.
        weights: the checkpoint's, plain.
        config: with ``quantization``.
        device: where weights are rounded.
    """
    assert config.quantization is not None
    plan, state = CheckpointPlan(config), model.state_dict()
    scale_dtype = getattr(torch, config.quantization.scale_dtype)
    parts: dict[str, list[Placement]] = {}
    for placement in plan.written():
        name = placement.memory_name
        if config.quantization.format_of(name) is None or plain_name(name) + "_scale" not in plan.shapes:
            placement.put(state[name], weights.part(name, placement))
        else:
            parts.setdefault(placement.disk_name.removesuffix(suffix_of(placement)), []).append(placement)
    for placements in parts.values():
        name = plain_name(placements[0].memory_name)
        one = config.quantization.format_of(name)
        assert one is not None
        # Zero points lie otherwise in their tensor than the rows do: the codes' place is the weight's.
        (codes,) = [placement for placement in placements if suffix_of(placement) == code_suffix(one)]
        made = round_to_nearest(weights.part(name, codes).to(device), one, scale_dtype).tensors()
        for placement in placements:
            placement.put(state[placement.memory_name], made[suffix_of(placement)])
