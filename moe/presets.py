"""The sparse models of the family, merged into ``phi35.presets`` by registry string.

``phi-3.5-moe`` is the published configuration, value for value; a test compares it with the published file.
``phi-3.5-vision-moe`` fills both slots: what ``phi35 upcycle`` makes of phi-3.5-vision by default. No such model was
published.
"""

from phi35 import longrope_factors as factors
from phi35.config import ModelConfig, RopeScaling
from phi35.presets import tiny_twin
from phi35.registry import resolve

_VISION: dict[str, ModelConfig] = resolve("presets.vision")

FULL_SIZE: dict[str, ModelConfig] = {
    "phi-3.5-moe": ModelConfig(
        model_type="phimoe",
        hidden_size=4096,
        intermediate_size=6400,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        norm_type="layernorm",
        attention_bias=True,
        lm_head_bias=True,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        sliding_window=131072,
        rope_scaling=RopeScaling(
            short_factor=factors.PHI_3_5_MOE_SHORT,
            long_factor=factors.PHI_3_5_MOE_LONG,
            short_mscale=1.243163121016122,
            long_mscale=1.243163121016122,
        ),
        num_local_experts=16,
        num_experts_per_tok=2,
        router_type="sparsemixer",
        router_jitter_noise=0.01,
        input_jitter_noise=0.01,
        router_aux_loss_coef=0.0,
    ),
    "phi-3.5-vision-moe": _VISION["phi-3.5-vision"].replace(num_local_experts=16, router_type="topk"),
}

SMALL_VISION_MOE = _VISION["small-vision"].replace(num_local_experts=8, router_type="topk", intermediate_size=240)
"""The sparse twin of the model inside the package: no more active parameters, nearly twice as many in all."""

PRESETS: dict[str, ModelConfig] = {
    **FULL_SIZE,
    "small-vision-moe": SMALL_VISION_MOE,
    **{f"tiny-{name}": tiny_twin(config) for name, config in FULL_SIZE.items()},
}
