"""Runs the MegaBlocks backend on the CPU and prints its errors as JSON.

MegaBlocks' Python sources must be importable; its two compiled extensions are replaced by plain torch, and its Triton
kernels run in the interpreter. A process of its own: TRITON_INTERPRET must stand before Triton is imported, and stays.
"""

import json
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import torch


def sort(values: torch.Tensor, end_bit: int, sorted_out: torch.Tensor, order_out: torch.Tensor) -> None:
    """Stable sort with the permutation."""
    ordered, order = values.sort(stable=True)
    sorted_out.copy_(ordered)
    order_out.copy_(order)


def histogram(values: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Counts of 0 .. num_bins - 1."""
    return torch.bincount(values.long(), minlength=num_bins).int()


def inclusive_cumsum(values: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    """Running sum into ``out``."""
    out.copy_(values.cumsum(dim))


def gmm(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, sizes: torch.Tensor, trans_a: bool, trans_b: bool
) -> None:
    """grouped-gemm's product: one matrix product per group of rows."""
    start = 0
    for group, size in enumerate(sizes.tolist()):
        rows = slice(start, start + size)
        if trans_a:
            out[group] = left[rows].T @ right[rows]
        else:
            out[rows] = left[rows] @ (right[group].T if trans_b else right[group])
        start += size


def stand_in(name: str, **functions: object) -> None:
    """Put a module of these functions in the place of a compiled extension."""
    module = types.ModuleType(name)
    vars(module).update(functions)
    sys.modules[name] = module


def pin_kernels() -> None:
    """Leave each Triton kernel one configuration: choosing between several asks for a GPU."""
    from megablocks.backend import kernels

    for kernel in vars(kernels).values():
        if hasattr(kernel, "configs"):
            kernel.configs = kernel.configs[:1]


def errors(counts: tuple[int, ...]) -> dict[str, float]:
    """Relative errors of output and gradients; ``counts`` tokens of each expert beside the common expert 0."""
    from moe.experts import loop
    from moe.megablocks_backend import run_dropless

    generator = torch.Generator().manual_seed(3)
    indices = torch.tensor([[expert, 0] for expert, count in enumerate(counts, 1) for _ in range(count)])
    experts, hidden, ffn = len(counts) + 1, 32, 48
    values = [
        torch.randn(len(indices), hidden, generator=generator),
        torch.rand(len(indices), 2, generator=generator),
        torch.randn(experts, 2 * ffn, hidden, generator=generator) * 0.2,
        torch.randn(experts, hidden, ffn, generator=generator) * 0.2,
    ]
    # Values that bfloat16 holds, so that only the arithmetic differs.
    values = [value.bfloat16() for value in values]
    reference = [value.float().requires_grad_() for value in values]
    mine = [value.clone().requires_grad_() for value in values]
    expected = loop(reference[0], indices, *reference[1:])
    out = run_dropless(mine[0], indices, *mine[1:], "silu")
    upstream = torch.randn(expected.shape, generator=generator).bfloat16()
    expected.backward(upstream.float())
    out.backward(upstream)
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(mine, reference, strict=True))]
    labels = ("output", "hidden_states", "expert_weights", "gate_up", "down")
    found = {}
    for label, (a, b) in zip(labels, pairs, strict=True):
        assert a is not None and b is not None
        found[label] = float((a.detach().float() - b.detach()).norm() / b.detach().norm())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    stand_in("megablocks_ops", sort=sort, histogram=histogram, inclusive_cumsum=inclusive_cumsum)
    stand_in("grouped_gemm_backend", gmm=gmm)
    pin_kernels()
    json.dump({"balanced": errors((5, 5, 5)), "skewed": errors((9, 0, 1)), "one_token": errors((0, 1))}, sys.stdout)
