"""Steps of the engine against a plain torch loop: ZeRO stages, micro-batches, ranks, expert parallelism."""

import pytest
import torch
from distributed import run_distributed

STEPS = 4
ROWS, LENGTH = 4, 12


def config_of(**changes):
    from phi35.training.config import TrainingConfig

    settings = {
        "model": "tiny-phi-3.5-mini",
        "global_batch_size": ROWS,
        "max_steps": STEPS,
        "warmup_steps": 1,
        "learning_rate": 2e-3,
        "gradient_clipping": 0.5,
        "adam_epsilon": 1e-4,  # at 1e-8 a first update is the gradient's sign, and rounding decides signs near zero
        "zero_stage": 0,
    }
    return TrainingConfig(**{**settings, **changes})


def global_batches(vocab_size=1088):
    """Batches whose rows hold very different numbers of labels, so that a mean of means would be wrong."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(STEPS):
        ids = torch.randint(3, vocab_size, (ROWS, LENGTH), generator=generator)
        labels = ids.clone()
        for row, cut in enumerate((0, 9, 5, 11)):
            labels[row, :cut] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def build(config, **overrides):
    from phi35.loading import create

    return create(config.model, device="cpu", dtype="float32", seed=3, **overrides)


def plain_losses_and_weights(config, **overrides):
    """The reference: one process, whole batches, torch's own AdamW and clipping, no DeepSpeed."""
    from phi35.training.parameter_groups import freeze_parameters, parameter_groups
    from phi35.training.schedule import learning_rate_factor

    torch.manual_seed(0)
    model = build(config, **overrides).train()
    freeze_parameters(model, config)
    groups = parameter_groups(model, config)
    optimizer = torch.optim.AdamW(groups, betas=config.adam_betas, eps=config.adam_epsilon)
    losses = []
    for step, batch in enumerate(global_batches()):
        factor = learning_rate_factor(
            step, schedule="cosine", total_steps=STEPS, warmup_steps=1, floor=config.min_lr_ratio
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.gradient_clipping)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.detach().clone() for name, value in model.named_parameters()}


def engine_losses_and_weights(rank, world_size, changes, overrides):
    from phi35.training.engine import Engine, shard_experts
    from phi35.training.environment import start
    from phi35.training.loss import count_label_tokens
    from phi35.training.optimizer_state import PARAMETER, OptimizerState
    from phi35.training.parameter_groups import freeze_parameters

    place = start("cpu")
    config = config_of(**changes)
    config = config.resolve(world_size=world_size, num_experts=4 if "moe" in config.model else 0)
    torch.manual_seed(0)
    model = build(config, **overrides)
    freeze_parameters(model, config)
    shard_experts(model, config)
    engine = Engine(model, config, place)
    size = config.micro_batch_size
    losses, norms = [], []
    for step, batch in enumerate(global_batches()):
        starts = range(rank * size, ROWS, size * world_size)
        micro = [{name: value[start : start + size] for name, value in batch.items()} for start in starts]
        counts = [count_label_tokens(one["labels"]) for one in micro]
        engine.set_learning_rate(step)
        result = engine.step(micro, counts, count_label_tokens(batch["labels"]))
        share = result.loss.clone()
        torch.distributed.all_reduce(share)
        losses.append(share.item())
        norms.append(float(result.gradient_norm))
    state = OptimizerState(engine)
    weights = {}
    for name, parameter in engine.model.named_parameters():
        weights[name] = (state.read(parameter, PARAMETER).clone(), getattr(parameter, "expert_shard", None))
    return losses, norms, weights


def assert_equal_to_plain(results, losses, weights, tolerance):
    for got, _, _ in results:
        assert got == pytest.approx(losses, rel=tolerance)
    for name, expected in weights.items():
        for _, _, got in results:
            value, shard = got[name]
            whole = expected if shard is None else expected[shard[0] : shard[0] + value.shape[0]]
            torch.testing.assert_close(
                value, whole, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_equals_a_plain_torch_loop(stage):
    changes = {"zero_stage": stage, "micro_batch_size": 1}
    losses, weights = plain_losses_and_weights(config_of(**changes))
    results = run_distributed(engine_losses_and_weights, 2, changes, {})
    assert_equal_to_plain(results, losses, weights, 1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=0)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_of_one_rank_change_nothing(micro_batch_size):
    changes = {"micro_batch_size": micro_batch_size}
    losses, weights = plain_losses_and_weights(config_of())
    results = run_distributed(engine_losses_and_weights, 1, changes, {})
    assert_equal_to_plain(results, losses, weights, 1e-6)


def test_checkpointed_layers_change_nothing():
    changes = {"gradient_checkpointing": True, "zero_stage": 3}
    losses, weights = plain_losses_and_weights(config_of())
    results = run_distributed(engine_losses_and_weights, 1, changes, {})
    assert_equal_to_plain(results, losses, weights, 1e-6)


@pytest.mark.parametrize("changes", [{"zero_stage": 3}, {"zero_stage": 2, "gradient_checkpointing": "selective"}])
def test_fused_operations_equal_a_plain_torch_loop(changes):
    changes = {**changes, "kernels": "fused"}
    losses, weights = plain_losses_and_weights(config_of())
    results = run_distributed(engine_losses_and_weights, 2, changes, {})
    assert_equal_to_plain(results, losses, weights, 1e-6)  # measured: 3e-7


def test_offload_equals_a_plain_torch_loop():
    changes = {"zero_stage": 2, "offload": "optimizer"}
    losses, weights = plain_losses_and_weights(config_of())
    results = run_distributed(engine_losses_and_weights, 2, changes, {})
    assert_equal_to_plain(results, losses, weights, 1e-6)


def test_parts_have_their_own_rates_and_can_be_frozen():
    changes = {"learning_rates": {"embeddings": 1e-4}, "freeze": ("decoder",), "zero_stage": 1}
    losses, weights = plain_losses_and_weights(config_of(**changes))
    results = run_distributed(engine_losses_and_weights, 1, changes, {})
    assert_equal_to_plain(results, losses, weights, 1e-6)
    before = dict(build(config_of()).named_parameters())
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(results[0][2][name][0], before[name])
    assert not torch.equal(results[0][2]["lm_head.weight"][0], before["lm_head.weight"])


MOE = {"model": "tiny-phi-3.5-moe", "router_aux_loss_coef": 0.0}
STILL = {"router_type": "topk", "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
"""Routing without randomness: ranks draw different noise than one process does."""


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_expert_parallel_training_equals_a_plain_torch_loop(stage):
    changes = {**MOE, "zero_stage": stage, "ep_size": 2}
    losses, weights = plain_losses_and_weights(config_of(**changes), **STILL)
    results = run_distributed(engine_losses_and_weights, 2, changes, STILL)
    assert_equal_to_plain(results, losses, weights, 1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=0)


def test_frozen_experts_stay_spread_while_the_rest_trains():
    losses, weights = plain_losses_and_weights(config_of(**MOE, freeze=("experts",)), **STILL)
    for stage in (0, 1, 2):
        changes = {**MOE, "zero_stage": stage, "ep_size": 2, "freeze": ("experts",), "micro_batch_size": 1}
        results = run_distributed(engine_losses_and_weights, 2, changes, STILL)
        assert_equal_to_plain(results, losses, weights, 1e-6)
        name = "model.layers.0.mlp.experts.down_proj"
        before = dict(build(config_of(**MOE), **STILL).named_parameters())[name]
        for rank, (_, _, got) in enumerate(results):
            assert torch.equal(got[name][0], before[2 * rank : 2 * rank + 2])


def test_bfloat16_experts_on_two_ranks_follow_float32():
    losses, _ = plain_losses_and_weights(config_of(**MOE), **STILL)
    for settings in ({"zero_stage": 0}, {"zero_stage": 0, "optimizer_dtype": "bfloat16"}, {"zero_stage": 1}):
        changes = {**MOE, "ep_size": 2, "dtype": "bfloat16", "micro_batch_size": 1, **settings}
        for got, norms, _ in run_distributed(engine_losses_and_weights, 2, changes, STILL):
            assert got == pytest.approx(losses, abs=0.002)  # measured 4.5e-4
            assert all(0 < norm < 100 for norm in norms)


def test_experts_under_zero_3_equal_a_plain_torch_loop():
    changes = {**MOE, "zero_stage": 3}
    losses, weights = plain_losses_and_weights(config_of(**changes), **STILL)
    results = run_distributed(engine_losses_and_weights, 2, changes, STILL)
    assert_equal_to_plain(results, losses, weights, 1e-6)


@pytest.mark.parametrize("stage, ep_size", [(1, 2), (3, 1)])
def test_sparse_layers_among_dense_ones_equal_a_plain_torch_loop(stage, ep_size):
    mixed = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "dense_intermediate_size": 80}
    mixed |= {"shared_expert_intermediate_size": 32, **STILL}
    changes = {**MOE, "zero_stage": stage, "ep_size": ep_size}
    losses, weights = plain_losses_and_weights(config_of(**changes), **mixed)
    results = run_distributed(engine_losses_and_weights, 2, changes, mixed)
    assert_equal_to_plain(results, losses, weights, 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_follows_float32(stage):
    losses, _ = plain_losses_and_weights(config_of())
    changes = {"zero_stage": stage, "dtype": "bfloat16"}
    ((got, _, weights),) = run_distributed(engine_losses_and_weights, 1, changes, {})
    assert got == pytest.approx(losses, abs=0.05)
    assert all(value.dtype == torch.float32 for value, _ in weights.values())
