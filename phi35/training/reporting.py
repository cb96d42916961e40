"""What a run reports, put together from its config: metrics, trackers, MFU."""

from pathlib import Path
from typing import Any

import torch

from phi35.config import ModelConfig
from phi35.registry import resolve
from phi35.training.engine import Engine
from phi35.training.flops import TrainingFlops, peak_flops
from phi35.training.metrics import Metrics
from phi35.training.trackers import choose_trackers, open_trackers


def open_metrics(engine: Engine, model_config: ModelConfig, source: Any, folder: Path, first_step: int) -> Metrics:
    """The metrics of a run; all ranks call it alike.

    Args:
        engine: its config says which trackers to open.
        model_config: of the model that is trained.
        source: of the training data; its ``skips()`` and ``wait_seconds``, where it has them, are reported.
        folder: of the run.
        first_step: steps made before.

    Raises:
        ValueError: if a tracker cannot start.
    """
    config, place = engine.config, engine.environment
    trackers = None
    if place.is_main:
        trackers = open_trackers(
            choose_trackers(config.trackers),
            folder,
            max_steps=config.max_steps,
            first_step=first_step,
            config=config.to_dict(),
            wandb_options=config.wandb_options,
        )
    skips = getattr(source, "skips", None)
    if skips is not None and engine.sequence_parallel is not None and engine.sequence_parallel.rank:
        skips = dict  # ranks that share rows leave out the same samples: the first counts them
    adapters = None
    if config.adapter is not None:
        adapters = resolve("phi35.adapters.inject:active_parameters")(engine.model, model_config)
    peak = config.peak_flops
    if peak is None and place.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(place.device), config.dtype)
    return Metrics(
        folder,
        place,
        max_steps=config.max_steps,
        first_step=first_step,
        log_interval=config.log_interval,
        trackers=trackers,
        flops=TrainingFlops(model_config, config.freeze, adapters),
        peak_flops=peak,
        skips=skips,
        waited=(lambda: float(source.wait_seconds)) if hasattr(source, "wait_seconds") else None,
    )
