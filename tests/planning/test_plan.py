"""``phi35 plan``: states by the usual arithmetic, what fits, speed and the DeepSpeed JSON."""

import json

import pytest

from phi35 import presets
from phi35.planning.memory import plan_memory
from phi35.planning.parameters import nominal_states, rank_parameters
from phi35.planning.plan import FRAGMENTATION, OUTSIDE_BYTES, candidates, deepspeed_json, seconds_for
from phi35.planning.speed import expected_speed, measurements
from phi35.training.config import TrainingConfig
from phi35.training.flops import TrainingFlops, Work, visible_pairs


@pytest.mark.parametrize(
    ("model", "changes", "world_size", "ep_size", "stage", "freeze", "gigabytes"),
    [  # gigabytes as worked out by hand: weights 2, gradients 2, masters 4, moments 8 bytes a trained parameter
        ("phi-3.5-moe", {}, 8, 8, 1, (), 89.4),
        ("phi-3.5-moe", {}, 16, 16, 1, (), 47.9),
        ("phi-3.5-moe", {}, 4, 4, 1, (), 172.3),
        ("phi-3.5-moe", {}, 8, 1, 3, (), 83.7),
        ("phi-3.5-moe", {}, 1, 1, 1, ("experts",), 106.3),
        ("phi-3.5-moe", {}, 2, 2, 1, ("experts",), 56.3),
        ("phi-3.5-moe", {"num_hidden_layers": 4}, 1, 1, 0, (), 87.4),
        ("phi-3.5-mini", {}, 1, 1, 0, (), 61.1),
        ("phi-3.5-vision", {}, 1, 1, 0, (), 66.2),
    ],
)
def test_states_by_sixteen_bytes_a_parameter(model, changes, world_size, ep_size, stage, freeze, gigabytes):
    config = TrainingConfig(model=model, freeze=freeze, zero_stage=stage, ep_size=ep_size, dtype="bfloat16")
    parameters = rank_parameters(presets.get(model).replace(**changes), config)
    assert nominal_states(parameters, world_size, ep_size, stage) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_one_gpu_at_stage_0_holds_sixteen_bytes_and_activations():
    model_config = presets.get("phi-3.5-mini").replace(num_hidden_layers=4)
    config = TrainingConfig(model="phi-3.5-mini", dtype="bfloat16", sequence_length=1024, global_batch_size=1)
    plan = plan_memory(model_config, config.resolve(world_size=1), 1)
    trained = rank_parameters(model_config, config.resolve(world_size=1)).trained
    assert sum(plan.states.values()) == 14 * trained
    assert plan.moments["update"] == 16 * trained + 100_000_000
    lean = config.replace(optimizer_dtype="bfloat16").resolve(world_size=1)
    assert sum(plan_memory(model_config, lean, 1).states.values()) == 6 * trained
    twice = config.replace(global_batch_size=2, micro_batch_size=1).resolve(world_size=1)
    assert plan_memory(model_config, twice, 1).moments["update"] == 18 * trained + 100_000_000  # sums in float32


SMALL = {"num_hidden_layers": 2, "vocab_size": 2048}


def planned(num_gpus, gpu_bytes, **settings):
    model_config = presets.get("phi-3.5-moe").replace(**SMALL)
    values = {
        "model": "phi-3.5-moe",
        "dtype": "bfloat16",
        "sequence_length": 512,
        "micro_batch_size": 1,
        "global_batch_size": 4 * num_gpus,
        **settings,
    }
    return model_config, candidates(model_config, values, num_gpus, gpu_bytes, 989e12)


def test_what_fits_comes_first_and_leaves_room():
    _, found = planned(4, 40_000_000_000)
    fitting = [one for one in found if one.fits]
    assert fitting and fitting == found[: len(fitting)] and len(fitting) < len(found)
    assert all(one.memory.peak * FRAGMENTATION + OUTSIDE_BYTES <= 40e9 for one in fitting)
    assert all(one.memory.peak * FRAGMENTATION + OUTSIDE_BYTES > 40e9 for one in found[len(fitting) :])
    combinations = {(one.config.zero_stage, one.config.ep_size, one.config.offload) for one in found}
    assert {(0, 4, "none"), (2, 2, "none"), (3, 1, "none"), (3, 1, "optimizer"), (1, 1, "optimizer")} <= combinations
    assert not any(stage == 3 and size > 1 for stage, size, _ in combinations)
    speeds = [
        one.speed.tokens_per_second for one in fitting if one.config.offload == "none" and one.config.zero_stage < 3
    ]
    assert speeds == sorted(speeds, reverse=True)


def test_settings_that_the_user_gives_are_kept():
    _, found = planned(2, 60_000_000_000, zero_stage=2, ep_size=2, gradient_checkpointing=True, offload="none")
    assert [(one.config.zero_stage, one.config.ep_size) for one in found] == [(2, 2)]
    with pytest.raises(ValueError, match="expert parallelism runs with zero_stage 0 to 2"):
        planned(2, 60_000_000_000, zero_stage=3, ep_size=2)


def test_more_ranks_and_experts_spread_need_less_memory():
    peaks = {}
    for ranks in (2, 4):
        _, found = planned(ranks, 10**12, zero_stage=2, offload="none", gradient_checkpointing=False)
        peaks |= {(ranks, one.config.ep_size): one.memory.peak for one in found}
    assert peaks[4, 4] < peaks[4, 2] < peaks[4, 1] < peaks[2, 1] and peaks[4, 2] < peaks[2, 2] < peaks[2, 1]


def test_speed_follows_from_mfu():
    model_config = presets.get("phi-3.5-mini")
    config = TrainingConfig(model="phi-3.5-mini", dtype="bfloat16", sequence_length=4096, global_batch_size=8)
    config = config.resolve(world_size=4)
    speed = expected_speed(model_config, config, 4, 989.4e12, mfu=0.5)
    flops = TrainingFlops(model_config)(Work(4096, visible_pairs(4096, None))) / 4096
    assert speed.tokens_per_second == pytest.approx(4 * 0.5 * 989.4e12 / flops)
    assert flops == 6 * 3_722_379_264 + 12 * 32 * 3072 * 4097 / 2
    kept, recomputed = (
        expected_speed(model_config, config.replace(gradient_checkpointing=how), 1, 1e15).tokens_per_second
        for how in (False, True)
    )
    assert recomputed == pytest.approx(0.75 * kept)
    assert {one.kind for one in measurements()} == {"dense", "sparse", "vision"}
    assert all(0.1 < one.mfu < 0.9 and one.source and one.device for one in measurements())


def test_time_for_tokens():
    model_config, found = planned(4, 10**12)
    best = found[0]
    seconds, steps = seconds_for(best, model_config, 1e9)
    assert steps == 1e9 / (16 * 512)
    assert seconds == pytest.approx(1e9 / best.speed.tokens_per_second)


def test_the_json_is_what_the_engine_renders_and_deepspeed_accepts(tmp_path, capsys):
    from deepspeed.runtime.config import DeepSpeedConfig

    from phi35.cli.plan import plan
    from phi35.training.deepspeed_config import config_fields, read_deepspeed_file

    settings = ["model_overrides.num_hidden_layers=2", "sequence_length=512"]
    target = tmp_path / "planned.json"
    plan(settings, preset="phi-3.5-moe", gpus=1, gpu_memory="141GB", tokens=1e9, crops=0, device="H200", mfu=None,
         config=None, write=target, as_json=True, everything=False)  # fmt: skip
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = read_deepspeed_file(target)
    assert written == printed["deepspeed"] and printed["best"]["fits"] == "yes"
    assert DeepSpeedConfig(written).zero_config.stage == printed["best"]["ZeRO"]
    assert config_fields(written)["dtype"] == "bfloat16"
    _, found = planned(4, 10**12, zero_stage=2, ep_size=4)
    rendered = deepspeed_json(found[0], 4)
    assert rendered["train_batch_size"] == 16 and rendered["gradient_accumulation_steps"] == 4


def test_nothing_fits_is_an_error_that_says_what_to_do(capsys):
    from phi35.cli.plan import plan

    with pytest.raises(ValueError, match="nothing fits 8GB a GPU: the least is .* more GPUs"):
        plan(["model_overrides.num_hidden_layers=2", "sequence_length=512", "offload=none"], preset="phi-3.5-moe",
             gpus=1, gpu_memory="8GB", tokens=1e9, crops=0, device="H200", mfu=None, config=None, write=None,
             as_json=False, everything=False)  # fmt: skip
    shown = capsys.readouterr().out
    assert "master weights" in shown and "GPU-hours" in shown and '"zero_optimization"' in shown
