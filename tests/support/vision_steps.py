"""Training steps of tiny vision models on ranks of which one has pictures and another has none."""

import torch


def vision_batches(config):
    """Two micro-batches, one with a picture in each row and one with text alone, of equal label counts."""
    generator = torch.Generator().manual_seed(5)
    side = config.vision.image_size
    grid = config.vision.merged_grid_size
    tokens = 2 * (grid * grid + grid) + 1
    text = torch.randint(3, 900, (2, tokens + 6), generator=generator)
    ids = text.clone()
    ids[:, 2 : 2 + tokens] = -1
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = text[:, -4:]
    pixels = torch.randn(4, 3, side, side, generator=generator)
    sizes = torch.tensor([[side, side], [side, side]])
    return [
        {"input_ids": ids, "labels": labels, "pixel_values": pixels, "image_sizes": sizes},
        {"input_ids": text, "labels": labels},
    ]


def losses_and_weights(rank, world_size, changes):
    """Losses of three steps, this rank's parameters after them, and the names of the trained ones."""
    from phi35 import presets
    from phi35.loading import create
    from phi35.training.config import TrainingConfig
    from phi35.training.engine import Engine, shard_experts
    from phi35.training.environment import start
    from phi35.training.loss import count_label_tokens
    from phi35.training.optimizer_state import PARAMETER, OptimizerState
    from phi35.training.parameter_groups import freeze_parameters

    place = start("cpu")
    base = {"model": "tiny-phi-3.5-vision", "global_batch_size": 4, "micro_batch_size": 2, "max_steps": 3}
    config = TrainingConfig(**{**base, "warmup_steps": 1, "adam_epsilon": 1e-4, **changes})
    model_config = presets.get(config.model).replace(**config.model_overrides)
    config = config.resolve(world_size=world_size, num_experts=model_config.num_local_experts)
    model = create(model_config, device="cpu", dtype="float32", seed=1)
    freeze_parameters(model, config)
    shard_experts(model, config)
    engine = Engine(model, config, place)
    batches = vision_batches(model_config)
    counts = [count_label_tokens(batch["labels"]) for batch in batches]
    losses = []
    for step in range(3):
        engine.set_learning_rate(step)
        result = engine.step(batches[rank::world_size], counts[rank::world_size], sum(counts))
        share = result.loss.clone()
        torch.distributed.all_reduce(share)
        losses.append(share.item())
    state = OptimizerState(engine)
    weights = {name: state.read(value, PARAMETER).clone() for name, value in engine.model.named_parameters()}
    trained = [name for name, value in engine.model.named_parameters() if value.requires_grad]
    return losses, weights, trained
