"""The sparse feed-forward of one token with experts in few bits, after ``moe.kernels.decode_step``.

The router's kernel is that one's. Only the codes of the chosen experts are read; the programs of the last kernel ask
for theirs while the one before still runs.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from moe.kernels.decode_step import SparseScratch, route, routing_of
from moe.layer import SparseMoE
from moe.quantized_experts import QuantizedExperts
from moe.router import SparseMixerRouter, TopKSoftmaxRouter
from phi35.kernels.common import activate, launch_options, wait_for_predecessor, wait_then_release
from phi35.kernels.operands import Norm
from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.kernels.shapes import WordConfig, choose
from phi35.quantization.kernels.vector import constants, operands
from phi35.quantization.kernels.words import dot_rows, hold_rows, load_halves, spread


def add_sparse_feed_forward(
    mlp: Any, hidden: torch.Tensor, norm: Norm, scratches: dict[tuple[int, ...], SparseScratch], pdl: bool
) -> torch.Tensor:
    """hidden (1, D) += routed experts of its norm; see ``moe.kernels.decode_step.add_sparse_feed_forward``."""
    gate_up, down = mlp.experts.held("gate_up_proj"), mlp.experts.held("down_proj")
    routing = routing_of(mlp.router)
    if down.shape not in scratches:
        scratches[down.shape] = SparseScratch(hidden, down.shape[0], routing.top_k, down.shape[2])
    scratch = scratches[down.shape]
    route(hidden, norm, mlp.router.weight, routing, scratch, pdl)
    expert_gate_up(gate_up, mlp.experts.hidden_act, scratch, choose(gate_up), pdl)
    expert_down_add(down, hidden, scratch, choose(down), pdl)
    return scratch.normed


def limit(mlp: Any, dtype: torch.dtype) -> str | None:
    """Why these kernels do not take a sparse layer, or None; a shared expert is the caller's."""
    if type(mlp) is not SparseMoE or type(mlp.experts) is not QuantizedExperts:
        return f"its experts are {type(mlp.experts).__name__} in {type(mlp).__name__}"
    if type(mlp.router) not in (SparseMixerRouter, TopKSoftmaxRouter):
        return f"its router is {type(mlp.router).__name__}"
    if mlp.router.weight.dtype != dtype or mlp.router.weight.shape[1] % 8:
        return f"its router's weight is {mlp.router.weight.dtype}, or its rows are no multiple of 8"
    return None


def expert_gate_up(
    gate_up_proj: QuantizedTensor, hidden_act: str, scratch: SparseScratch, config: WordConfig, pdl: bool
) -> None:
    """scratch.acted (k, F) from scratch.normed (1, D) and the chosen of (E, 2F, D)."""
    half, rows = gate_up_proj.shape[1] // 2, max(1, config.rows // 2)
    _expert_gate_up_kernel[(triton.cdiv(half, rows), scratch.indices.shape[0])](
        scratch.normed,
        *operands(gate_up_proj),
        scratch.indices,
        scratch.acted,
        half,
        ACT=hidden_act,
        ROWS=rows,
        EVEN=half % rows == 0,
        **constants(gate_up_proj, config),
        **launch_options(config.num_warps, pdl),
    )


def expert_down_add(
    down_proj: QuantizedTensor, hidden: torch.Tensor, scratch: SparseScratch, config: WordConfig, pdl: bool
) -> None:
    """hidden (1, D) += weighted sum of the chosen of (E, D, F) times the rows of scratch.acted."""
    num_rows, rows = down_proj.shape[1], max(1, config.rows // 2)
    _expert_down_kernel[(triton.cdiv(num_rows, rows),)](
        scratch.acted,
        *operands(down_proj),
        scratch.indices,
        scratch.weights,
        hidden,
        num_rows,
        TOP_K=scratch.indices.shape[0],
        ROWS=rows,
        EVEN=num_rows % rows == 0,
        **constants(down_proj, config),
        **launch_options(config.num_warps, pdl),
    )


@triton.jit
def _expert_gate_up_kernel(  # type: ignore[no-untyped-def]
    normed,
    codes,
    scale,
    zeros,
    row_scale,
    indices,
    acted,
    half,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    choice = tl.program_id(1)
    start = tl.program_id(0) * ROWS
    rows = start + tl.arange(0, ROWS)
    wait_then_release(PDL)
    base = tl.load(indices + choice) * (2 * half)
    gate_row, up_row = base + start, base + half + start
    gate_end, up_end = base + half, base + 2 * half
    gate_held = hold_rows(codes, scale, zeros, gate_row, gate_end, ROWS, WIDTH, LANES, KIND, GROUP, ZEROS, EVEN)
    up_held = hold_rows(codes, scale, zeros, up_row, up_end, ROWS, WIDTH, LANES, KIND, GROUP, ZEROS, EVEN)
    tiles = load_halves(normed, WIDTH, LANES)
    places = spread(tiles, (), (), 0.0, "none", WIDTH, LANES, KIND, ASM)
    gate = dot_rows(gate_held, places, row_scale, gate_row, gate_end, ROWS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM)
    up = dot_rows(up_held, places, row_scale, up_row, up_end, ROWS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM)
    out = acted + choice * half + rows
    tl.store(out, (activate(gate, ACT) * up).to(acted.dtype.element_ty), mask=rows < half)


@triton.jit
def _expert_down_kernel(  # type: ignore[no-untyped-def]
    acted,
    codes,
    scale,
    zeros,
    row_scale,
    indices,
    weights,
    hidden,
    num_rows,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    start = tl.program_id(0) * ROWS
    rows = start + tl.arange(0, ROWS)
    inside = rows < num_rows
    all_held = ()
    bases = ()
    for choice in tl.static_range(TOP_K):
        # Chosen before the predecessor began; past the first-level cache, which may hold an older choice.
        base = tl.load(indices + choice, cache_modifier=".cg") * num_rows
        held = hold_rows(
            codes, scale, zeros, base + start, base + num_rows, ROWS, WIDTH, LANES, KIND, GROUP, ZEROS, EVEN
        )
        all_held = all_held + (held,)  # type: ignore[assignment]
        bases = bases + (base,)  # type: ignore[assignment]
    wait_for_predecessor(PDL)
    total = tl.load(hidden + rows, mask=inside, other=0.0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        tiles = load_halves(acted + choice * WIDTH, WIDTH, LANES)
        places = spread(tiles, (), (), 0.0, "none", WIDTH, LANES, KIND, ASM)
        first, end = bases[choice] + start, bases[choice] + num_rows
        part = dot_rows(all_held[choice], places, row_scale, first, end, ROWS, WIDTH, LANES, KIND, ZEROS, BYTES, ASM)
        total += part * tl.load(weights + choice)
    tl.store(hidden + rows, total.to(hidden.dtype.element_ty), mask=inside)
