"""A checkpoint turned into one with weights in few bits, tensor by tensor.

Rounding to nearest needs no more memory than a few tensors of the source, whatever the model's size. Calibrated codes
come from ``phi35.quantization.calibrate``.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from phi35.checkpoint.rules import CheckpointPlan, Placement
from phi35.checkpoint.streaming import StoredWeights, check_space, check_target, copy_companions
from phi35.checkpoint.writer import DeferredTensor, Writable, parse_size, write_json, write_weights
from phi35.config import ModelConfig
from phi35.config_io import to_generation_dict, to_hf_dict
from phi35.loading import COMPANION_FILES, find_folder, load_config
from phi35.quantization.codes import QuantizedTensor, round_to_nearest, tensor_specs
from phi35.quantization.config import QuantizationConfig
from phi35.quantization.names import packed_shapes, plain_name, suffix_of

Maker = Callable[[Placement], QuantizedTensor]
"""Gives the quantized form of the part of a weight that one published tensor holds."""


def quantize(
    source: str | Path, target: str | Path, quantization: QuantizationConfig, max_shard_size: int | str = "5GB"
) -> ModelConfig:
    """Write a checkpoint with its weights rounded to the nearest codes; tokenizer and image settings are copied.

    Args:
        source: folder or hub id of a checkpoint, dense or sparse, with or without the image path.
        target: folder to write; an earlier checkpoint's weights in it are replaced.
        quantization: what to quantize, and how.
        max_shard_size: bytes per weight file, e.g. "5GB".

    Returns:
        The config of the quantized model.

    Raises:
        ValueError: before anything is written, if the source is damaged or quantized already, a weight cannot be
            stored as asked, the target is the source or a file, or the disk lacks the space.
    """
    if quantization.method != "rtn":
        raise ValueError(f"method {quantization.method!r} needs calibration text: use quantize_calibrated")
    shard_bytes = parse_size(max_shard_size)
    folder, config = open_source(source, target, quantization)
    weights = StoredWeights(folder, config.replace(quantization=None))
    tensors = quantized_tensors(config, weights, _rounded(weights, quantization))
    write_checkpoint(folder, Path(target).expanduser(), config, weights.main_dtype, tensors, shard_bytes)
    return config


def open_source(source: str | Path, target: str | Path, quantization: QuantizationConfig) -> tuple[Path, ModelConfig]:
    """The source's folder and the config of the quantized model; nothing is written.

    Raises:
        ValueError: see ``quantize``.
    """
    folder, target = find_folder(source), Path(target).expanduser()
    check_target(folder, target)
    plain = load_config(folder)
    if plain.quantization is not None:
        raise ValueError(f"{folder} is quantized already ({plain.quantization.label}): quantize the original")
    config = plain.replace(quantization=quantization)
    CheckpointPlan(config)
    return folder, config


def quantized_tensors(config: ModelConfig, weights: StoredWeights, make: Maker) -> dict[str, Writable]:
    """Disk name -> tensor to be made, in the model's order.

    Args:
        config: of the quantized model.
        weights: of the source.
        make: gives quantized weights.
    """
    assert config.quantization is not None
    plan, source = CheckpointPlan(config), _Once(make)
    scale_dtype = getattr(torch, config.quantization.scale_dtype)
    tensors: dict[str, Writable] = {}
    for placement in plan.written():
        name, shape = placement.memory_name, plan.disk_shape(placement)
        plain = plain_name(name)
        if weights.plan.shapes.get(plain) is None:
            raise AssertionError(f"{name} stands for no tensor of the source")
        one = config.quantization.format_of(name)
        if one is None or not _is_quantized(plan, plain):
            made = functools.partial(weights.part, name, placement)
            tensors[placement.disk_name] = DeferredTensor(shape, weights.dtypes[name], made)
            continue
        dtype = tensor_specs(one, weights.plan.shapes[plain], scale_dtype)[suffix_of(placement)][1]
        tensors[placement.disk_name] = DeferredTensor(shape, dtype, functools.partial(source.tensor, placement))
    return tensors | packed_shapes(plan)


def write_checkpoint(
    folder: Path,
    target: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    tensors: Mapping[str, Writable],
    shard_bytes: int,
) -> None:
    """Write weights, config and the files beside them.

    Raises:
        ValueError: if the disk lacks the space, before anything is written.
    """
    check_space(target, stored_bytes(tensors))
    write_weights(target, tensors, shard_bytes)
    write_json(target / "config.json", to_hf_dict(config, dtype))
    write_json(target / "generation_config.json", to_generation_dict(config))
    copy_companions(folder, target, COMPANION_FILES)


def stored_bytes(tensors: Mapping[str, Writable]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _is_quantized(plan: CheckpointPlan, plain: str) -> bool:
    return plain + "_scale" in plan.shapes


def _rounded(weights: StoredWeights, quantization: QuantizationConfig) -> Maker:
    def make(placement: Placement) -> QuantizedTensor:
        name = plain_name(placement.memory_name)
        one = quantization.format_of(name)
        assert one is not None
        return round_to_nearest(weights.part(name, placement), one, getattr(torch, quantization.scale_dtype))

    return make


class _Once:
    """Quantizes each part of a weight once, although its codes and its scales are asked for apart.

    What is small is kept until it is asked for. Codes are not: where they are asked for after the scales, as fp8 ones
    are, they are made again.
    """

    def __init__(self, make: Maker) -> None:
        self._make = make
        self._waiting: dict[str, torch.Tensor] = {}
        self._given: set[str] = set()

    def tensor(self, placement: Placement) -> torch.Tensor:
        """The tensor that a placement of the quantized checkpoint holds."""
        name, suffix = placement.disk_name, suffix_of(placement)
        base = name.removesuffix(suffix)
        self._given.add(name)
        if name in self._waiting:
            return self._waiting.pop(name)
        # The widest elements are written first, and zero points lie otherwise in their tensor than rows.
        assert suffix != "_zero_point", "codes come before zero points"
        made = self._make(placement).tensors()
        for other, tensor in made.items():
            if other not in ("", "_packed") and base + other not in self._given:
                self._waiting[base + other] = tensor
        return made[suffix]
