"""Saving and loading a training run's state, independent of how it was spread over processes.

Tensors are gathered one parameter at a time and stored whole under their names, so that a checkpoint of any world
size, ZeRO stage and expert-parallel size loads at any other. DeepSpeed's own checkpoint files play no part.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from phi35.config import ModelConfig
from phi35.registry import resolve
from phi35.training import checkpoint_files as files
from phi35.training.checkpoint_files import CheckpointReader, TensorWriter
from phi35.training.engine import Engine
from phi35.training.environment import Environment
from phi35.training.optimizer_state import MOMENTS, PARAMETER, OptimizerState
from phi35.training.random_state import random_state, restore_random_state, seed_everything


def save(root: str | Path, step: int, engine: Engine, state: dict[str, Any], keep_last: int = 0) -> Path:
    """Writes a checkpoint; all ranks call it, on one file system.

    Args:
        root: folder of the run's checkpoints.
        step: updates made.
        engine: whose weights and moments are saved.
        state: plain data to keep with them (data position, configs).
        keep_last: older checkpoints beyond this number are removed; 0 keeps all.

    Returns:
        The checkpoint's folder.
    """
    from safetensors.torch import save_file

    root, environment = Path(root), engine.environment
    if environment.is_main:
        folder = files.begin(root, step)
    environment.barrier()
    folder = root / f".writing-{files.folder_name(step)}"
    optimizer = OptimizerState(engine)
    writer = TensorWriter(folder, f"{environment.rank:05d}")
    num_steps = optimizer.num_steps
    for name, parameter in engine.model.named_parameters():
        kinds = (PARAMETER, *MOMENTS) if parameter.requires_grad and num_steps else (PARAMETER,)
        for kind in kinds:
            value = optimizer.read(parameter, kind)
            if _writes(parameter, environment):
                offset, rows = getattr(parameter, "expert_shard", (0, None))
                writer.add(kind, name, value, offset=offset, rows=rows)
    writer.flush()
    random_file = _random_file(environment.rank)
    save_file(random_state(), folder / random_file)
    mine = {name: files.describe_file(folder / name) for name in (*writer.files, random_file)}
    gathered = _gather((writer.pieces, mine), environment)
    final = root / files.folder_name(step)
    if environment.is_main:
        trainer = {**state, "step": step, "optimizer_steps": num_steps, "world_size": environment.world_size}
        pieces = [piece for rank_pieces, _ in gathered for piece in rank_pieces]
        described = {name: entry for _, rank_files in gathered for name, entry in rank_files.items()}
        files.commit(folder, step, trainer=trainer, pieces=pieces, files=described)
        files.prune(root, keep_last)
    environment.barrier()
    return final


def open_newest(root: str | Path, environment: Environment) -> CheckpointReader | None:
    """The newest complete checkpoint below ``root``, verified by rank 0; None where there is none.

    Raises:
        ValueError: on every rank, naming the files that are damaged.
    """
    found = files.complete_checkpoints(root) if environment.is_main else []
    (folder,) = broadcast([found[-1] if found else None], environment)
    return None if folder is None else open_checkpoint(folder, environment)


def open_checkpoint(folder: str | Path, environment: Environment) -> CheckpointReader:
    """A checkpoint, verified by rank 0.

    Raises:
        ValueError: on every rank, naming the files that are damaged.
    """
    problem = None
    if environment.is_main:
        try:
            CheckpointReader(folder)
        except ValueError as error:
            problem = str(error)
    (problem,) = broadcast([problem], environment)
    if problem is not None:
        raise ValueError(problem)
    return CheckpointReader(folder, verify=False)


@torch.no_grad()
def load_parameters(model: nn.Module, reader: CheckpointReader) -> None:
    """Fills a model, whole or with its experts sharded, before the engine is built.

    Raises:
        ValueError: with all missing, unknown and misshapen tensors.
    """
    parameters: dict[str, Any] = dict(model.named_parameters())
    stored = reader.names(PARAMETER)
    problems = [f"missing {name}" for name in sorted(set(parameters) - stored)]
    problems += [f"unknown {name}" for name in sorted(stored - set(parameters))]
    for name in sorted(stored & set(parameters)):
        shape = list(parameters[name].shape)
        if hasattr(parameters[name], "expert_shard"):
            shape[0] = parameters[name].expert_shard[1]
        if tuple(shape) != reader.shape(PARAMETER, name):
            problems.append(f"{name} is {reader.shape(PARAMETER, name)}, the model wants {tuple(shape)}")
    if problems:
        raise ValueError(f"checkpoint {str(reader.folder)!r} does not fit the model: " + "; ".join(problems))
    for name, parameter in parameters.items():
        parameter.copy_(_read(reader, PARAMETER, name, parameter))


def load_optimizer(engine: Engine, reader: CheckpointReader) -> None:
    """Restores masters, moments and Adam's step count; parameters new to training start with zero moments."""
    optimizer = OptimizerState(engine)
    num_steps = int(reader.trainer["optimizer_steps"])
    if num_steps:
        optimizer.allocate_moments(num_steps)
    stored = {kind: reader.names(kind) for kind in MOMENTS}
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if optimizer.has_masters:
            optimizer.write(parameter, PARAMETER, _read(reader, PARAMETER, name, parameter))
        for kind in MOMENTS:
            if num_steps and name in stored[kind]:
                optimizer.write(parameter, kind, _read(reader, kind, name, parameter))


def load_random_state(reader: CheckpointReader, environment: Environment, seed: int) -> None:
    """Restores this rank's generators; at another number of ranks they are seeded anew for this step."""
    if reader.trainer["world_size"] == environment.world_size:
        restore_random_state(reader.read_file(_random_file(environment.rank)))
    else:
        seed_everything(seed, environment.rank, reader.trainer["step"])


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """A model config as plain data."""
    return dataclasses.asdict(config)


def model_config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of ``model_config_to_dict``."""
    return ModelConfig().replace(**values)


def _read(reader: CheckpointReader, kind: str, name: str, parameter: Any) -> torch.Tensor:
    if not hasattr(parameter, "expert_shard"):
        return reader.read(kind, name)
    return reader.read(kind, name, offset=parameter.expert_shard[0], rows=parameter.shape[0])


def _writes(parameter: Any, environment: Environment) -> bool:
    """Whether this rank writes a tensor: rank 0, or of each part of the experts the first rank that holds it."""
    if getattr(parameter, "allreduce", True):
        return environment.is_main
    return distributed.get_rank(resolve("moe.deepspeed_adapter:expert_data_group")(parameter.group_name)) == 0


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.safetensors"


def _gather(value: Any, environment: Environment) -> list[Any]:
    if environment.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * environment.world_size
    distributed.all_gather_object(gathered, value)
    return gathered


def broadcast(values: list[Any], environment: Environment) -> list[Any]:
    """Rank 0's plain values on every rank."""
    if environment.world_size > 1:
        distributed.broadcast_object_list(values, src=0)
    return values
