"""Engines over fixed data whose whole state can be compared to the bit."""

import torch

STEPS = 4


def build_engine(changes):
    from phi35 import presets
    from phi35.loading import create
    from phi35.training.config import TrainingConfig
    from phi35.training.engine import Engine, shard_experts
    from phi35.training.environment import start

    place = start("cpu")
    base = {"global_batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS, "warmup_steps": 0}
    config = TrainingConfig(**{**base, **changes})
    model_config = presets.get(config.model)
    config = config.resolve(world_size=place.world_size, num_experts=model_config.num_local_experts)
    model = create(model_config, device="cpu", dtype="float32", seed=3)
    shard_experts(model, config)
    return Engine(model, config, place)


def make_steps(rank, engine, left_out=()):
    """Steps over fixed data but for some; the gradient norms and losses of those made."""
    generator = torch.Generator().manual_seed(rank)
    results = []
    for step in range(STEPS):
        micro = [{"input_ids": torch.randint(3, 900, (1, 10), generator=generator)} for _ in range(2)]
        micro = [{**batch, "labels": batch["input_ids"]} for batch in micro]
        if step in left_out:
            continue
        torch.manual_seed(step)  # routing noise
        engine.set_learning_rate(step)
        results.append(engine.step(micro, [9, 9], 36))
    return results


def state_of(engine):
    from phi35.training.optimizer_state import PARAMETER, OptimizerState

    state = OptimizerState(engine)
    kept = {"steps": torch.tensor(state.num_steps), "bias": torch.tensor(engine.balancer.state() or [])}
    for name, parameter in engine.model.named_parameters():
        for kind in (PARAMETER, *state.moments_of(parameter)) if parameter.requires_grad else (PARAMETER,):
            kept[f"{kind} of {name}"] = state.read(parameter, kind).clone()
        kept[f"{name} in the model"] = parameter.detach().clone()
    return kept
