"""The decoder's kernels compile for Hopper without a GPU, read and write 16 bytes at a time, and do not spill."""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from phi35.kernels import adamw, cross_entropy, gated, norm, rotary, squares  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter replaces the compiler"
)


def compiled(kernel, kinds, constants, num_warps):
    """Compiled for compute capability 9.0, from "name name: type" lines; pointers and sizes are multiples of 16."""
    arguments = {}
    for names, kind in kinds.items():
        arguments |= dict.fromkeys(names.split(), kind)
    assert set(arguments) | set(constants) == set(kernel.arg_names)
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [name for name, kind in arguments.items() if kind != "fp32" and name not in kernel_keys(kernel)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def kernel_keys(kernel):
    """Arguments whose values are not known to be multiples of 16."""
    return ("key", "length", "table_length") if kernel.__name__.startswith(("_adamw", "_rotate")) else ("key",)


def registers_and_stack(kernel, tmp_path):
    """Registers a thread, and bytes of stack (spilled registers)."""
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


BF16, FP32 = "*bf16", "*fp32"
CASES = {
    "norm": (
        norm._norm_kernel,
        {
            "hidden_states residual total normed weight bias": BF16,
            "means deviations": FP32,
            "seed": "*i32",
            "width": "i32",
            "eps low unit": "fp32",
        },
        {"JITTER": True, "ADD": True, "BIAS": True, "SUBTRACT": True, "BLOCK": 4096},
        8,
    ),
    "norm backward": (
        norm._norm_backward_kernel,
        {
            "grad_total grad_normed total weight grad": BF16,
            "means deviations weight_parts bias_parts": FP32,
            "seed": "*i32",
            "num_rows width": "i32",
            "low unit": "fp32",
        },
        {"JITTER": True, "ADD": True, "BIAS": True, "SUBTRACT": True, "BLOCK": 4096},
        8,
    ),
    "gate": (
        gated._gate_kernel,
        {"gate_up out": BF16, "width": "i32"},
        {"ACT": "silu", "LIMIT": 0.0, "BLOCK": 1024},
        4,
    ),
    "gate backward": (
        gated._gate_backward_kernel,
        {"grad gate_up gate_up_grad": BF16, "width": "i32"},
        {"ACT": "silu", "LIMIT": 0.0, "BLOCK": 1024},
        4,
    ),
    "clamped gate": (
        gated._gate_kernel,
        {"gate_up out": BF16, "width": "i32"},
        {"ACT": "gegelu", "LIMIT": 20.0, "BLOCK": 1024},
        4,
    ),
    "clamped gate backward": (
        gated._gate_backward_kernel,
        {"grad gate_up gate_up_grad": BF16, "width": "i32"},
        {"ACT": "gegelu", "LIMIT": 20.0, "BLOCK": 1024},
        4,
    ),
    "activate": (
        gated._activate_kernel,
        {"values grad out": BF16, "count": "i32"},
        {"ACT": "quick_gelu", "BACKWARD": True, "BLOCK": 1024},
        4,
    ),
    "rotate": (
        rotary._rotate_kernel,
        {"projected cos sin": BF16, "length table_length": "i32"},
        {"WIDTH": 9216, "HEADS": 64, "HALF": 48, "HEAD_BLOCK": 64, "HALF_BLOCK": 64},
        4,
    ),
    "rotate back": (
        rotary._rotate_back_kernel,
        {"part grad cos sin": BF16, "length table_length batch_stride head_stride token_stride": "i32"},
        {"WIDTH": 9216, "FIRST": 0, "HEADS": 32, "HALF": 48, "ROTATE": True, "HEAD_BLOCK": 32, "HALF_BLOCK": 64},
        4,
    ),
    "cross-entropy": (
        cross_entropy._cross_entropy_kernel,
        {"logits": BF16, "labels": "*i64", "losses scale": FP32, "vocabulary": "i32"},
        {"GRADIENT": True, "BLOCK": 8192},
        16,
    ),
    "scale": (
        cross_entropy._scale_kernel,
        {"values out": BF16, "factor": FP32, "count": "i32"},
        {"BLOCK": 2048},
        8,
    ),
    "adamw": (
        adamw._adamw_kernel,
        {
            "weights grad": BF16,
            "master first second factor": FP32,
            "count": "i32",
            "beta1 one_less_beta1 beta2 one_less_beta2 epsilon decay step_size second_correction": "fp32",
            "key": "i32",
        },
        {"HAS_MASTER": True, "HAS_FACTOR": True, "ROUND_WEIGHTS": False, "ROUND_MOMENTS": False, "BLOCK": 2048},
        8,
    ),
    "adamw, bfloat16 states": (
        adamw._adamw_kernel,
        {
            "weights grad master first second": BF16,
            "factor": FP32,
            "count": "i32",
            "beta1 one_less_beta1 beta2 one_less_beta2 epsilon decay step_size second_correction": "fp32",
            "key": "i32",
        },
        {"HAS_MASTER": False, "HAS_FACTOR": True, "ROUND_WEIGHTS": True, "ROUND_MOMENTS": True, "BLOCK": 2048},
        8,
    ),
    "squares": (
        squares._squares_kernel,
        {"tensor": BF16, "parts": FP32, "count": "i32"},
        {"BLOCK": 2048, "BLOCKS": 16},
        8,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel(tmp_path, record_property, case):
    kernel = compiled(*CASES[case])
    registers, stack = registers_and_stack(kernel, tmp_path)
    record_property("registers", registers)
    print(case, "registers", registers)
    assert stack == 0
    assert re.search(r"ld\.global(\.[\w:]+)*\.v4\.b32", kernel.asm["ptx"]), "no load of 16 bytes"
    if case != "squares":  # one number a program
        assert re.search(r"st\.global(\.[\w:]+)*\.v4\.b32", kernel.asm["ptx"]), "no store of 16 bytes"
