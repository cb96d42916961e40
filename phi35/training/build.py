"""What a training run is built from: the model's config, its processor, and the model with its weights."""

from pathlib import Path
from typing import Any

import torch

from phi35 import presets
from phi35.adapters.config import AdapterConfig
from phi35.checkpoint.reader import StoredTensor, fill, match_headers, read_headers
from phi35.checkpoint.rules import CheckpointPlan, Match, state_shapes
from phi35.config import ModelConfig
from phi35.loading import allocate, load_config
from phi35.meta_model import meta_model
from phi35.processor import Processor
from phi35.registry import resolve
from phi35.training import checkpoint
from phi35.training.checkpoint_files import CheckpointReader
from phi35.training.config import TrainingConfig
from phi35.training.engine import shard_experts
from phi35.training.parameter_groups import freeze_parameters

SMALL_MODEL = Path(__file__).resolve().parents[1] / "small_model"
"""Folder of the package whose tokenizer the tiny presets use."""


def read_model_config(config: TrainingConfig) -> ModelConfig:
    """The model's config, from preset or folder, with the overrides; allocates nothing.

    Raises:
        ValueError: for an unknown preset or field.
    """
    folder = Path(config.model)
    if (folder / "config.json").is_file():
        base = load_config(folder)
    else:
        base = presets.get(config.model)
    return base.replace(**config.model_overrides) if config.model_overrides else base


def build_processor(config: TrainingConfig, model_config: ModelConfig) -> Any:
    """The processor of the model's folder, of ``config.processor``, or with the package's small tokenizer.

    Raises:
        ValueError: if no tokenizer fits the vocabulary.
    """
    folder = Path(config.processor or config.model)
    if config.processor is None and not (folder / "tokenizer.json").is_file():
        folder = SMALL_MODEL
        if model_config.vocab_size > 2048:
            raise ValueError(
                f"model {config.model!r} has a vocabulary of {model_config.vocab_size} and brings no tokenizer; give "
                "processor=FOLDER with the tokenizer.json that belongs to it"
            )
    return Processor.from_folder(folder, model_config)


def build_model(
    config: TrainingConfig,
    model_config: ModelConfig,
    reader: CheckpointReader | None,
    device: torch.device | None = None,
) -> Any:
    """The model with the weights of the checkpoint, of the model folder, or random ones, parts of it frozen.

    A run's adapter is put on it, fresh or with the checkpoint's values.

    Memory is allocated once, on the device and in the dtype in which the run wants each parameter, for this rank's
    experts alone. The weights are those of a whole float32 model: random ones are drawn in float32, one whole parameter
    at a time.

    Args:
        config: resolved.
        model_config: the model's.
        reader: checkpoint of a run to continue; None where there is none.
        device: where the model trains; None is the CPU.

    Raises:
        ValueError: for weights that do not fit the config (``model_overrides`` included), or ``init_device`` "cuda" in
            a run on a CPU.
    """
    device = device or torch.device("cpu")
    if config.init_device == "cuda" and device.type != "cuda":
        raise ValueError(f"init_device='cuda' draws weights on a run's GPU, and this run is on {device.type}")
    model = meta_model(model_config)
    folder, stored, match = Path(config.model), None, None
    # Beside an adapter the weights never change, and its checkpoints lack them.
    whole = reader if config.adapter is None else None
    if whole is None and (folder / "config.json").is_file():
        stored = read_headers(folder)
        match = _match(model, model_config, stored, config)
    freeze_parameters(model, config)
    shard_experts(model, config)
    allocate(model, device, lambda parameter: _weights_dtype(parameter, config))
    if whole is not None:
        checkpoint.load_parameters(model, whole, config)
    elif stored is not None and match is not None:
        fill(model, match, stored)
    else:
        drawn_on = device if config.init_device == "cuda" else torch.device("cpu")
        model.init_weights(torch.Generator(drawn_on).manual_seed(config.seed), torch.float32)
    if config.tower is not None and whole is None:
        resolve("vision.pretraining:load_tower")(model, config.tower)
    if config.adapter is not None:
        resolve("phi35.adapters.inject:add_adapter")(model, AdapterConfig.of(config.adapter), config.seed)
        if reader is not None:
            checkpoint.load_parameters(model, reader, config)
    return model


def _match(
    model: torch.nn.Module, model_config: ModelConfig, stored: dict[str, StoredTensor], config: TrainingConfig
) -> Match:
    """Where the folder's tensors go; all of them must, also where the config was changed."""
    plan = CheckpointPlan(model_config, state_shapes(model_config, model.state_dict()))
    try:
        return match_headers(plan, stored, Path(config.model))
    except ValueError as error:
        if not config.model_overrides:
            raise
        raise ValueError(
            f"the weights of model {config.model!r} do not fit its config with model_overrides "
            f"{config.model_overrides}: leave out what changes their shapes, or name a preset for random weights. "
            f"{error}"
        ) from error


def _weights_dtype(parameter: torch.nn.Parameter, config: TrainingConfig) -> torch.dtype:
    """What the engine makes of a parameter: bfloat16, save where it takes its master from the float32 values."""
    keeps_float32 = config.zero_stage == 0 and config.optimizer_dtype == "float32" and parameter.requires_grad
    return torch.float32 if config.dtype == "float32" or keeps_float32 else torch.bfloat16
