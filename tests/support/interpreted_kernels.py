"""Runs the Triton kernels on the CPU in Triton's interpreter and prints their errors as JSON.

A process of its own: TRITON_INTERPRET must stand before Triton is imported, and stays.
"""

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.utils.checkpoint

from moe import router
from moe.experts import loop
from moe.kernels import decode, ops, routing
from moe.kernels.backend import combine_choices, triton_kernels

# tokens, k, experts, hidden, ffn, activation, dtype; hidden 40 and ffn 72 end inside a tile.
CASES: dict[str, tuple[int, int, int, int, int, str, torch.dtype]] = {
    "many": (20, 2, 3, 64, 96, "silu", torch.float32),
    "ragged_gelu": (9, 3, 4, 40, 72, "gelu", torch.float32),
    "one_token": (1, 2, 3, 40, 72, "silu", torch.float32),
    "two_tiles": (190, 2, 3, 32, 32, "silu", torch.float32),
    "one_choice": (5, 1, 3, 32, 32, "silu", torch.float32),
    "eight_choices": (3, 8, 10, 32, 32, "silu", torch.float32),
    "strips": (30, 2, 3, 72, 40, "silu", torch.float32),
    "half": (12, 2, 3, 64, 96, "silu", torch.float16),
}


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||."""
    return float((value.detach().double() - reference.detach().double()).norm() / reference.detach().double().norm())


def draw(name: str) -> tuple[list[torch.Tensor], torch.Tensor, str]:
    """Tokens, weights, gate_up_proj, down_proj; expert numbers, the last expert never chosen; activation."""
    tokens, top_k, experts, hidden, ffn, act, dtype = CASES[name]
    generator = torch.Generator().manual_seed(7)
    values = [
        torch.randn(tokens, hidden, generator=generator),
        torch.rand(tokens, top_k, generator=generator),
        torch.randn(experts, 2 * ffn, hidden, generator=generator) * 0.2,
        torch.randn(experts, hidden, ffn, generator=generator) * 0.2,
    ]
    indices = torch.rand(tokens, experts - 1, generator=generator).topk(min(top_k, experts - 1)).indices
    return [values[0].to(dtype), values[1][:, : indices.shape[1]], *(v.to(dtype) for v in values[2:])], indices, act


def compare(name: str) -> dict[str, float]:
    """Relative errors of the output, its four gradients, and the forward-only (small-batch) path, against the loop."""
    values, indices, act = draw(name)
    reference = [value.double().requires_grad_() for value in values]
    mine = [value.detach().clone().requires_grad_() for value in values]
    expected = loop(reference[0], indices, *reference[1:], act)
    out = triton_kernels(mine[0], indices, *mine[1:], act)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8)).to(out.dtype)
    expected.backward(upstream.double())
    if name == "strips":
        ops.STRIP, ops._MANY_ROWS = 32, 0
    out.backward(upstream)
    with torch.no_grad():
        small = triton_kernels(values[0], indices, *values[1:], act)
    errors = {"output": relative(out, expected), "decode": relative(small, expected)}
    if name == "many":
        limit, decode.MAX_TOKENS = decode.MAX_TOKENS, 0
        with torch.no_grad():
            errors["forward"] = relative(triton_kernels(values[0], indices, *values[1:], act), expected)
        decode.MAX_TOKENS = limit
    for label, a, b in zip(("hidden_states", "expert_weights", "gate_up", "down"), mine, reference, strict=True):
        errors[label] = relative(a.grad, b.grad)
    return errors


def plan(pairs: int, experts: int) -> dict[str, Any]:
    """What a routing plan says, beside what a stable sort says."""
    indices = torch.randint(0, experts - 1, (pairs, 1), generator=torch.Generator().manual_seed(9))
    found = routing.plan_routing(indices, experts, 16)
    flat = indices.flatten()
    counts = torch.bincount(flat, minlength=experts)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ((counts + 15) // 16 * 16).cumsum(0)])
    order = flat.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(pairs)) - (counts.cumsum(0) - counts)[flat]
    used, tiles = int(starts[-1]), (counts + 31) // 32
    return {
        "counts": found.counts.tolist() == counts.tolist(),
        "starts": found.starts.tolist() == starts.tolist(),
        "places": torch.equal(found.places.long(), starts[flat] + rank),
        "sources": torch.equal(found.sources[found.places.long()].long(), torch.arange(pairs)),
        "empty": int((found.sources[:used] == -1).sum()) == used - pairs,
        "tile_starts": found.tile_starts.tolist() == [0, *tiles.cumsum(0).tolist()],
        "tiles": found.tile_experts[: int(tiles.sum())].tolist()
        == [e for e in range(experts) for _ in range(int(tiles[e]))],
    }


def frozen_and_compiled() -> dict[str, float]:
    """Errors with frozen experts, and of a compiled call against the eager one."""
    values, indices, act = draw("one_token")
    values[0].requires_grad_()
    out = triton_kernels(values[0], indices, *values[1:], act)
    (grad,) = torch.autograd.grad(out.square().sum(), values[0])
    reference = values[0].detach().double().requires_grad_()
    expected = loop(reference, indices, *(value.double() for value in values[1:]), act)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), reference)
    # No tokens at all, as a process may have under expert parallelism: zeros, not errors.
    weights = [value.clone().requires_grad_() for value in values[2:]]
    empty = triton_kernels(values[0][:0].detach().requires_grad_(), indices[:0], values[1][:0], *weights, act)
    empty.sum().backward()
    zeros = sum(float(weight.grad.abs().max()) for weight in weights if weight.grad is not None) + empty.numel()
    # Weights at an odd place of a flat buffer, as optimizers lay them.
    flat = [torch.cat([value.new_zeros(1), value.flatten()])[1:].view_as(value) for value in values[2:]]
    with torch.no_grad():
        limit, decode.MAX_TOKENS = decode.MAX_TOKENS, 0
        odd = triton_kernels(values[0], indices, values[1], *flat, act)
        # Each choice run by itself, all added afterwards.
        ones = torch.ones_like(values[1][:, :1])
        parts = [triton_kernels(values[0], one, ones, *values[2:], act) for one in indices.split(1, dim=1)]
        combined = combine_choices(torch.stack(parts, dim=1), values[1])
        decode.MAX_TOKENS = limit
    # A layer that is computed again in backward gives the same gradients.
    kept = [value.detach().clone().requires_grad_() for value in values]
    torch.utils.checkpoint.checkpoint(
        triton_kernels, kept[0], indices, *kept[1:], act, use_reentrant=False
    ).sum().backward()
    plain = [value.detach().clone().requires_grad_() for value in values]
    triton_kernels(plain[0], indices, *plain[1:], act).sum().backward()
    moved = max(float((a.grad - b.grad).abs().max()) for a, b in zip(kept, plain, strict=True))
    torch._dynamo.reset()
    compiled = torch.compile(triton_kernels, backend="aot_eager", fullgraph=True)
    again = compiled(values[0], indices, *values[1:], act)
    (again_grad,) = torch.autograd.grad(again.square().sum(), values[0])
    return {
        "frozen": relative(grad, expected_grad),
        "empty": zeros,
        "checkpointed": moved,
        "odd_address": float((odd - out).detach().abs().max()),
        "combined": float((combined - out).detach().abs().max()),
        "compiled": float((again - out).abs().max()),
        "compiled_grad": float((again_grad - grad).abs().max()),
    }


def mixer(num_experts: int, scale: float, shift: float) -> dict[str, float]:
    """SparseMixer's fused choice beside the plain one, from one seed."""
    scores = torch.randn(150, num_experts, generator=torch.Generator().manual_seed(num_experts)) * scale + shift
    scores[3] = scores[3, 0]  # all alike
    upstream = torch.randn(150, 2, generator=torch.Generator().manual_seed(9))
    results = []
    for fused in (True, False):
        mine = scores.clone().requires_grad_()
        torch.manual_seed(5)
        if fused:
            found = router._FusedChoice.apply(mine, 0.01)
        else:
            first = router._choose(mine, mine, 0.01, True, None)
            second = router._choose(mine, mine.scatter(1, first[0], -torch.inf), 0.01, True, None, second=True)
            found = tuple(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
        (found[1] * upstream).sum().backward()
        results.append((*found, mine.grad, torch.rand(3)))
    assert torch.equal(results[0][-1], results[1][-1]), "the generator has moved by another distance"
    names = ("weights", "chances", "gradient")
    report = {name: relative(a, b) for name, a, b in zip(names, results[0][1:4], results[1][1:4], strict=True)}
    differing = (results[0][0] != results[1][0]).float().mean()
    used = len(torch.unique(results[0][0]))
    return report | {"differing": float(differing), "used": used}


def mixer_of_nan() -> float:
    """Largest expert that is chosen for tokens whose scores are NaN, of five."""
    indices, weights, _ = router._FusedChoice.apply(torch.full((70, 5), torch.nan), 0.01)
    assert weights.isnan().all()
    return float(indices.max())


def registration() -> bool:
    """torch's own check of the operators: schema, shapes without running, gradients."""
    values, indices, act = draw("one_token")
    values = [value.requires_grad_() for value in values]
    up = (values[0], indices, values[2], act, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.experts_up, up, test_utils=checks)
    acted, gate_up, plan_buffer = (output.detach() for output in ops.experts_up(*up))
    down = (acted, gate_up.requires_grad_(), values[1], values[3], plan_buffer, act)
    torch.library.opcheck(ops.experts_down, down, test_utils=checks)
    few = (values[0], indices, values[1], values[2], values[3], act)
    torch.library.opcheck(ops.experts_decode, few, test_utils=("test_schema", "test_faketensor"))
    return True


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = {name: compare(name) for name in CASES}
    report["plans"] = {f"{pairs}/{experts}": plan(pairs, experts) for pairs, experts in ((3, 4), (1100, 5))}
    report["other"] = frozen_and_compiled()
    report["registration"] = registration()
    cases = {"sharp": (16, 0.01, 0.0), "flat": (16, 0.001, 1.0), "negative": (5, 0.02, -2.0), "two": (2, 0.01, 1.0)}
    report["mixer"] = {name: mixer(*case) for name, case in cases.items()}
    report["mixer of NaN"] = mixer_of_nan()
    json.dump(report, sys.stdout)
