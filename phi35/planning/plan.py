"""Which settings of a training run fit the GPUs at hand, and what the run will take.

Every combination of ZeRO stage, expert parallelism, offload and recomputation that the training config allows is
planned (``phi35.planning.memory``); those that fit are ranked by speed, then by memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from phi35.config import ModelConfig
from phi35.planning.memory import MemoryPlan, plan_memory
from phi35.planning.speed import ExpectedSpeed, expected_speed, micro_batch_work
from phi35.training.config import TrainingConfig
from phi35.training.deepspeed_config import to_deepspeed

OUTSIDE_BYTES = 1_500_000_000
"""Of a GPU's memory, for the CUDA context, NCCL and what the allocator cannot join."""
FRAGMENTATION = 1.06
"""What the allocator reserves for each byte that is allocated at the peak: 1.00 to 1.056 in five runs on an H200."""
OFFLOAD_SLOWDOWN = 2.0
"""Ranks offloaded settings behind the others; their speed is not measured."""

GPUS = {"h100": 85_000_000_000, "h200": 150_700_000_000, "a100": 85_000_000_000}
"""Bytes that CUDA reports as total, by name."""

OPEN = ("zero_stage", "ep_size", "offload", "gradient_checkpointing")
"""Settings that the planner tries where the user leaves them open."""


@dataclass(frozen=True)
class Candidate:
    """One combination of settings.

    Attributes:
        config: resolved.
        memory: of one GPU.
        speed: expected.
        fits: whether the peak leaves room on the GPU.
    """

    config: TrainingConfig
    memory: MemoryPlan
    speed: ExpectedSpeed
    fits: bool

    @property
    def label(self) -> str:
        """The settings in a few words."""
        parts = [f"ZeRO-{self.config.zero_stage}"]
        if (self.config.ep_size or 1) > 1:
            parts.append(f"ep {self.config.ep_size}")
        if self.config.offload != "none":
            parts.append("offload")
        recomputed = {False: "", True: "checkpointing", "selective": "selective checkpointing"}
        parts.append(recomputed[self.config.gradient_checkpointing])
        return ", ".join(part for part in parts if part)


def candidates(
    model_config: ModelConfig,
    settings: Mapping[str, Any],
    num_gpus: int,
    gpu_bytes: int,
    peak_flops: float,
    *,
    crops: int = 0,
    mfu: float | None = None,
) -> list[Candidate]:
    """Every combination of what ``settings`` leaves open, those that fit first, the fastest and leanest first.

    Args:
        model_config: of the model.
        settings: fields of ``TrainingConfig``; those of ``OPEN`` that are missing are tried.
        num_gpus: number of ranks.
        gpu_bytes: memory of a GPU.
        peak_flops: of a GPU, per second.
        crops: of a micro-batch's pictures.
        mfu: to take in place of a measured one.

    Raises:
        ValueError: if no combination is a valid config.
    """
    found, problem = [], "no combination of ZeRO stage and ep_size"
    for config in _configs(model_config, settings, num_gpus):
        if isinstance(config, str):
            problem = config
            continue
        memory = plan_memory(model_config, config, num_gpus, crops=crops)
        speed = expected_speed(model_config, config, num_gpus, peak_flops, crops=crops, mfu=mfu)
        found.append(Candidate(config, memory, speed, fits(memory, gpu_bytes)))
    if not found:
        raise ValueError(f"nothing to plan: {problem}")
    return sorted(found, key=_rank)


def fits(memory: MemoryPlan, gpu_bytes: int) -> bool:
    """Whether the peak leaves the room that CUDA, NCCL and the allocator take.

    Args:
        memory: of one GPU.
        gpu_bytes: of the GPU.
    """
    return memory.peak * FRAGMENTATION + OUTSIDE_BYTES <= gpu_bytes


def deepspeed_json(candidate: Candidate, num_gpus: int) -> dict[str, Any]:
    """The DeepSpeed config of a candidate, as the engine would render it."""
    return to_deepspeed(candidate.config, num_gpus, "cuda")


def seconds_for(
    candidate: Candidate, model_config: ModelConfig, num_tokens: float, *, crops: int = 0
) -> tuple[float, float]:
    """Time for a number of tokens, and the optimizer steps that takes."""
    work = micro_batch_work(model_config, candidate.config, crops)
    assert candidate.config.micro_batch_size is not None
    per_step = work.tokens / candidate.config.micro_batch_size * candidate.config.global_batch_size
    return num_tokens / candidate.speed.tokens_per_second, num_tokens / per_step


def _configs(model_config: ModelConfig, settings: Mapping[str, Any], num_gpus: int) -> Iterator[TrainingConfig | str]:
    stages = [settings["zero_stage"]] if settings.get("zero_stage") is not None else [0, 1, 2, 3]
    offloads = [settings["offload"]] if "offload" in settings else ["none", "optimizer"]
    recomputations = (
        [settings["gradient_checkpointing"]] if "gradient_checkpointing" in settings else [False, "selective", True]
    )
    sizes = [1]
    if settings.get("ep_size") is not None:
        sizes = [settings["ep_size"]]
    elif model_config.is_sparse:
        experts = model_config.num_local_experts
        sizes = [size for size in range(1, num_gpus + 1) if num_gpus % size == 0 and experts % size == 0]
    rest = {name: value for name, value in settings.items() if name not in OPEN}
    for stage in stages:
        for size in sizes:
            for offload in offloads:
                for recomputation in recomputations:
                    tried: dict[str, Any] = {
                        "zero_stage": stage,
                        "ep_size": size,
                        "offload": offload,
                        "gradient_checkpointing": recomputation,
                    }
                    if _pointless(tried, num_gpus):
                        continue
                    try:
                        yield TrainingConfig(**rest, **tried).resolve(
                            world_size=num_gpus,
                            num_experts=model_config.num_local_experts,
                            router_aux_loss_coef=model_config.router_aux_loss_coef,
                        )
                    except ValueError as error:
                        yield str(error)


def _pointless(tried: Mapping[str, Any], num_gpus: int) -> bool:
    """Sharding over one GPU copies and saves nothing, save where states go to the host."""
    return num_gpus == 1 and tried["zero_stage"] in (1, 2, 3) and tried["offload"] == "none"


def _rank(candidate: Candidate) -> tuple[bool, float, float]:
    slowdown = 1.0 if candidate.config.offload == "none" else OFFLOAD_SLOWDOWN
    # ZeRO-3 fetches every layer's weights twice a step over the network.
    slowdown *= 1.1 if candidate.config.zero_stage == 3 else 1.0
    return (not candidate.fits, slowdown / candidate.speed.tokens_per_second, candidate.memory.peak)
