"""The experts' weights and the backends that run them.

Weights have one canonical form: ``gate_up_proj`` (E, 2F, D), gate first, and ``down_proj`` (E, D, F). A backend is a
pure function of (hidden_states, expert_indices, expert_weights, gate_up_proj, down_proj); every backend reads the
canonical form without a copy. All are dropless: each token reaches each of its experts. A container that stores its
weights otherwise (quantized, say) takes the place of ``Experts`` by having the same ``forward``.

Results are combined without atomic additions, so that they do not vary from run to run: rows go to their experts
and come back by a permutation, and the k rows of a token are added in order, in float32.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from moe import megablocks_backend
from moe.kernels import backend as kernels_backend
from phi35.quantization.config import WeightFormat

logger = logging.getLogger(__name__)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu}
BackendFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str], torch.Tensor]


class Experts(nn.Module):
    """E gated feed-forwards, W_down (act(W_gate x) * W_up x), in one pair of tensors.

    Args:
        num_experts: E.
        hidden_size: D.
        intermediate_size: F.
        hidden_act: "silu" or "gelu".
        backend: "auto", "megablocks", "grouped_mm", "triton" or "loop".
        initializer_range: standard deviation of the initial weights.

    Raises:
        ValueError: for an unknown backend or one that cannot run here.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str = "silu",
        backend: str = "auto",
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        check_backend(backend)
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {sorted(ACTIVATIONS)}, got {hidden_act!r}")
        self.hidden_act = hidden_act
        self.backend = backend
        self.initializer_range = initializer_range
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """Experts held here (under expert parallelism: this process's share)."""
        return self.gate_up_proj.shape[0]

    def reset_parameters(self) -> None:
        """Draw all weights from a normal distribution, as the published initialisation does."""
        nn.init.normal_(self.gate_up_proj, std=self.initializer_range)
        nn.init.normal_(self.down_proj, std=self.initializer_range)

    def forward(
        self, hidden_states: torch.Tensor, expert_indices: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states: (N, D) in the weights' dtype.
            expert_indices: (N, k) int64 in [0, E).
            expert_weights: (N, k) multipliers, usually float32.

        Returns:
            (N, D) in the dtype of ``hidden_states``; the sum over k is taken in float32.

        Raises:
            ValueError: if a backend was asked for by name and cannot run on this dtype or these sizes.
        """
        run = BACKENDS[self.backend_for(hidden_states)].run
        assert run is not None, "check_backend lets no backend without a function through"
        return run(hidden_states, expert_indices, expert_weights, self.gate_up_proj, self.down_proj, self.hidden_act)

    def has_kernels_for_few(self, hidden_states: torch.Tensor) -> bool:
        """Whether up to 64 tokens go through kernels that add a token's choices themselves, more through others."""
        return self.backend_for(hidden_states) == "triton"

    def combine_choices(self, rows: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
        """Each token's sum from what ``forward`` gives for its choices one by one, with weights of one.

        By the kernel that ``forward`` adds with, so that the result is the same to the bit; MegaBlocks alone rounds
        otherwise.

        Args:
            rows: (N, k, D).
            expert_weights: (N, k).

        Returns:
            (N, D) in the dtype of ``rows``.
        """
        if self.backend_for(rows) == "triton":
            return kernels_backend.combine_choices(rows, expert_weights)
        return combine_in_order(rows, expert_weights, rows.dtype)

    def backend_for(self, hidden_states: torch.Tensor) -> str:
        """Name of the backend that runs these tokens; says once what "auto" picked."""
        if self.backend != "auto":
            return self.backend
        name = automatic_backend(hidden_states, self.gate_up_proj, self.down_proj)
        if not torch.compiler.is_compiling():  # a message would break the graph
            _say_once(name, hidden_states.device.type, hidden_states.dtype)
        return name

    def quantized_twin(self, one: WeightFormat, scale_dtype: torch.dtype) -> nn.Module:
        """The same experts with room for weights in few bits, unset; see ``moe.quantized_experts``."""
        from moe.quantized_experts import QuantizedExperts

        _, two_ffn, hidden_size = self.gate_up_proj.shape
        with self.gate_up_proj.device:
            return QuantizedExperts(self.num_experts, hidden_size, two_ffn // 2, one, scale_dtype, self.hidden_act)

    def calibration_inputs(
        self, hidden_states: torch.Tensor, expert_indices: torch.Tensor
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        """What each expert's weights are multiplied with: (weight, expert, inputs), for the experts that have tokens.

        Args:
            hidden_states: (N, D).
            expert_indices: (N, k).
        """
        activation = ACTIVATIONS[self.hidden_act]
        for expert in range(self.num_experts):
            tokens = hidden_states[(expert_indices == expert).any(dim=1)]
            if len(tokens):
                gate, up = F.linear(tokens, self.gate_up_proj[expert]).chunk(2, dim=-1)
                yield "gate_up_proj", expert, tokens
                yield "down_proj", expert, activation(gate) * up

    def extra_repr(self) -> str:
        """Shape and backend, for the printed model."""
        _, two_ffn, hidden_size = self.gate_up_proj.shape
        return f"num_experts={self.num_experts}, hidden={hidden_size}, ffn={two_ffn // 2}, backend={self.backend}"


def loop(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str = "silu",
) -> torch.Tensor:
    """One pair of matrix products per expert that has tokens: every dtype, every size, every device.

    Reads the counts on the host, one synchronisation per call. Shapes as in ``Experts.forward``.
    """
    rows = sort_by_expert(hidden_states, expert_indices, gate_up_proj.shape[0])
    activation = ACTIVATIONS[hidden_act]
    ends = rows.ends.tolist()
    outputs = []
    # unbind, not indexing: its backward stacks once where E selections would each fill an (E, 2F, D) gradient.
    for start, end, gate_up, down in zip([0, *ends[:-1]], ends, gate_up_proj.unbind(), down_proj.unbind(), strict=True):
        if start < end:
            gate, up = F.linear(rows.values[start:end], gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(activation(gate) * up, down))
    if not outputs:
        # No rows at all. The result still hangs on the weights: under expert parallelism every process must take
        # part in the backward exchange, also the one whose experts nobody chose.
        empty = rows.values @ gate_up_proj[0].transpose(0, 1)
        gate, up = empty.chunk(2, dim=-1)
        outputs.append(F.linear(activation(gate) * up, down_proj[0]))
    return combine(torch.cat(outputs), rows.inverse, expert_weights, hidden_states.dtype)


def grouped_mm(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str = "silu",
) -> torch.Tensor:
    """torch's grouped matrix product over rows sorted by expert: no host synchronisation.

    Shapes as in ``Experts.forward``; bfloat16, float16 and float32, rows of 16-byte multiples.

    Raises:
        ValueError: for a dtype or sizes that the operation does not take.
    """
    check_limit("grouped_mm", hidden_states, gate_up_proj, down_proj)
    rows = sort_by_expert(hidden_states, expert_indices, gate_up_proj.shape[0])
    offsets = rows.ends.to(torch.int32)
    product = grouped_mm_function()
    # The last offset is the number of rows, so that no row stays uninitialised.
    gate, up = product(rows.values, gate_up_proj.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    output = product(ACTIVATIONS[hidden_act](gate) * up, down_proj.transpose(1, 2), offs=offsets)
    return combine(output, rows.inverse, expert_weights, hidden_states.dtype)


@dataclass(frozen=True)
class Backend:
    """A way of running the experts.

    Attributes:
        run: the function, or None where this version has none.
        missing: why it cannot run here, or None.
    """

    run: BackendFunction | None
    missing: Callable[[], str | None]


def check_backend(name: str) -> None:
    """Check that a backend can be asked for.

    Raises:
        ValueError: if it is unknown or cannot run; the message says what is missing.
    """
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ValueError(f"experts_backend must be one of {['auto', *BACKENDS]}, got {name!r}")
    reason = BACKENDS[name].missing()
    if reason is not None:
        raise ValueError(f"experts backend {name!r} cannot run: {reason}; use 'auto', 'grouped_mm' or 'loop'")


def check_limit(name: str, hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> None:
    """Check that a backend takes these tensors.

    Raises:
        ValueError: if the backend of this name does not; the message says why.
    """
    limits = {"grouped_mm": _grouped_mm_limit, "triton": kernels_backend.limit}
    reason = limits[name](hidden_states, gate_up_proj, down_proj) if name in limits else None
    if reason is not None:
        raise ValueError(f"experts backend {name!r} cannot run: {reason}; use 'loop' or 'auto'")


def backend_report() -> dict[str, str | None]:
    """Each backend's name with None if it can run here, else the reason why it cannot."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def automatic_backend(hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> str:
    """What "auto" stands for with these tensors: "triton", else "grouped_mm", where they take them, else "loop".

    On a Hopper GPU the kernels were the fastest at every size measured, from one token to 16,384 (docs/moe.md).
    On a CPU "grouped_mm" and "loop" give the same bits, and over token counts from 1 to 2048 the grouped product's
    forward and backward pass took 0.75 to 1.03 times the loop's time (float32 and bfloat16, one core, torch 2.14).
    """
    if hidden_states.device.type == "cuda" and BACKENDS["triton"].missing() is None:
        if kernels_backend.limit(hidden_states, gate_up_proj, down_proj) is None:
            return "triton"
    if BACKENDS["grouped_mm"].missing() is None and _grouped_mm_limit(hidden_states, gate_up_proj, down_proj) is None:
        return "grouped_mm"
    return "loop"


def combine(
    rows: torch.Tensor, inverse: torch.Tensor, expert_weights: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Put expert outputs back in token order and add each token's k rows, weighted.

    Args:
        rows: (N k, D) expert outputs, sorted by expert.
        inverse: (N k,) int64, where the row of (token, choice) lies.
        expert_weights: (N, k).
        dtype: of the result; the sum is taken in float32 or wider.

    Returns:
        (N, D).
    """
    num_tokens, top_k = expert_weights.shape
    in_order = _PermuteRows.apply(rows, inverse).view(num_tokens, top_k, rows.shape[-1])
    return combine_in_order(in_order, expert_weights, dtype)


def combine_in_order(in_order: torch.Tensor, expert_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``combine`` of rows (N, k, D) in the order of tokens and choices."""
    wide = torch.promote_types(torch.promote_types(in_order.dtype, expert_weights.dtype), torch.float32)
    return (in_order.to(wide) * expert_weights.to(wide).unsqueeze(-1)).sum(dim=1).to(dtype)


@dataclass(frozen=True)
class SortedRows:
    """Tokens copied once per choice and sorted by expert.

    Attributes:
        values: (N k, D) rows, those of expert 0 first.
        inverse: (N k,) int64, where the row of (token, choice) lies.
        ends: (E,) int64, one past each expert's last row.
    """

    values: torch.Tensor
    inverse: torch.Tensor
    ends: torch.Tensor


def sort_by_expert(hidden_states: torch.Tensor, expert_indices: torch.Tensor, num_experts: int) -> SortedRows:
    """Copy each token of (N, D) once per choice of (N, k) and sort the rows by expert."""
    flat = expert_indices.reshape(-1)
    # Stable, so that rows of one expert keep the tokens' order and results repeat to the bit.
    sorted_experts, order = flat.sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    experts = torch.arange(num_experts, device=flat.device)
    ends = torch.searchsorted(sorted_experts, experts, right=True)
    values = _CopyRows.apply(hidden_states, order, inverse, expert_indices.shape[1])
    return SortedRows(values=values, inverse=inverse, ends=ends)


class _CopyRows(torch.autograd.Function):
    """Rows order // k of the tokens; backward adds each token's k rows in order (no atomic additions)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_states: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k  # type: ignore[attr-defined]
        return hidden_states.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grad_outputs[0].index_select(0, inverse)
        return grad.view(-1, ctx.top_k, grad.shape[-1]).sum(dim=1), None, None, None


class _PermuteRows(torch.autograd.Function):
    """Rows in a new order; backward scatters them back, each place written once."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(permutation)
        return rows.index_select(0, permutation)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (permutation,) = ctx.saved_tensors
        grad = grad_outputs[0]
        places = permutation.unsqueeze(-1).expand_as(grad)
        return torch.empty_like(grad, memory_format=torch.contiguous_format).scatter_(0, places, grad), None


def grouped_mm_function() -> Callable[..., torch.Tensor]:
    """torch's grouped matrix product, under its public name where it has one."""
    function = getattr(F, "grouped_mm", None)
    return function if function is not None else torch._grouped_mm


def _grouped_mm_missing() -> str | None:
    if hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm"):
        return None
    return f"torch {torch.__version__} has no grouped_mm (2.11 or later has)"


def _grouped_mm_limit(hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> str | None:
    """Why torch's grouped product does not take these tensors, or None."""
    dtype = hidden_states.dtype
    if gate_up_proj.dtype != dtype or down_proj.dtype != dtype:
        return f"tokens are {dtype}, expert weights {gate_up_proj.dtype} and {down_proj.dtype}"
    on_cuda = hidden_states.device.type == "cuda"
    supported = (torch.bfloat16,) if on_cuda else (torch.bfloat16, torch.float16, torch.float32)
    if dtype not in supported:
        names = ", ".join(str(one).removeprefix("torch.") for one in supported)
        return (
            f"torch's grouped_mm takes {names} on {hidden_states.device.type}, got {str(dtype).removeprefix('torch.')}"
        )
    if not on_cuda and dtype != torch.bfloat16 and torch.compiler.is_compiling():
        return f"torch.compile traces torch's grouped_mm in bfloat16 only, got {str(dtype).removeprefix('torch.')}"
    hidden_size, intermediate_size = down_proj.shape[1:]
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size * dtype.itemsize % 16:
            return f"{name} ({size}) times {dtype.itemsize} bytes is no multiple of 16"
    return None


@functools.cache
def _say_once(name: str, device_type: str, dtype: torch.dtype) -> None:
    logger.info("experts backend 'auto' picked %r (%s, %s)", name, device_type, dtype)


BACKENDS: dict[str, Backend] = {
    "megablocks": Backend(run=megablocks_backend.megablocks, missing=megablocks_backend.missing),
    "grouped_mm": Backend(run=grouped_mm, missing=_grouped_mm_missing),
    "triton": Backend(run=kernels_backend.triton_kernels, missing=kernels_backend.missing),
    "loop": Backend(run=loop, missing=lambda: None),
}
