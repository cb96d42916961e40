"""A chunk's attention in two parts against one softmax over all its keys."""

import pytest
import torch
from torch.nn import functional as F

from phi35.generation.split_attention import attend_in_two

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("past", "length", "sharp"), [(1, 1, 1), (7, 5, 1), (300, 64, 1), (33, 200, 30)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_two_parts_are_the_attention_over_all(
    device: str, past: int, length: int, sharp: float, scale: float | None
) -> None:
    """Sharp scores give nearly all weight to one of the parts."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(past)
    shape = (1, 4, past + length, 32)
    keys, values = (torch.randn(shape, generator=generator).to(device, dtype) for _ in "kv")
    queries = sharp * torch.randn(1, 4, length, 32, generator=generator).to(device, dtype)
    seen = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    wide = (tensor.double() for tensor in (queries, keys, values))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=seen, scale=scale)
    found = attend_in_two(queries, keys, values, scale)
    # Measured on a CPU in float32: 9e-7, and 2.8e-5 with sharp scores, of values that reach 4. bfloat16 rounds weights,
    # parts and sum to 2^-8 each.
    tolerance = 1e-4 if device == "cpu" else 0.06
    assert found.dtype == dtype and (found.double() - expected).abs().max() < tolerance
