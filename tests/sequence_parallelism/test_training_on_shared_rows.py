"""Training steps with rows spread over processes equal a plain torch loop on one."""

import pytest
import torch
from distributed import RankError, run_distributed

STEPS = 3
ROWS, LENGTH = 4, 22
SAMPLES = ((22,), (9, 11), (3, 4, 5), (21,))
"""Lengths of each row's samples; the rest is padding. 22 tokens over 2 or 4 processes: one of them needs padding."""
STILL = {"router_type": "topk", "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}


def config_of(model, **changes):
    from phi35.training.config import TrainingConfig

    settings = {
        "model": model,
        "global_batch_size": ROWS,
        "micro_batch_size": 2,
        "max_steps": STEPS,
        "warmup_steps": 1,
        "learning_rate": 2e-3,
        "gradient_clipping": 0.5,
        "adam_epsilon": 1e-4,  # at 1e-8 a first update is the gradient's sign, and rounding decides signs near zero
        "zero_stage": 1,
    }
    return TrainingConfig(**{**settings, **changes})


def global_batches(model, packed=True):
    """Batches of four rows; of a vision model the second and third row hold pictures."""
    from phi35.training.build import read_model_config

    config = read_model_config(config_of(model))
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(STEPS):
        ids = torch.randint(3, config.vocab_size - 4, (ROWS, LENGTH), generator=generator)
        labels, mask = ids.clone(), torch.zeros_like(ids)
        lengths = torch.zeros(ROWS, 3, dtype=torch.int64)
        for row, samples in enumerate(SAMPLES):
            samples = samples if packed else (sum(samples),)
            lengths[row, : len(samples)] = torch.tensor(samples)
            mask[row, : sum(samples)] = 1
        labels[mask == 0] = -100
        labels[0, 5:9] = -100
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        if packed:
            batch["sequence_lengths"] = lengths
        batches.append(batch)
    return batches if config.vision is None else [with_pictures(batch, config, generator) for batch in batches]


def with_pictures(batch, config, generator):
    """A picture in rows 1 and 2 whose features cross from one process to the other."""
    from vision.image_transform import num_image_tokens

    side = config.vision.image_size
    count = num_image_tokens(side, side, config.vision)
    width = LENGTH + count
    grown = {"sequence_lengths": batch["sequence_lengths"].clone()} if "sequence_lengths" in batch else {}
    for name, filler in (("input_ids", 5), ("labels", -100), ("attention_mask", 0)):
        grown[name] = torch.full((ROWS, width), filler)
        grown[name][:, :LENGTH] = batch[name]
    for row in (1, 2):
        for name, filler in (("input_ids", -1), ("labels", -100), ("attention_mask", 1)):
            old = batch[name][row]
            grown[name][row] = torch.cat((old[:2], torch.full((count,), filler), old[2:]))
        if "sequence_lengths" in grown:
            grown["sequence_lengths"][row, 0] += count
    grown["pixel_values"] = torch.randn(4, 3, side, side, generator=generator)
    grown["image_sizes"] = torch.tensor([[side, side]] * 2)
    return grown


def rows_of(batch, rows):
    """Some rows of a batch, with their pictures: row 1 holds the first one's two crops, row 2 the second one's."""
    part = {name: value[rows] for name, value in batch.items() if name not in ("pixel_values", "image_sizes")}
    pictures = [row - 1 for row in rows if row in (1, 2)]
    if "pixel_values" in batch and pictures:
        part["pixel_values"] = torch.cat([batch["pixel_values"][2 * number : 2 * number + 2] for number in pictures])
        part["image_sizes"] = batch["image_sizes"][pictures]
    return part


def build(config, overrides):
    from phi35.loading import create

    return create(config.model, device="cpu", dtype="float32", seed=3, **overrides)


def plain_loop(config, overrides, packed):
    """The reference: one process, whole batches, torch's own AdamW and clipping, no DeepSpeed."""
    from phi35.training.parameter_groups import freeze_parameters, parameter_groups
    from phi35.training.schedule import learning_rate_factor

    model = build(config, overrides).train()
    freeze_parameters(model, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=config.adam_betas, eps=config.adam_epsilon)
    losses, norms = [], []
    for step, batch in enumerate(global_batches(config.model, packed)):
        factor = learning_rate_factor(
            step, schedule="cosine", total_steps=STEPS, warmup_steps=1, floor=config.min_lr_ratio
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, config.gradient_clipping)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: value.detach().clone() for name, value in model.named_parameters()}


def shared_steps(rank, world_size, model, changes, overrides, packed):
    from phi35.training.build import read_model_config
    from phi35.training.engine import Engine, shard_experts
    from phi35.training.environment import start
    from phi35.training.loop import _sum_over_ranks, next_micro_batches
    from phi35.training.optimizer_state import PARAMETER, OptimizerState
    from phi35.training.parameter_groups import freeze_parameters

    place = start("cpu")
    config = config_of(model, **changes)
    num_experts = read_model_config(config).num_local_experts
    config = config.resolve(world_size=world_size, num_experts=num_experts)
    network = build(config, overrides)
    freeze_parameters(network, config)
    shard_experts(network, config)
    engine = Engine(network, config, place)
    group, groups = rank // config.sequence_parallel_size, config.data_parallel_size(world_size)
    size, accumulation = config.micro_batch_size, config.gradient_accumulation_steps(world_size)
    losses, norms = [], []
    for step, batch in enumerate(global_batches(model, packed)):
        starts = range(group * size, ROWS, size * groups)
        micro = [rows_of(batch, list(range(first, first + size))) for first in starts]
        assert len(micro) == accumulation
        batches, counts, _ = next_micro_batches(iter(micro), accumulation, engine)
        engine.set_learning_rate(step)
        result = engine.step(batches, counts, _sum_over_ranks(sum(counts), place))
        share = result.loss.clone()
        torch.distributed.all_reduce(share)
        losses.append(share.item())
        norms.append(float(result.gradient_norm))
    state = OptimizerState(engine)
    weights = {}
    for name, parameter in engine.model.named_parameters():
        weights[name] = (state.read(parameter, PARAMETER).clone(), getattr(parameter, "expert_shard", None))
    return losses, norms, weights


@pytest.mark.parametrize(
    "model, world_size, changes, packed",
    [
        ("tiny-phi-3.5-mini", 2, {"sequence_parallel_size": 2}, True),
        ("tiny-phi-3.5-mini", 2, {"sequence_parallel_size": 2}, False),
        ("tiny-phi-3.5-mini", 4, {"sequence_parallel_size": 2, "zero_stage": 3, "gradient_checkpointing": True}, True),
        (
            "tiny-phi-3.5-mini",
            4,
            {"sequence_parallel_size": 4, "zero_stage": 0, "gradient_checkpointing": "selective"},
            True,
        ),
        ("tiny-phi-3.5-moe", 2, {"sequence_parallel_size": 2, "ep_size": 1}, True),
        ("tiny-phi-3.5-moe", 2, {"sequence_parallel_size": 2, "ep_size": 2}, False),
        ("tiny-phi-3.5-vision", 2, {"sequence_parallel_size": 2}, True),
    ],
    ids=["dense", "lone", "two groups, ZeRO-3, checkpointed", "four share", "sparse", "experts spread too", "pictures"],
)
def test_three_steps_equal_one_process(model, world_size, changes, packed):
    overrides = STILL if "moe" in model else {}
    losses, norms, weights = plain_loop(config_of(model, **changes), overrides, packed)
    assert len(set(losses)) == STEPS
    results = run_distributed(shared_steps, world_size, model, changes, overrides, packed)
    worst = 0.0
    for got_losses, got_norms, got_weights in results:
        assert got_losses == pytest.approx(losses, rel=1e-6)
        assert got_norms == pytest.approx(norms, rel=1e-5)
        for name, expected in weights.items():
            value, shard = got_weights[name]
            whole = expected if shard is None else expected[shard[0] : shard[0] + value.shape[0]]
            worst = max(worst, float((value - whole).abs().max()))
    # Measured: at most 1.4e-7.
    assert worst <= 1e-6


def test_the_balance_loss_counts_the_tokens_of_all_stretches():
    model, changes = "tiny-phi-3.5-moe", {"sequence_parallel_size": 2, "micro_batch_size": 4}
    alone, _, _ = run_distributed(shared_steps, 1, model, {"micro_batch_size": 4, **AUX}, STILL, True)[0]
    shared, _, weights = run_distributed(shared_steps, 2, model, {**changes, **AUX}, STILL, True)[0]
    _, _, expected = run_distributed(shared_steps, 1, model, {"micro_batch_size": 4, **AUX}, STILL, True)[0]
    _, _, without = run_distributed(shared_steps, 1, model, {"micro_batch_size": 4}, STILL, True)[0]
    assert shared == pytest.approx(alone, rel=1e-6)
    name = "model.layers.0.mlp.router.weight"
    torch.testing.assert_close(weights[name][0], expected[name][0], rtol=0, atol=1e-6)
    assert float((without[name][0] - expected[name][0]).abs().max()) > 1e-4


AUX = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "ep_size": 1}


@pytest.mark.parametrize(
    "changes, world_size, message",
    [
        ({"sequence_parallel_size": 2}, 3, r"sequence_parallel_size \(2\) must divide the number of processes \(3\)"),
        ({"sequence_parallel_size": 2, "global_batch_size": 6}, 8, r"that share no rows \(2 x 4\)"),
        ({"sequence_parallel_size": 2, "compile": True}, 2, "exchange heads within them"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, world_size, message):
    with pytest.raises(ValueError, match=message):
        config_of("tiny-phi-3.5-mini", **changes).resolve(world_size=world_size)


def left_padded(rank, world_size):
    from phi35 import presets
    from phi35.sequence_parallel import SequenceParallel
    from phi35.training.sequence import local_part

    mask = torch.tensor([[0, 1, 1, 1]])
    batch = {"input_ids": torch.ones_like(mask), "labels": torch.ones_like(mask), "attention_mask": mask}
    local_part(batch, SequenceParallel(torch.distributed.group.WORLD), presets.get("tiny-phi-3.5-mini"))


def test_padding_on_the_left_is_refused():
    with pytest.raises(RankError, match="padded on the right"):
        run_distributed(left_padded, 2)


def test_heads_are_checked_before_anything_is_built():
    from phi35 import presets
    from phi35.training.sequence import check_heads

    config = config_of("tiny-phi-3.5-mini", sequence_parallel_size=3)
    heads = presets.get("tiny-phi-3.5-mini").num_attention_heads
    with pytest.raises(ValueError, match=f"must divide the model's {heads} attention heads"):
        check_heads(config, presets.get("tiny-phi-3.5-mini"))
