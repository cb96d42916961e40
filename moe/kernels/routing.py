"""Sort (token, choice) pairs by expert on the device, without asking the host for anything.

A stable counting sort in three small kernels: count per block of pairs, one program that turns the counts into
places and a tile schedule, and a scatter of places. Every expert's rows start at a multiple of ``align`` and are
followed by empty rows up to the next multiple, so that the grouped products meet only whole or half tiles and need no
masks.
MegaBlocks (arXiv 2211.15841, section 5.2) pads to blocks for the same reason. Empty rows hold zeros, which every stage
maps to zeros.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_PAIRS_PER_BLOCK = 512
_TILES_PER_STEP = 256
_ALIGNMENT = 4  # elements: views start at multiples of 16 bytes, which Triton's specialisation asks for


@dataclass(frozen=True)
class RoutingPlan:
    """Where every row lies; all tensors int32 views of one buffer on the tokens' device.

    Attributes:
        places: (N k,) sorted row of pair token * k + choice.
        sources: (P,) pair of each sorted row, -1 for an empty one; P is the static upper bound of rows. Rows at and
            past ``starts[E]`` are undefined.
        starts: (E + 1,) first row of each expert, multiples of ``align``; the last is the number of rows in use.
        counts: (E,) real rows of each expert.
        tile_starts: (E + 1,) first tile of each expert; the last is the number of tiles. A tile has two halves of
            ``align`` rows; an expert's last tile may have one.
        tile_experts: (tiles,) expert of each tile; undefined past the tiles in use.
        align: rows per half tile.
        buffer: what the others are views of.
    """

    places: torch.Tensor
    sources: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    tile_starts: torch.Tensor
    tile_experts: torch.Tensor
    align: int
    buffer: torch.Tensor

    @property
    def num_rows(self) -> int:
        """P, the static upper bound of sorted rows."""
        return self.sources.shape[0]

    @classmethod
    def view(cls, buffer: torch.Tensor, num_pairs: int, num_experts: int, align: int) -> "RoutingPlan":
        """The plan that lies in a buffer of ``plan_size`` elements."""
        views, offset = [], 0
        for size in _sizes(num_pairs, num_experts, align):
            views.append(buffer[offset : offset + size])
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
        places, sources, starts, counts, tile_starts, tile_experts = views
        return cls(places, sources, starts, counts, tile_starts, tile_experts, align, buffer)


def padded_rows(num_pairs: int, num_experts: int, align: int) -> int:
    """Upper bound of sorted rows, the same for every routing of ``num_pairs`` pairs."""
    # An expert with rows wastes at most align - 1; no more than num_pairs experts have rows.
    waste = min(num_experts, num_pairs) * (align - 1)
    # At least one half tile: a descriptor has no empty tensor.
    return max(1, -(-(num_pairs + waste) // align)) * align


def plan_size(num_pairs: int, num_experts: int, align: int) -> int:
    """Elements of a plan's buffer."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in _sizes(num_pairs, num_experts, align))


def plan_routing(expert_indices: torch.Tensor, num_experts: int, align: int) -> RoutingPlan:
    """Sort (N, k) expert numbers in [0, E); see ``RoutingPlan``. No host synchronisation."""
    flat = expert_indices.reshape(-1).contiguous()
    num_pairs = flat.numel()
    size = plan_size(num_pairs, num_experts, align)
    num_blocks = triton.cdiv(num_pairs, _PAIRS_PER_BLOCK)
    width = triton.next_power_of_2(max(num_experts, 2))
    # One allocation for the plan: eight would cost the host more than the kernels take.
    plan = RoutingPlan.view(torch.empty(size, dtype=torch.int32, device=flat.device), num_pairs, num_experts, align)
    if num_pairs == 0:
        plan.buffer.zero_()
        return plan
    block_counts = torch.empty((num_blocks, width), dtype=torch.int32, device=flat.device)
    num_tiles = plan.tile_experts.shape[0]
    _count_kernel[(num_blocks,)](flat, block_counts, num_pairs, WIDTH=width, BLOCK=_PAIRS_PER_BLOCK, num_warps=4)
    _plan_kernel[(1,)](
        block_counts,
        plan.sources,
        plan.starts,
        plan.counts,
        plan.tile_starts,
        plan.tile_experts,
        num_blocks,
        num_experts,
        num_tiles,
        WIDTH=width,
        ALIGN=align,
        BLOCKS_PER_STEP=min(64, triton.next_power_of_2(num_blocks)),
        TILES_PER_STEP=min(_TILES_PER_STEP, triton.next_power_of_2(num_tiles)),
        num_warps=8,
    )
    _place_kernel[(num_blocks,)](
        flat, block_counts, plan.places, plan.sources, num_pairs, WIDTH=width, BLOCK=_PAIRS_PER_BLOCK, num_warps=4
    )
    return plan


def _sizes(num_pairs: int, num_experts: int, align: int) -> tuple[int, ...]:
    num_tiles = padded_rows(num_pairs, num_experts, 2 * align) // (2 * align)
    return (
        num_pairs,
        padded_rows(num_pairs, num_experts, align),
        num_experts + 1,
        num_experts,
        num_experts + 1,
        num_tiles,
    )


@triton.jit
def _count_kernel(indices, block_counts, num_pairs, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of each expert in each block of pairs."""
    block = tl.program_id(0)
    pairs = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(indices + pairs, mask=pairs < num_pairs, other=-1).to(tl.int32)
    experts = tl.arange(0, WIDTH)
    hits = (expert[:, None] == experts[None, :]).to(tl.int32)
    tl.store(block_counts + block * WIDTH + experts, tl.sum(hits, axis=0))


@triton.jit
def _plan_kernel(  # type: ignore[no-untyped-def]
    block_counts,
    sources,
    starts,
    counts,
    tile_starts,
    tile_experts,
    num_blocks,
    num_experts,
    num_tiles,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCKS_PER_STEP: tl.constexpr,
    TILES_PER_STEP: tl.constexpr,
):
    """One program: totals, starts, the tile schedule; block counts become each block's first places."""
    experts = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, num_blocks, BLOCKS_PER_STEP):
        blocks = first + tl.arange(0, BLOCKS_PER_STEP)
        at = block_counts + blocks[:, None] * WIDTH + experts[None, :]
        total += tl.sum(tl.load(at, mask=blocks[:, None] < num_blocks, other=0), axis=0)
    padded = (total + ALIGN - 1) // ALIGN * ALIGN
    ends = tl.cumsum(padded, axis=0)
    begin = ends - padded
    real = experts < num_experts
    tl.store(counts + experts, total, mask=real)
    tl.store(starts + experts, begin, mask=real)
    tl.store(starts + num_experts, tl.sum(padded, axis=0))
    tiles = (total + 2 * ALIGN - 1) // (2 * ALIGN)
    tile_ends = tl.cumsum(tiles, axis=0)
    tl.store(tile_starts + experts, tile_ends - tiles, mask=real)
    tl.store(tile_starts + num_experts, tl.sum(tiles, axis=0))

    running = begin
    for first in range(0, num_blocks, BLOCKS_PER_STEP):
        blocks = first + tl.arange(0, BLOCKS_PER_STEP)
        at = block_counts + blocks[:, None] * WIDTH + experts[None, :]
        inside = blocks[:, None] < num_blocks
        here = tl.load(at, mask=inside, other=0)
        tl.store(at, running[None, :] + tl.cumsum(here, axis=0) - here, mask=inside)
        running += tl.sum(here, axis=0)

    # Empty rows between an expert's last real row and its end.
    slots = tl.arange(0, ALIGN)
    rows = begin[:, None] + total[:, None] + slots[None, :]
    tl.store(sources + rows, tl.full((WIDTH, ALIGN), -1, tl.int32), mask=rows < ends[:, None])

    for first in range(0, num_tiles, TILES_PER_STEP):
        tile = first + tl.arange(0, TILES_PER_STEP)
        owner = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        tl.store(tile_experts + tile, tl.minimum(owner, num_experts - 1), mask=tile < num_tiles)


@triton.jit
def _place_kernel(  # type: ignore[no-untyped-def]
    indices, block_places, places, sources, num_pairs, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Each pair's row: its block's first place of that expert plus its rank in the block."""
    block = tl.program_id(0)
    pairs = block * BLOCK + tl.arange(0, BLOCK)
    inside = pairs < num_pairs
    expert = tl.load(indices + pairs, mask=inside, other=-1).to(tl.int32)
    experts = tl.arange(0, WIDTH)
    hits = (expert[:, None] == experts[None, :]).to(tl.int32)
    first = tl.load(block_places + block * WIDTH + experts)
    rank = tl.cumsum(hits, axis=0) - hits
    place = tl.sum(hits * (rank + first[None, :]), axis=1)
    tl.store(places + pairs, place, mask=inside)
    tl.store(sources + place, pairs, mask=inside)
