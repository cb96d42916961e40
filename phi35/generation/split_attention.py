"""A chunk's attention over a long cache in two parts: all that came before, and itself, causally.

The attention that torch offers for a causal triangle in the lower right corner is flash attention's. Before the chunk
nothing is masked and within it the triangle is an ordinary one, so that cuDNN's attention takes either; the two are
weighted by their sums of exponentials (as in ring attention, arXiv 2310.01889, section 3). On an H200, a chunk of 8,192
tokens of phi-3.5-mini over 131,072 keys: 38.4 ms for the triangle, 26.3 ms in two parts.
"""

import functools

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

WORTH_TWO_PARTS = 2**25
"""Pairs of a query and a key, masked ones among them, from which the further launches pay."""


def takes_two_parts(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether cuDNN takes both parts of ``attend_in_two`` (compute capability 9.0 on) and they are large enough.

    Arguments are those of ``attend_in_two``; within ``sdpa_kernel`` its choice of backends holds.
    """
    length, total = queries.shape[2], keys.shape[2]
    if not queries.is_cuda or length == total or length * total < WORTH_TWO_PARTS or not _is_hopper(queries.device):
        return False
    gqa, past = queries.shape[1] != keys.shape[1], total - length
    early = SDPAParams(queries, keys[:, :, :past], values[:, :, :past], None, 0.0, False, gqa)
    own = SDPAParams(queries, keys[:, :, past:], values[:, :, past:], None, 0.0, True, gqa)
    return can_use_cudnn_attention(early) and can_use_cudnn_attention(own)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def attend_in_two(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Causal attention of the last n tokens over all.

    Args:
        queries: (1, H, n, d).
        keys: (1, K, total, d), total > n, the queries' own the last; K divides H.
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
