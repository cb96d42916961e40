"""What a training run is built from: the model's config, its processor, and the model with its weights."""

from pathlib import Path
from typing import Any

from phi35 import presets
from phi35.config import ModelConfig
from phi35.loading import create, load, load_config
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


def build_model(config: TrainingConfig, model_config: ModelConfig, reader: CheckpointReader | None) -> Any:
    """The model on the CPU in float32: weights of the checkpoint, of the model folder, or random; experts sharded."""
    if reader is None and (Path(config.model) / "config.json").is_file() and not config.model_overrides:
        model, _ = load(config.model, device="cpu", dtype="float32")
    else:
        model = create(model_config, device="cpu", dtype="float32", seed=config.seed)
    if config.tower is not None and reader is None:
        resolve("vision.pretraining:load_tower")(model, config.tower)
    freeze_parameters(model, config)
    shard_experts(model, config)
    if reader is not None:
        checkpoint.load_parameters(model, reader)
    return model
