"""The training config rendered to DeepSpeed's dict, whole and without "auto" values.

DeepSpeed's own parser drops "auto" and misspelt keys without a word, so nothing is left to it: the dict is
rendered from the training config, and a JSON file given beside it may add keys but not contradict.
"""

import json
from pathlib import Path
from typing import Any

from phi35.training.config import TrainingConfig

BUCKET_SIZE = 200_000_000
"""Elements per reduction or gather: 0.8 GB in float32."""

KNOWN_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "bf16",
    "data_types",
    "zero_optimization",
    "communication_data_type",
    "use_data_before_expert_parallelism",
    "timers",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "dump_state",
}
"""Top-level keys a ready file may hold: those that this project renders or that only observe."""


def to_deepspeed(config: TrainingConfig, world_size: int, device_type: str = "cpu") -> dict[str, Any]:
    """DeepSpeed's config of a resolved training config.

    In bfloat16 the weights are bfloat16, and gradients are accumulated, and masters and moments kept, in float32: by
    DeepSpeed at stages 1 to 3, by our own optimizer at stage 0 (see ``handed_over``).

    Args:
        config: resolved for ``world_size``.
        world_size: number of processes.
        device_type: "cpu" or "cuda"; communication overlaps computation only on the latter.
    """
    assert config.is_resolved, "resolve the training config first"
    bfloat16 = config.dtype == "bfloat16"
    rendered: dict[str, Any] = {
        # DeepSpeed takes every rank for one with rows of its own.
        "train_batch_size": config.global_batch_size * config.sequence_parallel_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps(world_size),
        "gradient_clipping": config.gradient_clipping,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # it would wait for the GPU each step
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero(config, device_type),
    }
    if bfloat16:
        rendered["bf16"] = {"enabled": True}
    if bfloat16 and config.zero_stage != 0:
        rendered["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.ep_size is not None and config.ep_size > 1:
        rendered["use_data_before_expert_parallelism"] = False
    if config.offload != "none":
        rendered["zero_force_ds_cpu_optimizer"] = False
    return rendered


def handed_over(rendered: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is given of a rendered config.

    At stage 0 all but "bf16": the weights are bfloat16 already, and DeepSpeed would wrap the optimizer that keeps
    their masters in one of its own that copies every gradient.
    """
    if rendered["zero_optimization"]["stage"] != 0:
        return rendered
    return {key: value for key, value in rendered.items() if key != "bf16"}


def _zero(config: TrainingConfig, device_type: str) -> dict[str, Any]:
    assert config.zero_stage is not None
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 0:
        return zero
    zero.update(
        overlap_comm=device_type == "cuda" and config.offload == "none",
        contiguous_gradients=True,
        reduce_scatter=True,
        reduce_bucket_size=BUCKET_SIZE,
    )
    if config.zero_stage < 3:
        zero.update(allgather_partitions=True, allgather_bucket_size=BUCKET_SIZE, round_robin_gradients=False)
    else:
        zero.update(
            stage3_prefetch_bucket_size=BUCKET_SIZE // 4,
            stage3_param_persistence_threshold=100_000,
            stage3_max_live_parameters=1_000_000_000,
            stage3_max_reuse_distance=1_000_000_000,
            sub_group_size=1_000_000_000,
        )
    if config.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device_type == "cuda"}
    return zero


def read_deepspeed_file(path: str | Path) -> dict[str, Any]:
    """A ready DeepSpeed JSON file.

    Raises:
        ValueError: if it is missing or unreadable, holds unknown keys, or "auto" values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"DeepSpeed config {str(path)!r} does not exist; deepspeed_configs/ holds ready files")
    try:
        given = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"DeepSpeed config {str(path)!r} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"DeepSpeed config {str(path)!r} must hold a JSON object, got {type(given).__name__}")
    for section in ("zero_optimization", "bf16"):
        if not isinstance(given.get(section, {}), dict):
            raise ValueError(f"DeepSpeed config {str(path)!r}: {section} must be an object, got {given[section]!r}")
    unknown = sorted(set(given) - KNOWN_KEYS)
    if unknown:
        raise ValueError(f"DeepSpeed config {str(path)!r} holds keys this project does not pass on: {unknown}")
    autos = [key for key, value in _flat(given) if value == "auto"]
    if autos:
        raise ValueError(f"DeepSpeed config {str(path)!r} holds 'auto' at {autos}, which DeepSpeed drops; give values")
    return given


def config_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of ``TrainingConfig`` that a ready file decides: defaults below whatever the user says."""
    zero = given.get("zero_optimization", {})
    fields: dict[str, Any] = {}
    if "stage" in zero:
        fields["zero_stage"] = zero["stage"]
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        fields["offload"] = "optimizer"
    if given.get("bf16", {}).get("enabled"):
        fields["dtype"] = "bfloat16"
    renamed = {
        "train_batch_size": "global_batch_size",
        "train_micro_batch_size_per_gpu": "micro_batch_size",
        "gradient_clipping": "gradient_clipping",
    }
    fields.update({field: given[key] for key, field in renamed.items() if key in given})
    return fields


def merge(rendered: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The rendered dict with the additions of a ready file.

    Raises:
        ValueError: if the file contradicts the training config, naming every such key.
    """
    free = {"overlap_comm", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "pin_memory"}
    conflicts = []

    def combine(ours: dict[str, Any], theirs: dict[str, Any], prefix: str) -> dict[str, Any]:
        combined = dict(ours)
        for key, value in theirs.items():
            mine = ours.get(key)
            if isinstance(value, dict) and isinstance(mine, dict):
                combined[key] = combine(mine, value, f"{prefix}{key}.")
                continue
            tunable = key in free or key.startswith("stage3_")
            if key in ours and mine != value and not tunable:
                conflicts.append(f"{prefix}{key}: the training config gives {mine!r}, the file {value!r}")
            combined[key] = value
        return combined

    merged = combine(rendered, given, "")
    if given.get("bf16", {}).get("enabled") and "bf16" not in rendered:
        conflicts.append("bf16: enabled in the file, but the training config asks for another dtype")
    if given.get("zero_optimization", {}).get("offload_optimizer") and "offload_optimizer" not in _section(rendered):
        conflicts.append("zero_optimization.offload_optimizer: the training config says offload='none'")
    if conflicts:
        raise ValueError("the DeepSpeed file contradicts the training config: " + "; ".join(conflicts))
    return merged


def _section(rendered: dict[str, Any]) -> dict[str, Any]:
    return rendered.get("zero_optimization", {})


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        flat.extend(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)])
    return flat
