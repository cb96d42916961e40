"""Vision training: ranks with and without pictures, frozen tower, every ZeRO stage."""

import pytest
import torch
from distributed import run_distributed
from vision_steps import losses_and_weights


@pytest.fixture(scope="module")
def alone():
    """One process at stage 0 that sees both micro-batches."""
    return run_distributed(losses_and_weights, 1, {"zero_stage": 0})[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_with_pictures_and_one_without_train_as_one_process(alone, stage):
    losses, weights, _ = alone
    for got, values, _ in run_distributed(losses_and_weights, 2, {"zero_stage": stage}):
        assert got == pytest.approx(losses, rel=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(values[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: name + text)


def test_unused_tower_tensors_stay_out_of_the_optimizer(alone):
    from phi35.loading import create

    _, weights, trained = alone
    before = dict(create("tiny-phi-3.5-vision", device="cpu", dtype="float32", seed=1).named_parameters())
    unused = [name for name in weights if name not in trained]
    assert unused and all("img_processor" in name for name in unused)
    for name in weights:
        assert torch.equal(weights[name], before[name]) == (name not in trained), name


def test_a_frozen_tower_stays_as_it_is(alone):
    ((_, weights, trained),) = run_distributed(losses_and_weights, 1, {"zero_stage": 1, "freeze": ("tower",)})
    _, moved, all_trained = alone
    assert not any("img_processor" in name for name in trained)
    assert any("img_projection" in name for name in trained)
    name = next(name for name in all_trained if "img_processor" in name)
    assert not torch.equal(weights[name], moved[name])
