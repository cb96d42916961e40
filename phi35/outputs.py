"""What the layers and the model return."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from phi35.cache import KVCache


@dataclass
class RouterOutput:
    """What one sparse layer decided: enough for every loss and every plot.

    Attributes:
        logits: (N, E) float32 router scores, N = B * T tokens in row-major order.
        expert_indices: (N, k) int64 experts really used (in training: sampled).
        expert_weights: (N, k) multipliers of the experts' outputs.
        expert_gradient_weights: (N, k) multipliers of the experts' own gradients where a router wants others there
            than ``expert_weights``, without gradient; None for the same.
    """

    logits: torch.Tensor
    expert_indices: torch.Tensor
    expert_weights: torch.Tensor
    expert_gradient_weights: torch.Tensor | None = None

    def to(self, device: torch.device) -> "RouterOutput":
        """The same on another device."""
        held = {name: value for name, value in vars(self).items() if value is not None}
        return RouterOutput(**{name: value.to(device) for name, value in held.items()})


@dataclass
class CausalLMOutput:
    """Result of the model's forward pass.

    Attributes:
        loss: scalar float32, mean cross-entropy over the labels that count (with ``labels=``).
        logits: (B, T, V), or (B, n, V) with ``logits_to_keep=n``; None where not asked for.
        past_key_values: the cache that was passed in or made (with ``use_cache=True``).
        router_outputs: one per sparse layer, in layer order; empty for dense models.
        hidden_states: (B, T, D) output of the final norm.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: "KVCache | None" = None
    router_outputs: tuple[RouterOutput, ...] = ()
    hidden_states: torch.Tensor | None = None

    @property
    def router_logits(self) -> tuple[torch.Tensor, ...]:
        """(N, E) router scores of every sparse layer, as transformers names them."""
        return tuple(output.logits for output in self.router_outputs)
