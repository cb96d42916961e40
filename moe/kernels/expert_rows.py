"""The Triton kernels as ``moe.row_products.RowProducts``: what expert parallelism multiplies with on Hopper.

The kernels are those of a layer on one process. Only the copy of tokens to their rows is another, since some rows lie
in a tensor that leaves and others come from elsewhere.
"""

import dataclasses
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from moe.exchange_plan import ExchangePlan
from moe.kernels import ops, tuning
from moe.kernels import rows as row_passes
from moe.kernels.grouped_gemm import HALF_ROWS
from moe.kernels.routing import RoutingPlan

_ALIGNMENT = 4  # elements: Triton's specialisation wants pointers to start at multiples of 16 bytes

OVERLAPPED_WAVES = 4
"""Waves of products that run beside an exchange, so that the multiprocessors it holds delay a quarter of their work."""


@dataclasses.dataclass(frozen=True)
class TritonRows:
    """``RowProducts`` by ``moe.kernels``; the methods are described there.

    Attributes:
        waves: of the products under which rows of other chunks travel.
        align: rows of half a tile.
    """

    waves: int = 1
    align: int = HALF_ROWS

    def table(self, plan: ExchangePlan) -> list[int]:
        """See ``RowProducts``."""
        values: list[int] = []
        for lists in self._lists(plan):
            for one in lists:
                values += [*one, *[0] * (-len(one) % _ALIGNMENT)]
        return values

    def layouts(self, plan: ExchangePlan, table: torch.Tensor) -> list[Any]:
        """See ``RowProducts``; a chunk's is a ``RoutingPlan`` whose pairs are the rows themselves."""
        lists = self._lists(plan)
        sizes = [size for part in lists for one in part for size in (len(one), -len(one) % _ALIGNMENT)]
        views = iter(table.split(sizes)[::2])
        whole, *chunks = ([next(views) for _ in part] for part in lists)
        nothing = table[:0]
        rows = torch.arange(plan.num_arrived, dtype=torch.int32, device=table.device)
        layouts: list[Any] = [tuple(whole)]
        for chunk, (starts, counts, tile_starts, tile_experts) in zip(plan.chunks, chunks, strict=True):
            layouts.append(
                RoutingPlan(
                    places=nothing,
                    sources=rows[: chunk.starts[-1]],
                    starts=starts,
                    counts=counts,
                    tile_starts=tile_starts,
                    tile_experts=tile_experts,
                    align=self.align,
                    buffer=nothing,
                )
            )
        return layouts

    def _lists(self, plan: ExchangePlan) -> list[list[list[int]]]:
        """What the kernels read: of all rows the experts' starts, counts and the expert of each half tile; of each
        chunk starts, counts, first tiles, and the expert of each tile."""
        starts = [chunk.rows[0] + start for chunk in plan.chunks for start in chunk.starts[:-1]] + [plan.num_arrived]
        counts = [count for chunk in plan.chunks for count in chunk.counts]
        halves = [(last - first) // self.align for first, last in zip(starts, starts[1:], strict=False)]
        lists = [[starts, counts, _repeated(halves)]]
        for chunk in plan.chunks:
            tiles = [-(-count // (2 * self.align)) for count in chunk.counts]
            tile_starts = list(accumulate(tiles, initial=0))
            lists.append([list(chunk.starts), list(chunk.counts), tile_starts, _repeated(tiles)])
        return lists

    def spread(
        self, values: torch.Tensor, sources: torch.Tensor, top_k: int, plan: ExchangePlan, layout: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RowProducts``."""
        width = values.shape[1]
        arrived = values.new_empty(plan.num_arrived, width)
        away = values.new_empty(plan.num_away, width)
        if sources.numel():
            chunk = min(2048, triton.next_power_of_2(width))
            _spread_kernel[(sources.numel(),)](
                values,
                arrived,
                away,
                sources,
                *layout,
                plan.num_arrived,
                width,
                TOP_K=top_k,
                ALIGN=self.align,
                CHUNK=chunk,
                num_warps=4,
            )
        return arrived, away

    def combine(
        self, rows: torch.Tensor, places: torch.Tensor, top_k: int, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """See ``RowProducts``."""
        if places.numel() == 0:
            return rows.new_empty(0, rows.shape[1])
        return row_passes.combine_rows(rows, places, top_k, weights, rows.dtype)

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
        how = _tuning(rows, down_proj.shape[2], hidden_act, self.waves)
        gated, gate_up_rows = ops.rows_by_experts_gated(rows, gate_up_proj, layout, hidden_act, how.up, save=True)
        ops.rows_by_experts(gated, down_proj, layout, True, how.down, out)
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
        how = _tuning(upstream, down_proj.shape[2], hidden_act, self.waves)
        gated_grad = ops.rows_by_experts(upstream, down_proj, layout, False, how.down_rows)
        gate_up_grad, gated, weights_grad = row_passes.gate_rows_backward(
            gated_grad, gate_up_rows, layout, row_weights, hidden_act
        )
        weights_out.copy_(weights_grad)
        ops.rows_by_experts(gate_up_grad, gate_up_proj, layout, False, how.up_rows, out)
        return gate_up_grad, gated

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
        # The gradients of the rows travel under these products, however few chunks there are.
        how = _tuning(upstream, gated.shape[1], hidden_act, OVERLAPPED_WAVES)
        if down_out is not None:
            ops.rows_by_rows(upstream, gated, layout, how.down_weights, down_out)
        if gate_up_out is not None:
            ops.rows_by_rows(gate_up_grad, rows, layout, how.up_weights, gate_up_out)


def _tuning(rows: torch.Tensor, intermediate_size: int, hidden_act: str, waves: int) -> tuning.Tuning:
    """The measured choice for rows (P, hidden_size), each product in so many waves."""
    how = tuning.choose(rows.dtype, rows.device, (rows.shape[1], intermediate_size), hidden_act)
    chosen = {field.name: getattr(how, field.name) for field in dataclasses.fields(how)}
    return tuning.Tuning(**{name: dataclasses.replace(config, waves=waves) for name, config in chosen.items()})


def _repeated(times: list[int]) -> list[int]:
    """Each position as often as its number says."""
    return [position for position, count in enumerate(times) for _ in range(count)]


@triton.jit
def _spread_kernel(  # type: ignore[no-untyped-def]
    values,
    arrived,
    away,
    sources,
    starts,
    counts,
    half_experts,
    num_arrived,
    width,
    TOP_K: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per row: a token's copy, zeros for a row between experts, nothing where another's row will come."""
    row = tl.program_id(0)
    source = tl.load(sources + row)
    columns = tl.arange(0, CHUNK)
    if source >= 0:
        token = (source // TOP_K).to(tl.int64)
        target = arrived + row.to(tl.int64) * width
        if row >= num_arrived:
            target = away + (row - num_arrived).to(tl.int64) * width
        for first in range(0, width, CHUNK):
            inside = first + columns < width
            value = tl.load(values + token * width + first + columns, mask=inside)
            tl.store(target + first + columns, value, mask=inside)
    else:
        expert = tl.load(half_experts + row // ALIGN)
        if row >= tl.load(starts + expert) + tl.load(counts + expert):
            zeros = tl.zeros((CHUNK,), arrived.dtype.element_ty)
            for first in range(0, width, CHUNK):
                inside = first + columns < width
                tl.store(arrived + row.to(tl.int64) * width + first + columns, zeros, mask=inside)
