"""What routing did, in sums that add up over micro-batches, steps and ranks."""

from collections.abc import Sequence

import torch

from moe.losses import expert_counts
from phi35.outputs import RouterOutput

EXTRA_COLUMNS = 3
"""Columns behind the E counts: sum of entropies, sum of weights, number of tokens."""


@torch.no_grad()
def routing_totals(router_outputs: Sequence[RouterOutput], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(L, E + 3) float32 totals of each layer, on the device.

    The columns: tokens that each expert received (a token counts once per choice); the sum over tokens of the
    entropy of softmax(scores), in nats; the sum of the tokens' expert weights; the number of tokens.

    Args:
        router_outputs: one per sparse layer.
        attention_mask: (B, T), 1 for real tokens; padding is left out.

    Raises:
        ValueError: without router outputs, or with a mask of another size.
    """
    counts = expert_counts(router_outputs, attention_mask)
    log_probabilities = torch.stack([layer.logits.float() for layer in router_outputs]).log_softmax(dim=-1)
    per_token = torch.stack(
        (
            -(log_probabilities.exp() * log_probabilities).sum(dim=-1),
            torch.stack([layer.expert_weights.float().sum(dim=-1) for layer in router_outputs]),
            torch.ones_like(log_probabilities[..., 0]),
        ),
        dim=-1,
    )  # (L, N, 3)
    if attention_mask is not None:
        per_token = per_token * attention_mask.reshape(1, -1, 1).to(per_token)
    return torch.cat((counts, per_token.sum(dim=1)), dim=1)
