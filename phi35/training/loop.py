"""The loop of a training run: batches to the device, updates, metrics, checkpoints."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from phi35.training import checkpoint
from phi35.training.engine import Engine
from phi35.training.environment import Environment
from phi35.training.flops import Work, batch_work
from phi35.training.loss import count_tokens
from phi35.training.metrics import Metrics
from phi35.training.sequence import local_part

HOST_INPUTS = ("image_sizes", "sequence_lengths")
"""Inputs of which the model reads the values: on the device it would have to wait for them."""


def run_steps(
    engine: Engine, source: Any, metrics: Metrics, first_step: int, root: Path, state: dict[str, Any]
) -> Path:
    """The loop: ``max_steps`` updates, a checkpoint now and then and one at the end.

    Returns:
        The last checkpoint's folder.
    """
    config, place = engine.config, engine.environment
    accumulation = config.gradient_accumulation_steps(place.world_size)
    batches = source.compact() if hasattr(source, "compact") else iter(source)
    expand = getattr(source, "expand", None)
    saved = root / f"step-{first_step:08d}"
    for step in range(first_step, config.max_steps):
        micro_batches, num_tokens, work = _next_micro_batches(batches, accumulation, engine, expand)
        global_num_tokens = _sum_over_ranks(sum(num_tokens), place)
        learning_rate = engine.set_learning_rate(step)
        result = engine.step(micro_batches, num_tokens, global_num_tokens)
        metrics.add(
            step + 1,
            result,
            learning_rate=learning_rate,
            learning_rates=engine.learning_rates,
            work=work,
            num_tokens=global_num_tokens,
            num_samples=config.global_batch_size,
            attention_masks=[batch.get("attention_mask") for batch in micro_batches],
        )
        done = step + 1
        if done == config.max_steps or (config.save_interval and done % config.save_interval == 0):
            metrics.flush()
            now = {"data": source.state_dict(), "selection_bias": engine.balancer.state()}
            saved = checkpoint.save(root, done, engine, {**state, **now}, config.keep_last)
            metrics.restart_clock()
    return saved


def _next_micro_batches(
    batches: Iterator[dict[str, torch.Tensor]],
    count: int,
    engine: Engine,
    expand: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None,
) -> tuple[list[dict[str, torch.Tensor]], list[int], Work]:
    """``count`` micro-batches on the device, their label tokens and their work, counted before they leave the host."""
    taken, num_tokens, work = [], [], Work()
    device, shared = engine.environment.device, engine.sequence_parallel
    model: Any = engine.model
    for _ in range(count):
        batch = next(batches)
        if shared is None or shared.rank == 0:  # ranks that share rows read them whole: count them once
            work += batch_work(batch, model.config)
        if shared is not None:
            batch = local_part(batch, shared, model.config)
        num_tokens.append(count_tokens(batch))
        moved = {
            name: value if name in HOST_INPUTS else value.to(device, non_blocking=True) for name, value in batch.items()
        }
        taken.append(moved if expand is None else expand(moved))
    return taken, num_tokens, work


def _sum_over_ranks(value: int, place: Environment) -> torch.Tensor | int:
    """Sum of a count over ranks, at least 1; on a GPU it stays there, so that nobody waits for it."""
    if place.world_size == 1:
        return max(1, value)
    total = torch.tensor(float(value), device=place.device)
    distributed.all_reduce(total)
    return total.clamp(min=1)
