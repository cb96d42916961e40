"""The engine's steps, and a plain torch loop beside them, on batches whose rows hold very different label counts."""

import torch

STEPS = 4
ROWS, LENGTH = 4, 12


def config_of(**changes):
    """A training config of a few steps on a tiny model."""
    from phi35.training.config import TrainingConfig

    settings = {
        "model": "tiny-phi-3.5-mini",
        "global_batch_size": ROWS,
        "sequence_length": LENGTH,
        "max_steps": STEPS,
        "warmup_steps": 1,
        "learning_rate": 2e-3,
        "gradient_clipping": 0.5,
        "adam_epsilon": 1e-4,  # at 1e-8 a first update is the gradient's sign, and rounding decides signs near zero
        "zero_stage": 0,
    }
    return TrainingConfig(**{**settings, **changes})


def global_batches(steps=STEPS, rows=ROWS, length=LENGTH, vocab_size=1088):
    """``steps`` batches of ``rows`` rows."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(steps):
        ids = torch.randint(3, vocab_size, (rows, length), generator=generator)
        labels = ids.clone()
        for row, cut in zip(range(rows), (0, 9, 5, 11), strict=False):
            labels[row, :cut] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def build(config, **overrides):
    """The model of a config, always with the same weights."""
    from phi35.loading import create

    return create(config.model, device="cpu", dtype="float32", seed=3, **overrides)


def plain_run(config, make_optimizer, **overrides):
    """Losses and weights of one process with whole batches, torch's clipping and ``make_optimizer(model, config)``.

    The optimizer's ``step`` takes the learning rate.
    """
    from phi35.training.parameter_groups import freeze_parameters
    from phi35.training.schedule import learning_rate_factor

    torch.manual_seed(0)
    model = build(config, **overrides).train()
    freeze_parameters(model, config)
    optimizer = make_optimizer(model, config)
    losses = []
    for step, batch in enumerate(global_batches(config.max_steps, config.global_batch_size, config.sequence_length)):
        factor = learning_rate_factor(
            step, schedule="cosine", total_steps=config.max_steps, warmup_steps=1, floor=config.min_lr_ratio
        )
        loss = model(**batch).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.gradient_clipping)
        optimizer.step(config.learning_rate * factor)
        losses.append(loss.item())
    return losses, {name: value.detach().clone() for name, value in model.named_parameters()}


def engine_run(rank, world_size, changes, overrides):
    """Losses, gradient norms and weights (with their expert shards) of the engine on this rank."""
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
    size, rows = config.micro_batch_size, config.global_batch_size
    losses, norms = [], []
    for step, batch in enumerate(global_batches(config.max_steps, rows, config.sequence_length)):
        starts = range(rank * size, rows, size * world_size)
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
