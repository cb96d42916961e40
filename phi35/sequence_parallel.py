"""Rows spread over several processes: each holds a stretch of tokens, and of attention a part of the heads.

DeepSpeed's Ulysses (arXiv 2309.14509): an all-to-all before attention turns all heads of a stretch of T / s tokens
into H / s heads of all T tokens, another one after it turns back. Everything else of a decoder works token by token.
Keys and values travel with their queries in one exchange. Departures from DeepSpeed's own class: fewer key heads than
processes are allowed (they are repeated until every process has the ones its queries need), and nothing is read
from module-level state.
"""

from typing import Any

import torch
from torch import distributed
from torch.autograd.function import FunctionCtx


class SequenceParallel:
    """This process's place among those that share a row.

    Args:
        group: the processes, in the order of their stretches.

    Attributes:
        size: number of processes s.
        rank: this one's place.
    """

    def __init__(self, group: "distributed.ProcessGroup") -> None:
        self.group = group
        self.size = distributed.get_world_size(group)
        self.rank = distributed.get_rank(group)

    def local(self, values: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This process's stretch of a whole tensor whose dimension ``dim`` runs over T tokens."""
        length = values.shape[dim]
        if length % self.size:
            raise ValueError(f"{length} tokens cannot be split evenly over {self.size} processes: pad the rows")
        return values.narrow(dim, self.rank * (length // self.size), length // self.size)

    def to_heads(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All heads of this stretch -> this process's heads of the whole rows.

        Args:
            queries: (B, H, T / s, d); s divides H.
            keys: (B, K, T / s, d).
            values: (B, K, T / s, d).

        Returns:
            (B, H / s, T, d) and twice (B, K' / s, T, d), K' the least multiple of K that s divides.
        """
        copies = kv_copies(queries.shape[1], keys.shape[1], self.size)
        if copies > 1:
            keys, values = (tensor.repeat_interleave(copies, dim=1) for tensor in (keys, values))
        parts = [tensor.unflatten(1, (self.size, -1)) for tensor in (queries, keys, values)]  # (B, s, heads / s, ...)
        counts = [part.shape[2] for part in parts]
        sent = torch.cat(parts, dim=2).transpose(0, 1)  # (s, B, heads / s, T / s, d)
        received = _AllToAll.apply(sent, self.group)
        whole = received.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (B, heads / s, T, d)
        queries, keys, values = whole.split(counts, dim=1)
        return queries, keys, values

    def to_tokens(self, attended: torch.Tensor) -> torch.Tensor:
        """This process's heads of the whole rows (B, H / s, T, d) -> all heads of its stretch (B, H, T / s, d)."""
        sent = attended.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4)  # (s, B, H / s, T / s, d)
        return _AllToAll.apply(sent, self.group).transpose(0, 1).flatten(1, 2)


def kv_copies(num_heads: int, num_kv_heads: int, size: int) -> int:
    """How often each key head is repeated so that every process has those of its queries.

    Raises:
        ValueError: if the query heads cannot be spread evenly.
    """
    if num_heads % size:
        raise ValueError(
            f"sequence_parallel_size ({size}) must divide the model's {num_heads} attention heads: each process "
            "attends with its part of them"
        )
    group = num_heads // num_kv_heads
    return next(copies for copies in range(1, group + 1) if group % copies == 0 and num_kv_heads * copies % size == 0)


class _AllToAll(torch.autograd.Function):
    """Piece i of dimension 0 goes to process i; gradients travel back the same way."""

    @staticmethod
    def forward(ctx: FunctionCtx, sent: torch.Tensor, group: "distributed.ProcessGroup") -> torch.Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return _exchange(sent, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(grad_outputs[0], ctx.group), None


def _exchange(sent: torch.Tensor, group: "distributed.ProcessGroup") -> torch.Tensor:
    received = torch.empty_like(sent, memory_format=torch.contiguous_format)
    distributed.all_to_all_single(received, sent.contiguous(), group=group)
    return received
