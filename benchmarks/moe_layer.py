"""One MoE feed-forward, every backend beside its peers, in one run.

    python benchmarks/moe_layer.py                    # the Phi-3.5-MoE layer on a GPU; a small one on a CPU
    python benchmarks/moe_layer.py --output benchmarks/results/moe_layer.json

First every candidate's output and gradients are compared with a float32 loop over experts. Then forward, and forward
plus backward, of all candidates in turn, round after round, so that all see the same clocks and temperatures; medians.
MegaBlocks runs in its own weight layout, without the packing that our backend of that name pays. Rates count
6 N k D F operations forward and three times that with backward. Saved is what lies allocated between forward and
backward, output included; peak is what the pass allocates at most beyond the weights' gradients. Prints a table and,
last, one JSON line.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe import experts  # noqa: E402

NAMES = ("triton", "grouped_mm", "megablocks native", "transformers grouped_mm")


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer."""

    hidden: int
    ffn: int
    num_experts: int
    top_k: int = 2

    def flops(self, tokens: int) -> float:
        """Operations of a forward pass."""
        return 6.0 * tokens * self.top_k * self.hidden * self.ffn


@dataclass
class Candidate:
    """A layer to time: ``run(tokens, indices, weights)``, its trainable weights, and how to read their gradients."""

    name: str
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    parameters: list[torch.Tensor]
    canonical_grads: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    results: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 4096 16384 on a GPU")
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 15 on a GPU, 3 on a CPU)")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    gpu = device.type == "cuda"
    shape = Shape(hidden=4096, ffn=6400, num_experts=16) if gpu else Shape(hidden=256, ffn=320, num_experts=8)
    dtype = torch.bfloat16 if gpu else torch.float32
    tokens = arguments.tokens or ([4096, 16384] if gpu else [256])
    rounds = arguments.rounds or (15 if gpu else 3)

    record: dict[str, Any] = {"environment": environment(device, arguments.commit), "shape": vars(shape)}
    gate_up, down = draw_weights(shape, device, dtype)
    candidates, absent = build(shape, gate_up, down)
    record["absent"] = absent
    record["check"] = check(candidates, shape, device, dtype)
    size = 8192 if gpu else 512
    record["dense_tflops"] = dense_rate(size, device, dtype, rounds)
    if gpu:
        record["copy_tb_per_s"] = copy_rate(device)
    record["layer"] = []
    for count in tokens:
        for skew in (False, True):
            record["layer"] += time_layer(candidates, shape, count, skew, device, dtype, rounds)
    record["dense_tflops_after"] = dense_rate(size, device, dtype, rounds)
    if gpu:
        try:
            record["capture"] = capture_check(candidates[0], shape, device, dtype)
        except RuntimeError as error:
            record["capture"] = {"name": candidates[0].name, "error": str(error)}
        record["decode"] = [
            row for count in arguments.decode for row in time_decode(candidates, shape, count, record["copy_tb_per_s"])
        ]
    report(record)
    line = json.dumps(record)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(line)


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What ran where."""
    if commit is None:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = asked.stdout.strip() or "unknown"
    versions = {}
    for name in ("torch", "triton", "transformers", "megablocks", "grouped_gemm"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "commit": commit,
        "command": " ".join(["python", "benchmarks/moe_layer.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def draw_weights(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical weights, normal with standard deviation 0.02."""
    generator = torch.Generator(device=device).manual_seed(0)
    sizes = ((shape.num_experts, 2 * shape.ffn, shape.hidden), (shape.num_experts, shape.hidden, shape.ffn))
    gate_up, down = (torch.randn(size, device=device, dtype=dtype, generator=generator) * 0.02 for size in sizes)
    return gate_up, down


def draw_routing(
    shape: Shape, tokens: int, skew: bool, device: torch.device, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, k) experts, uniform or with expert 3 at four times the mean load, and (N, k) weights."""
    generator = torch.Generator(device=device).manual_seed(seed)
    scores = torch.rand(tokens, shape.num_experts, device=device, generator=generator)
    if skew:
        share = min(1.0, 4 * shape.top_k / shape.num_experts)
        scores[:, 3] = -1.0
        scores[torch.rand(tokens, device=device, generator=generator) < share, 3] = 2.0
    indices = scores.topk(shape.top_k, dim=1).indices
    return indices, torch.rand(tokens, shape.top_k, device=device, generator=generator)


def build(shape: Shape, gate_up: torch.Tensor, down: torch.Tensor) -> tuple[list[Candidate], dict[str, str]]:
    """Every candidate that can run here, and why the others cannot."""
    found, absent = [], {}
    builders = (build_backend, build_backend, build_megablocks, build_transformers)
    for name, builder in zip(NAMES, builders, strict=True):
        try:
            found.append(builder(name, shape, gate_up, down))
        except (ImportError, ValueError) as error:
            absent[name] = str(error)
    return found, absent


def build_backend(name: str, shape: Shape, gate_up: torch.Tensor, down: torch.Tensor) -> Candidate:
    """One of our backends on the canonical weights, shared between candidates."""
    experts.check_backend(name)
    run = experts.BACKENDS[name].run
    assert run is not None
    gate_up, down = gate_up.detach().requires_grad_(), down.detach().requires_grad_()
    return Candidate(
        name,
        lambda tokens, indices, weights: run(tokens, indices, weights, gate_up, down, "silu"),
        [gate_up, down],
        lambda: (gate_up.grad, down.grad),  # type: ignore[return-value, arg-type]
    )


def build_megablocks(name: str, shape: Shape, gate_up: torch.Tensor, down: torch.Tensor) -> Candidate:
    """MegaBlocks with weights of its own layout."""
    experts.check_backend("megablocks")
    from moe.megablocks_backend import dropless_layer, pack

    layer = dropless_layer(shape.num_experts, shape.hidden, shape.ffn, shape.top_k, "silu")
    packed = {key: value.detach().clone().requires_grad_() for key, value in pack(gate_up, down).items()}
    w1, v1, w2 = packed["mlp.w1"], packed["mlp.v1"], packed["mlp.w2"]

    def run(tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        inputs = (tokens, indices, weights.to(tokens.dtype), indices)
        return torch.func.functional_call(layer, packed, inputs, strict=True)

    def grads() -> tuple[torch.Tensor, torch.Tensor]:
        rows = (shape.num_experts, shape.ffn, shape.hidden)
        up = torch.cat([w1.grad.view(rows), v1.grad.view(rows)], dim=1)  # type: ignore[union-attr]
        return up, w2.grad.view(rows).transpose(1, 2)  # type: ignore[union-attr]

    return Candidate(name, run, [w1, v1, w2], grads)


def build_transformers(name: str, shape: Shape, gate_up: torch.Tensor, down: torch.Tensor) -> Candidate:
    """transformers' phimoe experts with its grouped product."""
    from transformers import PhimoeConfig
    from transformers.models.phimoe.modeling_phimoe import PhimoeExperts

    config = PhimoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        layer = PhimoeExperts(config)
    layer.gate_up_proj, layer.down_proj = nn.Parameter(gate_up.detach()), nn.Parameter(down.detach())
    return Candidate(
        name,
        lambda tokens, indices, weights: layer(tokens, indices, weights.to(tokens.dtype)),
        [layer.gate_up_proj, layer.down_proj],
        lambda: (layer.gate_up_proj.grad, layer.down_proj.grad),  # type: ignore[return-value, arg-type]
    )


def check(
    candidates: list[Candidate], shape: Shape, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Relative errors against a float32 loop: 300 tokens, skewed, one expert without tokens.

    Raises:
        RuntimeError: if a candidate is further off than rounding explains.
    """
    tokens = torch.randn(
        300, shape.hidden, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(1)
    )
    indices, weights = draw_routing(shape, 300, True, device, seed=1)
    indices[indices == 5] = 6
    indices[:, 1] = torch.where(indices[:, 0] == indices[:, 1], 7, indices[:, 1])
    upstream = torch.randn(tokens.shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(2))
    wide = [value.detach().float().requires_grad_() for value in (tokens, weights, *candidates[0].parameters[:2])]
    if len(candidates[0].parameters) != 2:
        raise RuntimeError("the first candidate must hold the canonical weights")
    expected = experts.loop(wide[0], indices, *wide[1:])
    expected.backward(upstream.float())
    errors = {}
    for candidate in candidates:
        mine = [tokens.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = candidate.run(mine[0], indices, mine[1])
        out.backward(upstream)
        found = (out, mine[0].grad, mine[1].grad, *candidate.canonical_grads())
        wanted = (expected, *(value.grad for value in wide))
        labels = ("output", "hidden_states", "expert_weights", "gate_up_proj", "down_proj")
        errors[candidate.name] = {
            label: float((a.detach().float() - b.detach()).norm() / b.detach().norm())
            for label, a, b in zip(labels, found, wanted, strict=True)
        }
        clear(candidate)
        worst = max(errors[candidate.name].values())
        if not worst < 0.02:
            raise RuntimeError(f"{candidate.name} is off by {worst} (relative): {errors[candidate.name]}")
    return errors


def clear(candidate: Candidate) -> None:
    """Drop the gradients of the weights."""
    for parameter in candidate.parameters:
        parameter.grad = None


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, by device events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # About a millisecond of idling on the device, so that the host is ahead, as it is in the middle of a model.
    torch.cuda._sleep(2_000_000)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def dense_rate(size: int, device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """TFLOP/s of a square matrix product."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [elapsed(lambda: left @ right, device) for _ in range(rounds + 3)][3:]
    return 2 * size**3 / statistics.median(times) / 1e9


def copy_rate(device: torch.device) -> float:
    """TB/s of a device copy, bytes read plus bytes written."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = [elapsed(lambda: target.copy_(source), device) for _ in range(13)][3:]
    return 2 * source.numel() / statistics.median(times) / 1e9


def time_layer(
    candidates: list[Candidate],
    shape: Shape,
    count: int,
    skew: bool,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> list[dict[str, Any]]:
    """Forward, forward plus backward and peak memory of every candidate, in turn."""
    tokens = torch.randn(count, shape.hidden, device=device, dtype=dtype).requires_grad_()
    indices, weights = draw_routing(shape, count, skew, device)
    weights.requires_grad_()
    upstream = torch.randn(count, shape.hidden, device=device, dtype=dtype)
    forward: dict[str, list[float]] = {one.name: [] for one in candidates}
    both: dict[str, list[float]] = {one.name: [] for one in candidates}
    peaks: dict[str, float] = {}
    saved: dict[str, float] = {}
    before = 0

    def step(one: Candidate) -> None:
        out = one.run(tokens, indices, weights)
        if device.type == "cuda":
            saved[one.name] = (torch.cuda.memory_allocated() - before) / 2**30
        out.backward(upstream)

    def look(one: Candidate) -> None:
        with torch.no_grad():
            one.run(tokens, indices, weights)

    for turn in range(rounds + 2):
        for one in candidates:
            clear(one)
            tokens.grad = weights.grad = None
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            both_time = elapsed(lambda one=one: step(one), device)  # type: ignore[misc]
            if device.type == "cuda":
                held = sum(parameter.numel() * parameter.element_size() for parameter in one.parameters)
                peaks[one.name] = (torch.cuda.max_memory_allocated() - before - held) / 2**30
            clear(one)
            forward_time = elapsed(lambda one=one: look(one), device)  # type: ignore[misc]
            if turn >= 2:
                both[one.name].append(both_time)
                forward[one.name].append(forward_time)
    flops = shape.flops(count)
    rows = []
    for one in candidates:
        ahead, full = statistics.median(forward[one.name]), statistics.median(both[one.name])
        rows.append(
            {
                "name": one.name,
                "tokens": count,
                "routing": "skewed" if skew else "random",
                "forward_ms": ahead,
                "forward_tflops": flops / ahead / 1e9,
                "forward_backward_ms": full,
                "forward_backward_tflops": 3 * flops / full / 1e9,
                "saved_gib": saved.get(one.name),
                "peak_gib": peaks.get(one.name),
            }
        )
    return rows


def capture_check(candidate: Candidate, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Forward and backward captured in a CUDA graph, replayed with another routing, against eager; no host sync."""
    tokens = torch.randn(1024, shape.hidden, device=device, dtype=dtype).requires_grad_()
    indices, weights = draw_routing(shape, 1024, False, device)
    upstream = torch.randn_like(tokens)

    def step() -> tuple[torch.Tensor, ...]:
        out = candidate.run(tokens, indices, weights)
        return out.detach(), *torch.autograd.grad(out, [tokens, *candidate.parameters], upstream)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other, _ = draw_routing(shape, 1024, True, device, seed=5)
    indices.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    equal = all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
    return {"name": candidate.name, "host_synchronisations": 0, "replay_equals_eager_bit_for_bit": equal}


def time_decode(candidates: list[Candidate], shape: Shape, count: int, bandwidth: float) -> list[dict[str, Any]]:
    """A few tokens, forward only, as CUDA graph replays over several routings; against the weights' bytes."""
    device, dtype = candidates[0].parameters[0].device, candidates[0].parameters[0].dtype
    tokens = torch.randn(count, shape.hidden, device=device, dtype=dtype)
    routings = [draw_routing(shape, count, False, device, seed) for seed in range(8)]
    chosen = statistics.mean(indices.unique().numel() for indices, _ in routings)
    bound = chosen * 3 * shape.hidden * shape.ffn * dtype.itemsize / bandwidth / 1e6
    rows = []
    for one in candidates:

        def all_routings(one: Candidate = one) -> None:
            with torch.no_grad():
                for indices, weights in routings:
                    one.run(tokens, indices, weights)

        all_routings()
        torch.cuda.synchronize()
        graphed = one.name in experts.BACKENDS  # the others may read counts on the host
        replay: Callable[[], object] = all_routings
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                all_routings()
            replay = graph.replay
        times = [elapsed(replay, device) for _ in range(13)][3:]
        spent = 1e3 * statistics.median(times) / len(routings)
        rows.append(
            {
                "name": one.name,
                "tokens": count,
                "graph": graphed,
                "us": spent,
                "bound_us": bound,
                "of_bound": bound / spent,
                "experts": chosen,
            }
        )
    return rows


def report(record: dict[str, Any]) -> None:
    """The tables."""
    dense = record["dense_tflops"]
    print(json.dumps(record["environment"]))
    for name, reason in record["absent"].items():
        print(f"absent: {name}: {reason}")
    for name, errors in record["check"].items():
        print(f"error of {name}: " + ", ".join(f"{label} {value:.1e}" for label, value in errors.items()))
    print(f"dense product: {dense:.0f} TFLOP/s before, {record['dense_tflops_after']:.0f} after")
    head = f"{'':26s}{'tokens':>7s} {'routing':8s}{'fwd ms':>9s}{'TFLOP/s':>9s}{'dense':>7s}"
    print(head + f"{'f+b ms':>9s}{'TFLOP/s':>9s}{'dense':>7s}{'saved':>7s}{'peak GiB':>9s}")
    for row in record["layer"]:
        ahead, full = row["forward_tflops"], row["forward_backward_tflops"]
        saved, peak = row["saved_gib"], row["peak_gib"]
        print(
            f"{row['name']:26s}{row['tokens']:7d} {row['routing']:8s}{row['forward_ms']:9.3f}{ahead:9.1f}"
            f"{ahead / dense:7.1%}{row['forward_backward_ms']:9.3f}{full:9.1f}{full / dense:7.1%}"
            + (f"{saved:7.2f}{peak:9.2f}" if peak is not None else "")
        )
    for row in record.get("decode", []):
        way = "graph" if row["graph"] else "eager"
        print(
            f"decode {row['name']:26s}{row['tokens']:4d} tokens, {row['experts']:.1f} experts: {row['us']:8.1f} us "
            f"({way}), bound {row['bound_us']:.1f} us, {row['of_bound']:.0%} of bandwidth"
        )
    if "capture" in record:
        print("CUDA graph:", json.dumps(record["capture"]))


if __name__ == "__main__":
    main()
