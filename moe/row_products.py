"""What expert parallelism asks of a backend: the experts' products on rows, with backward in two halves.

A layer on one process leaves its backward pass to autograd. Where rows cross between processes, the gradients of the
rows must be ready before the gradients of the weights are begun, so that they travel meanwhile; and the products of a
few experts must write into their part of a larger tensor. ``TorchRows`` does so with torch's operations on every
device; ``moe.kernels.expert_rows`` with the Triton kernels.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moe.exchange_plan import Chunk, ExchangePlan
from moe.experts import ACTIVATIONS, grouped_mm_function


class RowProducts(Protocol):
    """Products of E experts with P rows that are sorted by expert; a chunk holds some of both."""

    @property
    def align(self) -> int:
        """Each expert's rows start at a multiple of it."""

    def table(self, plan: ExchangePlan) -> list[int]:
        """What ``layouts`` wants on the device, as one list that is copied there at once."""

    def layouts(self, plan: ExchangePlan, table: torch.Tensor) -> list[Any]:
        """Layouts in this backend's own form, of all arrived rows and then of each chunk's.

        Args:
            plan: what ``table`` was asked for.
            table: its values on the device, int32.
        """

    def spread(
        self, values: torch.Tensor, sources: torch.Tensor, top_k: int, plan: ExchangePlan, layout: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy tokens (N, D) to their rows.

        Args:
            values: (N, D).
            sources: (P + S,) int64 pair (token * k + choice) of each row, -1 where none of this process's lies.
            top_k: k.
            plan: numbers of rows.
            layout: of all arrived rows.

        Returns:
            Arrived rows (P, D), with zeros between experts and nothing yet where other processes' rows come; away
            rows (S, D).
        """

    def combine(
        self, rows: torch.Tensor, places: torch.Tensor, top_k: int, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Add each token's k of the (P + S, D) rows, at ``places`` (N k,) int64, times (N, k) weights: (N, D)."""

    def forward(
        self,
        rows: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        layout: Any,
        hidden_act: str,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Write each row's expert output to ``out`` (rows, D); returns gate and up rows (rows, 2F) for backward."""

    def rows_backward(
        self,
        upstream: torch.Tensor,
        gate_up_rows: torch.Tensor,
        row_weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        layout: Any,
        hidden_act: str,
        out: torch.Tensor,
        weights_out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the rows and of their weights.

        Args:
            upstream: (rows, D) gradient of the tokens' sums, without the weights.
            gate_up_rows: from ``forward``.
            row_weights: (rows,) multiplier of each row in its token's sum, 0 for empty ones.
            gate_up_proj: (experts, 2F, D).
            down_proj: (experts, D, F).
            layout: of the chunk.
            hidden_act: "silu" or "gelu".
            out: (rows, D) written.
            weights_out: (rows,) float32 written.

        Returns:
            The gradient of gate and up rows (rows, 2F), and the gated rows times their weights (rows, F).
        """

    def weights_backward(
        self,
        rows: torch.Tensor,
        upstream: torch.Tensor,
        gate_up_grad: torch.Tensor,
        gated: torch.Tensor,
        layout: Any,
        hidden_act: str,
        gate_up_out: torch.Tensor | None,
        down_out: torch.Tensor | None,
    ) -> None:
        """Write the gradients of the experts' weights, where they are wanted, from ``rows_backward``'s results."""


@dataclass(frozen=True)
class TorchRows:
    """``RowProducts`` by torch's grouped product, or by one product an expert.

    Attributes:
        grouped: whether torch's grouped product takes the tensors at hand.
    """

    grouped: bool
    align: int = 1

    def table(self, plan: ExchangePlan) -> list[int]:
        """See ``RowProducts``."""
        return [start for chunk in plan.chunks for start in chunk.starts[1:]]

    def layouts(self, plan: ExchangePlan, table: torch.Tensor) -> list[Any]:
        """See ``RowProducts``."""
        sizes = [len(chunk.counts) for chunk in plan.chunks]
        return [None, *zip(plan.chunks, table.split(sizes), strict=True)]

    def spread(
        self, values: torch.Tensor, sources: torch.Tensor, top_k: int, plan: ExchangePlan, layout: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RowProducts``."""
        tokens = sources.div(top_k, rounding_mode="floor")
        arrived = values.new_empty(plan.num_arrived, values.shape[1])
        for first, last in plan.own:
            if first < last:
                torch.index_select(values, 0, tokens[first:last], out=arrived[first:last])
        return arrived, values.index_select(0, tokens[plan.num_arrived :])

    def combine(
        self, rows: torch.Tensor, places: torch.Tensor, top_k: int, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """See ``RowProducts``."""
        in_order = rows.index_select(0, places).view(-1, top_k, rows.shape[1])
        if weights is None:
            return in_order.sum(dim=1)
        wide = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)
        return (in_order.to(wide) * weights.to(wide).unsqueeze(-1)).sum(dim=1).to(rows.dtype)

    def forward(
        self,
        rows: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        layout: Any,
        hidden_act: str,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """See ``RowProducts``."""
        gate_up_rows = self._by_experts(rows, gate_up_proj.transpose(1, 2), layout)
        gate, up = gate_up_rows.chunk(2, dim=-1)
        out.copy_(self._by_experts(ACTIVATIONS[hidden_act](gate) * up, down_proj.transpose(1, 2), layout))
        return gate_up_rows

    def rows_backward(
        self,
        upstream: torch.Tensor,
        gate_up_rows: torch.Tensor,
        row_weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        layout: Any,
        hidden_act: str,
        out: torch.Tensor,
        weights_out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RowProducts``."""
        wide = torch.promote_types(upstream.dtype, torch.float32)
        row_weights = row_weights.to(wide).unsqueeze(-1)
        gate, up = gate_up_rows.chunk(2, dim=-1)
        acted = ACTIVATIONS[hidden_act](gate)
        gated_grad = self._by_experts(upstream, down_proj, layout)
        gated = acted * up
        weights_out.copy_((gated.to(wide) * gated_grad.to(wide)).sum(dim=-1))
        gated_grad = (gated_grad.to(wide) * row_weights).to(upstream.dtype)
        gate_grad = _act_backward(gated_grad * up, gate, hidden_act)
        gate_up_grad = torch.cat([gate_grad, gated_grad * acted], dim=-1)
        out.copy_(self._by_experts(gate_up_grad, gate_up_proj, layout))
        return gate_up_grad, (gated.to(wide) * row_weights).to(gated.dtype)

    def weights_backward(
        self,
        rows: torch.Tensor,
        upstream: torch.Tensor,
        gate_up_grad: torch.Tensor,
        gated: torch.Tensor,
        layout: Any,
        hidden_act: str,
        gate_up_out: torch.Tensor | None,
        down_out: torch.Tensor | None,
    ) -> None:
        """See ``RowProducts``."""
        if down_out is not None:
            self._by_rows(upstream, gated, layout, down_out)
        if gate_up_out is not None:
            self._by_rows(gate_up_grad, rows, layout, gate_up_out)

    def _by_experts(
        self, rows: torch.Tensor, weights: torch.Tensor, layout: tuple[Chunk, torch.Tensor]
    ) -> torch.Tensor:
        """(rows, K) times each expert's (K, M)."""
        chunk, ends = layout
        if self.grouped:
            return grouped_mm_function()(rows, weights, offs=ends)
        out = rows.new_empty(rows.shape[0], weights.shape[2])
        for expert, (first, last) in enumerate(zip(chunk.starts, chunk.starts[1:], strict=False)):
            if first < last:
                torch.mm(rows[first:last], weights[expert], out=out[first:last])
        return out

    def _by_rows(
        self, left: torch.Tensor, right: torch.Tensor, layout: tuple[Chunk, torch.Tensor], out: torch.Tensor
    ) -> None:
        """Each expert's left^T right into ``out`` (experts, M, C)."""
        chunk, ends = layout
        if self.grouped:
            out.copy_(grouped_mm_function()(left.t(), right, offs=ends))
            return
        for expert, (first, last) in enumerate(zip(chunk.starts, chunk.starts[1:], strict=False)):
            if first < last:
                torch.mm(left[first:last].t(), right[first:last], out=out[expert])
            else:
                out[expert].zero_()


def _act_backward(grad: torch.Tensor, value: torch.Tensor, hidden_act: str) -> torch.Tensor:
    """Gradient of the activation, by the operators that autograd uses."""
    if hidden_act == "silu":
        return torch.ops.aten.silu_backward(grad, value)
    return torch.ops.aten.gelu_backward(grad, value)
