"""Load balance without a loss (arXiv 2408.15664): a bias per expert that moves the choice and no weight.

After each optimizer step an expert that received more tokens than its layer's mean is made less attractive by a
fixed amount, one that received fewer more attractive. No gradient is involved, so that balance does not pull on the
model's own objective.
"""

from collections.abc import Sequence

import torch
from torch import nn

from moe.layer import SparseMoE


def updated_selection_bias(selection_bias: torch.Tensor, expert_counts: torch.Tensor, rate: float) -> torch.Tensor:
    """The bias after a step: b + rate sign(mean count - count), algorithm 1 of the paper.

    Args:
        selection_bias: (L, E) float32.
        expert_counts: (L, E) tokens that each expert received in the step, over all data-parallel ranks
            (``moe.losses.expert_counts``, summed).
        rate: of the update; the paper uses 0.001.

    Returns:
        (L, E), a new tensor.

    Raises:
        ValueError: if the shapes differ.
    """
    if selection_bias.shape != expert_counts.shape:
        raise ValueError(
            f"selection_bias {tuple(selection_bias.shape)} and expert_counts {tuple(expert_counts.shape)} must both "
            "be (layers, experts)"
        )
    counts = expert_counts.to(selection_bias)
    return selection_bias + rate * (counts.mean(dim=-1, keepdim=True) - counts).sign()


def set_selection_bias(model: nn.Module, selection_bias: torch.Tensor | Sequence[torch.Tensor] | None) -> None:
    """Give each sparse layer of a model its row of a bias, or take the bias away.

    Args:
        model: holds the layers, sharded over experts or not.
        selection_bias: (L, E), global expert numbers; None for no bias.

    Raises:
        ValueError: if rows and layers, or columns and experts, differ in number.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseMoE)]
    if selection_bias is None:
        for layer in layers:
            layer.router.selection_bias = None
        return
    shapes = [tuple(row.shape) for row in selection_bias]
    expected = [(layer.num_experts,) for layer in layers]
    if shapes != expected:
        raise ValueError(
            f"selection_bias must hold one row per sparse layer of shapes {expected}, got rows of shapes {shapes}"
        )
    for layer, row in zip(layers, selection_bias, strict=True):
        layer.router.selection_bias = row
