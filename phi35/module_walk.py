"""Walks over a model's modules without names or sets, for what every generation asks before its first token.

``nn.Module.modules``, ``eval`` and ``state_dict`` take 1.4 to 1.8 ms each for the 839 modules of phi-3.5-vision on one
core, and a device waits meanwhile; these take a tenth of it. A module that is reached twice is given twice.
"""

from collections.abc import Callable

import torch
from torch import nn


def walk(module: nn.Module, stop: Callable[[nn.Module], bool] | None = None) -> list[nn.Module]:
    """A module and all below it, always in the same order.

    Args:
        module: the root.
        stop: modules below the root for which this is true are left out, with all below them.
    """
    found = [module]
    for one in found:  # grows while it runs
        if one._modules:
            children = [child for child in one._modules.values() if child is not None]
            found += children if stop is None else [child for child in children if not stop(child)]
    return found


def set_evaluation(module: nn.Module) -> None:
    """Put a module and all below it into evaluation mode, as ``eval`` does."""
    if any([one.training for one in walk(module)]):  # a list: a generator takes longer than it may save
        module.eval()


def stored_tensors(module: nn.Module, stop: Callable[[nn.Module], bool] | None = None) -> list[torch.Tensor]:
    """Parameters and persistent buffers: what ``state_dict`` holds.

    Args:
        module: the root.
        stop: as of ``walk``.
    """
    found: list[torch.Tensor] = []
    for one in walk(module, stop):
        if one._parameters:
            found += [tensor for tensor in one._parameters.values() if tensor is not None]
        if one._buffers:
            passing = one._non_persistent_buffers_set
            found += [buffer for name, buffer in one._buffers.items() if buffer is not None and name not in passing]
    return found
