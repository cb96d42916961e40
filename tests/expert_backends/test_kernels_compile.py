"""The kernels compile for Hopper without a GPU: within its shared memory, on its matrix units, without spills.

Triton's interpreter accepts programs that the compiler refuses, and runs no Gluon at all.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from moe.kernels import (  # noqa: E402
    decode,
    expert_rows,
    grouped_gemm,
    hopper_gemm,
    hopper_weights,
    low_rank,
    mixer,
    routing,
    rows,
    tuning,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter replaces the compiler"
)

SHARED_MEMORY = 232448  # bytes a block can have on compute capability 9.0
POINTER, NUMBER = "*i32", "i32"


def compiled(kernel: Any, source: Any, arguments: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """Compile a kernel for compute capability 9.0 from the types of its arguments."""
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    assert set(arguments) | set(constants) == set(kernel.arg_names)
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # As at run time: pointers and sizes are multiples of 16.
    plain = [name for name, kind in arguments.items() if not kind.startswith("tensordesc")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in plain}
    source = source(kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def assert_fits(kernel: Any, tmp_path: Path, matrix: str | None) -> None:
    """Shared memory within bounds, no stack (spilled registers), and the wanted matrix instruction."""
    assert kernel.metadata.shared <= SHARED_MEMORY
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack is not None and int(stack[1]) == 0, usage
    if matrix is not None:
        assert matrix in kernel.asm["ptx"]


def tile(*block: int) -> str:
    """Type of a Triton descriptor of bfloat16 blocks."""
    return f"tensordesc<bf16[{','.join(map(str, block))}]>"


def swizzled(height: int, width: int) -> str:
    """Type of a Gluon descriptor of bfloat16 blocks."""
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout.get_default_for([height, width], gl.bfloat16)
    return f"tensordesc<bf16[{height}, {width}],{layout!r}>"


def numbers(*names: str) -> dict[str, str]:
    """Arguments of type int32."""
    return dict.fromkeys(names, NUMBER)


def pointers(*names: str) -> dict[str, str]:
    """Arguments that point to int32."""
    return dict.fromkeys(names, POINTER)


@pytest.mark.parametrize("transposed", [True, False])
def test_rows_by_experts(tmp_path: Path, transposed: bool) -> None:
    config = tuning.HOPPER.down
    assert isinstance(config, grouped_gemm.GemmConfig)
    n, k = config.block_n, config.block_k
    arguments = {"rows": tile(128, k), "weights": tile(1, n, k) if transposed else tile(1, k, n), "out": tile(128, n)}
    arguments |= {"half_rows": tile(64, k), "half_out": "*bf16"}
    arguments |= pointers("tile_starts", "tile_experts", "starts") | numbers("num_experts", "columns", "depth")
    constants = {"TRANSPOSED": transposed, "BLOCK_M": 128, "BLOCK_N": n, "BLOCK_K": k, "GROUP": config.group}
    constants |= {"PROGRAMS": 132, "FLATTEN": config.flatten}
    kernel = compiled(
        grouped_gemm._rows_by_experts_kernel,
        ASTSource,
        arguments,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert_fits(kernel, tmp_path, "wgmma")


@pytest.mark.parametrize("rank", [16, 48, 64])
@pytest.mark.parametrize("transposed", [True, False])
def test_rows_by_experts_with_an_addition(tmp_path: Path, transposed: bool, rank: int) -> None:
    config, strip = low_rank._WIDE, low_rank.strip_of(rank)
    n = config.block_n
    arguments = {"rows": tile(128, config.block_k), "half_rows": tile(64, config.block_k), "out": tile(128, n)}
    arguments |= {"low": tile(128, strip), "half_low": tile(64, strip), "half_out": "*bf16"}
    for name, k in (("weights", config.block_k), ("factor", strip)):
        arguments[name] = tile(1, n, k) if transposed else tile(1, k, n)
    arguments |= pointers("tile_starts", "tile_experts", "starts") | numbers("num_experts", "columns", "depth")
    constants = {"TRANSPOSED": transposed, "BLOCK_M": 128, "BLOCK_N": n, "BLOCK_K": config.block_k, "RANK": rank}
    constants |= {"BLOCK_R": strip, "GROUP": config.group, "PROGRAMS": 132}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel = compiled(low_rank._added_kernel, ASTSource, arguments, constants, **options)
    assert_fits(kernel, tmp_path, "wgmma")


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("transposed", [True, False])
def test_products_as_narrow_as_a_rank(tmp_path: Path, transposed: bool, rank: int) -> None:
    config = low_rank._NARROW
    k, options = config.block_k, {"num_warps": config.num_warps, "num_stages": config.num_stages}
    arguments = {"rows": tile(128, k), "half_rows": tile(64, k), "out": tile(128, rank), "half_out": "*bf16"}
    arguments |= {"weights": tile(1, rank, k) if transposed else tile(1, k, rank)}
    arguments |= pointers("tile_starts", "tile_experts", "starts") | numbers("num_experts", "columns", "depth")
    tiles = {"BLOCK_M": 128, "BLOCK_N": rank, "BLOCK_K": k, "GROUP": config.group, "PROGRAMS": 132, "FLATTEN": False}
    constants = {"TRANSPOSED": transposed, **tiles}
    kernel = compiled(grouped_gemm._rows_by_experts_kernel, ASTSource, arguments, constants, **options)
    assert_fits(kernel, tmp_path, "wgmma")
    arguments = {"left_rows": tile(k, 128), "right_rows": tile(k, rank), "out": tile(1, 128, rank)}
    arguments |= pointers("starts", "counts") | numbers("num_experts", "height", "columns")
    kernel = compiled(grouped_gemm._rows_by_rows_kernel, ASTSource, arguments, tiles, **options)
    assert_fits(kernel, tmp_path, "wgmma")


@pytest.mark.parametrize(("act", "save"), [("gelu", True), ("silu", False)])
def test_portable_gated_product(tmp_path: Path, act: str, save: bool) -> None:
    config = tuning.PORTABLE.up
    assert isinstance(config, grouped_gemm.GemmConfig)
    half, k = config.block_n // 2, config.block_k
    arguments = {"rows": tile(128, k), "half_rows": tile(64, k), "weights": tile(1, 2, half, k)}
    arguments |= {"out": tile(128, half), "gate_up": tile(128, 1, half), "half_out": "*bf16", "half_gate_up": "*bf16"}
    arguments |= pointers("tile_starts", "tile_experts", "starts") | numbers("num_experts", "width", "depth")
    constants = {"ACT": act, "SAVE": save, "BLOCK_M": 128, "HALF_N": half, "BLOCK_K": k, "GROUP": config.group}
    constants |= {"PROGRAMS": 132, "FLATTEN": config.flatten}
    kernel = compiled(
        grouped_gemm._rows_by_experts_gated_kernel,
        ASTSource,
        arguments,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert_fits(kernel, tmp_path, "wgmma")


@pytest.mark.parametrize("save", [True, False])
def test_hopper_gated_product(tmp_path: Path, save: bool) -> None:
    from triton.experimental.gluon._runtime import GluonASTSource

    config = tuning.HOPPER.up
    assert isinstance(config, hopper_gemm.HopperConfig)
    half = config.block_n // 2
    arguments = {"rows": swizzled(64, 64), "weights": swizzled(half, 64)}
    arguments |= {"out": swizzled(64, half), "gate_up": swizzled(64, half)}
    arguments |= pointers("tile_starts", "tile_experts", "starts") | numbers("num_experts", "columns", "depth")
    constants = {"PROGRAMS": 132, "TRANSPOSED": True, "GATED": True, "SAVE": save, "BLOCK_N": half}
    constants |= {"STAGES": config.num_stages, "GROUP": config.group}
    kernel = compiled(hopper_gemm._rows_by_experts_kernel, GluonASTSource, arguments, constants, num_warps=4)
    assert_fits(kernel, tmp_path, "wgmma")
    assert "setmaxnreg" in kernel.asm["ptx"]


@pytest.mark.parametrize("squares", [True, False])
def test_hopper_gradient_of_weights(tmp_path: Path, squares: bool) -> None:
    from triton.experimental.gluon._runtime import GluonASTSource

    config = tuning.HOPPER.up_weights
    assert isinstance(config, hopper_gemm.HopperConfig)
    n = config.block_n
    arguments = {"left": swizzled(64, 64), "right": swizzled(64, n), "out": swizzled(64, n)}
    arguments |= pointers("starts", "counts") | numbers("num_experts", "height", "columns") | {"squares": "*fp32"}
    constants = {"SQUARES": squares, "PROGRAMS": 132, "BLOCK_N": n, "STAGES": config.num_stages, "GROUP": config.group}
    kernel = compiled(hopper_weights._rows_by_rows_kernel, GluonASTSource, arguments, constants, num_warps=4)
    assert_fits(kernel, tmp_path, "wgmma")


def test_decode_product(tmp_path: Path) -> None:
    config = decode.DecodeConfig()
    arguments = dict.fromkeys(("hidden_states", "gate_up_proj", "acted"), "*bf16") | {"expert_indices": "*i64"}
    arguments |= numbers("num_pairs", "hidden_size", "width")
    constants = {"ACT": "silu", "TOP_K": 2, "SLOTS": 16, "PAIRS": 32, "COLUMNS": config.columns, "DEPTH": config.depth}
    kernel = compiled(
        decode._decode_up_kernel,
        ASTSource,
        arguments,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert_fits(kernel, tmp_path, "mma.sync")


def test_plan_and_gate_backward(tmp_path: Path) -> None:
    arguments = pointers("block_counts", "sources", "starts", "counts", "tile_starts", "tile_experts")
    arguments |= numbers("num_blocks", "num_experts", "num_tiles")
    constants = {"WIDTH": 16, "ALIGN": 128, "BLOCKS_PER_STEP": 64, "TILES_PER_STEP": 256}
    assert_fits(compiled(routing._plan_kernel, ASTSource, arguments, constants, num_warps=8), tmp_path, None)
    arguments = dict.fromkeys(("grad", "gate_up", "gate_up_grad"), "*bf16") | pointers("sources", "num_rows")
    arguments |= dict.fromkeys(("expert_weights", "weights_grad"), "*fp32") | numbers("width")
    constants = {"ACT": "silu", "CHUNK": 1024}
    assert_fits(compiled(rows._gate_backward_kernel, ASTSource, arguments, constants, num_warps=4), tmp_path, None)


def test_spread_of_rows_between_processes(tmp_path: Path) -> None:
    arguments = dict.fromkeys(("values", "arrived", "away"), "*bf16") | {"sources": "*i64"}
    arguments |= pointers("starts", "counts", "half_experts") | numbers("num_arrived", "width")
    constants = {"TOP_K": 2, "ALIGN": 64, "CHUNK": 2048}
    assert_fits(compiled(expert_rows._spread_kernel, ASTSource, arguments, constants, num_warps=4), tmp_path, None)


def test_sparsemixers_choice(tmp_path: Path) -> None:
    inputs = ("scores", "exponentials1", "exponentials2", "coins1", "coins2", "weights", "chances")
    arguments = dict.fromkeys(inputs, "*fp32") | {"indices": "*i64"} | numbers("num_tokens")
    arguments |= dict.fromkeys(("threshold", "coin_threshold", "low", "high"), "fp32")
    shape = {"NUM_EXPERTS": 16, "PADDED": 16, "TOKENS": mixer._TOKENS}
    assert_fits(compiled(mixer._choose_kernel, ASTSource, arguments, shape, num_warps=4), tmp_path, None)
    arguments = dict.fromkeys(("grad", "scores", "scores_grad"), "*fp32") | {"indices": "*i64", "threshold": "fp32"}
    arguments |= numbers("num_tokens")
    assert_fits(compiled(mixer._choose_backward_kernel, ASTSource, arguments, shape, num_warps=4), tmp_path, None)
