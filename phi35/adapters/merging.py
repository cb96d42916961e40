"""An adapter added to a checkpoint's weights, tensor by tensor: memory never holds a model."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from phi35.adapters.names import Addition, additions_of
from phi35.checkpoint.rules import CheckpointPlan, Placement
from phi35.checkpoint.streaming import StoredWeights, check_space, check_target, copy_companions
from phi35.checkpoint.writer import DeferredTensor, checkpoint_bytes, parse_size, write_json, write_weights
from phi35.config import ModelConfig
from phi35.config_io import to_generation_dict, to_hf_dict
from phi35.loading import COMPANION_FILES, find_folder, load_config


class Weights(Protocol):
    """Where the base model's weights come from."""

    def part(self, name: str, placement: Placement) -> torch.Tensor:
        """The part of memory tensor ``name`` that ``placement`` takes."""
        ...


class HeldWeights:
    """Those of a model in memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.state = model.state_dict()

    def part(self, name: str, placement: Placement) -> torch.Tensor:
        """See ``Weights``."""
        return placement.take(self.state[name])


def merge_folder(
    base: str | Path, adapter: str | Path, target: str | Path, max_shard_size: int | str = "5GB"
) -> ModelConfig:
    """Writes a checkpoint with an adapter added to its weights; tokenizer and image settings are copied.

    Args:
        base: folder or hub id of the model.
        adapter: folder of an adapter in PEFT's form, under any of the names of ``phi35.adapters.names``.
        target: folder to write.
        max_shard_size: bytes per weight file.

    Returns:
        The model's config.

    Raises:
        ValueError: before anything is written, if the adapter does not fit, the base is in few bits or damaged, the
            target is the base, or the disk lacks the space.
    """
    from phi35.adapters.files import read_adapter

    folder, output = find_folder(base), Path(target).expanduser()
    check_target(folder, output)
    config = load_config(folder)
    check_mergeable(config)
    additions = additions_of(*read_adapter(adapter), config)
    weights = StoredWeights(folder, config)
    tensors = merged_tensors(weights, config, additions, weights.main_dtype)
    shard_bytes = parse_size(max_shard_size)
    check_space(output, checkpoint_bytes(tensors))
    write_weights(output, tensors, shard_bytes)
    write_json(output / "config.json", to_hf_dict(config, weights.main_dtype))
    write_json(output / "generation_config.json", to_generation_dict(config))
    copy_companions(folder, output, COMPANION_FILES)
    return config


def check_mergeable(config: ModelConfig) -> None:
    """Raises ValueError for weights in few bits, whose codes cannot take a small addition."""
    if config.quantization is not None:
        raise ValueError(
            f"an adapter cannot be merged into weights in few bits ({config.quantization.label}): merge it into the "
            "original weights and quantize those again"
        )


def merged_tensors(
    weights: Weights, config: ModelConfig, additions: Mapping[str, Addition], dtype: torch.dtype
) -> dict[str, DeferredTensor]:
    """Published name -> tensor to be made, in the model's order."""
    plan = CheckpointPlan(config)
    return {
        placement.disk_name: DeferredTensor(
            plan.disk_shape(placement), dtype, functools.partial(_merged, weights, placement, additions, dtype)
        )
        for placement in plan.written()
    }


def _merged(
    weights: Weights, placement: Placement, additions: Mapping[str, Addition], dtype: torch.dtype
) -> torch.Tensor:
    name = placement.memory_name
    weight = weights.part(name, placement)
    if name not in additions:
        return weight.to(dtype)
    return added(weight, additions[name].part(placement)).to(dtype)


def added(weight: torch.Tensor, addition: Addition) -> torch.Tensor:
    """The weight (out, in) with its addition, and DoRA's lengths, in float32."""
    total = weight.float() + addition.scaling * (addition.second.float() @ addition.first.float())
    if addition.magnitude is None:
        return total
    lengths = torch.linalg.vector_norm(total, dim=1)
    return total * (addition.magnitude.float() / lengths).unsqueeze(1)
