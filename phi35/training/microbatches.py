"""Micro-batches from a data source to the device, with what must be known of them on the host."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from phi35.training.engine import Engine
from phi35.training.flops import Work, batch_work
from phi35.training.sequence import local_part

HOST_INPUTS = ("image_sizes", "sequence_lengths")
"""Inputs of which the model reads the values: on the device it would have to wait for them."""


def next_micro_batches(
    batches: Iterator[dict[str, torch.Tensor]],
    count: int,
    engine: Engine,
    expand: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    beat: Callable[[], None] | None = None,
) -> tuple[list[dict[str, torch.Tensor]], list[int], Work]:
    """``count`` micro-batches on the device; their label tokens and work, counted before they leave the host.

    Args:
        batches: of this rank, on the host.
        count: micro-batches of a step.
        engine: says the device, and which ranks share rows.
        expand: turns what has reached the device into the model's inputs.
        beat: called after each batch has come.
    """
    device, shared = engine.environment.device, engine.sequence_parallel
    model: Any = engine.model
    taken, num_tokens, work = [], [], Work()
    for _ in range(count):
        batch = next(batches)
        if beat is not None:
            beat()
        if shared is None or shared.rank == 0:  # ranks that share rows read them whole: count them once
            work += batch_work(batch, model.config)
        if shared is not None:
            batch = local_part(batch, shared, model.config)
        num_tokens.append(engine.objective.count(batch))
        moved: dict[str, Any] = {
            name: value if name in HOST_INPUTS else value.to(device, non_blocking=True) for name, value in batch.items()
        }
        moved = moved if expand is None else expand(moved)
        if padded_on_right(batch.get("attention_mask")):
            moved = {**moved, "padding_side": "right"}  # seen here, not on the device
        taken.append(moved)
    return taken, num_tokens, work


def padded_on_right(attention_mask: torch.Tensor | None) -> bool:
    """Whether a mask (B, T) on the host shows no real token after a padded one."""
    return attention_mask is not None and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
