"""Small configs that the tests of the decoder share."""

from phi35.config import ModelConfig, RopeScaling


def longrope_config(original: int = 4096, **changes: object) -> ModelConfig:
    """A grouped-query decoder of two layers whose two factor sets differ strongly."""
    config = ModelConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32 * original,
        original_max_position_embeddings=original,
        rope_scaling=RopeScaling(
            short_factor=tuple(1.0 + 0.05 * i for i in range(8)), long_factor=tuple(1.5 + 3.0 * i for i in range(8))
        ),
        initializer_range=0.1,
        eos_token_id=150,
        pad_token_id=150,
        stop_token_ids=(157, 151, 150),
    )
    return config.replace(**changes)
