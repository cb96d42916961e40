"""Auxiliary losses of the router: load balance (arXiv 2101.03961, eq. 4-6) and z-loss (arXiv 2202.08906, eq. 5).

Pure functions of what the layers returned. The balance loss counts the experts that really ran, in training those
that SparseMixer sampled (transformers counts a plain softmax top-2 instead). Layers count alike: a loss is the mean
over layers of the layer's loss, so that a coefficient means the same at any depth.
"""

from collections.abc import Sequence

import torch
from torch import distributed

from phi35.outputs import RouterOutput


def load_balancing_loss(
    router_outputs: Sequence[RouterOutput],
    attention_mask: torch.Tensor | None = None,
    process_group: "distributed.ProcessGroup | None" = None,
) -> torch.Tensor:
    """E times the sum over experts of (share of tokens) x (mean softmax probability), averaged over layers.

    The shares of a layer sum to k (each token counts k times), so that perfect balance gives k: the scale of
    transformers' loss. The gradient flows through the probabilities only.

    Args:
        router_outputs: one per sparse layer.
        attention_mask: (B, T), 1 for real tokens, in the order of the N = B T router rows; padding is left out.
        process_group: count the experts' shares over all tokens of this group (GRIN's global balance) instead of
            this process's alone. The probabilities stay this process's part of the global mean, times the group's
            size: values and gradients averaged over the group are those of the joined batch, however many tokens
            each process holds.

    Returns:
        Scalar float32; zero where no token counts.

    Raises:
        ValueError: without router outputs, or with a mask of another size.
    """
    layers, mask = _checked(router_outputs, attention_mask)
    counts = expert_counts(layers, attention_mask)  # (L, E)
    num_tokens = counts.new_tensor(layers[0].logits.shape[0]) if mask is None else mask.sum()
    probabilities = torch.stack([_masked_sum(layer.logits.float().softmax(dim=-1), mask) for layer in layers])
    world_size = 1
    if process_group is not None:
        world_size = distributed.get_world_size(process_group)
        totals = torch.cat((counts.reshape(-1), num_tokens.reshape(1)))
        distributed.all_reduce(totals, group=process_group)
        counts, num_tokens = totals[:-1].view_as(counts), totals[-1]
    shares = counts / num_tokens.clamp(min=1)
    probabilities = probabilities * (world_size / num_tokens.clamp(min=1))
    return shares.shape[-1] * (shares * probabilities).sum(dim=-1).mean()


def router_z_loss(
    router_outputs: Sequence[RouterOutput],
    attention_mask: torch.Tensor | None = None,
    process_group: "distributed.ProcessGroup | None" = None,
) -> torch.Tensor:
    """Mean over tokens of logsumexp(scores) squared, averaged over layers: keeps scores small.

    Args:
        router_outputs: one per sparse layer.
        attention_mask: (B, T), 1 for real tokens; padding is left out.
        process_group: the mean is over all tokens of this group: values and gradients averaged over it are those of
            the joined batch.

    Returns:
        Scalar float32; zero where no token counts.

    Raises:
        ValueError: without router outputs, or with a mask of another size.
    """
    layers, mask = _checked(router_outputs, attention_mask)
    squares = torch.stack([layer.logits.float().logsumexp(dim=-1).square() for layer in layers])  # (L, N)
    num_tokens = squares.new_tensor(squares.shape[1]) if mask is None else mask.sum()
    total = squares.sum() if mask is None else (squares * mask).sum()
    if process_group is not None:
        num_tokens = num_tokens.detach() / distributed.get_world_size(process_group)
        distributed.all_reduce(num_tokens, group=process_group)
        return total / (len(layers) * num_tokens.clamp(min=1 / distributed.get_world_size(process_group)))
    return total / (len(layers) * num_tokens.clamp(min=1))


def expert_counts(router_outputs: Sequence[RouterOutput], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(L, E) float32: tokens that each expert of each layer received (a token counts once per choice).

    Raises:
        ValueError: without router outputs, or with a mask of another size.
    """
    layers, mask = _checked(router_outputs, attention_mask)
    with torch.no_grad():
        counts = []
        for layer in layers:
            num_experts = layer.logits.shape[-1]
            # A comparison, not bincount or scatter_add: repeatable on a GPU and without a host synchronisation.
            experts = torch.arange(num_experts, device=layer.logits.device)
            chosen = (layer.expert_indices.unsqueeze(-1) == experts).sum(dim=1)  # (N, E)
            counts.append(_masked_sum(chosen.float(), mask))
        return torch.stack(counts)


def _masked_sum(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(E,) sum of (N, E) rows that count."""
    return values.sum(dim=0) if mask is None else (values * mask.unsqueeze(-1)).sum(dim=0)


def _checked(
    router_outputs: Sequence[RouterOutput], attention_mask: torch.Tensor | None
) -> tuple[list[RouterOutput], torch.Tensor | None]:
    """The layers as a list and the mask as (N,) float32."""
    layers = list(router_outputs)
    if not layers:
        raise ValueError("router losses need the router output of at least one sparse layer, got none (dense model?)")
    if attention_mask is None:
        return layers, None
    num_tokens = layers[0].logits.shape[0]
    if attention_mask.numel() != num_tokens:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must cover the {num_tokens} tokens that were routed, "
            "B x T without cached tokens"
        )
    return layers, attention_mask.reshape(-1).to(device=layers[0].logits.device, dtype=torch.float32)
