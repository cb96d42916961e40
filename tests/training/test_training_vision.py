"""Vision training: ranks with and without pictures, frozen tower, every ZeRO stage."""

import pytest
import torch
from distributed import run_distributed


def vision_batches(config):
    """Two micro-batches, one with a picture in each row and one with text alone, of equal label counts."""
    generator = torch.Generator().manual_seed(5)
    side = config.vision.image_size
    grid = config.vision.merged_grid_size
    tokens = 2 * (grid * grid + grid) + 1
    text = torch.randint(3, 900, (2, tokens + 6), generator=generator)
    ids = text.clone()
    ids[:, 2 : 2 + tokens] = -1
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = text[:, -4:]
    pixels = torch.randn(4, 3, side, side, generator=generator)
    sizes = torch.tensor([[side, side], [side, side]])
    return [
        {"input_ids": ids, "labels": labels, "pixel_values": pixels, "image_sizes": sizes},
        {"input_ids": text, "labels": labels},
    ]


def losses_and_weights(rank, world_size, changes):
    from phi35 import presets
    from phi35.loading import create
    from phi35.training.config import TrainingConfig
    from phi35.training.engine import Engine
    from phi35.training.environment import start
    from phi35.training.loss import count_label_tokens
    from phi35.training.optimizer_state import PARAMETER, OptimizerState
    from phi35.training.parameter_groups import freeze_parameters

    place = start("cpu")
    base = {"model": "tiny-phi-3.5-vision", "global_batch_size": 4, "micro_batch_size": 2, "max_steps": 3}
    config = TrainingConfig(**{**base, "warmup_steps": 1, "adam_epsilon": 1e-4, **changes})
    config = config.resolve(world_size=world_size)
    model_config = presets.get(config.model)
    model = create(model_config, device="cpu", dtype="float32", seed=1)
    freeze_parameters(model, config)
    engine = Engine(model, config, place)
    batches = vision_batches(model_config)
    counts = [count_label_tokens(batch["labels"]) for batch in batches]
    losses = []
    for step in range(3):
        engine.set_learning_rate(step)
        result = engine.step(batches[rank::world_size], counts[rank::world_size], sum(counts))
        share = result.loss.clone()
        torch.distributed.all_reduce(share)
        losses.append(share.item())
    state = OptimizerState(engine)
    weights = {name: state.read(value, PARAMETER).clone() for name, value in engine.model.named_parameters()}
    trained = [name for name, value in engine.model.named_parameters() if value.requires_grad]
    return losses, weights, trained


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
