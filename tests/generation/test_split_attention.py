"""A chunk's attention in two parts against one softmax over all its keys."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from phi35.generation.fast_prefill import _BACKENDS, _over_cache
from phi35.generation.split_attention import attend_in_two, takes_two_parts


def drawn(past: int, length: int, num_kv: int, head_dim: int, sharp: float = 1) -> list[torch.Tensor]:
    """Queries (1, 4, length, d), keys and values (1, K, past + length, d)."""
    generator = torch.Generator().manual_seed(past)
    shape = (1, num_kv, past + length, head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in "kv")
    return [sharp * torch.randn(1, 4, length, head_dim, generator=generator), keys, values]


@pytest.mark.parametrize(("past", "length", "sharp"), [(1, 1, 1), (7, 5, 1), (300, 64, 1), (33, 200, 30)])
@pytest.mark.parametrize("num_kv", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_two_parts_are_the_attention_over_all(
    past: int, length: int, sharp: float, num_kv: int, scale: float | None
) -> None:
    """Sharp scores give nearly all weight to one of the parts."""
    queries, keys, values = drawn(past, length, num_kv, 32, sharp)
    seen = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    wide = (tensor.double() for tensor in (queries, keys, values))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=seen, scale=scale, enable_gqa=True)
    found = attend_in_two(queries, keys, values, scale)
    # Measured: 9e-7, and 2.8e-5 with sharp scores, of values that reach 4.
    assert found.dtype == torch.float32 and (found.double() - expected).abs().max() < 1e-4
    assert not takes_two_parts(queries, keys, values), "it is cuDNN's on a GPU"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_kv", [4, 1])
@pytest.mark.parametrize("head_dim", [96, 128])
@torch.no_grad()
def test_long_chunks_on_a_gpu_take_two_parts(num_kv: int, head_dim: int) -> None:
    """In bfloat16, keys as they lie in a cache with room for more, against float32."""
    tensors = [tensor.to("cuda", torch.bfloat16) for tensor in drawn(20000, 2000, num_kv, head_dim)]
    queries, keys, values = tensors[0], *(F.pad(tensor, (0, 0, 0, 300))[:, :, :-300] for tensor in tensors[1:])
    if torch.cuda.get_device_capability()[0] >= 9:
        with sdpa_kernel(_BACKENDS, set_priority=True):
            assert takes_two_parts(queries, keys, values)
    with sdpa_kernel(_BACKENDS, set_priority=True):
        found = _over_cache(queries[0].transpose(0, 1), keys, values, None, None, None).transpose(0, 1)[None]
    seen = torch.ones(2000, 22000, dtype=torch.bool, device="cuda").tril(20000)
    wide = (tensor.float() for tensor in (queries, keys, values))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=seen, enable_gqa=True)
    # Values reach 0.1; measured on an H200 for phi-3.5-mini's shape: 2e-4 from flash attention's at a largest of 0.04.
    assert (found.float() - expected).abs().max() < 2e-3
