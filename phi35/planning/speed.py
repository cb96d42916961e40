"""Expected speed of a run, from MFU that was measured on one GPU.

The numbers stand in ``measured_mfu.json`` with where each comes from. A run of another size, or on several GPUs, is
expected at the same MFU: what ranks lose by waiting for each other is not in it. Recomputing whole layers adds a third
to the work and selective recomputation about a hundredth, where a kind was measured without.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from phi35.config import ModelConfig
from phi35.registry import resolve
from phi35.training.config import TrainingConfig
from phi35.training.flops import TrainingFlops, Work, attention_pairs

MEASURED = Path(__file__).with_name("measured_mfu.json")
SLOWDOWN = {False: 1.0, "selective": 1.01, True: 4 / 3}
"""Time of a step relative to one that recomputes nothing."""


@dataclass(frozen=True)
class MeasuredMfu:
    """One measurement.

    Attributes:
        kind: "dense", "sparse" or "vision".
        mfu: share of the device's bfloat16 peak, as ``phi35.training.flops`` counts.
        gradient_checkpointing: what the measured run recomputed.
        device: it ran on.
        source: the file in the project that holds it.
        case: its name there.
    """

    kind: str
    mfu: float
    gradient_checkpointing: bool | str
    device: str
    source: str
    case: str


@dataclass(frozen=True)
class ExpectedSpeed:
    """What a setting should reach.

    Attributes:
        tokens_per_second: over all GPUs; positions, padding not counted.
        mfu: that it follows from.
        basis: of the MFU, in words.
    """

    tokens_per_second: float
    mfu: float
    basis: str


@functools.cache
def measurements() -> tuple[MeasuredMfu, ...]:
    """All that were made."""
    return tuple(MeasuredMfu(**entry) for entry in json.loads(MEASURED.read_text()))


def expected_speed(
    model_config: ModelConfig,
    config: TrainingConfig,
    world_size: int,
    peak_flops: float,
    *,
    crops: int = 0,
    mfu: float | None = None,
) -> ExpectedSpeed:
    """Tokens a second of a run.

    Args:
        model_config: of the model.
        config: resolved.
        world_size: number of GPUs.
        peak_flops: of one GPU, per second.
        crops: of a micro-batch's pictures.
        mfu: to take in place of a measured one.
    """
    work = micro_batch_work(model_config, config, crops)
    flops = TrainingFlops(model_config, config.freeze)(work)
    if mfu is None:
        found, basis = _measured(model_config, config)
    else:
        found, basis = mfu, "given"
    return ExpectedSpeed(world_size * found * peak_flops / (flops / work.tokens), found, basis)


def micro_batch_work(model_config: ModelConfig, config: TrainingConfig, crops: int) -> Work:
    """A micro-batch of full rows; its pictures' crops as one strip, for the count of image tokens."""
    assert config.micro_batch_size is not None
    length, rows = config.sequence_length, config.micro_batch_size
    image_tokens = 0
    if crops and model_config.vision is not None:
        side = model_config.vision.image_size
        count = resolve("vision.image_transform:num_image_tokens")
        image_tokens = count(side, side * max(1, crops - 1), model_config.vision)
    return Work(rows * length, rows * attention_pairs(length, model_config), crops, image_tokens)


def _measured(model_config: ModelConfig, config: TrainingConfig) -> tuple[float, str]:
    kind = "vision" if model_config.vision is not None else "sparse" if model_config.is_sparse else "dense"
    wanted = config.gradient_checkpointing
    found = [one for one in measurements() if one.kind == kind]
    best = max(found, key=lambda one: (one.gradient_checkpointing == wanted, one.mfu))
    factor = SLOWDOWN[best.gradient_checkpointing] / SLOWDOWN[wanted]
    return best.mfu * factor, f"{best.mfu:.1%} on one {best.device}: {best.source}, case {best.case!r}"
