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
        max_position_embeddings=131072,
        sliding_window=131072,
        rope_scaling=RopeScaling(
            short_factor=factors.PHI_3_VISION_128K_SHORT, long_factor=factors.PHI_3_VISION_128K_LONG, type="su"
        ),
        vision=VisionConfig(num_crops=16),
    ),
    "phi-3.5-vision": ModelConfig(
        max_position_embeddings=131072,
        sliding_window=262144,
        rope_scaling=RopeScaling(
            short_factor=factors.PHI_3_5_VISION_SHORT, long_factor=factors.PHI_3_5_VISION_LONG, type="su"
        ),
        vision=VisionConfig(num_crops=4),
    ),
}

PRESETS: dict[str, ModelConfig] = {
    **FULL_SIZE,
    **{f"tiny-{name}": tiny_twin(config) for name, config in FULL_SIZE.items()},
}
