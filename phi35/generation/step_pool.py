"""Captured steps between generations: a model keeps its last one, as long as its cache is small.

Capturing takes some tens of milliseconds (docs/inference.md), so that short answers gain from a step that is there.
"""

from typing import Any

from phi35.generation.fast_step import DecodeStep

KEPT_BYTES = 2**30
"""Largest cache that is kept with its step."""
ATTRIBUTE = "_kept_step"
FEED_ATTRIBUTE = "_kept_feed"


class KeptStep:
    """Holds a step, or what speculation steps with, on its model; copies and pickles of the model hold none."""

    def __init__(self, step: Any = None) -> None:
        self.step = step

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptStep":
        return KeptStep()

    def __reduce__(self) -> tuple[type["KeptStep"], tuple[()]]:
        return KeptStep, ()


def take(model: Any, batch: int, capacity: int, plain: bool, kv_cache_dtype: str | None = None) -> DecodeStep:
    """A step for so many rows of so many tokens: the kept one where it serves, else a new one, not captured yet."""
    kept = model.__dict__.pop(ATTRIBUTE, KeptStep()).step
    if kept is not None:
        cache = kept.cache
        fits = cache.batch_size == batch and cache.capacity >= capacity and cache.kind == kv_cache_dtype
        if not plain and fits and kept.is_current:
            return kept
        del kept, cache
    return DecodeStep(model, model.new_cache(batch, capacity, kv_cache_dtype), plain=plain)


def give(model: Any, step: DecodeStep) -> None:
    """Keep a step for the next generation, if its cache is small."""
    if step.cache.nbytes <= KEPT_BYTES and step.model.device.type == "cuda":
        model.__dict__[ATTRIBUTE] = KeptStep(step)


def drop(model: Any) -> None:
    """Free the kept steps."""
    for name in (ATTRIBUTE, FEED_ATTRIBUTE):
        model.__dict__.pop(name, None)
