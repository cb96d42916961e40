"""What makes a training config invalid: one generator of messages per subject, all of them read at once."""

import dataclasses
import math
from collections.abc import Iterator
from types import UnionType
from typing import TYPE_CHECKING, get_args, get_origin, get_type_hints

from phi35.adapters.config import AdapterConfig
from phi35.training.preference_config import PreferenceConfig
from phi35.training.schedule import SCHEDULES
from phi35.training.trackers import PACKAGES

if TYPE_CHECKING:
    from phi35.training.config import TrainingConfig

DTYPES = ("float32", "bfloat16")
OFFLOADS = ("none", "optimizer")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
KERNELS = ("auto", "torch", "fused")
PARTS = ("embeddings", "decoder", "router", "experts", "tower", "projector")
"""Groups of parameters that can have a learning rate of their own, or be frozen."""


def type_problems(config: "TrainingConfig") -> Iterator[str]:
    """Fields with a value of another type than declared; whole numbers in float fields become floats."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        declared = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        accepted = [get_origin(kind) or kind for kind in declared]
        if isinstance(value, int) and not isinstance(value, bool) and float in accepted:
            object.__setattr__(config, item.name, float(value))
            continue
        if not any(isinstance(value, kind) for kind in accepted) or (isinstance(value, bool) and bool not in accepted):
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in accepted)
            yield f"{item.name} must be {names}, got {value!r}"


def value_problems(config: "TrainingConfig") -> Iterator[str]:
    """Values that no run can have, whatever its model and processes."""
    for subject in (
        _choice_problems,
        _number_problems,
        _schedule_problems,
        _part_problems,
        _rollback_problems,
        _evaluation_problems,
        _report_problems,
        _adapter_problems,
        _preference_problems,
    ):
        yield from subject(config)


def _choice_problems(config: "TrainingConfig") -> Iterator[str]:
    choices: dict[str, tuple[object, ...]] = {
        "schedule": SCHEDULES,
        "dtype": DTYPES,
        "optimizer": OPTIMIZERS,
        "optimizer_dtype": DTYPES,
        "offload": OFFLOADS,
        "zero_stage": (None, 0, 1, 2, 3),
        "on_skipped_steps": ("stop", "rollback"),
        "gradient_checkpointing": (False, True, "selective"),
        "kernels": KERNELS,
        "init_device": ("cpu", "cuda"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            yield f"{name} must be one of {allowed}, got {getattr(config, name)!r}"
    if config.offload != "none" and config.zero_stage == 0:
        yield "offload='optimizer' needs zero_stage 1 to 3"
    if config.optimizer_dtype == "bfloat16" and config.dtype != "bfloat16":
        yield f"optimizer_dtype='bfloat16' needs dtype='bfloat16', got {config.dtype!r}"
    if config.optimizer_dtype == "bfloat16" and config.optimizer != "adamw":
        yield f"optimizer_dtype='bfloat16' is for optimizer 'adamw'; {config.optimizer!r} works on float32 masters"
    if config.compile and config.kernels == "fused":
        yield "compile=true makes kernels of its own: leave kernels 'auto' or 'torch'"
    if config.compile and config.gradient_checkpointing == "selective":
        yield "compile=true chooses itself what to keep: gradient_checkpointing='selective' has no effect there"


def _number_problems(config: "TrainingConfig") -> Iterator[str]:
    for name in (
        "global_batch_size",
        "micro_batch_size",
        "max_steps",
        "sequence_length",
        "ep_size",
        "ep_chunks",
        "log_interval",
        "sequence_parallel_size",
        "spike_window",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            yield f"{name} must be at least 1, got {value}"
    at_least_zero = (
        "num_workers warmup_steps decay_steps weight_decay gradient_clipping adam_epsilon save_interval keep_last "
        "keep_every hang_timeout_seconds max_skipped_steps spike_threshold max_rollbacks router_z_loss_coef "
        "router_bias_update_rate"
    )
    for name in at_least_zero.split():
        if getattr(config, name) < 0:
            yield f"{name} must not be negative, got {getattr(config, name)}"
    if not 0 <= config.ema_decay < 1:
        yield f"ema_decay must lie in [0, 1), got {config.ema_decay}"
    if config.export_average and not config.ema_decay:
        yield "export_average needs an average: set ema_decay"
    if config.sequence_length < 2:
        yield "sequence_length must be at least 2: each token predicts the next"
    if len(config.adam_betas) != 2 or not all(0 <= beta < 1 for beta in config.adam_betas):
        yield f"adam_betas must be two numbers in [0, 1), got {config.adam_betas}"


def _rollback_problems(config: "TrainingConfig") -> Iterator[str]:
    if config.save_interval == 0:
        for name, asked in (
            ("spike_threshold", config.spike_threshold > 0),
            ("on_skipped_steps='rollback'", config.on_skipped_steps == "rollback"),
        ):
            if asked:
                yield f"{name} goes back to a checkpoint, and save_interval=0 makes none before the end; set it"


def _schedule_problems(config: "TrainingConfig") -> Iterator[str]:
    if not config.learning_rate > 0:
        yield f"learning_rate must be positive, got {config.learning_rate}"
    if not 0 <= config.min_lr_ratio <= 1:
        yield f"min_lr_ratio must lie in [0, 1], got {config.min_lr_ratio}"
    if config.warmup_steps + config.decay_steps > config.max_steps:
        yield (
            f"warmup_steps ({config.warmup_steps}) + decay_steps ({config.decay_steps}) exceed max_steps "
            f"({config.max_steps})"
        )
    if config.schedule == "wsd" and config.decay_steps == 0:
        yield "schedule 'wsd' needs decay_steps > 0"
    if config.schedule != "wsd" and config.decay_steps:
        yield f"decay_steps={config.decay_steps} has no effect with schedule {config.schedule!r}; leave it 0"


def _part_problems(config: "TrainingConfig") -> Iterator[str]:
    for name in ("learning_rates", "freeze"):
        unknown = sorted(set(getattr(config, name)) - set(PARTS))
        if unknown:
            yield f"{name} names unknown parts {unknown}; parts are {PARTS}"
    for part, rate in config.learning_rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            yield f"learning_rates.{part} must be a number, at least 0, got {rate!r}"
    if set(config.freeze) >= set(PARTS):
        yield "freeze leaves nothing to train"


def _evaluation_problems(config: "TrainingConfig") -> Iterator[str]:
    for name in ("eval_interval", "eval_questions", "keep_best"):
        if getattr(config, name) < 0:
            yield f"{name} must not be negative, got {getattr(config, name)}"
    if config.eval_samples < 1:
        yield f"eval_samples must be at least 1, got {config.eval_samples}"
    if not 0 < config.held_out < 1:
        yield f"held_out must lie between 0 and 1, got {config.held_out}"
    if not config.eval_interval:
        given = [name for name in ("eval_data", "eval_questions", "keep_best") if getattr(config, name)]
        if given:
            yield f"{given} have no effect without evaluations: set eval_interval"


def _adapter_problems(config: "TrainingConfig") -> Iterator[str]:
    if config.adapter is None:
        if config.export_merged:
            yield "export_merged is about an adapter: set adapter, or leave it false"
        return
    try:
        AdapterConfig.of(config.adapter)
    except (ValueError, TypeError) as error:
        yield str(error)
    if config.freeze:
        yield f"freeze={list(config.freeze)} has no effect with an adapter, beside which everything is frozen"
    if config.optimizer == "muon":
        yield "optimizer 'muon' is for whole matrices, not for an adapter's factors: take 'adamw' or 'adamw8bit'"


def _preference_problems(config: "TrainingConfig") -> Iterator[str]:
    if config.preference is None:
        return
    try:
        PreferenceConfig.of(config.preference).reference_for(config.adapter is not None)
    except (ValueError, TypeError) as error:
        yield str(error)
    if config.sequence_parallel_size > 1:
        yield "preference compares whole replies, of which ranks that share rows hold parts: sequence_parallel_size=1"
    if config.eval_data is not None:
        yield "preference evaluates pairs held out of data: leave eval_data out and set held_out"


def _report_problems(config: "TrainingConfig") -> Iterator[str]:
    unknown = sorted(set(config.trackers or ()) - set(PACKAGES))
    if unknown:
        yield f"trackers names unknown ones {unknown}; known are {sorted(PACKAGES)}"
    if config.wandb_options and "wandb" not in (config.trackers or ()):
        yield "wandb_options has no effect without 'wandb' in trackers"
    if config.peak_flops is not None and not config.peak_flops > 0:
        yield f"peak_flops must be positive, got {config.peak_flops}"
