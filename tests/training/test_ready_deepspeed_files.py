"""The ready DeepSpeed files train on the CPU and are what the engine renders; their README's numbers are planned."""

import json
from pathlib import Path

import pytest
from distributed import run_distributed

from phi35 import presets
from phi35.planning.plan import GPUS, fits
from phi35.planning.ready_files import KINDS, MODELS, Fitting, Row, memory_of, rows
from phi35.training.config import TrainingConfig
from phi35.training.deepspeed_config import config_fields, merge, read_deepspeed_file, to_deepspeed

FOLDER = Path(__file__).resolve().parents[2] / "deepspeed_configs"
READY = sorted(FOLDER.glob("*.json"))
LINES = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| `")]


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


@pytest.mark.parametrize("name", ["moe_ep2_zero1", "moe_ep2_zero2", "moe_ep4_zero2"])
def test_a_ready_file_trains_with_experts_spread_over_ranks(name):
    world_size = int(name.removeprefix("moe_ep")[0])
    for stage, losses, ep_size in run_distributed(two_steps, world_size, str(FOLDER / f"{name}.json")):
        assert f"zero{int(stage)}" in name and ep_size == world_size
        assert losses[1] < losses[0] - 0.1


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_file_is_what_the_engine_renders(path):
    """On as many GPUs as the README says, DeepSpeed's own reader included."""
    from deepspeed.runtime.config import DeepSpeedConfig

    given = read_deepspeed_file(path)
    for row in (Row.parse(line) for line in LINES if f"`{path.name}`" in line):
        spread = "ep" in path.stem
        batch = {"micro_batch_size": 1, "global_batch_size": row.num_gpus}
        config = TrainingConfig(**{**batch, **config_fields(given)})
        config = config.resolve(world_size=row.num_gpus, num_experts=16 if spread else 0)
        assert config.ep_size == (row.num_gpus if spread else 1)
        rendered = to_deepspeed(config, row.num_gpus, "cuda")
        assert merge(rendered, given) == rendered
        assert given.keys() - rendered.keys() == set() and given["zero_optimization"] == rendered["zero_optimization"]
        read = DeepSpeedConfig({**rendered, "train_batch_size": rendered["train_batch_size"] // row.num_gpus})
        assert read.zero_config.stage == config.zero_stage and read.bfloat16_config.enabled == ("bf16" in rendered)


def test_the_readme_names_every_file():
    named = {row.file for row in rows(FOLDER / "README.md")}
    assert named == {path.name for path in READY} and len(READY) >= 16
    assert {4, 8, 16} <= {row.num_gpus for row in rows(FOLDER / "README.md")}


@pytest.mark.parametrize("line", LINES, ids=[f"{number}-{line.split('`')[1]}" for number, line in enumerate(LINES)])
def test_the_readme_s_numbers_are_planned(line):
    """The cell is the planner's, that model fits, and one more layer or the next larger model does not."""
    row, cells = Row.parse(line), [cell.strip() for cell in line.strip("| ").split("|")][4:]
    free = "model=" not in row.settings
    for kind, cell in zip(KINDS, cells, strict=True):
        model, _, part = cell.partition(":")[0].partition(", ")
        whole = presets.get(model).num_hidden_layers
        shown = int(part.split()[0]) if part else whole
        memory = memory_of(row, FOLDER, model, shown)
        assert Fitting(model, shown, memory).cell() == cell and fits(memory, GPUS[kind])
        if shown < whole:
            assert not fits(memory_of(row, FOLDER, model, shown + 1), GPUS[kind])
        for larger in MODELS[: MODELS.index(model)] if free else ():
            layers = presets.get(larger).num_hidden_layers
            assert not fits(memory_of(row, FOLDER, larger, layers), GPUS[kind])


def test_a_plan_takes_a_ready_file(capsys):
    from phi35.cli.plan import plan

    settings = ["gradient_checkpointing=true", "sequence_length=512", "model_overrides.num_hidden_layers=2"]
    plan(settings, preset="phi-3.5-mini", gpus=2, deepspeed_config=FOLDER / "zero2.json", as_json=True)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(printed["all"]) == 1 and (printed["best"]["ZeRO"], printed["best"]["offload"]) == (2, "none")
