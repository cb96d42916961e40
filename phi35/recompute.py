"""Keeping a recipe in place of a tensor: what is cheap to compute again need not stay for the backward pass.

The selective form of activation checkpointing (arXiv 2205.05198) for tensors that cost no matrix product. It works on
whatever reads the tensor: a linear layer, or one that an adapter wraps.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def given_again(
    tensor: torch.Tensor, recipe: Callable[[], torch.Tensor], enabled: bool = True
) -> contextlib.AbstractContextManager[Any]:
    """Within it, operations that would keep ``tensor`` for the backward pass keep ``recipe`` instead.

    Args:
        tensor: result of the recipe; other tensors are kept as ever.
        recipe: computes it again, bit for bit, from tensors that are kept anyway; called without gradients.
        enabled: False for no effect.
    """
    if not enabled or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    mark = _identity(tensor)

    def pack(saved: torch.Tensor) -> Any:
        return _Recipe(recipe, saved.shape) if _identity(saved) == mark else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


class _Recipe:
    def __init__(self, recipe: Callable[[], torch.Tensor], shape: torch.Size) -> None:
        self.recipe, self.shape = recipe, shape


def _unpack(kept: Any) -> torch.Tensor:
    if not isinstance(kept, _Recipe):
        return kept
    with torch.no_grad():
        return kept.recipe().view(kept.shape)


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The same for views that hold the same elements in the same order."""
    storage = tensor.untyped_storage()
    # The storage itself, not its address: on the meta device every address is 0.
    return storage._cdata, tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor.is_contiguous()
