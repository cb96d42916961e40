"""Quantized products, experts and whole steps on a CUDA device."""

import pytest
import torch

import phi35
from moe.experts import loop
from moe.quantized_experts import QuantizedExperts
from phi35.quantization.codes import QuantizedTensor, dequantize, round_to_nearest
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.linear import quantized_linear

pytestmark = pytest.mark.gpu

FORMATS = [
    WeightFormat(),
    WeightFormat(group_size=32, symmetric=False),
    WeightFormat(group_size=64, scale_bits=8),
    WeightFormat(group_size=None),
    WeightFormat(bits=8),
    WeightFormat(bits=8, group_size=64, symmetric=False),
    WeightFormat(bits=8, type="float", group_size=None),
    WeightFormat(bits=8, type="float"),
]


def on_gpu(one: WeightFormat, *shape: int) -> QuantizedTensor:
    """Quantized normal weights on the device."""
    quantized = round_to_nearest(torch.randn(shape) * 0.05, one, torch.bfloat16)
    return QuantizedTensor.of(one, {suffix: tensor.cuda() for suffix, tensor in quantized.tensors().items()})


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.label)
@pytest.mark.parametrize("tokens", [1, 2, 16, 40, 300])
def test_products(one: WeightFormat, tokens: int) -> None:
    weight, bias = on_gpu(one, 1000 if one.symmetric else 1024, 1536), torch.randn(1024).cuda()
    bias = bias[: weight.shape[0]]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        hidden = torch.randn(tokens, 1536, device="cuda").to(dtype)
        with torch.no_grad():
            out = quantized_linear(hidden, weight, bias.to(dtype))
        expected = hidden.double() @ dequantize(weight, torch.float64).T + bias.to(dtype)
        error = float((out - expected).norm() / expected.norm())
        # The output's rounding alone: 1.7e-3 in bfloat16, 2e-4 in float16; beyond 64 tokens weights are rounded, too.
        assert out.dtype == dtype and error < {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-4}[dtype]


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.label)
def test_experts(one: WeightFormat) -> None:
    with torch.device("cuda"):
        experts = QuantizedExperts(8, 512, 768, one, torch.bfloat16)
    gate_up, down = on_gpu(one, 8, 1536, 512), on_gpu(one, 8, 512, 768)
    for base, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
        for suffix, tensor in experts.held(base).tensors().items():
            tensor.copy_(weight.tensors()[suffix])
    for tokens in (1, 7, 64, 500):
        hidden = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        indices, weights = torch.rand(tokens, 7, device="cuda").topk(2).indices, torch.rand(tokens, 2, device="cuda")
        with torch.no_grad():
            out = experts(hidden, indices, weights)
        plain = [dequantize(weight, torch.float64) for weight in (gate_up, down)]
        expected = loop(hidden.double(), indices, weights.double(), *plain)
        assert float((out - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("preset", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
@pytest.mark.parametrize("batch", [1, 3])
def test_captured_generation_equals_the_plain_one(preset: str, batch: int) -> None:
    one = WeightFormat(group_size=32)
    quantization = QuantizationConfig(linear=one, head=WeightFormat(bits=8, group_size=32), embedding=one)
    model = phi35.create(
        preset, device="cuda", dtype="float16", seed=0, initializer_range=0.15, quantization=quantization
    )
    ids = torch.randint(3, 1000, (batch, 20), device="cuda")
    options = {"max_new_tokens": 24, "stop_token_ids": ()}
    fast = model.generate(ids, fast=True, **options)
    plain = model.generate(ids, fast=False, **options)
    # Sums in another order may turn a near tie: most tokens agree.
    assert float((fast == plain)[:, 20:].float().mean()) > 0.5 and torch.equal(fast[:, 20], plain[:, 20])


def test_products_are_captured_and_compiled() -> None:
    weight = on_gpu(WeightFormat(), 1024, 512)
    for tokens in (1, 8, 100):
        hidden = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            expected = quantized_linear(hidden, weight)
            compiled = torch.compile(lambda x: quantized_linear(x, weight), fullgraph=True)(hidden)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = quantized_linear(hidden, weight)
            hidden.copy_(torch.randn_like(hidden))
            graph.replay()
            assert torch.equal(out, quantized_linear(hidden, weight))
        assert torch.equal(compiled, expected)
