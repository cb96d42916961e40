"""Each kernel for weights in few bits alone: error, time and bandwidth of every candidate shape of its programs.

    python benchmarks/quantize.py --kernels                    # both models' sizes, needs a CUDA GPU
    python benchmarks/quantize.py --kernels --models mini --formats int4

As ``decode_kernels`` times plain weights: many launches in one CUDA graph over weights that together are larger than
the caches. Bandwidth counts codes, scales and zero points once. Errors are relative, against torch in float32 with the
restored weight.
"""

from collections.abc import Callable
from typing import Any

import decode_kernels
import torch
from decode_kernels import Case, count, draw, norm_for, relative, replayed, wide
from torch.nn import functional as F

from moe.kernels import quantized, quantized_step
from moe.kernels.decode_step import SparseScratch
from phi35 import presets
from phi35.config import ModelConfig
from phi35.kernels import reference
from phi35.kernels.operands import LayerCache, Rope
from phi35.quantization.codes import QuantizedTensor, dequantize, tensor_specs
from phi35.quantization.config import WeightFormat
from phi35.quantization.kernels import matrix, vector
from phi35.quantization.kernels.shapes import HELD_WORDS, WordConfig, held_words
from phi35.quantization.linear import quantized_linear

FORMATS = {
    "int4": WeightFormat(),
    "int4z": WeightFormat(symmetric=False),
    "int8": WeightFormat(bits=8),
    "fp8": WeightFormat(bits=8, type="float", group_size=None),
}
SHAPES = [(rows, warps) for warps in (2, 4, 8) for rows in (4, 8, 16)]
"""Candidate (rows, warps), of which those are taken that the registers hold."""

Builder = Callable[[ModelConfig, WeightFormat, list[WordConfig], int | None], Case]


def random_weight(one: WeightFormat, *shape: int, std: float = 0.02) -> QuantizedTensor:
    """Random codes on the GPU."""
    with torch.device("cuda"):
        return random_codes(one, *shape, std=std)


def random_codes(one: WeightFormat, *shape: int, std: float = 0.02) -> QuantizedTensor:
    """The same on the device of the context."""
    from phi35.quantization.modules import FewBitModule

    module = FewBitModule()
    module.hold("weight", one, shape, torch.bfloat16)
    module.draw_codes(std)
    return module.held()


def num_bytes(one: WeightFormat, *shape: int) -> int:
    """Of a weight."""
    specs = tensor_specs(one, shape, torch.bfloat16).values()
    return sum(torch.Size(size).numel() * dtype.itemsize for size, dtype in specs)


def qkv_case(config: ModelConfig, one: WeightFormat, shapes: list[WordConfig], copies: int | None) -> Case:
    """Norm, product, rotation, cache store."""
    heads, num_kv, dim = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
    width, rows = config.hidden_size, (heads + 2 * num_kv) * dim
    size = num_bytes(one, rows, width)
    weights = [random_weight(one, rows, width) for _ in range(count(size, copies))]
    hidden, norm = draw(1, width, scale=1.0), norm_for(config)
    rope = Rope(torch.rand(2, dim // 2, device="cuda"), torch.ones(2, device="cuda"))
    lengths, long = torch.tensor([37], device="cuda"), torch.tensor([True], device="cuda")
    query, keys, values = draw(1, heads * dim), draw(1, num_kv, 65, dim), draw(1, num_kv, 65, dim)
    cache = LayerCache(keys, values)

    def launch(number: int, shape: WordConfig, pdl: bool) -> None:
        vector.project_qkv(hidden, norm, weights[number], None, rope, lengths, long, query, cache, shape, pdl)

    def error() -> float:
        plain = [value.float() for value in (query, keys, values)]
        projected = F.linear(reference.normed(hidden.float(), wide(norm)), dequantize(weights[0], torch.float32))
        reference.rotate_and_store(projected, rope, lengths, long, plain[0], LayerCache(*plain[1:]))
        mine = [query, keys[:, :, 37], values[:, :, 37]]
        return max(map(relative, mine, [plain[0], plain[1][:, :, 37], plain[2][:, :, 37]]))

    return Case("qkv", size, shapes, launch, error, len(weights))


def project_case(name: str, rows: int, width: int, normed: bool, out_dtype: torch.dtype) -> Builder:
    """A product, alone or behind a norm."""

    def build(config: ModelConfig, one: WeightFormat, shapes: list[WordConfig], copies: int | None) -> Case:
        size = num_bytes(one, rows, width)
        weights = [random_weight(one, rows, width) for _ in range(count(size, copies))]
        token, norm = draw(1, width, scale=1.0), norm_for(config) if normed else None
        out = torch.empty(1, rows, device="cuda", dtype=out_dtype)

        def launch(number: int, shape: WordConfig, pdl: bool) -> None:
            vector.project(token, norm, weights[number], None, out, shape, pdl)

        def error() -> float:
            plain = token.float() if norm is None else reference.normed(token.float(), wide(norm))
            return relative(out, F.linear(plain, dequantize(weights[0], torch.float32)))

        return Case(name, size, shapes, launch, error, len(weights))

    return build


def gate_up_case(config: ModelConfig, one: WeightFormat, shapes: list[WordConfig], copies: int | None) -> Case:
    """Norm, gate and up product, activation."""
    width, ffn = config.hidden_size, config.intermediate_size
    size = num_bytes(one, 2 * ffn, width)
    weights = [random_weight(one, 2 * ffn, width) for _ in range(count(size, copies))]
    hidden, norm, acted = draw(1, width, scale=1.0), norm_for(config), draw(1, ffn)

    def launch(number: int, shape: WordConfig, pdl: bool) -> None:
        vector.project_gate_up(hidden, norm, weights[number], acted, "silu", shape, pdl)

    def error() -> float:
        plain = F.linear(reference.normed(hidden.float(), wide(norm)), dequantize(weights[0], torch.float32))
        gate, up = plain.chunk(2, dim=-1)
        return relative(acted, F.silu(gate) * up)

    return Case("gate_up", size, shapes, launch, error, len(weights))


def expert_case(up: bool) -> Builder:
    """The chosen two experts' gate and up, or down."""

    def build(config: ModelConfig, one: WeightFormat, shapes: list[WordConfig], copies: int | None) -> Case:
        experts, width, ffn = config.num_local_experts, config.hidden_size, config.intermediate_size
        shape = (2 * ffn, width) if up else (width, ffn)
        size = 2 * num_bytes(one, *shape)
        weight, total = random_weight(one, experts, *shape), count(size, copies)
        indices = [torch.randperm(experts)[:2].to("cuda", torch.int32) for _ in range(total)]
        scratch = SparseScratch(draw(1, width), experts, 2, ffn)
        scratch.normed.copy_(draw(1, width, scale=1.0))
        scratch.acted.copy_(draw(2, ffn, scale=1.0))
        scratch.weights.copy_(torch.tensor([0.6, 0.7]))
        out, last = draw(1, width), [(0, shapes[0])]

        def launch(number: int, how: WordConfig, pdl: bool) -> None:
            scratch.indices, last[0] = indices[number], (number, how)
            if up:
                quantized_step.expert_gate_up(weight, "silu", scratch, how, pdl)
            else:
                quantized_step.expert_down_add(weight, out, scratch, how, pdl)

        def error() -> float:
            chosen = [dequantize(weight.part(int(e)), torch.float32) for e in indices[last[0][0]]]
            if up:
                pairs = [F.linear(scratch.normed.float(), plain).chunk(2, dim=-1) for plain in chosen]
                return relative(scratch.acted, torch.cat([F.silu(gate) * lift for gate, lift in pairs]))
            out.zero_()
            quantized_step.expert_down_add(weight, out, scratch, last[0][1], False)
            parts = [F.linear(row, plain) for row, plain in zip(scratch.acted.float(), chosen, strict=True)]
            return relative(out[0], scratch.weights @ torch.stack(parts))

        return Case("expert_gate_up" if up else "expert_down", size, shapes, launch, error, total)

    return build


BUILDERS: dict[str, dict[str, Builder]] = {
    "mini": {
        "qkv": qkv_case,
        "o_proj": project_case("o_proj", 3072, 3072, False, torch.bfloat16),
        "gate_up": gate_up_case,
        "down": project_case("down", 3072, 8192, False, torch.bfloat16),
        "logits": project_case("logits", 32064, 3072, True, torch.float32),
    },
    "moe": {
        "qkv": qkv_case,
        "o_proj": project_case("o_proj", 4096, 4096, False, torch.bfloat16),
        "expert_gate_up": expert_case(True),
        "expert_down": expert_case(False),
    },
}


def build(model: str, name: str, copies: int | None = None) -> Case:
    """A case called "format kernel" with random operands."""
    torch.manual_seed(0)
    form, kernel = name.split()
    config, one = presets.get(decode_kernels.PRESETS[model]), FORMATS[form]
    width = config.intermediate_size if "down" in kernel else config.hidden_size
    with torch.device("meta"):
        weight = random_codes(one, 4096, width)
    chosen = [WordConfig(*shape) for shape in SHAPES]
    shapes = [shape for shape in chosen if held_words(shape, weight) <= HELD_WORDS]
    case = BUILDERS[model][kernel](config, one, shapes, copies)
    case.name = name
    return case


def compile_case(name: tuple[str, str]) -> str:
    """Launch each config of one case once."""
    try:
        case = build(*name, copies=1)
        for config, pdl in [*((config, True) for config in case.configs), (case.configs[0], False)]:
            case.launch(0, config, pdl)
        torch.cuda.synchronize()
    except Exception as error:  # the parent meets it again, with its own report
        return f"{name}: {error}"
    return ""


def measure(models: list[str], formats: list[str], copy_rate: float) -> list[dict[str, Any]]:
    """Check and time the one-token kernels of the models, then products of several tokens; prints tables."""
    names = [(model, f"{form} {kernel}") for model in models for form in formats for kernel in BUILDERS[model]]
    decode_kernels.compile_all(names, compile_case)
    rows = []
    for model, name in names:
        try:
            rows += decode_kernels.time_case(model, build(model, name), copy_rate)
        except (RuntimeError, ValueError) as error:
            print(f"{model} {name}: {error}", flush=True)
            rows.append({"model": model, "kernel": name, "error_text": str(error)})
        torch.cuda.empty_cache()
    for form in formats:
        rows += several_tokens(form, copy_rate) if "mini" in models else []
        rows += several_expert_tokens(form, copy_rate) if "moe" in models else []
    return rows


def several_tokens(form: str, copy_rate: float) -> list[dict[str, Any]]:
    """phi-3.5-mini's gate_up for 2 to 4,096 tokens, beside bfloat16 weights through cuBLAS."""
    size, rows = num_bytes(FORMATS[form], 16384, 3072), []
    weights = [random_weight(FORMATS[form], 16384, 3072) for _ in range(16)]
    plain = [draw(16384, 3072) for _ in range(8)]
    exact = dequantize(weights[0], torch.float32)
    for tokens in (2, 4, 8, 16, 64, 512, 4096):
        hidden = draw(tokens, 3072, scale=1.0)
        candidates: dict[str, Callable[[QuantizedTensor], torch.Tensor]] = {
            "": lambda w, x=hidden: quantized_linear(x, w)
        }
        if tokens <= matrix.MAX_TOKENS:
            for shape in ((64, 128, 4, 4), (32, 128, 4, 4), (64, 128, 8, 4), (32, 64, 4, 4)):
                how = matrix.TileConfig(*shape)
                candidates[" ".join(map(str, shape))] = lambda w, x=hidden, c=how: matrix.product(x, w, None, c)
        with torch.no_grad():
            dense = replayed(lambda x=hidden: [F.linear(x, weight) for weight in plain]) / len(plain)
            for name, call in candidates.items():
                error = relative(call(weights[0]), F.linear(hidden.float(), exact))
                spent = replayed(lambda c=call: [c(weight) for weight in weights]) / len(weights)
                row = {"model": "mini", "kernel": f"{form} gate_up x{tokens}", "config": name, "us": 1e3 * spent}
                row |= {"tb_per_s": size / spent / 1e9, "bf16_us": 1e3 * dense, "error": error}
                rows.append(row | {"of_copy": size / spent / 1e9 / copy_rate})
                print(
                    f"{form} gate_up, {tokens:5d} tokens {name:14s}{row['us']:9.1f} us{row['tb_per_s']:7.3f} TB/s, "
                    f"bfloat16 {row['bf16_us']:.1f} us, error {error:.1e}",
                    flush=True,
                )
    return rows


def several_expert_tokens(form: str, copy_rate: float) -> list[dict[str, Any]]:
    """Phi-3.5-MoE's experts for 1 to 4,096 tokens, beside the bfloat16 kernels."""
    from moe.experts import Experts

    one, rows = FORMATS[form], []
    gate_up, down = random_weight(one, 16, 12800, 4096), random_weight(one, 16, 4096, 6400)
    with torch.device("cuda"):
        plain = Experts(16, 4096, 6400).bfloat16()
    with torch.no_grad():
        plain.gate_up_proj.copy_(dequantize(gate_up, torch.bfloat16))
        plain.down_proj.copy_(dequantize(down, torch.bfloat16))
    whole = sum(tensor.nbytes for weight in (gate_up, down) for tensor in weight.tensors().values())
    for tokens in (1, 4, 16, 512, 4096):
        hidden, weights = draw(tokens, 4096, scale=1.0), torch.rand(tokens, 2, device="cuda")
        indices = torch.rand(tokens, 16, device="cuda").topk(2).indices
        size = whole * indices.unique().numel() / 16
        given = (hidden, indices, weights)
        with torch.no_grad():
            expected = plain(*given)
            spent = replayed(lambda g=given: quantized.run_experts(*g, gate_up, down, "silu"))
            dense = replayed(lambda g=given: plain(*g))
            wrong = relative(quantized.run_experts(*given, gate_up, down, "silu"), expected)
        row = {"model": "moe", "kernel": f"{form} experts x{tokens}", "us": 1e3 * spent, "bf16_us": 1e3 * dense}
        rows.append(row | {"tb_per_s": size / spent / 1e9, "of_copy": size / spent / 1e9 / copy_rate, "error": wrong})
        print(
            f"{form} experts, {tokens:5d} tokens{row['us']:10.1f} us, {size / spent / 1e9:.3f} TB/s, bfloat16 "
            f"{row['bf16_us']:.1f} us, error against it {wrong:.1e}",
            flush=True,
        )
    return rows


def best(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The fastest right configuration of each kernel: what ``shapes.choose`` is read off."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = f"{row['model']} {row['kernel']}"
        if row.get("error", 1.0) < 0.02 and row["us"] < found.get(name, {"us": float("inf")})["us"]:
            found[name] = row
    return found
