"""The planner's memory against live tensors of the engine's second step, under every ZeRO stage."""

import gc

import pytest
import torch
from distributed import run_distributed

BUCKET = 300_000
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 16}


def measured_and_planned(rank, world_size, changes):
    """(bytes at the peak of a step, between steps, at the peak before the update), and the plan."""
    from phi35.planning import memory
    from phi35.planning.live_memory import LiveMemory
    from phi35.training.build import build_model, read_model_config
    from phi35.training.config import TrainingConfig
    from phi35.training.engine import Engine
    from phi35.training.environment import start

    common = {"model": "tiny-phi-3.5-mini", "model_overrides": WIDE, "sequence_length": 64, "micro_batch_size": 1}
    config = TrainingConfig(**{**common, "global_batch_size": world_size, **changes})
    model_config = read_model_config(config)
    place = start("cpu")
    config = config.resolve(world_size=world_size, num_experts=model_config.num_local_experts)
    zero = {"stage": config.zero_stage, "reduce_bucket_size": BUCKET}
    live, before_update = LiveMemory(), []
    with live:
        model = build_model(config, model_config, None, place.device)
        engine = Engine(model, config, place, {"zero_optimization": zero} if config.zero_stage else None)
        engine.base_optimizer.register_step_pre_hook(lambda *_: before_update.append(live.peak))
        for _ in range(2):
            gc.collect()
            live.restart()
            before_update.clear()
            ids = torch.randint(0, 900, (1, 64))
            engine.set_learning_rate(0)
            engine.step([{"input_ids": ids, "labels": ids}], [63], 63 * world_size)
        peak = live.peak
        gc.collect()
        between = live.now
    planned = memory.plan_memory(model_config, config, world_size, device_type="cpu", bucket_size=BUCKET)
    return peak, between, before_update[0], planned


MOE = {"model": "tiny-phi-3.5-moe"}


@pytest.mark.parametrize(
    ("world_size", "changes", "tolerance"),
    [  # the tolerances stand beside measured ratios of plan and peak
        (1, {"zero_stage": 0}, 0.03),  # 1.014
        (2, {"zero_stage": 0}, 0.04),  # 0.999
        (2, {"zero_stage": 1, "dtype": "bfloat16"}, 0.02),  # 0.999
        (2, {"zero_stage": 2, "dtype": "bfloat16"}, 0.08),  # 1.04
        (2, {"zero_stage": 3, "dtype": "bfloat16"}, 0.1),  # 0.93
        (2, {**MOE, "zero_stage": 1, "dtype": "bfloat16", "ep_size": 2}, 0.02),  # 0.999
        (2, {**MOE, "zero_stage": 2, "dtype": "bfloat16", "ep_size": 2}, 0.08),  # 1.02
    ],
)
def test_peak_and_states(world_size, changes, tolerance):
    peak, between, _, plan = run_distributed(measured_and_planned, world_size, changes)[0]
    ratio = plan.peak / peak
    assert abs(ratio - 1) < tolerance, f"{ratio}: {plan}"
    assert sum(plan.states.values()) == pytest.approx(between, rel=0.03)


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer_dtype": "bfloat16"}, MOE, {"optimizer": "muon"}, {"ema_decay": 0.9}]
)
def test_own_masters_at_stage_0(changes):
    # The update is left out: on a CPU it is made of torch operations, whose passing tensors one kernel has not.
    _, between, peak, plan = run_distributed(
        measured_and_planned, 1, {"zero_stage": 0, "dtype": "bfloat16", **changes}
    )[0]
    ratio = max(size for name, size in plan.moments.items() if name != "update") / peak
    assert abs(ratio - 1) < 0.06, f"{ratio}: {plan}"  # measured: 0.98 to 1.02
    assert sum(plan.states.values()) == pytest.approx(between, rel=0.01)


@pytest.mark.parametrize("stage", [1, 2])
def test_offloaded_states_are_on_the_host(stage):
    changes = {"zero_stage": stage, "dtype": "bfloat16", "offload": "optimizer"}
    peak, between, _, plan = run_distributed(measured_and_planned, 2, changes)[0]
    assert plan.peak + plan.host == pytest.approx(peak, rel=0.1)  # on a CPU both are one; measured: 1.08 and 0.96
    assert sum(plan.states.values()) + plan.host == pytest.approx(between, rel=0.06)
