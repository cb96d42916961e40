"""Experts spread over a process group: tokens travel to them and back, under the products of other experts.

The forward pass sends every chunk's rows at once and multiplies a chunk as soon as its rows have come, while later ones
still travel; its outputs leave while the next chunk is multiplied. The backward pass goes the same way with gradients
and computes the gradients of the weights last, under the way home of the gradients of the rows. Messages are sent
from one process to another, so that a token's own process keeps what it computes itself.

Sums are those of a single process: an expert's rows stand in the order of processes and tokens, and a token's k rows
are weighted and added at home, in order of choice.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed

from moe.exchange_plan import Chunk, CountExchange, ExchangePlan, Message, count_and_rank, ranks
from moe.row_products import RowProducts

Wait = Callable[[], None]


@dataclass
class ExchangeClock:
    """Times of a layer's exchanges on a GPU, for benchmarks; empty until the layer runs.

    Attributes:
        waits: pairs of CUDA events around each place where the products wait for rows to come, in order; the time
            between them is the exchange's share that no product covers.
    """

    waits: list[tuple[Any, Any]] = field(default_factory=list)


def exchanged_experts(
    tokens: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str,
    *,
    group: "distributed.ProcessGroup",
    products: RowProducts,
    num_chunks: int = 1,
    clock: ExchangeClock | None = None,
) -> torch.Tensor:
    """Weighted sum of each token's experts, wherever in the group those are.

    All processes of the group must call this alike, also with N = 0. The counts are read on the host, once.

    Args:
        tokens: (N, D).
        expert_indices: (N, k) int64, global numbers in [0, E).
        expert_weights: (N, k) multipliers.
        gate_up_proj: (E / processes, 2F, D), this process's experts.
        down_proj: (E / processes, D, F).
        hidden_act: "silu" or "gelu".
        group: the processes that share the experts, in the order of the experts.
        products: how rows are multiplied.
        num_chunks: pieces that travel under each other's products; at most one an expert.
        clock: takes the times of the exchanges.

    Returns:
        (N, D) in the tokens' dtype.
    """
    flat = expert_indices.reshape(-1)
    num_ranks = distributed.get_world_size(group)
    hits, counts = count_and_rank(flat, num_ranks * gate_up_proj.shape[0])
    told = CountExchange(counts, group)
    rank_in_expert = ranks(hits, flat)
    sent, received = told.wait()
    plan = ExchangePlan.build(
        sent, received, rank=distributed.get_rank(group), num_chunks=num_chunks, align=products.align
    )
    first_rows, table = _to_device([plan.first_rows, products.table(plan)], flat.device)
    places = first_rows.index_select(0, flat).add_(rank_in_expert).long()
    call = _Call(plan, products, products.layouts(plan, table), places, hidden_act, RowExchange(group, clock))
    inputs = (tokens, expert_weights, gate_up_proj, down_proj)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _ExchangedExperts.apply(*inputs, call, save)


class RowExchange:
    """Messages over a process group; tags name the expert, so that no order of arrival is assumed."""

    def __init__(self, group: "distributed.ProcessGroup", clock: ExchangeClock | None) -> None:
        self.group, self.clock = group, clock

    def out(self, chunk: Chunk, *tensors: tuple[torch.Tensor, torch.Tensor]) -> Wait:
        """Send away rows to their experts and take other processes' rows in: pairs of (away, arrived) tensors."""
        return self._start(chunk.leaving, chunk.arriving, tensors)

    def home(self, chunk: Chunk, *tensors: tuple[torch.Tensor, torch.Tensor]) -> Wait:
        """Send arrived rows' results back and take the away rows' in: pairs of (arrived, away) tensors."""
        return self._start(chunk.arriving, chunk.leaving, tensors)

    def _start(
        self,
        sends: Sequence[Message],
        receives: Sequence[Message],
        tensors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> Wait:
        operations = []
        for number, (source, target) in enumerate(tensors):
            for function, messages, rows in (
                (distributed.irecv, receives, target),
                (distributed.isend, sends, source),
            ):
                for message in messages:
                    tag = number + len(tensors) * message.expert
                    part = rows[message.first : message.last]
                    operations.append(
                        distributed.P2POp(function, part, group=self.group, tag=tag, group_peer=message.peer)
                    )
        # The rows must outlive the exchange: whoever waits holds them.
        works = distributed.batch_isend_irecv(operations) if operations else []

        def wait(held: Any = tensors) -> None:
            before = self._event()
            for work in works:
                work.wait()
            if before is not None and self.clock is not None:
                self.clock.waits.append((before, self._event()))

        return wait

    def _event(self) -> Any:
        if self.clock is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class _Call:
    """What one call knows beside its tensors: the plan, its layouts, and each pair's row (N k,)."""

    plan: ExchangePlan
    products: RowProducts
    layouts: list[Any]
    places: torch.Tensor
    hidden_act: str
    exchange: RowExchange

    def spread(self, values: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens' rows (N, D) as arrived and away rows."""
        plan, places = self.plan, self.places
        sources = places.new_full((plan.num_arrived + plan.num_away,), -1)
        sources.scatter_(0, places, torch.arange(places.numel(), device=places.device))
        return self.products.spread(values.contiguous(), sources, top_k, plan, self.layouts[0])

    def chunks(self) -> list[tuple[Chunk, Any, slice, slice]]:
        """Each chunk, its layout, its arrived rows and its experts."""
        return [
            (chunk, layout, slice(*chunk.rows), slice(*chunk.experts))
            for chunk, layout in zip(self.plan.chunks, self.layouts[1:], strict=True)
        ]


class _ExchangedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        expert_weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        call: _Call,
        save: bool,
    ) -> torch.Tensor:
        products, exchange, arrived_rows = call.products, call.exchange, call.plan.num_arrived
        top_k = expert_weights.shape[1]
        arrived, away = call.spread(tokens, top_k)
        coming = [exchange.out(chunk, (away, arrived)) for chunk in call.plan.chunks]
        del away  # the waits hold it
        mixed = tokens.new_empty(arrived_rows + call.plan.num_away, tokens.shape[1])
        going, kept = [], []
        for (chunk, layout, rows, experts), come in zip(call.chunks(), coming, strict=True):
            come()
            if chunk.rows[0] < chunk.rows[1]:
                gate_up_rows = products.forward(
                    arrived[rows], gate_up_proj[experts], down_proj[experts], layout, call.hidden_act, mixed[rows]
                )
                kept.append(gate_up_rows)
            going.append(exchange.home(chunk, (mixed[:arrived_rows], mixed[arrived_rows:])))
        for went in going:
            went()
        if save:
            ctx.call = call
            if not ctx.needs_input_grad[2]:
                arrived = arrived.new_empty(0)  # only the gradient of gate_up_proj needs the rows
            ctx.save_for_backward(arrived, expert_weights, gate_up_proj, down_proj, *kept)
        return products.combine(mixed, call.places, top_k, expert_weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: _Call = ctx.call
        arrived, expert_weights, gate_up_proj, down_proj, *kept = ctx.saved_tensors
        products, exchange, places, num_arrived = call.products, call.exchange, call.places, call.plan.num_arrived
        num_rows, top_k = num_arrived + call.plan.num_away, expert_weights.shape[1]
        upstream, away = call.spread(grad_outputs[0], top_k)
        row_weights = expert_weights.new_zeros(num_rows).scatter_(0, places, expert_weights.reshape(-1))
        weights = (row_weights[num_arrived:], row_weights[:num_arrived])
        coming = [exchange.out(chunk, (away, upstream), weights) for chunk in call.plan.chunks]
        del away
        row_grads = upstream.new_empty(num_rows, upstream.shape[1])
        wide = torch.promote_types(expert_weights.dtype, torch.float32)
        weight_grads = expert_weights.new_empty(num_rows, dtype=wide)
        going, late, remaining = [], [], list(kept)
        del kept
        for (chunk, layout, rows, experts), come in zip(call.chunks(), coming, strict=True):
            come()
            if chunk.rows[0] < chunk.rows[1]:
                halves = products.rows_backward(
                    upstream[rows],
                    remaining.pop(0),
                    row_weights[rows],
                    gate_up_proj[experts],
                    down_proj[experts],
                    layout,
                    call.hidden_act,
                    row_grads[rows],
                    weight_grads[rows],
                )
                late.append((arrived[rows], upstream[rows], *halves))
            going.append(
                exchange.home(
                    chunk,
                    (row_grads[:num_arrived], row_grads[num_arrived:]),
                    (weight_grads[:num_arrived], weight_grads[num_arrived:]),
                )
            )
        _, _, gate_up_wanted, down_wanted, *_ = ctx.needs_input_grad
        gate_up_grad = torch.empty_like(gate_up_proj) if gate_up_wanted else None
        down_grad = torch.empty_like(down_proj) if down_wanted else None
        for chunk, layout, _, experts in call.chunks():
            outs = [None if grad is None else grad[experts] for grad in (gate_up_grad, down_grad)]
            if chunk.rows[0] < chunk.rows[1]:
                products.weights_backward(*late.pop(0), layout, call.hidden_act, *outs)
            else:
                for out in outs:
                    if out is not None:
                        out.zero_()
        for went in going:
            went()
        tokens_grad = products.combine(row_grads, places, top_k, None)
        weights_grad = weight_grads.index_select(0, places).view(expert_weights.shape).to(expert_weights.dtype)
        return tokens_grad, weights_grad, gate_up_grad, down_grad, None, None


def _to_device(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Int32 tensors by one copy that the host does not wait for; each starts at a multiple of 16 bytes."""
    joined, sizes = array("i"), []
    for values in lists:
        padding = -len(values) % 4
        joined.extend(values)
        joined.extend([0] * padding)
        sizes += [len(values), padding]
    # Through a buffer: torch.tensor of a list of this length takes ten times as long, and the device waits.
    held = torch.frombuffer(joined, dtype=torch.int32)
    held = held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held
    return held.split(sizes)[::2]
