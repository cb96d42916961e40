"""Ready configurations of the family, by name.

The dense models stand here; the sparse and the vision models stand beside their code in ``moe.presets`` and
``vision.presets`` and are merged in by registry string. Every value is that of the published ``config.json`` (a test
diffs them), but for the LongRoPE factors of phi-3-small-128k (``phi35.longrope_factors``). Each preset has a twin
called "tiny-" + its name: the same kinds of layers, shrunk until a forward pass takes milliseconds on a CPU.
"""

import dataclasses
import difflib

from phi35 import longrope_factors as factors
from phi35.config import ModelConfig, RopeScaling
from phi35.config_io import SMALL_DUMMY_IDS, SMALL_STOP_IDS, SMALL_VOCAB_SIZE
from phi35.registry import resolve

_MINI = ModelConfig(sliding_window=2047)
_MEDIUM = _MINI.replace(
    hidden_size=5120,
    intermediate_size=17920,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=10,
)

_SMALL = ModelConfig(
    model_type="phi3small",
    vocab_size=SMALL_VOCAB_SIZE,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    hidden_act="gegelu",
    gegelu_limit=20.0,
    norm_type="layernorm",
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    embd_pdrop=0.1,
    ffn_pdrop=0.1,
    max_position_embeddings=8192,
    original_max_position_embeddings=8192,
    rope_theta=1e6,
    mup_use_scaling=True,
    mup_embedding_multiplier=10.0,
    mup_width_multiplier=8.0,
    blocksparse_block_size=64,
    blocksparse_num_local_blocks=16,
    blocksparse_vert_stride=8,
    dense_attention_every_n_layers=2,
    dummy_token_indices=SMALL_DUMMY_IDS,
    bos_token_id=100257,
    eos_token_id=100257,
    pad_token_id=100257,
    stop_token_ids=SMALL_STOP_IDS,
)

FULL_SIZE: dict[str, ModelConfig] = {
    "phi-3-mini-4k": _MINI,
    "phi-3-mini-128k": _MINI.replace(
        max_position_embeddings=131072,
        sliding_window=262144,
        rope_scaling=RopeScaling(short_factor=factors.PHI_3_MINI_128K_SHORT, long_factor=factors.PHI_3_MINI_128K_LONG),
    ),
    "phi-3-small-8k": _SMALL,
    "phi-3-small-128k": _SMALL.replace(
        max_position_embeddings=131072,
        rope_scaling=RopeScaling(
            short_factor=factors.PHI_3_SMALL_128K_SHORT,
            long_factor=factors.PHI_3_SMALL_128K_LONG,
            short_mscale=factors.PHI_3_SMALL_128K_MSCALE,
            long_mscale=factors.PHI_3_SMALL_128K_MSCALE,
        ),
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

    Two layers of width 64 with 4 heads of 16 (2 key-value heads where the model groups them), the package's small
    vocabulary (the published special ids less 31000), 4 experts, a tower of 3 blocks on 64-pixel crops; blocks of 16
    tokens, 4 of them local, where attention is block-sparse. LongRoPE keeps its lengths, so that the switch stays at
    4096, and an evenly spaced choice of its factors.

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
        bos_token_id=1,
        eos_token_id=1000,
        pad_token_id=1000,
        stop_token_ids=(1007, 1001, 1000),
        num_local_experts=4 if config.is_sparse else 0,
        blocksparse_block_size=16 if config.blocksparse_block_size else 0,
        blocksparse_num_local_blocks=4 if config.blocksparse_block_size else 16,
        dummy_token_indices=tuple(range(1064, 1088)) if config.dummy_token_indices else (),
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
