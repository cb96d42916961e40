"""The ready DeepSpeed files train on the CPU: one rank, and two with the experts spread over them."""

from pathlib import Path

import pytest
from distributed import run_distributed

READY = sorted((Path(__file__).resolve().parents[2] / "deepspeed_configs").glob("*zero*.json"))


def two_steps(rank, world_size, path):
    import torch

    from phi35.loading import create
    from phi35.training.config import read_config
    from phi35.training.deepspeed_config import config_fields, read_deepspeed_file
    from phi35.training.engine import Engine, shard_experts
    from phi35.training.environment import start

    place, sparse = start("cpu"), "ep" in path.rsplit("/", 1)[-1]
    given = read_deepspeed_file(path)
    config = read_config(None, ["warmup_steps=0"], {"global_batch_size": 2, **config_fields(given)})
    config = config.replace(model="tiny-phi-3.5-moe" if sparse else config.model)
    config = config.resolve(world_size=world_size, num_experts=4 if sparse else 0)
    model = create(config.model, device="cpu", dtype="float32", seed=0)
    shard_experts(model, config)
    engine = Engine(model, config, place, given)
    ids = torch.arange(24).view(2, 12) + 5
    count = config.gradient_accumulation_steps(world_size)
    losses = []
    for step in range(2):
        engine.set_learning_rate(step)
        result = engine.step([{"input_ids": ids, "labels": ids}] * count, [22] * count, 22 * count * world_size)
        losses.append(result.loss.item() * world_size)
    return engine.deepspeed.zero_optimization_stage(), losses, config.ep_size


@pytest.mark.parametrize("path", [path for path in READY if "ep" not in path.stem], ids=lambda path: path.stem)
def test_a_ready_file_trains(path):
    ((stage, losses, _),) = run_distributed(two_steps, 1, str(path))
    assert f"zero{int(stage)}" in path.stem
    assert losses[1] < losses[0] - 0.1


@pytest.mark.parametrize("path", [path for path in READY if "ep2" in path.stem], ids=lambda path: path.stem)
def test_a_ready_file_trains_experts_spread_over_two_ranks(path):
    for stage, losses, ep_size in run_distributed(two_steps, 2, str(path)):
        assert f"zero{int(stage)}" in path.stem and ep_size == 2
        assert losses[1] < losses[0] - 0.1
