"""Ready configurations of the vision models.

Values are those of the published ``config.json`` files, save the ids that end a reply: the published
``eos_token_id`` 2 never comes out of these models, which end on the ids of the text models. The text side of
both is the geometry of phi-3-mini-128k; they differ in the LongRoPE factors, the window and the number of crops
that their processors default to.
"""

from phi35 import longrope_factors as factors
from phi35.config import ModelConfig, RopeScaling, VisionConfig
from phi35.presets import tiny_twin

FULL_SIZE: dict[str, ModelConfig] = {
    "phi-3-vision-128k": ModelConfig(
        model_type="phi3_v",
        max_position_embeddings=131072,
        sliding_window=131072,
        rope_scaling=RopeScaling(
            short_factor=factors.PHI_3_VISION_128K_SHORT, long_factor=factors.PHI_3_VISION_128K_LONG, type="su"
        ),
        vision=VisionConfig(num_crops=16),
    ),
    "phi-3.5-vision": ModelConfig(
        model_type="phi3_v",
        max_position_embeddings=131072,
        sliding_window=262144,
        rope_scaling=RopeScaling(
            short_factor=factors.PHI_3_5_VISION_SHORT, long_factor=factors.PHI_3_5_VISION_LONG, type="su"
        ),
        vision=VisionConfig(num_crops=4),
    ),
}

SMALL_VISION = ModelConfig(
    model_type="phi3_v",
    vocab_size=1088,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=6,
    eos_token_id=1000,
    pad_token_id=1000,
    stop_token_ids=(1007, 1001, 1000),
    vision=VisionConfig(
        image_size=64,
        patch_size=8,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_crops=1,
        image_token_id=1044,
        model_name="small-vision-tower-64",
    ),
)
"""The model inside the package: 41 tokens for a picture of 64x64 pixels."""

PRESETS: dict[str, ModelConfig] = {
    **FULL_SIZE,
    "small-vision": SMALL_VISION,
    **{f"tiny-{name}": tiny_twin(config) for name, config in FULL_SIZE.items()},
}
