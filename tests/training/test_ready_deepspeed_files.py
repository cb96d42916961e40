"""The ready DeepSpeed files train: one rank, two steps, on the CPU."""

from pathlib import Path

import pytest
from distributed import run_distributed

READY = sorted((Path(__file__).resolve().parents[2] / "deepspeed_configs").glob("*zero*.json"))


def two_steps(rank, world_size, path):
    import torch

    from phi35.loading import create
    from phi35.training.config import read_config
    from phi35.training.deepspeed_config import config_fields, read_deepspeed_file
    from phi35.training.engine import Engine
    from phi35.training.environment import start

    given = read_deepspeed_file(path)
    config = read_config(None, ["warmup_steps=0"], {"global_batch_size": 2, **config_fields(given)})
    config = config.resolve(world_size=1)
    engine = Engine(create(config.model, device="cpu", dtype="float32", seed=0), config, start("cpu"), given)
    ids = torch.arange(24).view(2, 12) + 5
    losses = []
    for step in range(2):
        engine.set_learning_rate(step)
        losses.append(engine.step([{"input_ids": ids, "labels": ids}], [22], 22).loss.item())
    return engine.deepspeed.zero_optimization_stage(), losses


@pytest.mark.parametrize("path", [path for path in READY if "ep" not in path.stem], ids=lambda path: path.stem)
def test_a_ready_file_trains(path):
    ((stage, losses),) = run_distributed(two_steps, 1, str(path))
    assert f"zero{int(stage)}" in path.stem
    assert losses[1] < losses[0] - 0.1
