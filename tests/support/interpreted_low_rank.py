"""Runs experts with low-rank additions on the Triton kernels in Triton's interpreter; prints errors as JSON.

A process of its own: TRITON_INTERPRET must stand before Triton is imported, and stays.
"""

import json
import os
import sys
from collections.abc import Sequence

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.utils.checkpoint import checkpoint

from moe import low_rank
from moe.low_rank import LowRank, Weight
from phi35.quantization.codes import dequantize, round_to_nearest
from phi35.quantization.config import WeightFormat

# tokens, k, experts, hidden, ffn, ranks of gate_up's and of down's additions, activation, bits, dtype.
CASES: dict[str, tuple[int, int, int, int, int, Sequence[int], Sequence[int], str, int | None, torch.dtype]] = {
    "rank 16": (9, 2, 3, 64, 96, (16,), (16,), "silu", None, torch.float32),
    "rank 3, ragged, gelu": (9, 2, 4, 40, 72, (3,), (3,), "gelu", None, torch.float32),
    "two tiles, two adapters": (130, 1, 2, 32, 32, (4, 16), (8, 40), "silu", None, torch.float32),
    "rank 128": (5, 1, 2, 32, 32, (128,), (64,), "silu", None, torch.float32),
    "gate_up alone": (5, 1, 2, 64, 40, (8,), (), "silu", None, torch.float32),
    "down alone": (5, 1, 2, 64, 40, (), (8,), "silu", None, torch.float32),
    "int4": (5, 1, 2, 64, 96, (8,), (8,), "silu", 4, torch.float32),
    "half": (5, 1, 2, 64, 96, (16,), (16,), "silu", None, torch.float16),
}
NAMES = ("hidden_states", "expert_weights")


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||."""
    return float((value.detach().double() - reference.detach().double()).norm() / reference.detach().double().norm())


def inputs(name: str) -> tuple[torch.Tensor, list[Weight], list[torch.Tensor], str]:
    """Experts' numbers, the last never chosen; frozen weights; tokens, multipliers and all factors; activation."""
    tokens, top_k, experts, hidden, ffn, up, down, act, bits, dtype = CASES[name]
    draw = torch.Generator().manual_seed(11)
    indices = torch.rand(tokens, experts - 1, generator=draw).topk(min(top_k, experts - 1)).indices

    def tensor(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * scale).to(dtype)

    weights: list[Weight] = [tensor(experts, 2 * ffn, hidden), tensor(experts, hidden, ffn)]
    if bits is not None:
        one = WeightFormat(bits=bits, group_size=32)
        weights = [
            round_to_nearest(weight, one, torch.bfloat16) for weight in weights if isinstance(weight, torch.Tensor)
        ]
    leaves = [tensor(tokens, hidden, scale=1.0), torch.rand(indices.shape, generator=draw).to(dtype)]
    for ranks, width, out in ((up, hidden, 2 * ffn), (down, ffn, hidden)):
        for rank in ranks:
            # Factors that lie as PEFT lays them: the expert changes fastest in B.
            leaves += [tensor(experts, rank, width), tensor(out, rank, experts).permute(2, 0, 1)]
    return indices, weights, leaves, act


def additions_of(leaves: list[torch.Tensor]) -> list[LowRank]:
    """Pairs of factors, each with a scaling of its own."""
    pairs = zip(leaves[2::2], leaves[3::2], strict=True)
    return [LowRank(first, second, 1.5 - 0.25 * index) for index, (first, second) in enumerate(pairs)]


def run(name: str, leaves: list[torch.Tensor], indices: torch.Tensor, weights: list[Weight], act: str) -> torch.Tensor:
    """The layer under test."""
    num_up, additions = len(CASES[name][5]), additions_of(leaves)
    return low_rank.adapted_experts(
        leaves[0], indices, leaves[1], *weights, act, additions[:num_up], additions[num_up:]
    )


def compare(name: str) -> dict[str, float]:
    """Relative errors of output and gradients against torch's products in float64."""
    indices, weights, leaves, act = inputs(name)
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    plain: list[Weight] = [
        one.double() if isinstance(one, torch.Tensor) else dequantize(one, torch.float64) for one in weights
    ]
    expected = run(name, wide, indices, plain, act)
    mine = [leaf.detach().requires_grad_() for leaf in leaves]
    assert low_rank._kernels_take(mine[0], *weights, additions_of(mine))
    assert not low_rank._kernels_take(wide[0], *plain, additions_of(wide))
    out = run(name, mine, indices, weights, act)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8)).to(out.dtype)
    grads = torch.autograd.grad(out, mine, upstream)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    errors = {"output": relative(out, expected)}
    labels = [*NAMES, *(f"factor {index}" for index in range(len(mine) - 2))]
    for label, got, want in zip(labels, grads, wanted, strict=True):
        errors[label] = relative(got, want)
    # The expert without tokens: zeros, not what was in memory.
    assert all(not got[-1].any() for got in grads[2:])
    return errors


def other() -> dict[str, float]:
    """Differences under recomputation, at odd addresses and where one B alone is trained."""
    name = "rank 128"
    indices, weights, leaves, act = inputs(name)

    def gradients(given: list[torch.Tensor], again: bool) -> list[torch.Tensor]:
        mine = [leaf.detach().requires_grad_() for leaf in given]
        if again:
            out = checkpoint(lambda *x: run(name, list(x), indices, weights, act), *mine, use_reentrant=False)
        else:
            out = run(name, mine, indices, weights, act)
        return list(torch.autograd.grad(out.square().sum(), mine))

    plain = gradients(leaves, again=False)
    odd = [torch.cat([leaf.new_zeros(1), leaf.flatten()])[1:].view(leaf.shape) for leaf in leaves]
    second = [leaf.detach() for leaf in leaves]
    second[5] = second[5].requires_grad_()
    (alone,) = torch.autograd.grad(run(name, second, indices, weights, act).square().sum(), second[5])
    trained = [one.clone().requires_grad_() for one in weights if isinstance(one, torch.Tensor)]
    dropped = [LowRank(leaves[2], leaves[3], 1.0, torch.nn.Dropout(0.5))]
    assert not low_rank._kernels_take(leaves[0], *trained, additions_of(leaves))
    assert not low_rank._kernels_take(leaves[0], *weights, dropped)
    return {
        "checkpointed": largest(gradients(leaves, again=True), plain),
        "odd address": largest(gradients(odd, again=False), plain),
        "one factor": largest([alone], [plain[5]]),
    }


def largest(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Largest difference of any element."""
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = {name: compare(name) for name in CASES}
    report["other"] = other()
    json.dump(report, sys.stdout)
