"""What a micro-batch adds to the training loss: its label tokens, and the router's losses.

The token loss is a mean over the real tokens of the global batch, so that it does not depend on the micro-batch size
or the number of ranks. The router's balance loss is a product of means over one forward pass of all ranks by its
definition, and does depend on how many samples that is.
"""

from typing import Any

import torch

from phi35.outputs import CausalLMOutput
from phi35.packed_attention import ignore_first_tokens
from phi35.registry import resolve


def count_label_tokens(labels: torch.Tensor, sequence_lengths: torch.Tensor | None = None) -> int:
    """Labels that count in (B, T): nothing predicts the first of a row, or of a packed sample; negative ones do not."""
    if sequence_lengths is not None:
        labels = ignore_first_tokens(labels, sequence_lengths)
    return int((labels[:, 1:] >= 0).sum())


def count_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a micro-batch that the loss counts."""
    if "targets" in batch:
        return int((batch["targets"] >= 0).sum())
    return count_label_tokens(batch["labels"], batch.get("sequence_lengths"))


def auxiliary_losses(
    output: CausalLMOutput,
    attention_mask: torch.Tensor | None,
    *,
    balance: float,
    z: float,
    process_group: Any = None,
) -> dict[str, torch.Tensor]:
    """The router losses that have a weight, unweighted, as float32 scalars.

    Args:
        output: of a model with sparse layers; without them the result is empty.
        attention_mask: (B, T), 1 for real tokens.
        balance: weight of the load-balance loss.
        z: weight of the z-loss.
        process_group: ranks whose joined tokens the losses are of; None: this rank's alone.
    """
    losses: dict[str, torch.Tensor] = {}
    if not output.router_outputs:
        return losses
    if balance:
        losses["balance"] = resolve("moe.losses:load_balancing_loss")(
            output.router_outputs, attention_mask, process_group=process_group
        )
    if z:
        losses["z"] = resolve("moe.losses:router_z_loss")(
            output.router_outputs, attention_mask, process_group=process_group
        )
    return losses


def expert_counts(output: CausalLMOutput, attention_mask: torch.Tensor | None) -> Any:
    """(layers, E) float32 tokens each expert received; None for dense models."""
    if not output.router_outputs:
        return None
    return resolve("moe.losses:expert_counts")(output.router_outputs, attention_mask)
