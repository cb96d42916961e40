"""The ready configs for adapters and preferences are valid and fit the models that they name."""

from pathlib import Path

import pytest

from phi35 import presets
from phi35.adapters.config import AdapterConfig
from phi35.training.config import read_config
from phi35.training.preference_config import PreferenceConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize(
    ("name", "preset", "world_size", "places"),
    [
        ("lora_moe", "phi-3.5-moe", 8, ("attention", "experts")),
        ("qlora_moe", "phi-3.5-moe", 1, ("attention", "experts")),
        ("lora_vision", "phi-3.5-vision", 8, ("attention", "feed_forward", "projector", "tower")),
        ("dpo", "phi-3.5-mini", 8, None),
    ],
)
def test_recipes_are_valid(name, preset, world_size, places):
    model_config = presets.get(preset)
    config = read_config(RECIPES / f"{name}.yaml").resolve(
        world_size=world_size, num_experts=model_config.num_local_experts
    )
    assert config.global_batch_size % (config.micro_batch_size * world_size) == 0
    assert config.ep_size == 1
    if places is None:
        assert PreferenceConfig.of(config.preference).reference_for(config.adapter is not None) == "precomputed"
    else:
        assert AdapterConfig.of(config.adapter).resolve(model_config) == places
