"""From a training checkpoint to a folder in Hugging Face form, on the CPU, without DeepSpeed, a tensor at a time."""

import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from phi35.adapters.config import AdapterConfig
from phi35.adapters.files import save_adapter, without_adapter_name
from phi35.adapters.inject import lora_config_of
from phi35.adapters.merging import HeldWeights, Weights, check_mergeable, merged_tensors
from phi35.adapters.names import additions_of
from phi35.checkpoint.rules import CheckpointPlan, Placement
from phi35.checkpoint.streaming import StoredWeights, check_space, check_target
from phi35.checkpoint.writer import DeferredTensor, checkpoint_bytes, write_json, write_weights
from phi35.config import ModelConfig
from phi35.config_io import to_generation_dict, to_hf_dict
from phi35.meta_model import meta_model
from phi35.processor import Processor
from phi35.training.build import build_model, build_processor
from phi35.training.checkpoint import check_fit, model_config_from_dict
from phi35.training.checkpoint_files import MANIFEST, TRAINER, CheckpointReader, complete_checkpoints, step_of
from phi35.training.config import TrainingConfig
from phi35.training.optimizer_state import AVERAGE, PARAMETER

SELECTION_BIAS_FILE = "router_selection_bias.json"
"""Beside an exported model that was trained with one: a list per sparse layer of a number per expert."""


def export(
    folder: str | Path,
    output: str | Path,
    *,
    processor: Any = None,
    processor_folder: str | Path | None = None,
    dtype: str | None = None,
    verify: bool = True,
    average: bool = False,
    best: bool = False,
    merged: bool = False,
) -> Path:
    """Writes the model of a training checkpoint as config.json, safetensors and tokenizer, or its adapter.

    Of a run with an adapter that is written in PEFT's form, beside the tokenizer.

    Args:
        folder: a checkpoint, or a run's folder (its newest complete checkpoint is taken).
        output: folder to write.
        processor: tokenizer and image settings to write beside the weights.
        processor_folder: where to read them in place of ``processor``; by default as the run did.
        dtype: "float32" or "bfloat16"; by default that of the run.
        verify: compare the checkpoint's files with its SHA-256 manifest first.
        best: of a run, take the checkpoint with the lowest held-out loss (``keep_best``) instead of the newest.
        merged: of a run with an adapter, write the model with the adapter in its weights.
        average: take the moving average of the weights in place of the weights; frozen parameters have none.

    Returns:
        The output folder.

    Raises:
        ValueError: if there is no complete checkpoint, or it is damaged or without average, or the disk has no room.
    """
    reader = CheckpointReader(find_checkpoint(folder, best), verify=verify)
    model_config = model_config_from_dict(reader.trainer["model_config"])
    config = TrainingConfig(**reader.trainer["training_config"])
    if processor_folder is not None:
        processor = Processor.from_folder(processor_folder, model_config)
    elif processor is None:
        processor = build_processor(config, model_config)
    target, stored_as = Path(output), getattr(torch, dtype or config.dtype)
    check_target(reader.folder, target)
    if average and not reader.names(AVERAGE):
        raise ValueError(f"{str(reader.folder)!r} holds no average of the weights: the run had ema_decay=0")
    if config.adapter is None and merged:
        raise ValueError(f"{str(reader.folder)!r} is of a run without an adapter: there is nothing to merge")
    if config.adapter is not None and not merged:
        return _export_adapter(reader, target, config, model_config, stored_as, average, processor)
    if config.adapter is not None:
        tensors = _merged_tensors(reader, config, model_config, stored_as, average)
    else:
        tensors = _TrainedTensors(reader, model_config, stored_as, average).deferred()
    check_space(target, checkpoint_bytes(tensors))
    write_weights(target, tensors)
    write_json(target / "config.json", to_hf_dict(model_config, stored_as))
    write_json(target / "generation_config.json", to_generation_dict(model_config))
    if processor is not None:
        processor.save(target)
    _write_selection_bias(reader.trainer.get("selection_bias"), target)
    return target


class _TrainedTensors:
    """A training checkpoint's weights under their published names, each read when its turn to be written comes.

    Of stacked experts one at a time is read, so that memory holds a single tensor of the published checkpoint beside
    the one of the training's that it is cut from.

    Raises:
        ValueError: if the checkpoint does not fit its config, with all that is missing, unknown or misshapen.
    """

    def __init__(self, reader: CheckpointReader, config: ModelConfig, dtype: torch.dtype, average: bool) -> None:
        self.reader, self.dtype, self.average = reader, dtype, average
        self.plan = CheckpointPlan(config)
        check_fit(reader, self.plan.shapes)
        self._last: tuple[tuple[str, int | None], torch.Tensor] | None = None

    def deferred(self) -> dict[str, DeferredTensor]:
        """Disk name -> tensor to be made, in the model's order."""
        return {
            placement.disk_name: DeferredTensor(
                self.plan.disk_shape(placement), self.dtype, functools.partial(self._tensor, placement)
            )
            for placement in self.plan.written()
        }

    def _tensor(self, placement: Placement) -> torch.Tensor:
        key = (placement.memory_name, placement.index)
        if self._last is None or self._last[0] != key:
            self._last = None  # its memory first
            name, index = key
            one = {} if index is None else {"offset": index, "rows": 1}
            kind = AVERAGE if self.average and self.reader.has(AVERAGE, name) else PARAMETER
            read = self.reader.read(kind, name, **one).to(self.dtype)
            self._last = (key, read if index is None else read[0])
        return dataclasses.replace(placement, index=None).take(self._last[1])


def _export_adapter(
    reader: CheckpointReader,
    target: Path,
    config: TrainingConfig,
    model_config: ModelConfig,
    dtype: torch.dtype,
    average: bool,
    processor: Any,
) -> Path:
    assert config.adapter is not None
    base = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    tensors = {name: tensor.to(dtype) for name, tensor in _adapter_tensors(reader, average).items()}
    save_adapter(target, tensors, AdapterConfig.of(config.adapter), model_config, base)
    if processor is not None:
        processor.save(target)
    return target


def _adapter_tensors(reader: CheckpointReader, average: bool) -> dict[str, torch.Tensor]:
    kind = AVERAGE if average else PARAMETER
    return {name: reader.read(kind, name) for name in sorted(reader.names(kind))}


def _merged_tensors(
    reader: CheckpointReader, config: TrainingConfig, model_config: ModelConfig, dtype: torch.dtype, average: bool
) -> dict[str, DeferredTensor]:
    """Published name -> tensor to be made of the base's and the adapter's."""
    check_mergeable(model_config)
    assert config.adapter is not None
    described = lora_config_of(AdapterConfig.of(config.adapter), meta_model(model_config)).to_dict()
    tensors = {without_adapter_name(name): tensor for name, tensor in _adapter_tensors(reader, average).items()}
    weights: Weights
    if (Path(config.model) / "config.json").is_file():
        weights = StoredWeights(Path(config.model), model_config)
    else:
        weights = HeldWeights(build_model(config.replace(adapter=None, export_merged=False), model_config, None))
    return merged_tensors(weights, model_config, additions_of(described, tensors, model_config), dtype)


def _write_selection_bias(selection_bias: list[list[float]] | None, output: Path) -> None:
    path = output / SELECTION_BIAS_FILE
    path.unlink(missing_ok=True)
    if selection_bias is None:
        return
    path.write_text(json.dumps(selection_bias) + "\n")
    warnings.warn(
        f"this model was trained with a selection bias, for which the published form has no place: loaded models "
        f"route without it. It is kept in {path}; moe.balancing.set_selection_bias puts it back",
        stacklevel=3,
    )


def find_checkpoint(folder: str | Path, best: bool = False) -> Path:
    """The checkpoint that a path means: itself, or the newest complete one of a run, or its best one.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return folder
    found = complete_checkpoints(folder / "checkpoints") or complete_checkpoints(folder)
    if not found:
        raise ValueError(f"{str(folder)!r} is no complete training checkpoint and no run that holds one")
    if not best:
        return found[-1]
    kept = json.loads((found[-1] / TRAINER).read_text()).get("best", {}).get("kept", [])
    steps = {step_of(path): path for path in found}
    for _, step in kept:
        if step in steps:
            return steps[step]
    raise ValueError(f"{str(folder)!r} kept no checkpoint for its held-out loss: the run had keep_best=0")
