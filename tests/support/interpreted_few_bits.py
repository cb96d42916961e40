"""Runs the kernels for weights in few bits on the CPU in Triton's interpreter and prints their errors as JSON.

A process of its own: TRITON_INTERPRET must stand before Triton is imported, and stays.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.nn import functional as F

import phi35
from moe.experts import loop
from moe.kernels import quantized
from phi35.generation.fast_step import DecodeStep
from phi35.kernels import reference
from phi35.kernels.configs import AttentionConfig
from phi35.kernels.operands import LayerCache, Norm, Rope
from phi35.kernels.tuning import StepTuning
from phi35.quantization.codes import QuantizedTensor, dequantize, round_to_nearest
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.kernels import matrix, vector
from phi35.quantization.kernels.operations import FewBitOperations
from phi35.quantization.kernels.prepared import Prepared
from phi35.quantization.kernels.shapes import FewBitShapes, WordConfig

FORMATS = {
    "int4": WeightFormat(),
    "int4_g32_zeros": WeightFormat(group_size=32, symmetric=False),
    "int4_rows": WeightFormat(group_size=None),
    "int4_bytes_zeros": WeightFormat(group_size=64, scale_bits=8, symmetric=False),
    "int8": WeightFormat(bits=8),
    "int8_zeros": WeightFormat(bits=8, group_size=32, symmetric=False),
    "int8_bytes": WeightFormat(bits=8, group_size=64, scale_bits=8),
    "fp8": WeightFormat(bits=8, type="float", group_size=None),
    "fp8_groups": WeightFormat(bits=8, type="float", group_size=64),
}


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """||value - expected|| / ||expected||."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def drawn(one: WeightFormat, *shape: int, std: float = 0.1) -> QuantizedTensor:
    """Quantized normal weights."""
    return round_to_nearest(torch.randn(shape) * std, one, torch.bfloat16)


def vector_case(one: WeightFormat, norm_kind: str, rows: int) -> dict[str, float]:
    """Products with one vector: added to a residual with norm and bias, gated, rotated into a cache; plain."""
    width, config = 384, WordConfig(rows=rows, num_warps=2)
    norm = Norm(norm_kind, torch.rand(width) + 0.5, torch.randn(width) * 0.1, 1e-5)
    hidden = torch.randn(1, width) * 2 + 0.3
    normed = reference.normed(hidden, norm)
    weight, bias = drawn(one, 24, width), torch.randn(24)
    plain = dequantize(weight, torch.float32)
    out = torch.full((1, 24), 0.5)
    vector.project(hidden, norm, weight, bias, out, config, False, add=True)
    errors = {"add": relative(out, 0.5 + F.linear(normed, plain, bias))}
    acted = torch.empty(1, 12)
    vector.project_gate_up(hidden, norm, weight, acted, "silu", config, False)
    gate, up = F.linear(normed, plain).chunk(2, dim=-1)
    errors["gate_up"] = relative(acted, F.silu(gate) * up)
    heads, head_dim = 2, 8
    weight, bias = drawn(one, 4 * head_dim, width), torch.randn(4 * head_dim)
    rope = Rope(torch.rand(2, head_dim // 2), torch.tensor([1.0, 1.2]))
    caches = [LayerCache(torch.zeros(1, 1, 9, head_dim), torch.zeros(1, 1, 9, head_dim)) for _ in range(2)]
    queries = [torch.empty(1, heads * head_dim) for _ in range(2)]
    lengths, long = torch.tensor([5]), torch.tensor([True])
    vector.project_qkv(hidden, norm, weight, bias, rope, lengths, long, queries[0], caches[0], config, False)
    projected = F.linear(normed, dequantize(weight, torch.float32), bias)
    reference.rotate_and_store(projected, rope, lengths, long, queries[1], caches[1])
    errors |= {"query": relative(*queries), "keys": relative(caches[0].keys, caches[1].keys)}
    errors["values"] = relative(caches[0].values, caches[1].values)
    return errors


def matrix_case(one: WeightFormat, dtype: torch.dtype) -> dict[str, float]:
    """Products with several vectors, whole and in parts; restored rows."""
    width = 208 if one.group_size is None else 384
    weight, bias = drawn(one, 40, width), torch.randn(40).to(dtype)
    hidden = torch.randn(17, width).to(dtype)
    expected = hidden.double() @ dequantize(weight, torch.float64).T + bias
    tile = matrix.TileConfig(rows=16, depth=64)
    errors = {f"splits_{n}": relative(matrix.product(hidden, weight, bias, tile, n), expected) for n in (1, 3)}
    restored = matrix.restore(weight, 8, 40, dtype)
    return errors | {"restored": float(not torch.equal(restored, dequantize(weight, dtype)[8:40]))}


def experts_case(one: WeightFormat, tokens: int, top_k: int, act: str, dtype: torch.dtype) -> dict[str, float]:
    """Few tokens, and the same tokens as if they were many; the last expert is never chosen."""
    experts, width, ffn = 4, 64, 96 if one.group_size == 32 else 64
    gate_up, down = drawn(one, experts, 2 * ffn, width), drawn(one, experts, width, ffn)
    hidden, weights = torch.randn(tokens, width).to(dtype), torch.rand(tokens, top_k)
    indices = torch.rand(tokens, experts - 1).topk(top_k).indices
    plain = [dequantize(weight, torch.float64) for weight in (gate_up, down)]
    expected = loop(hidden.double(), indices, weights.double(), *plain, act)
    config = quantized.ExpertConfig(columns=16, depth=32, tile_rows=16, tile_columns=32, tile_depth=32)
    given = (hidden, indices, weights, gate_up, down, act, config)
    empty = quantized.run_experts(hidden[:0], indices[:0], weights[:0], gate_up, down, act, config)
    return {
        "few": relative(quantized.few(*given), expected),
        "many": relative(quantized.many(*given), expected),
        "empty": float(empty.numel()),
    }


@torch.no_grad()
def step_case(
    name: str, quantization: QuantizationConfig, steps: int, shapes: FewBitShapes | None = None, **changes: object
) -> dict[str, float]:
    """Whole steps of one token beside the model's forward pass."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"head_dim": 16, "vocab_size": 96, "stop_token_ids": (90,), "eos_token_id": 90, "pad_token_id": 90}
    model = phi35.create(name, seed=0, initializer_range=0.2, quantization=quantization, **(small | changes))
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    caches = [model.new_cache(1, 32) for _ in range(2)]
    tokens = [model(ids, past_key_values=cache).logits[:, -1].argmax(dim=-1) for cache in caches][0]
    one = AttentionConfig(block=16, num_warps=1)
    tuning = StepTuning(one=one, grouped=one)
    step = DecodeStep(model, caches[0], tuning=tuning, plain=True)
    heads, window = model.config.num_attention_heads, model.config.sliding_window
    step.operations = FewBitOperations(model.config.hidden_act, window, caches[0].layer(0), heads, tuning, False)
    step.operations.follow(model.model)
    step.operations.shapes = shapes or FewBitShapes()
    step.state.tokens.copy_(tokens)
    worst, wrong, sources = 0.0, 0, []
    take = step.operations._take

    def counted(linear: object) -> Prepared | None:
        sources.append(take(linear))
        return sources[-1]

    step.operations._take = counted  # type: ignore[method-assign]
    for _ in range(steps):
        expected = model(tokens[:, None], past_key_values=caches[1]).logits[:, -1]
        step.run()
        worst = max(worst, relative(step.logits, expected))
        tokens = expected.argmax(dim=-1)
        wrong += int(tokens != step.state.tokens)
    prepared = sum(source is not None for source in sources) / steps
    return {"logits": worst, "wrong": float(wrong), "prepared": prepared}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    half, single = torch.float16, torch.float32
    report = {}
    for place, (name, one) in enumerate(FORMATS.items()):
        norm = ("rmsnorm", "layernorm", "none")[place % 3]
        report[f"vector {name}"] = vector_case(one, norm, rows=(8, 16, 4)[place % 3])
        report[f"matrix {name}"] = matrix_case(one, single)
    report["half matrix"] = matrix_case(FORMATS["int4"], half)
    small, row = WeightFormat(group_size=32), FORMATS["fp8"]
    report["experts int4"] = experts_case(small, 5, 2, "silu", single)
    report["experts zeros"] = experts_case(FORMATS["int4_g32_zeros"], 21, 3, "gelu", single)
    report["experts bytes"] = experts_case(WeightFormat(group_size=32, scale_bits=8), 1, 2, "silu", single)
    report["experts fp8"] = experts_case(row, 4, 1, "silu", single)
    report["half experts"] = experts_case(small, 9, 2, "silu", half)
    report["step dense"] = step_case(
        "tiny-phi-3.5-mini", QuantizationConfig(linear=small, head=row, embedding=small), 1, num_hidden_layers=2
    )
    bytes_zeros = QuantizationConfig(linear=WeightFormat(bits=8, group_size=32, symmetric=False))
    single_groups = FewBitShapes(
        WordConfig(8, 2), WordConfig(8, 1), WordConfig(16, 1), WordConfig(16, 2), prepares_bytes=True
    )
    report["step in one group"] = step_case("tiny-phi-3.5-mini", bytes_zeros, 1, single_groups, num_hidden_layers=2)
    zeros = QuantizationConfig(linear=FORMATS["int4_g32_zeros"])
    report["step sparse"] = step_case("tiny-phi-3.5-moe", zeros, 1, num_hidden_layers=1)
    mixed = {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 2, "dense_intermediate_size": 64}
    report["step mixed"] = step_case("tiny-phi-3.5-moe", QuantizationConfig(linear=FORMATS["int8_zeros"]), 1, **mixed)
    json.dump(report, sys.stdout)
