"""Recomputing a decoder layer in the backward pass, with the routing it had in the forward pass.

Both of torch's forms restore the random state, so that the recomputation draws the same noise and chooses the same
experts. The reentrant form runs the layer without a graph and sees tensors only where they stand in a flat tuple:
inside ``RouterOutput`` they would leave it detached, and the router's losses would lose their gradient without a
word. So the routing crosses its border field by field.
"""

import dataclasses
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from phi35.outputs import RouterOutput


def checkpoint_layer(
    layer: Any, hidden_states: torch.Tensor, *arguments: Any, reentrant: bool = False
) -> tuple[torch.Tensor, RouterOutput | None]:
    """Run a layer, keeping its input alone for the backward pass.

    Args:
        layer: maps (hidden_states, *arguments) to (hidden_states, RouterOutput or None).
        hidden_states: (B, T, D).
        *arguments: further arguments, without gradient.
        reentrant: which of torch's forms to use.
    """
    if not reentrant:
        return checkpoint(layer, hidden_states, *arguments, use_reentrant=False)
    if not hidden_states.requires_grad:
        # It follows the gradient of its inputs alone, and would drop the layer's where the embedding is frozen.
        hidden_states = hidden_states.detach().requires_grad_()
    flat: tuple[Any, ...] = checkpoint(_flat, layer, hidden_states, *arguments, use_reentrant=True)
    return flat[0], RouterOutput(*flat[1:]) if len(flat) > 1 else None


def _flat(layer: Any, hidden_states: torch.Tensor, *arguments: Any) -> tuple[Any, ...]:
    result, routing = layer(hidden_states, *arguments)
    if routing is None:
        return (result,)
    return (result, *(getattr(routing, field.name) for field in dataclasses.fields(routing)))
