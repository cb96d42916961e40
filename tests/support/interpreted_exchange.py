"""One of two gloo processes that share experts, with the Triton kernels in Triton's interpreter; prints errors as JSON.

    python interpreted_exchange.py RANK RENDEZVOUS_FILE

A process of its own: TRITON_INTERPRET must stand before Triton is imported, and stays.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import distributed

from moe.expert_exchange import exchanged_experts
from moe.experts import loop
from moe.kernels.expert_rows import TritonRows

EXPERTS = 4
# hidden, ffn, tokens of both ranks, chunks, waves of the products, experts that may be chosen, activation.
CASES = {
    "two chunks, waves": ((40, 72), (9, 5), 2, 4, (0, 1, 3), "gelu"),
    "one chunk, idle rank": ((32, 32), (3, 2), 1, 1, (0, 1), "silu"),
    "no tokens on rank 1": ((32, 32), (150, 0), 2, 1, (1, 2), "silu"),
}


def draw(
    tokens: int, hidden: int, choices: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (N, D), experts (N, 2) and weights (N, 2) of a rank."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, len(choices), generator=generator).topk(2).indices
    chosen = torch.tensor(choices)[indices]
    return torch.randn(tokens, hidden, generator=generator), chosen, torch.rand(tokens, 2, generator=generator)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    if reference.numel() == 0:
        return 0.0
    return float((value.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-3))


def compare(name: str, rank: int) -> dict[str, float]:
    """Errors of output and gradients against a float64 loop over all tokens and experts."""
    (hidden, ffn), counts, num_chunks, waves, choices, act = CASES[name]
    generator = torch.Generator().manual_seed(7)
    whole = [torch.randn(EXPERTS, 2 * ffn, hidden, generator=generator) * 0.2]
    whole.append(torch.randn(EXPERTS, hidden, ffn, generator=generator) * 0.2)
    inputs = [draw(count, hidden, choices, seed) for seed, count in enumerate(counts)]
    tokens, indices, weights = inputs[rank]
    mine = [tokens.clone().requires_grad_(), weights.clone().requires_grad_()]
    local = EXPERTS // 2
    here = slice(rank * local, (rank + 1) * local)
    mine += [value[here].clone().requires_grad_() for value in whole]
    out = exchanged_experts(
        mine[0],
        indices,
        *mine[1:],
        act,
        group=distributed.group.WORLD,
        products=TritonRows(waves=waves),
        num_chunks=num_chunks,
    )
    out.square().sum().backward()
    joined = [torch.cat([one[part] for one in inputs]) for part in range(3)]
    reference = [value.double().requires_grad_() for value in (joined[0], joined[2], *whole)]
    expected = loop(reference[0], joined[1], *reference[1:], act)
    expected.square().sum().backward()
    at = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    wanted = [expected[at].detach(), *(value.grad[at] for value in reference[:2])]
    wanted += [value.grad[here] for value in reference[2:]]
    found = [out.detach(), *(value.grad for value in mine)]
    labels = ("output", "tokens", "weights", "gate_up_proj", "down_proj")
    return {label: relative(a, b) for label, a, b in zip(labels, found, wanted, strict=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    this_rank = int(sys.argv[1])
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=this_rank, world_size=2)
    report = {name: compare(name, this_rank) for name in CASES}
    distributed.barrier()
    json.dump(report, sys.stdout)
