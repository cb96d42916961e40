"""The ready configs for text are valid, fit the processes they are meant for, and name options that exist."""

import inspect
from pathlib import Path

import pytest

from phi35 import presets
from phi35.data.opening import open_text
from phi35.training.config import read_config
from phi35.training.sequence import check_heads

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("name", ["text_pretraining", "chat_finetuning", "long_context"])
def test_recipes_are_valid_on_eight_ranks(name):
    config = read_config(RECIPES / f"{name}.yaml").resolve(world_size=8)
    check_heads(config, presets.get("phi-3.5-mini"))
    assert config.global_batch_size % (config.micro_batch_size * config.data_parallel_size(8)) == 0
    assert set(config.data_options) <= set(inspect.signature(open_text).parameters)
    assert config.sequence_length <= presets.get("phi-3.5-mini").max_position_embeddings
