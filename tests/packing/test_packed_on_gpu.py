"""The one-kernel form of packed attention against the form that runs sample by sample."""

import pytest
import torch

from phi35.packed_attention import _one_by_one, packed_rows

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
    fast, exact = rows.kernel(flat, rows.offsets, rows.longest, window), _one_by_one(wide, rows.segments, window, 0.0)
    got = torch.autograd.grad(fast, flat, upstream.bfloat16())
    expected = torch.autograd.grad(exact, wide, upstream)
    torch.testing.assert_close(fast.float(), exact, rtol=0, atol=2e-2)
    for one, reference in zip(got, expected, strict=True):
        assert float((one.float() - reference).norm() / reference.norm()) <= 1e-2


def test_compiled_layers_give_the_same_for_many_packings():
    from torch._dynamo.utils import counters

    from phi35.loading import create

    plain, compiled = (create("tiny-phi-3.5-mini", device="cuda", dtype="bfloat16", seed=0).train() for _ in range(2))
    torch.compiler.reset()
    for layer in compiled.model.layers:
        layer.compile(dynamic=False, fullgraph=True)
    ids = torch.randint(0, 900, (2, 256), generator=torch.Generator().manual_seed(0)).cuda()
    for rows in ([[100, 56, 90], [256, 0, 0]], [[30, 226, 0], [5, 6, 7]], [[250, 0, 0], [1, 1, 200]]):
        lengths, losses = torch.tensor(rows), []
        for model in (plain, compiled):
            model.zero_grad()
            loss = model(ids, labels=ids, sequence_lengths=lengths).loss
            loss.backward()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], abs=2e-2)
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            assert float((one.grad - other.grad).norm()) <= 5e-2 * float(one.grad.norm()) + 1e-3
    assert counters["stats"]["unique_graphs"] <= 2


def test_nothing_waits_for_the_device():
    from phi35.loading import create

    model = create("tiny-phi-3.5-mini", device="cuda", dtype="bfloat16", seed=0).train()
    ids, lengths = torch.zeros(2, 256, dtype=torch.int64, device="cuda"), torch.tensor([[100, 56, 90], [200, 0, 0]])
    model(ids, labels=ids, sequence_lengths=lengths).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, labels=ids, sequence_lengths=lengths).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
