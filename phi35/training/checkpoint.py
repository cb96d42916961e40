"""Loading a training run's state, independent of how it was spread over processes.

Tensors are gathered one parameter at a time and stored whole under their names, so that a checkpoint of any world
size, ZeRO stage and expert-parallel size loads at any other. DeepSpeed's own checkpoint files play no part.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phi35.config import ModelConfig
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.training import checkpoint_files as files
from phi35.training.checkpoint_files import CheckpointReader
from phi35.training.config import TrainingConfig
from phi35.training.console import warn
from phi35.training.engine import Engine
from phi35.training.environment import Environment
from phi35.training.optimizer_state import AVERAGE, PARAMETER, OptimizerState
from phi35.training.parameter_groups import kept_parameters
from phi35.training.random_state import restore_random_state, seed_everything


def open_newest(root: str | Path, environment: Environment) -> CheckpointReader | None:
    """The newest good checkpoint below ``root``, verified by all ranks together; None where there is none at all.

    A damaged one is reported and renamed to ``damaged-step-...``, and the one before it is taken.

    Raises:
        ValueError: on every rank, naming the files that are damaged, if no checkpoint is left.
    """
    found = environment.broadcast([str(path) for path in files.complete_checkpoints(root)])
    reports = []
    for folder in reversed(found):
        try:
            reader = open_checkpoint(folder, environment)
        except ValueError as error:
            reports.append(str(error))
            continue
        if environment.is_main and reports:
            asides = [files.put_aside(Path(damaged), "damaged") for damaged in found[len(found) - len(reports) :]]
            warn(
                f"{'; '.join(reports)}. It counts no more ({', '.join(map(str, asides))}); the run goes on from "
                f"{folder!r}"
            )
        return reader
    if reports:
        raise ValueError(f"no good checkpoint is left below {str(root)!r}: {'; '.join(reports)}")
    return None


def open_checkpoint(folder: str | Path, environment: Environment) -> CheckpointReader:
    """A checkpoint, of which every rank verifies a part of the files.

    Raises:
        ValueError: on every rank, naming the files that are damaged.
    """
    message, damage = None, []
    try:
        reader = CheckpointReader(folder, verify=False)
        names = sorted(reader.manifest["files"])
        damage = reader.damage(names[environment.rank :: environment.world_size])
    except ValueError as error:
        message = str(error)
    gathered = environment.gather((message, damage))
    unreadable = [message for message, _ in gathered if message]
    problems = [problem for _, damage in gathered for problem in damage]
    if unreadable or problems:
        raise ValueError(unreadable[0] if unreadable else files.damage_message(Path(folder), problems))
    return reader


def check_fit(reader: CheckpointReader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares a checkpoint's weights with the names and shapes of a model's.

    Raises:
        ValueError: with all missing, unknown and misshapen tensors.
    """
    stored = reader.names(PARAMETER)
    problems = [f"missing {name}" for name in sorted(set(shapes) - stored)]
    problems += [f"unknown {name}" for name in sorted(stored - set(shapes))]
    problems += [
        f"{name} is {reader.shape(PARAMETER, name)}, the model wants {shapes[name]}"
        for name in sorted(stored & set(shapes))
        if reader.shape(PARAMETER, name) != shapes[name]
    ]
    if problems:
        raise ValueError(f"checkpoint {str(reader.folder)!r} does not fit the model: " + "; ".join(problems))


@torch.no_grad()
def load_parameters(model: nn.Module, reader: CheckpointReader, config: TrainingConfig) -> None:
    """Fills a model, whole or with its experts sharded, or its adapter, before the engine is built.

    Raises:
        ValueError: with all missing, unknown and misshapen tensors.
    """
    parameters: dict[str, Any] = dict(kept_parameters(model, config))
    shapes = {}
    for name, parameter in parameters.items():
        shard = getattr(parameter, "expert_shard", None)
        shapes[name] = tuple(parameter.shape) if shard is None else (shard[1], *parameter.shape[1:])
    check_fit(reader, shapes)
    for name, parameter in parameters.items():
        parameter.copy_(_read(reader, PARAMETER, name, parameter))


def load_optimizer(engine: Engine, reader: CheckpointReader) -> None:
    """Restores masters, moments and Adam's step count; parameters new to training start with zero moments."""
    optimizer = OptimizerState(engine)
    num_steps = int(reader.trainer["optimizer_steps"])
    if num_steps:
        optimizer.allocate_moments(num_steps)
    exact = optimizer.read_own_tensors(reader)
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if optimizer.has_masters:
            optimizer.write(parameter, PARAMETER, _read(reader, PARAMETER, name, parameter))
        for kind in () if exact or not num_steps else optimizer.moments_of(parameter):
            if reader.has(kind, name):
                optimizer.write(parameter, kind, _read(reader, kind, name, parameter))
    optimizer.finish()
    if engine.average is not None:
        engine.average.restart()  # where the checkpoint has none
        engine.average.num_updates = int(reader.trainer.get("average_updates", 0))
        for name, parameter in engine.model.named_parameters():
            if parameter.requires_grad and reader.has(AVERAGE, name):
                optimizer.write(parameter, AVERAGE, _read(reader, AVERAGE, name, parameter))


def restore(engine: Engine, reader: CheckpointReader) -> None:
    """Puts weights, optimizer and random state of a running engine back to a checkpoint of the same run."""
    optimizer = OptimizerState(engine)
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            optimizer.write(parameter, PARAMETER, _read(reader, PARAMETER, name, parameter))
    optimizer.refresh_weights()
    load_optimizer(engine, reader)
    engine.balancer.load_state(reader.trainer.get("selection_bias"), engine.environment.device)
    load_random_state(reader, engine.environment, engine.config.seed)


def load_random_state(reader: CheckpointReader, environment: Environment, seed: int) -> None:
    """Restores this rank's generators; at another number of ranks they are seeded anew for this step."""
    if reader.trainer["world_size"] == environment.world_size:
        restore_random_state(reader.read_file(files.random_file(environment.rank)))
    else:
        seed_everything(seed, environment.rank, reader.trainer["step"])


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """A model config as plain data."""
    return dataclasses.asdict(config)


def model_config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of ``model_config_to_dict``."""
    if values.get("quantization") is not None:
        formats: dict[str, Any] = {
            name: WeightFormat(**value) if isinstance(value, dict) else value
            for name, value in values["quantization"].items()
        }
        values = {**values, "quantization": QuantizationConfig(**formats)}
    return ModelConfig().replace(**values)


def _read(reader: CheckpointReader, kind: str, name: str, parameter: Any) -> torch.Tensor:
    if not hasattr(parameter, "expert_shard"):
        return reader.read(kind, name)
    return reader.read(kind, name, offset=parameter.expert_shard[0], rows=parameter.shape[0])
