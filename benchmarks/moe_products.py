"""The six grouped products of one MoE feed-forward, each kernel beside torch's: what moe/kernels/tuning.py is read off.

    python benchmarks/moe_products.py                       # the Phi-3.5-MoE layer, needs a Hopper GPU
    TRITON_INTERPRET=1 python benchmarks/moe_products.py    # a tiny layer on the CPU: shows that it runs

All candidates of a product take turns, round after round; medians. Rates count useful operations, not padding. Prints
a table and, last, one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import moe_layer  # noqa: E402

from moe.kernels import grouped_gemm, rows  # noqa: E402
from moe.kernels.grouped_gemm import GemmConfig  # noqa: E402
from moe.kernels.hopper_config import HopperConfig  # noqa: E402
from moe.kernels.routing import RoutingPlan, plan_routing  # noqa: E402

Products = dict[str, Callable[[], object]]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 4096 16384 on a GPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    if not gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("no CUDA device is visible; TRITON_INTERPRET=1 runs a tiny layer on the CPU")
    dtype = torch.bfloat16 if gpu else torch.float32
    shape = moe_layer.Shape(4096, 6400, 16) if gpu else moe_layer.Shape(32, 64, 4, top_k=1)
    gate_up, down = moe_layer.draw_weights(shape, device, dtype)
    record = {"environment": moe_layer.environment(device, arguments.commit), "products": []}
    record["environment"]["command"] = "python benchmarks/moe_products.py"
    for tokens in arguments.tokens or ([4096, 16384] if gpu else [8]):
        for skew in (False, True):
            inputs = draw(shape, tokens, skew, device, dtype)
            for name, (candidates, flops) in products(shape, tokens, inputs, gate_up, down, gpu).items():
                for kernel, spent in race(candidates, device, arguments.rounds if gpu else 1).items():
                    rate = flops / spent / 1e9
                    routing = "skewed" if skew else "random"
                    row = {"product": name, "kernel": kernel, "tokens": tokens, "routing": routing}
                    record["products"].append(row | {"ms": spent, "tflops": rate})
                    print(f"{name:14s}{kernel:10s}{tokens:7d} {routing:8s}{spent:9.3f} ms{rate:8.1f} TFLOP/s")
    print(json.dumps(record))


def draw(
    shape: moe_layer.Shape, tokens: int, skew: bool, device: torch.device, dtype: torch.dtype
) -> tuple[RoutingPlan, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A plan and sorted rows of widths D, F and 2F; empty rows are zeros."""
    indices, _ = moe_layer.draw_routing(shape, tokens, skew, device)
    plan = plan_routing(indices, shape.num_experts, grouped_gemm.HALF_ROWS)
    wide = [
        rows.gather_rows(torch.randn(tokens, width, device=device, dtype=dtype), plan, shape.top_k)
        for width in (shape.hidden, shape.ffn, 2 * shape.ffn)
    ]
    return plan, *wide


def products(
    shape: moe_layer.Shape,
    tokens: int,
    inputs: tuple[RoutingPlan, torch.Tensor, torch.Tensor, torch.Tensor],
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gpu: bool,
) -> dict[str, tuple[Products, float]]:
    """Every product's candidates and operations."""
    plan, narrow, gated, double = inputs
    small = 2.0 * tokens * shape.top_k * shape.hidden * shape.ffn
    triton = GemmConfig() if gpu else GemmConfig(block_n=64, block_k=32)
    hopper = HopperConfig()
    found: dict[str, tuple[Products, float]] = {}

    def add(name: str, flops: float, torchs: Callable[[], object] | None, ours: Callable[[], object]) -> Products:
        candidates = {"torch": torchs} if torchs is not None else {}
        candidates["triton"] = ours
        found[name] = (candidates, flops)
        return candidates

    ends, grouped = plan.starts[1:], torch._grouped_mm
    g = grouped_gemm
    up = add("up, gated", 2 * small, None, lambda: g.rows_by_experts_gated(narrow, gate_up, plan, "silu", triton, True))
    pairs = (
        ("down", gated, down, True, small),
        ("down_rows", narrow, down, False, small),
        ("up_rows", double, gate_up, False, 2 * small),
    )
    sums = (("down_weights", narrow, gated, small), ("up_weights", double, narrow, 2 * small))
    if gpu:
        from moe.kernels import hopper_gemm, hopper_weights

        up["hopper"] = lambda: hopper_gemm.rows_by_experts_gated(
            narrow, gate_up, plan, HopperConfig(num_stages=4), True
        )
    for name, left, weights, transposed, flops in pairs:
        other = weights.transpose(1, 2) if transposed else weights
        one = add(
            name,
            flops,
            lambda left=left, other=other: grouped(left, other, offs=ends),  # type: ignore[misc]
            lambda left=left, w=weights, t=transposed: g.rows_by_experts(left, w, plan, t, triton),  # type: ignore[misc]
        )
        if gpu:
            one["hopper"] = lambda left=left, w=weights, t=transposed: hopper_gemm.rows_by_experts(  # type: ignore[misc]
                left, w, plan, t, hopper
            )
    for name, left, right, flops in sums:
        sum_out = torch.empty((shape.num_experts, left.shape[1], right.shape[1]), dtype=left.dtype, device=left.device)
        one = add(
            name,
            flops,
            lambda left=left, right=right: grouped(left.t(), right, offs=ends),  # type: ignore[misc]
            lambda left=left, right=right, out=sum_out: g.rows_by_rows(left, right, plan, triton, out),  # type: ignore[misc]
        )
        if gpu:
            one["hopper"] = lambda left=left, right=right, out=sum_out: hopper_weights.rows_by_rows(  # type: ignore[misc]
                left, right, plan, hopper, out
            )
    return found


def race(candidates: Products, device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each candidate, taking turns after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    warm = 2 if device.type == "cuda" else 0
    for turn in range(rounds + warm):
        for name, call in candidates.items():
            spent = moe_layer.elapsed(call, device)
            if turn >= warm:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
