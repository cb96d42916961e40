"""Where every row lies when tokens travel to their experts: counts, places and messages.

A process holds two stretches of rows. The *arrived* rows are those of its own experts: sorted by expert, each expert
starting at a multiple of ``align``, its rows in the order of the processes they come from and of the tokens there. The
*away* rows are those of its own tokens that other processes compute: sorted by chunk, process and expert. A token's own
process writes the rows of its own experts straight to their places among the arrived ones; only the away rows cross
to another process.

The experts are cut into chunks, so that one chunk's rows travel while another's are multiplied.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import distributed


@dataclass(frozen=True)
class Message:
    """Rows [first, last) that go to, or come from, one process for one expert.

    Attributes:
        peer: rank in the expert group.
        expert: global number of the expert.
        first: first row.
        last: one past the last.
    """

    peer: int
    expert: int
    first: int
    last: int


@dataclass(frozen=True)
class Chunk:
    """Experts that are exchanged and multiplied together.

    Attributes:
        experts: [first, last) of this process's experts.
        rows: [first, last) of its arrived rows.
        starts: first row of each expert and the end, counted from the chunk's first row.
        counts: real rows of each expert.
        leaving: away rows that other processes compute.
        arriving: arrived rows that come from other processes.
    """

    experts: tuple[int, int]
    rows: tuple[int, int]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    leaving: tuple[Message, ...]
    arriving: tuple[Message, ...]


@dataclass(frozen=True)
class ExchangePlan:
    """The host's knowledge of one exchange.

    Attributes:
        num_arrived: P, arrived rows with the empty ones between experts.
        num_away: S, away rows.
        first_rows: (E,) where this process's first row for each expert lies among the P + S rows, arrived first.
        own: (first, last) of this process's own rows among the arrived rows of each of its experts.
        chunks: in the order in which they travel.
    """

    num_arrived: int
    num_away: int
    first_rows: tuple[int, ...]
    own: tuple[tuple[int, int], ...]
    chunks: tuple[Chunk, ...]

    @classmethod
    def build(
        cls, sent: list[int], received: list[list[int]], *, rank: int, num_chunks: int, align: int
    ) -> "ExchangePlan":
        """Lay rows out by their counts.

        Args:
            sent: (E,) rows of this process's tokens for each expert.
            received: (processes, E / processes) rows that each process sends for each of this one's experts.
            rank: of this process in the group.
            num_chunks: pieces, at most as many as experts here.
            align: multiple at which each expert's arrived rows start.
        """
        num_ranks, num_local = len(received), len(received[0])
        # before[q][e]: rows of expert e from processes below q.
        before = list(accumulate(received, _added, initial=[0] * num_local))
        counts = before[-1]
        starts = list(accumulate((-(-count // align) * align for count in counts), initial=0))
        own = [(starts[e] + before[rank][e], starts[e] + before[rank + 1][e]) for e in range(num_local)]
        first_rows = [0] * len(sent)
        first_rows[rank * num_local : (rank + 1) * num_local] = [first for first, _ in own]
        num_chunks = max(1, min(num_chunks, num_local))
        bounds = [num_local * chunk // num_chunks for chunk in range(num_chunks + 1)]
        chunks, away = [], 0
        for low, high in zip(bounds, bounds[1:], strict=False):
            leaving, arriving = [], []
            for peer in range(num_ranks):
                if peer == rank:
                    continue
                for local in range(low, high):
                    expert = peer * num_local + local
                    first_rows[expert] = starts[-1] + away
                    if sent[expert]:
                        leaving.append(Message(peer, expert, away, away + sent[expert]))
                        away += sent[expert]
                    if received[peer][local]:
                        first = starts[local] + before[peer][local]
                        mine = rank * num_local + local
                        arriving.append(Message(peer, mine, first, first + received[peer][local]))
            chunks.append(
                Chunk(
                    (low, high),
                    (starts[low], starts[high]),
                    tuple(start - starts[low] for start in starts[low : high + 1]),
                    tuple(counts[low:high]),
                    tuple(leaving),
                    tuple(arriving),
                )
            )
        return cls(starts[-1], away, tuple(first_rows), tuple(own), tuple(chunks))


def _added(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]


class CountExchange:
    """Rows for each expert, told to the process that holds it: one small all-to-all and one copy to the host.

    It is under way when the constructor returns; what is queued before ``wait`` runs beside it.

    Args:
        counts: (E,) int64 rows of this process's tokens for each expert.
        group: the processes that share the experts.
    """

    def __init__(self, counts: torch.Tensor, group: "distributed.ProcessGroup") -> None:
        self._num_ranks = distributed.get_world_size(group)
        self._both = counts.new_empty(2, counts.numel())
        self._both[0].copy_(counts)
        self._work = distributed.all_to_all_single(self._both[1], self._both[0], group=group, async_op=True)

    def wait(self) -> tuple[list[int], list[list[int]]]:
        """(E,) rows sent for each expert, and (processes, E / processes) rows received for each own expert."""
        if self._work is not None:  # None for a process outside the group, says torch's signature
            self._work.wait()
        if self._both.device.type == "cuda":
            host = torch.empty(self._both.shape, dtype=self._both.dtype, pin_memory=True)
            host.copy_(self._both, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            copied.synchronize()
        else:
            host = self._both
        sent, received = host.tolist()
        num_local = len(received) // self._num_ranks
        return sent, [received[first : first + num_local] for first in range(0, len(received), num_local)]


def count_and_rank(expert_indices: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What there is to know of (N k,) expert numbers without sorting them.

    Returns:
        (E, N k) bool, which pairs each expert has; (E,) int64 pairs of each expert. ``ranks`` takes the first.
    """
    hits = expert_indices.unsqueeze(0) == torch.arange(num_experts, device=expert_indices.device).unsqueeze(1)
    return hits, hits.sum(dim=1)


def ranks(hits: torch.Tensor, expert_indices: torch.Tensor) -> torch.Tensor:
    """(N k,) int32: how many earlier pairs have the same expert."""
    return hits.cumsum(dim=1, dtype=torch.int32).gather(0, expert_indices.unsqueeze(0)).squeeze(0) - 1
