"""Experts with low-rank additions to their weights (LoRA, arXiv 2106.09685): W x + s B (A x), an A and a B each.

The additions are products of rank r on the rows that are sorted by expert anyway: no expert's B A, which has the
size of its weight, ever exists. The weights stay as they are, plain or in few bits, and get no gradient: one in few
bits is restored for its product and dropped again, in the backward pass as well (QLoRA, arXiv 2305.14314). On a GPU
``moe.kernels.low_rank`` does so inside the experts' own products; here are torch's grouped product and plain loops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe.experts import combine, grouped_mm_function, sort_by_expert
from moe.kernels import backend as kernels_backend
from phi35.fused import gated_activation
from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.linear import restored

Weight = torch.Tensor | QuantizedTensor


@dataclass(frozen=True)
class LowRank:
    """An addition to the weights of E experts.

    Attributes:
        first: (E, r, in), A of each expert.
        second: (E, out, r), B of each expert.
        scaling: s, usually alpha / r.
        dropout: what the inputs pass on their way to A.
    """

    first: torch.Tensor
    second: torch.Tensor
    scaling: float
    dropout: Callable[[torch.Tensor], torch.Tensor] | None = None


def adapted_experts(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    hidden_act: str,
    gate_up_additions: Sequence[LowRank] = (),
    down_additions: Sequence[LowRank] = (),
) -> torch.Tensor:
    """Weighted sum of each token's experts, as ``moe.experts.Experts.forward``, with additions to their weights.

    The Triton kernels run where they take dtypes and sizes, the weights are frozen and nothing is dropped out. Else
    there is torch's grouped product, which reads nothing on the host either; and one product an expert for dtypes and
    sizes that this does not take.

    Args:
        hidden_states: (N, D).
        expert_indices: (N, k) int64 in [0, E).
        expert_weights: (N, k).
        gate_up_proj: (E, 2F, D), gate first.
        down_proj: (E, D, F).
        hidden_act: "silu" or "gelu".
        gate_up_additions: to ``gate_up_proj``.
        down_additions: to ``down_proj``.

    Returns:
        (N, D) in the dtype of ``hidden_states``. Gradients reach the tokens, their multipliers and the additions, and
        plain weights that want them.
    """
    if _kernels_take(hidden_states, gate_up_proj, down_proj, (*gate_up_additions, *down_additions)):
        from moe.kernels import low_rank

        up, down = (_factors(additions) for additions in (gate_up_additions, down_additions))
        return low_rank.adapted_experts(
            hidden_states, expert_indices, expert_weights, gate_up_proj, down_proj, hidden_act, up, down
        )
    given = (hidden_states, expert_indices, expert_weights, gate_up_proj, down_proj, hidden_act)
    return with_torch(*given, gate_up_additions, down_additions)


def with_torch(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    hidden_act: str,
    gate_up_additions: Sequence[LowRank] = (),
    down_additions: Sequence[LowRank] = (),
) -> torch.Tensor:
    """``adapted_experts`` by torch's products on every device."""
    rows = sort_by_expert(hidden_states, expert_indices, gate_up_proj.shape[0])
    segments = Segments(rows.ends)
    gate_up = _adapted(rows.values, gate_up_proj, gate_up_additions, segments)
    acted = gated_activation(gate_up, hidden_act)
    mixed = _adapted(acted, down_proj, down_additions, segments)
    return combine(mixed, rows.inverse, expert_weights, hidden_states.dtype)


class Segments:
    """Which rows are whose: rows [ends[e - 1], ends[e]) are expert e's.

    Args:
        ends: (E,) int64.
    """

    def __init__(self, ends: torch.Tensor) -> None:
        self.ends = ends
        self.offsets = ends.to(torch.int32)
        self._slices: list[slice] | None = None

    @property
    def slices(self) -> list[slice]:
        """Each expert's rows, read on the host."""
        if self._slices is None:
            ends = self.ends.tolist()
            self._slices = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return self._slices

    def product(self, rows: torch.Tensor, weights: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """(P, out) of rows (P, in) and each expert's weight (E, out, in); with ``transposed`` the other way round."""
        weights = weights if transposed else weights.transpose(1, 2)
        if _grouped_takes(rows, weights):
            return grouped_mm_function()(rows, weights, offs=self.offsets)
        # Experts without rows too: their weights' gradient is then zero, not absent.
        return torch.cat([rows[one] @ weight for one, weight in zip(self.slices, weights.unbind(), strict=True)])


def _adapted(rows: torch.Tensor, weight: Weight, additions: Sequence[LowRank], segments: Segments) -> torch.Tensor:
    if isinstance(weight, QuantizedTensor):
        out = _FewBitProduct.apply(rows, weight, segments)
    else:
        out = segments.product(rows, weight)
    for one in additions:
        inputs = (rows if one.dropout is None else one.dropout(rows)).to(one.first.dtype)
        first, second = _padded(one.first, one.second)
        low = segments.product(inputs, first) * one.scaling
        out = out + segments.product(low, second).to(out.dtype)
    return out


def _kernels_take(
    hidden_states: torch.Tensor, gate_up_proj: Weight, down_proj: Weight, additions: Sequence[LowRank]
) -> bool:
    """Whether the Triton kernels run these experts."""
    if torch.compiler.is_compiling() or not len(hidden_states):
        return False
    if any(one.dropout is not None or one.first.dtype != hidden_states.dtype for one in additions):
        return False
    shapes = []
    for weight in (gate_up_proj, down_proj):
        if not isinstance(weight, QuantizedTensor):
            if weight.requires_grad and torch.is_grad_enabled():
                return False
            shapes.append(weight)
        else:  # restored in the dtype of the tokens
            shapes.append(torch.empty(weight.shape, dtype=hidden_states.dtype, device="meta"))
    # Whether there is a GPU is asked last: it takes longer than all else.
    return kernels_backend.limit(hidden_states, *shapes) is None and kernels_backend.missing() is None


def _factors(additions: Sequence[LowRank]) -> Any:
    """All additions as one ``Factors``, scaled, of a rank that the kernels take; None if there are none."""
    from moe.kernels.low_rank import MIN_RANK, Factors

    if not additions:
        return None
    first, second, scaling = additions[0].first, additions[0].second, additions[0].scaling
    if len(additions) > 1:
        first = torch.cat([one.first for one in additions], dim=1)
        second, scaling = torch.cat([one.second * one.scaling for one in additions], dim=2), 1.0
    missing = -first.shape[1] % MIN_RANK
    if missing:
        first, second = F.pad(first, (0, 0, 0, missing)), F.pad(second, (0, missing))
    first = first.contiguous()
    # Descriptors start at multiples of 16 bytes; optimizers may lay parameters elsewhere in a flat buffer.
    return Factors(first if first.data_ptr() % 16 == 0 else first.clone(), second, scaling)


def _padded(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose rank fills whole multiples of 16 bytes, as the grouped product wants them."""
    missing = -first.shape[1] % (16 // first.element_size())
    if not missing:
        return first, second.contiguous()
    return F.pad(first, (0, 0, 0, missing)), F.pad(second, (0, missing))


def _grouped_takes(rows: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether torch's grouped product takes (P, in) and (E, in, out)."""
    on_cuda = rows.device.type == "cuda"
    dtypes = (torch.bfloat16,) if on_cuda else (torch.bfloat16, torch.float16, torch.float32)
    if rows.dtype != weights.dtype or rows.dtype not in dtypes:
        return False
    return all(size * rows.element_size() % 16 == 0 for size in weights.shape[1:])


class _FewBitProduct(torch.autograd.Function):
    """Rows times experts' weights in few bits, which are restored whole for as long as the product takes."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: QuantizedTensor, segments: Segments) -> torch.Tensor:
        ctx.weight, ctx.segments = weight, segments
        return segments.product(rows, restored(weight, rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight = restored(ctx.weight, grad.dtype)
        return ctx.segments.product(grad.contiguous(), weight, transposed=True), None, None
