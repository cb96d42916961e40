"""The "triton" experts backend: checks, then the operators of ``moe.kernels.ops``."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def _constant_under_compile(function: Callable[[], Result]) -> Callable[[], Result]:
    """The mark that ``torch.compiler.assume_constant_result`` sets, without importing the compiler (3 s)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_under_compile
def missing() -> str | None:
    """Why the kernels cannot run on this machine, or None."""
    if not _triton_installed():
        return "Triton is not installed (torch's CUDA builds bring it)"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    major, minor = _capability()
    if major < 9:
        return f"the kernels need compute capability 9.0 (Hopper) or newer, this device has {major}.{minor}"
    return None


def limit(hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    dtype = hidden_states.dtype
    if gate_up_proj.dtype != dtype or down_proj.dtype != dtype:
        return f"tokens are {dtype}, expert weights {gate_up_proj.dtype} and {down_proj.dtype}"
    if hidden_states.device.type not in ("cuda", "meta") and not _interpreted():
        return f"tokens are on {hidden_states.device.type}, the kernels run on CUDA"
    supported = (torch.bfloat16, torch.float16) if not _interpreted() else (torch.float16, torch.float32)
    if dtype not in supported:
        names = " and ".join(str(one).removeprefix("torch.") for one in supported)
        return f"the kernels take {names} here, got {str(dtype).removeprefix('torch.')}"
    hidden_size, intermediate_size = down_proj.shape[1:]
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        # Rows of tensor-memory descriptors start at multiples of 16 bytes; a tile is at least 32 columns wide.
        if size % 8 or size < 32:
            return f"{name} ({size}) must be a multiple of 8 and at least 32"
    return None


def triton_kernels(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str = "silu",
) -> torch.Tensor:
    """Weighted sum of each token's experts; shapes as in ``moe.experts.Experts.forward``.

    Raises:
        ValueError: for a dtype, device or sizes that the kernels do not take.
    """
    reason = limit(hidden_states, gate_up_proj, down_proj)
    if reason is not None:
        raise ValueError(f"experts backend 'triton' cannot run: {reason}; use 'grouped_mm', 'loop' or 'auto'")
    from moe.kernels import decode, ops

    gate_up_proj, down_proj = gate_up_proj.contiguous(), down_proj.contiguous()
    inputs = (hidden_states, expert_weights, gate_up_proj, down_proj)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if not save and hidden_states.shape[0] <= decode.MAX_TOKENS:
        return ops.experts_decode(hidden_states, expert_indices, expert_weights, gate_up_proj, down_proj, hidden_act)
    acted, gate_up, plan = ops.experts_up(hidden_states, expert_indices, gate_up_proj, hidden_act, save)
    return ops.experts_down(acted, gate_up, expert_weights, down_proj, plan, hidden_act)


def combine_choices(rows: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
    """Sum (N, D) of each token's rows (N, k, D) times weights (N, k), by the kernel that many tokens are added with."""
    from moe.kernels.rows import combine_rows

    num_tokens, top_k, width = rows.shape
    places = torch.arange(num_tokens * top_k, dtype=torch.int32, device=rows.device)
    return combine_rows(rows.reshape(-1, width), places, top_k, expert_weights, rows.dtype)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


@_constant_under_compile
def _interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
