"""The sparse feed-forward of one token (batch 1) as three kernels of a decoding step, norm and residual included.

1. norm, router scores and choice of the experts: one program an expert, the last to finish chooses.
2. gate and up rows of the chosen experts, gated.
3. down rows of the chosen experts, weighted, added to the residual stream.

Only the weights of the chosen experts are read. The programs of the third kernel ask for theirs while the second still
runs: the choice is known by then.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from moe.experts import Experts
from moe.layer import SparseMoE
from moe.router import SparseMixerRouter, TopKSoftmaxRouter
from phi35.kernels.common import (
    activate,
    dot_tiles,
    launch_options,
    load_norm,
    load_tiles,
    load_vector,
    normalise,
    prefetch_rows,
    wait_for_predecessor,
    wait_then_release,
)
from phi35.kernels.configs import VectorConfig
from phi35.kernels.operands import Norm
from phi35.kernels.operations import is_plain
from phi35.kernels.tuning import StepTuning


@dataclass(frozen=True)
class Routing:
    """How scores become experts and weights.

    Attributes:
        kind: "sparsemixer" or "topk".
        top_k: experts of a token.
        jitter_eps: of SparseMixer's threshold.
        renormalize: of the softmax router.
        selection_bias: (E,) float32 or None.
    """

    kind: str
    top_k: int
    jitter_eps: float = 0.0
    renormalize: bool = True
    selection_bias: torch.Tensor | None = None


class SparseScratch:
    """What passes between the kernels: normed token, scores, choice, gated rows, arrivals (zero between launches)."""

    def __init__(self, hidden: torch.Tensor, num_experts: int, top_k: int, width: int) -> None:
        device = hidden.device
        self.normed = torch.empty_like(hidden)
        self.scores = torch.empty(num_experts, dtype=torch.float32, device=device)
        self.indices = torch.zeros(top_k, dtype=torch.int32, device=device)
        self.weights = torch.empty(top_k, dtype=torch.float32, device=device)
        self.acted = torch.empty(top_k, width, dtype=hidden.dtype, device=device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)


def add_sparse_feed_forward(
    mlp: Any,
    hidden: torch.Tensor,
    norm: Norm,
    scratches: dict[tuple[int, ...], "SparseScratch"],
    tuning: StepTuning,
    pdl: bool,
) -> torch.Tensor:
    """hidden (1, D) += routed experts of its norm; the shared expert is left to the caller.

    Args:
        mlp: a ``moe.layer.SparseMoE``.
        hidden: the residual stream.
        norm: before the router.
        scratches: buffers by shape of down_proj, shared by the layers of a step; made where absent.
        tuning: shapes of the programs.
        pdl: launch programmatically.

    Returns:
        (1, D) the normed token, which the next sparse layer overwrites.
    """
    experts, router = mlp.experts, mlp.router
    shape = tuple(experts.down_proj.shape)
    routing = routing_of(router)
    if shape not in scratches:
        scratches[shape] = SparseScratch(hidden, shape[0], routing.top_k, shape[2])
    scratch = scratches[shape]
    route(hidden, norm, router.weight, routing, scratch, pdl)
    expert_gate_up(experts.gate_up_proj, experts.hidden_act, scratch, tuning.expert_gate_up, pdl)
    expert_down_add(experts.down_proj, hidden, scratch, tuning.expert_down, pdl)
    return scratch.normed


def limit(mlp: Any, dtype: torch.dtype) -> str | None:
    """Why these kernels do not take a sparse layer, or None."""
    if type(mlp) is not SparseMoE or type(mlp.experts) is not Experts:
        return f"its experts are {type(mlp.experts).__name__} in {type(mlp).__name__}"
    if type(mlp.router) not in (SparseMixerRouter, TopKSoftmaxRouter):
        return f"its router is {type(mlp.router).__name__}"
    weights = [mlp.router.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj]
    if mlp.shared_expert is not None:
        linear = (mlp.shared_expert.gate_up_proj, mlp.shared_expert.down_proj)
        if not all(is_plain(module, dtype) for module in linear):
            return "its shared expert is no pair of plain matrices"
    if mlp.experts.num_experts != mlp.num_experts:
        return "its experts are spread over processes"
    if not all(weight.dtype == dtype and weight.is_contiguous() and weight.shape[-1] % 8 == 0 for weight in weights):
        return f"its weights are not all contiguous {dtype} with rows of multiples of 8"
    return None


def routing_of(router: Any) -> Routing:
    """What the kernels need to know of a router."""
    if isinstance(router, SparseMixerRouter):
        return Routing("sparsemixer", 2, jitter_eps=router.jitter_eps, selection_bias=router.selection_bias)
    return Routing("topk", router.top_k, renormalize=router.renormalize, selection_bias=router.selection_bias)


def route(
    hidden: torch.Tensor, norm: Norm, weight: torch.Tensor, routing: Routing, scratch: SparseScratch, pdl: bool
) -> None:
    """Fill ``scratch.normed``, ``scores``, ``indices`` and ``weights`` from hidden (1, D) and the router (E, D)."""
    num_experts, width = weight.shape
    bias = routing.selection_bias
    config = VectorConfig(rows=1, num_warps=8)
    _route_kernel[(num_experts,)](
        hidden,
        norm.weight,
        norm.bias,
        norm.eps,
        weight,
        scratch.scores if bias is None else bias,
        scratch.normed,
        scratch.scores,
        scratch.indices,
        scratch.weights,
        scratch.arrived,
        2 * routing.jitter_eps,
        NORM=norm.kind,
        KIND=routing.kind,
        TOP_K=routing.top_k,
        RENORMALIZE=routing.renormalize,
        BIAS=bias is not None,
        NUM_EXPERTS=num_experts,
        PADDED_EXPERTS=triton.next_power_of_2(num_experts),
        WIDTH=width,
        CHUNK=config.chunk(width, weight.element_size()),
        **launch_options(config.num_warps, pdl),
    )


def expert_gate_up(
    gate_up_proj: torch.Tensor, hidden_act: str, scratch: SparseScratch, config: VectorConfig, pdl: bool
) -> None:
    """scratch.acted (k, F) from scratch.normed (1, D) and the chosen of (E, 2F, D)."""
    _, double, width = gate_up_proj.shape
    half, rows = double // 2, max(1, config.rows // 2)
    _expert_gate_up_kernel[(triton.cdiv(half, rows), scratch.indices.shape[0])](
        scratch.normed,
        gate_up_proj,
        scratch.indices,
        scratch.acted,
        half,
        ACT=hidden_act,
        WIDTH=width,
        CHUNK=config.chunk(width, gate_up_proj.element_size()),
        ROWS=rows,
        EVEN=half % rows == 0,
        **launch_options(config.num_warps, pdl),
    )


def expert_down_add(
    down_proj: torch.Tensor, hidden: torch.Tensor, scratch: SparseScratch, config: VectorConfig, pdl: bool
) -> None:
    """hidden (1, D) += weighted sum of the chosen of (E, D, F) times the rows of scratch.acted."""
    _, num_rows, width = down_proj.shape
    asked = config.asked_ahead(config.rows, num_rows)
    _expert_down_kernel[(triton.cdiv(num_rows, config.rows),)](
        scratch.acted,
        down_proj,
        scratch.indices,
        scratch.weights,
        hidden,
        num_rows,
        *asked,
        TOP_K=scratch.indices.shape[0],
        WIDTH=width,
        CHUNK=config.chunk(width, down_proj.element_size()),
        ROWS=config.rows,
        EVEN=num_rows % config.rows == 0,
        PARTS=config.wave if asked[1] else 0,
        LANES=config.num_warps * 32,
        **launch_options(config.num_warps, pdl),
    )


@triton.jit
def _route_kernel(  # type: ignore[no-untyped-def]
    hidden,
    norm_weight,
    norm_bias,
    eps,
    weight,
    bias,
    normed,
    scores,
    indices,
    weights,
    arrived,
    threshold,
    NORM: tl.constexpr,
    KIND: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BIAS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    expert = tl.program_id(0)
    kind = normed.dtype.element_ty
    row = load_vector(weight + expert * WIDTH, WIDTH, CHUNK)
    norms, norm_biases = load_norm(norm_weight, norm_bias, NORM, WIDTH, CHUNK)
    wait_for_predecessor(PDL)
    chunks = normalise(load_vector(hidden, WIDTH, CHUNK), norms, norm_biases, eps, NORM, WIDTH, CHUNK)
    total = tl.zeros((CHUNK,), tl.float32)
    for chunk in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        # Router and experts read the token rounded, as in the plain path.
        token = chunks[chunk].to(kind)
        total += token.to(tl.float32) * row[chunk].to(tl.float32)
        if expert == 0:
            tl.store(normed + columns, token, mask=columns < WIDTH)
    tl.store(scores + expert, tl.sum(total, axis=0))
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if before == NUM_EXPERTS - 1:
        tl.store(arrived, 0)
        experts = tl.arange(0, PADDED_EXPERTS)
        real = experts < NUM_EXPERTS
        found = tl.load(scores + experts, mask=real, other=float("-inf"), cache_modifier=".cg")
        added = tl.zeros((PADDED_EXPERTS,), tl.float32)
        if BIAS:
            added = tl.load(bias + experts, mask=real, other=0.0)
        if KIND == "sparsemixer":
            _choose_sparsemixer(found, added, experts, threshold, indices, weights, TOP_K)
        else:
            _choose_topk(found, added, experts, real, indices, weights, TOP_K, RENORMALIZE)


@triton.jit
def _choose_sparsemixer(scores, bias, experts, threshold, indices, weights, TOP_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """As ``moe.router.sparsemixer`` at inference."""
    candidates = scores
    for choice in tl.static_range(TOP_K):
        chosen = tl.argmax(candidates + bias, axis=0, tie_break_left=True)
        best = tl.max(candidates, axis=0)
        far = (best - scores) / tl.maximum(tl.abs(scores), best) > threshold
        kept = (candidates > float("-inf")) & ((far == 0) | (experts == chosen))
        chances = tl.where(kept, tl.exp(candidates - best), 0.0)
        weight = tl.sum(tl.where(experts == chosen, chances, 0.0), axis=0) / tl.sum(chances, axis=0)
        tl.store(indices + choice, chosen.to(tl.int32))
        tl.store(weights + choice, weight)
        candidates = tl.where(experts == chosen, float("-inf"), candidates)


@triton.jit
def _choose_topk(  # type: ignore[no-untyped-def]
    scores, bias, experts, real, indices, weights, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr
):
    """The k experts of the highest (biased) chances, and their chances, over their sum if so wanted."""
    chances = tl.exp(scores - tl.max(scores, axis=0))
    chances = chances / tl.sum(chances, axis=0)
    preference = tl.where(real, chances + bias, float("-inf"))
    taken = tl.zeros_like(experts)
    for choice in tl.static_range(TOP_K):
        chosen = tl.argmax(tl.where(taken == 0, preference, float("-inf")), axis=0, tie_break_left=True)
        taken = tl.where(experts == chosen, choice + 1, taken)
        tl.store(indices + choice, chosen.to(tl.int32))
    total = tl.sum(tl.where(taken > 0, chances, 0.0), axis=0) if RENORMALIZE else 1.0
    tl.store(weights + taken - 1, chances / total, mask=taken > 0)


@triton.jit
def _expert_gate_up_kernel(  # type: ignore[no-untyped-def]
    normed,
    gate_up_proj,
    indices,
    acted,
    half,
    ACT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    count: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    choice = tl.program_id(1)
    wait_then_release(PDL)
    expert = tl.load(indices + choice).to(tl.int64)
    gate_at = gate_up_proj + expert * half * 2 * WIDTH
    gate_tiles = load_tiles(gate_at, rows, half, WIDTH, CHUNK, EVEN)
    up_tiles = load_tiles(gate_at + half.to(tl.int64) * WIDTH, rows, half, WIDTH, CHUNK, EVEN)
    chunks = load_vector(normed, WIDTH, CHUNK)
    gate = dot_tiles(gate_tiles, chunks, count)
    up = dot_tiles(up_tiles, chunks, count)
    out = acted + choice * half + rows
    tl.store(out, (activate(gate, ACT) * up).to(acted.dtype.element_ty), mask=rows < half)


@triton.jit
def _expert_down_kernel(  # type: ignore[no-untyped-def]
    acted,
    down_proj,
    indices,
    weights,
    hidden,
    num_rows,
    ahead_row,
    ahead_rows,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    count: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    all_tiles = ()
    for choice in tl.static_range(TOP_K):
        # Chosen before the predecessor began; past the first-level cache, which may hold an older choice.
        expert = tl.load(indices + choice, cache_modifier=".cg").to(tl.int64)
        at = down_proj + expert * num_rows * WIDTH
        all_tiles = all_tiles + (load_tiles(at, rows, num_rows, WIDTH, CHUNK, EVEN),)  # type: ignore[assignment]
        if PDL and PARTS > 0:
            prefetch_rows(at, ahead_row, ahead_rows, WIDTH, PARTS, LANES)
    wait_for_predecessor(PDL)
    total = tl.load(hidden + rows, mask=inside, other=0.0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        chunks = load_vector(acted + choice * WIDTH, WIDTH, CHUNK)
        total += dot_tiles(all_tiles[choice], chunks, count) * tl.load(weights + choice)
    tl.store(hidden + rows, total.to(hidden.dtype.element_ty), mask=inside)
