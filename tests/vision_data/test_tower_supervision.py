"""Supervision of the tower: it learns, it is reproducible, and its weights reach the model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import phi35
from phi35 import presets
from vision.pretraining import PretrainingConfig, load_tower, normalise, pretrain_tower, save_tower

TINY = presets.get("tiny-phi-3.5-vision").vision


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, list[dict]]:
    reports: list[dict] = []
    assert TINY is not None
    settings = PretrainingConfig(steps=40, batch_size=32, warmup_steps=5, learning_rate=3e-3, held_out=0.02)
    tower, _ = pretrain_tower(TINY, settings, report=reports.append)
    return tower, reports


def test_colors_of_held_out_pictures_get_learned(trained: tuple[torch.nn.Module, list[dict]]) -> None:
    _, reports = trained
    assert reports[-1]["loss"] < 0.85 * reports[0]["loss"]
    assert reports[-1]["color"] > 0.4  # 1 / 8 by guessing; measured 0.87


def test_training_repeats_exactly() -> None:
    assert TINY is not None
    settings = PretrainingConfig(steps=2, batch_size=4, held_out=0.01)
    first, second = (pretrain_tower(TINY, settings)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saved_weights_reach_the_model(trained: tuple[torch.nn.Module, list[dict]], tmp_path: Path) -> None:
    tower, reports = trained
    save_tower(tower, tmp_path / "tower.safetensors", reports[-1])
    model = phi35.create("tiny-phi-3.5-vision", seed=1)
    load_tower(model, tmp_path / "tower.safetensors")
    loaded = model.model.vision_embed_tokens.img_processor
    assert all(torch.equal(value, tower.state_dict()[name]) for name, value in loaded.state_dict().items())
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(normalise(pixels, TINY)), tower(normalise(pixels, TINY)))


def test_a_file_that_does_not_fit_is_refused_with_every_name(tmp_path: Path) -> None:
    model = phi35.create("tiny-phi-3.5-vision", seed=1)
    weights = dict(model.model.vision_embed_tokens.img_processor.state_dict())
    weights["cls_token"] = torch.zeros(1, 1, 3)
    weights["extra"] = torch.zeros(1)
    del weights["norm.weight"]
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="missing norm.weight.*unknown extra.*cls_token has shape"):
        load_tower(model, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        load_tower(model, tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="text only"):
        load_tower(phi35.create("tiny-phi-3.5-mini", seed=1), tmp_path / "wrong.safetensors")


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="steps"):
        PretrainingConfig(steps=0)
