"""Captured steps between generations: a model keeps its last one, as long as its cache is small.

Capturing takes some tens of milliseconds (docs/inference.md), so that short answers gain from a step that is there.
"""

from typing import Any

from phi35.cache import KVCache
from phi35.generation.fast_step import DecodeStep
from phi35.kernels.operands import StepState

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


def take(
    model: Any, batch: int, capacity: int, plain: bool, kv_cache_dtype: str | None = None, graph: bool = True
) -> DecodeStep:
    """A step for so many rows of so many tokens: the kept one where it serves, else a new one.

    Raises:
        CannotCaptureError: if a module of the model waits for the device.
    """
    kept = model.__dict__.pop(ATTRIBUTE, KeptStep()).step
    if kept is not None:
        cache = kept.cache
        fits = cache.batch_size == batch and cache.capacity >= capacity and cache.kind == kv_cache_dtype
        if not plain and fits and kept.is_current:
            return kept
        del kept, cache
    return make(model, model.new_cache(batch, capacity, kv_cache_dtype), plain, graph=graph)


def make(model: Any, cache: KVCache, plain: bool, state: StepState | None = None, graph: bool = True) -> DecodeStep:
    """A step over a cache, captured unless ``plain`` or without ``graph``."""
    step = DecodeStep(model, cache, plain=plain, state=state)
    if graph and not plain:
        step.capture()
    return step


def give(model: Any, step: DecodeStep) -> None:
    """Keep a step for the next generation, if its cache is small."""
    if step.cache.nbytes <= KEPT_BYTES and step.model.device.type == "cuda":
        model.__dict__[ATTRIBUTE] = KeptStep(step)


def drop(model: Any) -> None:
    """Free the kept steps."""
    for name in (ATTRIBUTE, FEED_ATTRIBUTE):
        model.__dict__.pop(name, None)
