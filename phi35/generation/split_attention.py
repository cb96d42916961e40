"""A chunk's attention over a long cache in two parts: all that came before, and itself, causally.

The attention that torch offers for a causal triangle in the lower right corner is flash attention's. Before the chunk
nothing is masked and within it the triangle is an ordinary one, so that cuDNN's attention takes either; the two are
weighted by their sums of exponentials (as in ring attention, arXiv 2310.01889, section 3).
"""

import torch


def attend_in_two(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Causal attention of the last n tokens over all.

    Args:
        queries: (1, H, n, d).
        keys: (1, H, total, d), total > n, the queries' own the last.
        values: like ``keys``.
        scale: of the scores; None takes 1 / sqrt(d).

    Returns:
        (1, H, n, d)
    """
    past = keys.shape[2] - queries.shape[2]
    early, early_sums = _part(queries, keys[:, :, :past], values[:, :, :past], scale, causal=False)
    own, own_sums = _part(queries, keys[:, :, past:], values[:, :, past:], scale, causal=True)
    weight = torch.sigmoid(early_sums - own_sums)
    return torch.lerp(own.float(), early.float(), weight).to(queries.dtype)


def _part(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (1, H, n, d) over some keys and the logarithm of its sums of exponentials, (1, H, n, 1) float32."""
    if queries.is_cuda:
        attended, sums = torch.ops.aten._scaled_dot_product_cudnn_attention(
            queries, keys, values, None, True, 0.0, causal, False, scale=scale
        )[:2]
    else:
        attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, scale=scale
        )
    return attended, sums.float().view(*queries.shape[:3], 1)
