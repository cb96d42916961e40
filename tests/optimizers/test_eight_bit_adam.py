"""AdamW with 8-bit moments (bitsandbytes), under every ZeRO stage."""

import pytest
import torch
from distributed import run_distributed
from engine_runs import build, config_of, engine_run, plain_run

pytest.importorskip("bitsandbytes", reason="8-bit Adam is an optional extra")
CHANGES = {"optimizer": "adamw8bit"}


class Plain:
    """bitsandbytes' optimizer in a plain loop."""

    def __init__(self, model, config):
        import bitsandbytes

        from phi35.training.parameter_groups import parameter_groups

        groups = parameter_groups(model, config)
        self.optimizer = bitsandbytes.optim.AdamW8bit(groups, betas=config.adam_betas, eps=config.adam_epsilon)

    def step(self, rate):
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()


def test_unsharded_steps_are_the_librarys_own():
    losses, weights = plain_run(config_of(**CHANGES, gradient_clipping=1e6), Plain)
    got, _, own = run_distributed(engine_run, 1, {**CHANGES, "gradient_clipping": 1e6}, {})[0]
    assert got == pytest.approx(losses, rel=1e-6)
    for name, expected in weights.items():
        torch.testing.assert_close(own[name][0], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"zero_stage": 1}),
        (1, {"zero_stage": 2, "offload": "optimizer"}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (1, {"zero_stage": 0, "dtype": "bfloat16"}),
        (2, {"zero_stage": 1, "dtype": "bfloat16"}),
        (2, {"zero_stage": 1, "ep_size": 2, "model": "tiny-phi-3.5-moe"}),
    ],
    ids=["zero1", "offload", "zero2", "zero3", "bf16", "zero1-bf16", "moe-ep2"],
)
def test_sharded_steps_stay_near_adamw(world_size, changes):
    still = {"router_type": "topk", "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
    overrides = still if "model" in changes else {}
    exact = run_distributed(engine_run, world_size, changes, overrides)
    quantized = run_distributed(engine_run, world_size, {**CHANGES, **changes}, overrides)
    initial = dict(build(config_of(**changes), **overrides).named_parameters())
    for (losses, _, weights), (got, _, own) in zip(exact, quantized, strict=True):
        assert got == pytest.approx(losses, rel=2e-3)
        for name, (expected, shard) in weights.items():
            start = initial[name].detach()
            start = start if shard is None else start[shard[0] : shard[0] + expected.shape[0]]
            error = (own[name][0] - expected).norm() / (expected - start).norm()
            assert error < 0.3, f"{name}: {error}"  # 8 bits and four steps; at most 0.17, of a norm


def test_a_missing_package_is_named_before_anything_is_allocated(monkeypatch):
    from phi35.training.optimizers import check_optimizer

    check_optimizer(config_of(**CHANGES))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_optimizer(config_of())
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        check_optimizer(config_of(**CHANGES))
