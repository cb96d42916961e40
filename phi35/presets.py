"""Ready configurations of the family, by name.

The dense models stand here; the sparse and the vision models stand beside their code in ``moe.presets`` and
``vision.presets`` and are merged in by registry string. Every value is that of the published ``config.json``
(a test diffs them). Each preset has a twin called "tiny-" + its name: the same kinds of layers, shrunk until a
forward pass takes milliseconds on a CPU.
"""

import dataclasses
import difflib

from phi35 import longrope_factors as factors
from phi35.config import ModelConfig, RopeScaling
from phi35.registry import resolve

_MINI = ModelConfig(sliding_window=2047)
_MEDIUM = _MINI.replace(
    hidden_size=5120,
    intermediate_size=17920,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=10,
)

FULL_SIZE: dict[str, ModelConfig] = {
    "phi-3-mini-4k": _MINI,
    "phi-3-mini-128k": _MINI.replace(
        max_position_embeddings=131072,
        sliding_window=262144,
        rope_scaling=RopeScaling(short_factor=factors.PHI_3_MINI_128K_SHORT, long_factor=factors.PHI_3_MINI_128K_LONG),
    ),
    "phi-3-medium-4k": _MEDIUM,
    "phi-3-medium-128k": _MEDIUM.replace(
        max_position_embeddings=131072,
        sliding_window=131072,
        rope_scaling=RopeScaling(
            short_factor=factors.PHI_3_MEDIUM_128K_SHORT, long_factor=factors.PHI_3_MEDIUM_128K_LONG, type="su"
        ),
    ),
    "phi-3.5-mini": _MINI.replace(
        max_position_embeddings=131072,
        sliding_window=262144,
        rope_scaling=RopeScaling(short_factor=factors.PHI_3_5_MINI_SHORT, long_factor=factors.PHI_3_5_MINI_LONG),
    ),
}


def tiny_twin(config: ModelConfig) -> ModelConfig:
    """A config with the same kinds of layers that runs in milliseconds on a CPU.

    Two layers of width 64 with 4 heads of 16 (2 key-value heads where the model groups them), the package's
    small vocabulary (the published special ids less 31000), 4 experts, a tower of 3 blocks on 64-pixel crops.
    LongRoPE keeps its lengths, so that the switch stays at 4096, and an evenly spaced choice of its factors.

    Args:
        config: a full-size preset.
    """
    head_dim = 16
    rope_scaling = config.rope_scaling
    if rope_scaling is not None:
        step = len(rope_scaling.short_factor) // (head_dim // 2)
        rope_scaling = dataclasses.replace(
            rope_scaling,
            short_factor=rope_scaling.short_factor[::step],
            long_factor=rope_scaling.long_factor[::step],
        )
    vision = config.vision
    if vision is not None:
        vision = dataclasses.replace(
            vision,
            image_size=64,
            patch_size=8,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_token_id=1044,
        )
    return config.replace(
        vocab_size=1088,
        hidden_size=64,
        intermediate_size=96 if config.is_sparse else 128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if config.num_key_value_heads == config.num_attention_heads else 2,
        head_dim=head_dim,
        rope_scaling=rope_scaling,
        eos_token_id=1000,
        pad_token_id=1000,
        stop_token_ids=(1007, 1001, 1000),
        num_local_experts=4 if config.is_sparse else 0,
        vision=vision,
    )


PRESETS: dict[str, ModelConfig] = {
    **FULL_SIZE,
    **{f"tiny-{name}": tiny_twin(config) for name, config in FULL_SIZE.items()},
}


def names() -> list[str]:
    """Names of all presets: dense, sparse and vision, full size first."""
    return sorted(_all(), key=lambda name: (name.startswith("tiny-"), name))


def get(name: str) -> ModelConfig:
    """The configuration called ``name``.

    Raises:
        ValueError: for an unknown name, with the nearest ones and the list of all.
    """
    if name in PRESETS:
        return PRESETS[name]
    presets = _all()
    if name in presets:
        return presets[name]
    if isinstance(name, str) and name.removeprefix("tiny-").startswith("phi-3-small"):
        raise ValueError(
            f"preset {name!r}: the phi3small architecture (block-sparse attention, gegelu) is not supported by this "
            f"version; supported presets are {names()}"
        )
    near = difflib.get_close_matches(str(name), presets, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"unknown preset {name!r}{hint} Known presets are {names()}")


def _all() -> dict[str, ModelConfig]:
    merged = dict(PRESETS)
    for slot in ("presets.sparse", "presets.vision"):
        for name, config in resolve(slot).items():
            if name in merged:
                raise ValueError(f"preset {name!r} is defined twice (second time by slot {slot!r})")
            merged[name] = config
    return merged
