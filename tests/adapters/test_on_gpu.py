"""The low-rank path and restored weights on a GPU, against the CPU in float64."""

import pytest
import torch
from peft import LoraConfig

from moe.kernels import backend
from moe.low_rank import LowRank, _kernels_take, adapted_experts, with_torch
from phi35.adapters.layers import LoraQuantizedLinear
from phi35.quantization.codes import dequantize, round_to_nearest
from phi35.quantization.config import WeightFormat
from phi35.quantization.linear import quantized_linear, restored
from phi35.quantization.modules import QuantizedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMATS = [
    WeightFormat(),
    WeightFormat(symmetric=False, group_size=32),
    WeightFormat(bits=8),
    WeightFormat(type="float", bits=8),
]


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.label)
def test_a_stack_is_restored_as_on_the_cpu(one: WeightFormat) -> None:
    weight = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0))
    held = round_to_nearest(weight, one, torch.bfloat16)
    moved = type(held).of(one, {suffix: tensor.cuda() for suffix, tensor in held.tensors().items()})
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(restored(moved, dtype).cpu(), dequantize(held, dtype))
    inputs = torch.randn(100, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    quantized_linear(inputs, moved.part(1)).sum().backward()
    expected = dequantize(held.part(1), torch.float64).sum(dim=0).expand(100, -1)
    assert inputs.grad is not None
    # bfloat16 gradients of a sum of 64 weights.
    assert (inputs.grad.cpu().double() - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize("rank", [4, 16, 128])
@pytest.mark.parametrize("few_bits", [False, True])
def test_experts_with_additions_follow_the_cpu(few_bits: bool, rank: int) -> None:
    draw = torch.Generator().manual_seed(1)
    tokens, experts, width, inner = 300, 8, 256, 384
    hidden, weights = torch.randn(tokens, width, generator=draw), torch.rand(tokens, 2, generator=draw)
    indices = torch.rand(tokens, experts - 1, generator=draw).topk(2, dim=1).indices
    plain = [
        torch.randn(*shape, generator=draw) * 0.05 for shape in ((experts, 2 * inner, width), (experts, width, inner))
    ]
    factors = [
        torch.randn(*shape, generator=draw) * 0.05
        for shape in (
            (experts, rank, width),
            (experts, 2 * inner, rank),
            (experts, rank, inner),
            (experts, width, rank),
        )
    ]
    held = [round_to_nearest(one, WeightFormat(group_size=32), torch.bfloat16) for one in plain] if few_bits else plain
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        leaves = [one.to(torch.bfloat16).to(device, dtype).requires_grad_() for one in (hidden, *factors)]
        first, second = LowRank(leaves[1], leaves[2], 2.0), LowRank(leaves[3], leaves[4], 2.0)
        if few_bits:
            base = [
                type(one).of(one.format, {key: part.to(device) for key, part in one.tensors().items()}) for one in held
            ]
        else:
            base = [one.to(torch.bfloat16).to(device, dtype) for one in plain]
        given = (leaves[0], indices.to(device), weights.to(device))
        assert _kernels_take(leaves[0], *base, (first, second)) == (device == "cuda" and not backend.missing())
        out = adapted_experts(*given, *base, "silu", [first], [second])
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
        grads = torch.autograd.grad(out, leaves, upstream.to(device, dtype))
        results.append([one.detach().cpu().double() for one in (out, *grads)])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 3e-2 * want.abs().max()


@pytest.mark.parametrize("act", ["silu", "gelu"])
@pytest.mark.parametrize("tokens", [1, 77, 1500])
def test_kernels_follow_torchs_products(tokens: int, act: str) -> None:
    """Relative errors against float32, beside those of torch's products in bfloat16; the last expert has no rows."""
    if (reason := backend.missing()) is not None:
        pytest.skip(reason)
    draw = torch.Generator("cuda").manual_seed(3)
    experts, width, inner, rank = 8, 512, 640, 16

    def tensor(*shape: int, scale: float = 0.05) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw, device="cuda") * scale).to(torch.bfloat16)

    weights = tensor(experts, 2 * inner, width), tensor(experts, width, inner)
    leaves = [tensor(tokens, width, scale=1.0), torch.rand(tokens, 2, generator=draw, device="cuda")]
    for one, other in ((width, 2 * inner), (inner, width)):
        leaves += [tensor(experts, rank, one), tensor(other, rank, experts).permute(2, 0, 1)]
    indices = torch.rand(tokens, experts - 1, generator=draw, device="cuda").topk(2, dim=1).indices
    upstream = tensor(tokens, width, scale=1.0)
    found = []
    for run, dtype in ((with_torch, torch.float32), (with_torch, torch.bfloat16), (adapted_experts, torch.bfloat16)):
        mine = [leaf.to(dtype if index != 1 else torch.float32).requires_grad_() for index, leaf in enumerate(leaves)]
        additions = [LowRank(mine[2], mine[3], 2.0)], [LowRank(mine[4], mine[5], 0.5)]
        out = run(mine[0], indices, mine[1], *(weight.to(dtype) for weight in weights), act, *additions)
        grads = torch.autograd.grad(out, mine, upstream.to(dtype))
        found.append([one.detach().float() for one in (out, *grads)])
    for want, plain, got in zip(*found, strict=True):
        limit = max(1.5 * float((plain - want).norm() / want.norm()), 2e-3)
        assert float((got - want).norm() / want.norm()) <= limit
    assert all(not grad[-1].any() for grad in found[-1][3:])


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.label)
def test_dora_in_few_bits_follows_the_restored_weight(one: WeightFormat) -> None:
    """Output and gradients in bfloat16, and the lengths, against float64 on the CPU."""
    draw = torch.Generator().manual_seed(4)
    inputs, bias = torch.randn(200, 256, generator=draw).bfloat16(), torch.randn(320, generator=draw).bfloat16()
    held = round_to_nearest(torch.randn(320, 256, generator=draw) * 0.05, one, torch.bfloat16)
    base = QuantizedLinear(256, 320, True, one, torch.bfloat16)
    for suffix, tensor in held.tensors().items():
        getattr(base, "weight" + suffix).copy_(tensor)
    assert base.bias is not None
    base.bias.data = bias
    config = LoraConfig(r=8, lora_alpha=16, use_dora=True)
    layer = LoraQuantizedLinear(base.cuda(), "default", config, r=8, lora_alpha=16)
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    second.data.normal_(0.0, 0.05)
    magnitude.data *= 1.2
    whole = dequantize(held, torch.float64)
    leaves = [part.detach().cpu().double().requires_grad_() for part in (first, second, magnitude)]
    turned = whole + 2.0 * leaves[1] @ leaves[0]
    lengths = torch.linalg.vector_norm(turned, dim=1).detach()
    assert ((layer._lengths("default").cpu().double() - lengths).abs() / lengths).max() < 2e-3
    upstream = torch.randn(200, 320, generator=draw).bfloat16()
    expected = inputs.double() @ (turned * (leaves[2] / lengths)[:, None]).T + bias.double()
    wanted = torch.autograd.grad(expected, leaves, upstream.double())
    got = layer(inputs.cuda())
    grads = torch.autograd.grad(got, (first, second, magnitude), upstream.cuda())
    for mine, theirs in zip((got, *grads), (expected, *wanted), strict=True):
        assert (mine.detach().cpu().double() - theirs).abs().max() <= 3e-2 * theirs.abs().max()
