"""The one-kernel form of packed attention against the form that runs sample by sample."""

import pytest
import torch

from phi35.packed_attention import _flash, _one_by_one, packed_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kv_heads, window", [(8, None), (2, None), (8, 100)])
@pytest.mark.parametrize("head_dim", [96, 128])
def test_one_kernel_equals_sample_by_sample(kv_heads, window, head_dim):
    lengths = torch.tensor([[300, 1, 700], [1024, 0, 0], [17, 500, 0]])
    rows = packed_rows(lengths, 3, 1024, torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(3 * 1024, heads, head_dim) for heads in (8, kv_heads, kv_heads)]
    flat = tuple(torch.randn(shape, device="cuda", generator=generator).bfloat16().requires_grad_() for shape in shapes)
    upstream = torch.randn(shapes[0], device="cuda", generator=generator)
    wide = tuple(tensor.detach().float().requires_grad_() for tensor in flat)
    fast, exact = _flash(flat, rows, window), _one_by_one(wide, rows, window, 0.0)
    got = torch.autograd.grad(fast, flat, upstream.bfloat16())
    expected = torch.autograd.grad(exact, wide, upstream)
    torch.testing.assert_close(fast.float(), exact, rtol=0, atol=2e-2)
    for one, reference in zip(got, expected, strict=True):
        assert float((one.float() - reference).norm() / reference.norm()) <= 1e-2
