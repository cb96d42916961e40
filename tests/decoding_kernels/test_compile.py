"""The decoding kernels compile for Hopper at full size: wide loads, and weights asked for before the wait."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from compiled_kernels import SHARED_MEMORY, compile_kernel, machine_code  # noqa: E402

from moe.kernels import decode_step  # noqa: E402
from phi35.kernels import attention, batched, coded_attention, sampling, vector  # noqa: E402
from phi35.kernels.tuning import DEFAULT  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter replaces the compiler"
)


def typed(kind: str, *names: str) -> dict[str, str]:
    """Arguments of one type."""
    return dict.fromkeys(names, kind)


def loads_around_the_wait(instructions: list[str]) -> tuple[int, int]:
    """Loads of 16 bytes a thread before and after the wait for the predecessor."""
    (wait,) = [place for place, text in enumerate(instructions) if "ACQBULK" in text]
    wide = [place for place, text in enumerate(instructions) if "LDG.E" in text and ".128" in text]
    return sum(place < wait for place in wide), sum(place > wait for place in wide)


def test_all_weights_are_asked_for_before_the_wait(tmp_path: Path) -> None:
    """gate_up of phi-3.5-mini: 4 rows in 3 chunks, and the norm's 3; then the vector's 3."""
    config = DEFAULT.gate_up
    arguments = typed("*bf16", "hidden", "norm_weight", "norm_bias", "weight", "acted") | {"eps": "fp32", "half": "i32"}
    arguments |= typed("i32", "ahead_row", "ahead_rows")
    constants = {"NORM": "rmsnorm", "ACT": "silu", "WIDTH": 3072, "CHUNK": config.chunk(3072, 2)}
    constants |= {"ROWS": config.rows // 2, "EVEN": True, "PARTS": 528, "LANES": 128, "PDL": True}
    kernel = compile_kernel(vector._gate_up_kernel, arguments, constants, config.num_warps)
    instructions, stack = machine_code(kernel, tmp_path)
    chunks = 3072 // config.chunk(3072, 2)
    assert loads_around_the_wait(instructions) == ((config.rows + 1) * chunks, chunks)
    assert stack == 0


def test_down_weights_of_chosen_experts_are_asked_for_before_the_wait(tmp_path: Path) -> None:
    config = DEFAULT.expert_down
    arguments = typed("*bf16", "acted", "down_proj", "hidden") | {"weights": "*fp32", "indices": "*i32"}
    constants = {"TOP_K": 2, "WIDTH": 6400, "CHUNK": config.chunk(6400, 2), "ROWS": config.rows}
    constants |= {"EVEN": True, "PARTS": 264, "LANES": 32 * config.num_warps, "PDL": True}
    arguments |= typed("i32", "num_rows", "ahead_row", "ahead_rows")
    kernel = compile_kernel(decode_step._expert_down_kernel, arguments, constants, config.num_warps)
    instructions, stack = machine_code(kernel, tmp_path)
    before, _ = loads_around_the_wait(instructions)
    assert before == 2 * config.rows * -(-6400 // config.chunk(6400, 2))
    assert stack == 0


def test_query_key_value_product_spills_nothing_but_the_sine(tmp_path: Path) -> None:
    config = DEFAULT.qkv
    arguments = typed("*bf16", "hidden", "norm_weight", "norm_bias", "weight", "bias", "query", "keys", "values")
    arguments |= typed("*fp32", "inv_freq", "scaling") | {"eps": "fp32", "lengths": "*i64", "rope_long": "*i1"}
    constants: dict[str, Any] = {"NORM": "layernorm", "BIAS": True, "NUM_HEADS": 32, "NUM_KV": 8, "HALF": 64}
    constants |= {
        "WIDTH": 4096,
        "CHUNK": config.chunk(4096, 2),
        "PAIRS": config.rows // 2,
        "PAGE": 64,
        "PARTS": 528,
        "LANES": 128,
        "PDL": True,
    }
    arguments |= typed("i32", "capacity", "ahead_row", "ahead_rows") | {"table": "*i32"}
    kernel = compile_kernel(vector._qkv_kernel, arguments, constants, config.num_warps)
    instructions, stack = machine_code(kernel, tmp_path)
    # The reduction of large angles needs 32 bytes.
    assert stack <= 32
    assert loads_around_the_wait(instructions)[0] >= config.rows * 4096 // config.chunk(4096, 2)


@pytest.mark.parametrize(
    ("group", "head_dim", "page", "kind", "tokens"),
    [
        *((*shape, "none", 1) for shape in ((1, 96, 0), (4, 128, 0), (1, 96, 64), (4, 128, 64))),
        (1, 96, 0, "int8", 1),
        (4, 128, 64, "int8", 1),
        (1, 96, 64, "fp8", 1),
        (1, 96, 64, "none", 9),
        (4, 128, 64, "none", 9),
    ],
)
def test_attention_streams_keys_through_shared_memory(
    tmp_path: Path, group: int, head_dim: int, page: int, kind: str, tokens: int
) -> None:
    """One token a row, and nine side by side that share its keys."""
    config = DEFAULT.one if group * tokens == 1 else DEFAULT.grouped
    arguments = typed("*bf16", "query", "out", "key_scales", "value_scales") | typed("*fp32", "sums", "scales")
    arguments |= typed("*bf16" if kind == "none" else "*u8", "keys", "values") | {"exponent": "i32"}
    arguments |= {"table": "*i32", "lengths": "*i64", "arrived": "*i32", "capacity": "i32", "softmax_scale": "fp32"}
    constants = {"NUM_KV": 32 // group, "GROUP": group, "HEAD_DIM": head_dim, "PADDED_DIM": 128, "TOKENS": tokens}
    constants |= {"PADDED_TOKENS": 16 if tokens > 1 else 1, "PADDED_GROUP": 64 if group * tokens > 16 else 16}
    constants |= {"SPLITS": 8, "PADDED_SPLITS": 8, "BLOCK": config.block, "PAGE": page, "STAGES": config.num_stages}
    constants |= {"WINDOW": 0, "PREFETCHED": attention.PREFETCHED_STEPS, "PARTS": 256, "LANES": 128, "AHEAD": 3}
    constants |= {"PDL": True, "KIND": kind, **coded_attention.widths(head_dim)}
    arguments |= typed("*bf16", "ahead_a", "ahead_b", "ahead_c") | typed("i32", "bytes_a", "bytes_b", "bytes_c")
    kernel = compile_kernel(attention._attend_kernel, arguments, constants, config.num_warps)
    instructions, stack = machine_code(kernel, tmp_path)
    assert kernel.metadata.shared <= SHARED_MEMORY // 2 and stack == 0
    assert any("LDGSTS.E.BYPASS.128" in text for text in instructions)
    assert any("HMMA" in text or "HGMMA" in text for text in instructions) == (group * tokens > 1)
    # Prefetched before the wait.
    (wait,) = [place for place, text in enumerate(instructions) if "ACQBULK" in text]
    assert sum("UBLKPF" in text for text in instructions[:wait]) == 2 * attention.PREFETCHED_STEPS + 3


def test_sampler_router_and_batched_kernels_compile(tmp_path: Path) -> None:
    arguments = typed("*fp32", "logits", "temperatures", "top_ps", "min_ps", "penalties", "logprobs")
    arguments |= typed("*i64", "steps", "tokens", "lengths") | typed("*i32", "top_ks", "history")
    arguments |= {"draws": "*fp64", "seen": "*u8", "vocab": "i32", "masked": "*u8", "allowed": "*i32"}
    arguments |= typed("i32", "draws_stride", "history_stride", "allowed_stride")
    constants: dict[str, Any] = {"DRAWS": 256, "RING": 64, "PADDED": 32768, "PDL": True}
    assert compile_kernel(sampling._choose_kernel, arguments, constants, 32).metadata.shared < 65536
    arguments = typed("*bf16", "hidden", "norm_weight", "norm_bias", "weight", "normed")
    arguments |= typed("*fp32", "bias", "scores", "weights") | typed("*i32", "indices", "arrived")
    constants = {"NORM": "layernorm", "KIND": "sparsemixer", "TOP_K": 2, "RENORMALIZE": True, "BIAS": True}
    constants |= {"NUM_EXPERTS": 16, "PADDED_EXPERTS": 16, "WIDTH": 4096, "CHUNK": 2048, "PDL": True}
    compile_kernel(decode_step._route_kernel, arguments | typed("fp32", "eps", "threshold"), constants, 8)


@pytest.mark.parametrize("kind", ["none", "int8", "fp8"])
def test_rotations_into_the_cache_compile(kind: str) -> None:
    cached = typed("*bf16" if kind == "none" else "*u8", "keys", "values") | typed(
        "*bf16", "key_scales", "value_scales"
    )
    cached |= typed("*fp32", "inv_freq", "scaling") | {"capacity": "i32", "table": "*i32"}
    constants: dict[str, Any] = {"NUM_HEADS": 32, "NUM_KV": 32, "HALF": 48, "PADDED_HALF": 64, "PAGE": 64, "KIND": kind}
    arguments = typed("*bf16", "projected", "query") | cached | {"lengths": "*i64", "rope_long": "*i1"}
    compile_kernel(batched._rotate_kernel, arguments, constants | {"PDL": True}, 1)
    arguments = typed("*bf16", "projected") | typed("*i32", "positions", "places", "use_long") | cached
    constants |= {"HEADS": batched.HEADS_PER_PROGRAM}
    compile_kernel(batched._rotate_prompt_kernel, arguments | {"exponent": "i32"}, constants, 2)
