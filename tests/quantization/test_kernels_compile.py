"""The kernels for weights in few bits compile for Hopper at full size: what they load when, registers, instructions."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from compiled_kernels import SHARED_MEMORY, compile_kernel, machine_code  # noqa: E402

from moe.kernels import quantized, quantized_step  # noqa: E402
from phi35.quantization.codes import QuantizedTensor, tensor_specs  # noqa: E402
from phi35.quantization.config import WeightFormat  # noqa: E402
from phi35.quantization.kernels import matrix, shapes, tiles, vector  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter replaces the compiler"
)


def on_meta(one: WeightFormat, *shape: int) -> QuantizedTensor:
    """A weight without memory."""
    specs = tensor_specs(one, shape, torch.bfloat16)
    tensors = {suffix: torch.empty(size, dtype=dtype, device="meta") for suffix, (size, dtype) in specs.items()}
    return QuantizedTensor.of(one, tensors)


def typed(kind: str, *names: str) -> dict[str, str]:
    """Arguments of one type."""
    return dict.fromkeys(names, kind)


def words(codes: str = "*i32") -> dict[str, str]:
    """The arguments that stand for a weight of the one-token kernels."""
    return {"codes": codes, "scale": "*bf16", "zeros": "*i32", "row_scale": "*fp32"}


def counted(instructions: list[str]) -> Counter[str]:
    """How often each instruction stands in a kernel, without predicates and modifiers."""
    names = (text.split()[1] if text.startswith("@") else text.split()[0] for text in instructions)
    return Counter(name.split(".")[0] for name in names)


def gate_up(config: shapes.WordConfig, prepared: bool) -> Any:
    """gate_up of phi-3.5-mini, compiled; a prepared one leaves its result for down_proj."""
    weight = on_meta(WeightFormat(), 16384, 3072)
    arguments = typed("*bf16", "hidden", "norm_weight", "norm_bias", "acted") | words() | {"eps": "fp32", "half": "i32"}
    arguments |= typed("*i32", "prepared", "left", "left_norm")
    constants: dict[str, Any] = {"NORM": "rmsnorm", "ACT": "silu", "EVEN": True, "PDL": True, "PREPARED": prepared}
    constants |= {"GROUPS": config.groups, "ROWS": config.rows // 2 // config.groups}
    constants |= {"PARTS": 384 if prepared else 0, "PADDED_PARTS": 512 if prepared else 1}
    constants |= {"LEFT": "int4" if prepared else "none", "LEFT_NORM": False} | vector.constants(weight, config)
    return compile_kernel(vector._gate_up_kernel, arguments, constants, config.num_warps)


def test_gate_up_asks_for_all_codes_before_the_wait(tmp_path: Path) -> None:
    """gate_up of phi-3.5-mini: 16 rows of 3 pairs of words and 3 scales a lane, and the norm's weight in 6 tiles."""
    config = shapes.choose(on_meta(WeightFormat(), 16384, 3072))
    kernel = gate_up(config, False)
    instructions, stack = machine_code(kernel, tmp_path)
    (wait,) = [place for place, text in enumerate(instructions) if "ACQBULK" in text]
    loads = [place for place, text in enumerate(instructions) if "LDG" in text]
    assert config == shapes.WordConfig(rows=16, num_warps=2)
    assert sum(place < wait for place in loads) == 2 * 3 * config.rows + 6
    assert stack == 0 and kernel.metadata.shared <= 1024
    # Codes reach the sums without another exchange than that of the sums themselves.
    assert counted(instructions)["STS"] <= 32
    # Four codes are multiplied at once, with two bytes of each value. Measured: 2.6 instructions a weight in all, of
    # which the codes take 1.7; 5.2 with a float32 product for each code.
    assert counted(instructions)["IDP"] == config.rows * 24 + 24
    per_weight = len(instructions) / (config.rows * 3072 / (32 * config.num_warps))
    print(f"gate_up: {per_weight:.2f} instructions a weight and lane")
    assert per_weight < 3.0


def test_gate_up_of_a_prepared_vector_is_short_after_the_wait(tmp_path: Path) -> None:
    """Two groups of two warps with eight rows each: no vector is made, and twice as many warps fit."""
    config = shapes.choose(on_meta(WeightFormat(), 16384, 3072), prepared=True)
    kernel = gate_up(config, True)
    instructions, stack = machine_code(kernel, tmp_path)
    (wait,) = [place for place, text in enumerate(instructions) if "ACQBULK" in text]
    loads = [place for place, text in enumerate(instructions) if "LDG" in text]
    assert config == shapes.WordConfig(rows=16, num_warps=4, groups=2)
    assert sum(place < wait for place in loads) == 2 * 3 * 8 and stack == 0
    found = counted(instructions)
    assert found["IDP"] == 8 * 3 * 8
    # Measured by Triton 3.6: 923, against 1,826 of the form above, which has twice as many weights a lane.
    print(f"gate_up: {len(instructions) - wait} instructions after the wait, {found['BAR']} barriers")
    assert len(instructions) - wait < 1000 and found["BAR"] <= 20


def test_down_codes_of_chosen_experts_are_asked_for_before_the_wait(tmp_path: Path) -> None:
    weight = on_meta(WeightFormat(symmetric=False), 16, 4096, 6400)
    config = shapes.choose(weight)
    arguments = typed("*bf16", "acted", "hidden") | words() | {"weights": "*fp32", "indices": "*i32", "num_rows": "i32"}
    constants: dict[str, Any] = {"TOP_K": 2, "ROWS": config.rows // 2, "EVEN": True, "PDL": True}
    constants |= vector.constants(weight, config)
    kernel = compile_kernel(quantized_step._expert_down_kernel, arguments, constants, config.num_warps)
    instructions, stack = machine_code(kernel, tmp_path)
    (wait,) = [place for place, text in enumerate(instructions) if "ACQBULK" in text]
    loads = sum("LDG" in text for text in instructions[:wait])
    # Codes, scales and zero points of 4 rows in 4 chunks, for each of two experts, and the two choices.
    assert config == shapes.WordConfig(rows=8, num_warps=4)
    assert loads >= 2 * 3 * 4 * 4 and stack == 0


def test_products_of_several_tokens_use_matrix_units(tmp_path: Path) -> None:
    config = matrix.TileConfig()
    weight = on_meta(WeightFormat(), 9216, 3072)
    arguments = typed("*bf16", "hidden", "bias", "scale") | {"codes": "*u8", "out": "*fp32", "zeros": "*i32"}
    arguments |= {"row_scale": "*fp32"} | typed("i32", "exponent", "num_tokens", "num_rows", "share")
    constants: dict[str, Any] = {"BIAS": False, "SPLIT": True, "TOKENS": 16, "ROWS": config.rows}
    constants |= tiles.constants(weight, config.depth)
    kernel = compile_kernel(matrix._product_kernel, arguments, constants, config.num_warps)
    instructions, stack = machine_code(kernel, tmp_path)
    found = counted(instructions)
    # Codes pass shared memory as bytes, copied there while earlier ones are multiplied.
    assert found["HMMA"] and found["LDGSTS"] and stack == 0
    assert kernel.metadata.shared <= SHARED_MEMORY // 4


def test_products_of_many_tokens_use_warpgroup_units(tmp_path: Path) -> None:
    config = quantized.ExpertConfig()
    weight = on_meta(WeightFormat(), 16, 12800, 4096)
    arguments = typed("*bf16", "sorted_rows", "acted", "scale") | {"codes": "*u8", "zeros": "*i32"}
    arguments |= {"row_scale": "*fp32", "starts": "*i32"} | typed("i32", "exponent", "num_experts", "width")
    constants: dict[str, Any] = {"ACT": "silu", "EXPERTS": 16, "TILE": config.tile_rows}
    constants |= {"COLUMNS": config.tile_columns // 2} | tiles.constants(weight, config.tile_depth)
    kernel = compile_kernel(quantized._many_up_kernel, arguments, constants, 8)
    _, stack = machine_code(kernel, tmp_path)
    assert "wgmma" in kernel.asm["ptx"] and stack == 0 and kernel.metadata.shared <= SHARED_MEMORY
