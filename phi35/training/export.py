"""From a training checkpoint to a folder in Hugging Face form, on the CPU, without DeepSpeed."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from phi35.loading import empty_model, save
from phi35.processor import Processor
from phi35.training.build import build_processor
from phi35.training.checkpoint import load_parameters, model_config_from_dict
from phi35.training.checkpoint_files import CheckpointReader, complete_checkpoints

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
) -> Path:
    """Writes the model of a training checkpoint as config.json, safetensors and tokenizer.

    Args:
        folder: a checkpoint, or a run's folder (its newest complete checkpoint is taken).
        output: folder to write.
        processor: tokenizer and image settings to write beside the weights.
        processor_folder: where to read them in place of ``processor``; by default as the run did.
        dtype: "float32" or "bfloat16"; by default that of the run.
        verify: compare the checkpoint's files with its SHA-256 manifest first.

    Returns:
        The output folder.

    Raises:
        ValueError: if there is no complete checkpoint, or it is damaged.
    """
    from phi35.training.config import TrainingConfig

    reader = CheckpointReader(find_checkpoint(folder), verify=verify)
    model_config = model_config_from_dict(reader.trainer["model_config"])
    config = TrainingConfig(**reader.trainer["training_config"])
    if processor_folder is not None:
        processor = Processor.from_folder(processor_folder, model_config)
    elif processor is None:
        processor = build_processor(config, model_config)
    cpu, name = torch.device("cpu"), dtype or config.dtype
    model = empty_model(model_config, cpu, getattr(torch, name))
    load_parameters(model, reader)
    save(model, processor, str(output))
    _write_selection_bias(reader.trainer.get("selection_bias"), Path(output))
    return Path(output)


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


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest complete one of a run.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(folder)
    if (folder / "manifest.json").is_file():
        return folder
    found = complete_checkpoints(folder / "checkpoints") or complete_checkpoints(folder)
    if not found:
        raise ValueError(f"{str(folder)!r} is no complete training checkpoint and no run that holds one")
    return found[-1]
