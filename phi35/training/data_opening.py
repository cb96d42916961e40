"""The data of a run, opened by what its config says: for training, and held out for evaluation."""

import inspect
from pathlib import Path
from typing import Any

from phi35.config import ModelConfig
from phi35.registry import resolve
from phi35.training.config import TrainingConfig
from phi35.training.environment import Environment


def open_data(
    config: TrainingConfig, model_config: ModelConfig, processor: Any, place: Environment, folder: Path
) -> Any:
    """The source of the training data; all ranks call it alike.

    Args:
        config: resolved.
        model_config: of the model.
        processor: its tokenizer and image settings.
        place: this process's.
        folder: of the run, for its cache.

    Raises:
        ValueError: for data that cannot be opened, and options that its opener does not take.
    """
    options = dict(config.data_options)
    if config.eval_interval and config.eval_data is None:
        options |= {"held_out": config.held_out, "part": "train"}
    num_samples = config.max_steps * config.global_batch_size
    return _open(config, model_config, processor, place, folder, config.data, options, num_samples)


def open_held_out(
    config: TrainingConfig, model_config: ModelConfig, processor: Any, place: Environment, folder: Path
) -> Any:
    """The source of held-out data: of ``eval_data``, or of what is kept from training; read without processes.

    Raises:
        ValueError: as ``open_data``.
    """
    options = {name: value for name, value in config.data_options.items() if name != "augmentation"}
    if config.eval_data is None:
        options |= {"held_out": config.held_out, "part": "held_out"}
        data, num_samples = config.data, config.max_steps * config.global_batch_size  # those of training: one cache
    else:
        options.pop("sources", None)
        data, num_samples = config.eval_data, config.eval_samples
    alone = config.replace(num_workers=0, global_batch_size=_one_pass(config, place))
    return _open(alone, model_config, processor, place, folder, data, options, num_samples)


def _one_pass(config: TrainingConfig, place: Environment) -> int:
    assert config.micro_batch_size is not None
    return config.micro_batch_size * config.data_parallel_size(place.world_size)


def _open(
    config: TrainingConfig,
    model_config: ModelConfig,
    processor: Any,
    place: Environment,
    folder: Path,
    data: str,
    options: dict[str, Any],
    num_samples: int,
) -> Any:
    assert config.micro_batch_size is not None
    common: dict[str, Any] = {
        "model_config": model_config,
        "processor": processor,
        "rank": place.rank // config.sequence_parallel_size,
        "world_size": config.data_parallel_size(place.world_size),
        "micro_batch_size": config.micro_batch_size,
        "seed": config.seed,
        "num_workers": config.num_workers,
    }
    is_text = config.data_source is None and (model_config.vision is None or config.data == "stdlib")
    usual = "phi35.data.opening:open_text" if is_text else "vision.data:open_source"
    if config.preference is not None:
        usual = "phi35.data.preferences:open_preferences"
    opener = resolve(config.data_source or usual)
    asked = {
        "sequence_length": config.sequence_length,
        "num_samples": num_samples,
        "cache_folder": folder / "cache",
        "barrier": place.wait_for_main,
        "is_main": place.is_main,
        "accumulation_steps": config.gradient_accumulation_steps(place.world_size),
    }
    takes = inspect.signature(opener).parameters
    common |= {name: value for name, value in asked.items() if name in takes}
    _check_options(opener, options, common)
    if data == "easy-vqa":
        data = str(folder / "cache" / "easy-vqa-train")
        if place.is_main and not any(Path(data).glob("*.tar")):
            resolve("vision.easy_vqa_shards:prepare")(data, "train", num_pairs=1000)
        place.wait_for_main()
    return opener(data, **common, **options)


def _check_options(opener: Any, given: dict[str, Any], fixed: dict[str, Any]) -> None:
    parameters = list(inspect.signature(opener).parameters.values())[1:]
    allowed = {parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD} - set(fixed)
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
    refused = sorted(set(given) & set(fixed) if takes_any else set(given) - allowed)
    if "held_out" in refused:
        raise ValueError(
            f"{opener.__module__}:{opener.__qualname__} cannot keep a part of its data from training: give eval_data "
            "with data for evaluation, or eval_interval=0"
        )
    if refused:
        raise ValueError(
            f"data_options holds {refused}, which {opener.__module__}:{opener.__qualname__} does not take here; it "
            f"takes {sorted(allowed)}"
        )
