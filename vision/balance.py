"""Sharing a global batch between ranks so that none waits long for another.

Samples differ: a text alone, or eight pictures of five crops each. All ranks know the cost of all samples of a global
batch from the shards' index, and work out the same assignment: the longest processing time first (Graham, "Bounds on
multiprocessing timing anomalies", 1969), each to the share with the least work so far. The gradient does not change:
a token's weight is that of the whole global batch wherever the token is computed.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phi35.config import ModelConfig, VisionConfig


@dataclass(frozen=True)
class CostModel:
    """Arithmetic of one sample's forward pass.

    Attributes:
        per_crop: FLOPs of one crop in the tower.
        per_token: FLOPs of one position in the decoder, attention left out.
        per_token_pair: FLOPs of causal attention for one pair of positions, half of them masked.
    """

    per_crop: float
    per_token: float
    per_token_pair: float

    @classmethod
    def of(cls, config: ModelConfig) -> "CostModel":
        """The cost of a vision model's parts, by its config."""
        vision = config.vision
        assert vision is not None
        positions = (vision.image_size // vision.patch_size) ** 2 + 1
        block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        attention = 4 * positions**2 * vision.hidden_size
        per_crop = (vision.num_hidden_layers - 1) * (2 * block * positions + attention)
        head_width = config.num_attention_heads * config.attention_head_dim
        kv_width = config.num_key_value_heads * config.attention_head_dim
        layer = config.hidden_size * (2 * head_width + 2 * kv_width) + 3 * config.hidden_size * config.intermediate_size
        per_token = 2 * (config.num_hidden_layers * layer + config.hidden_size * config.vocab_size)
        return cls(float(per_crop), float(per_token), 2.0 * config.num_hidden_layers * head_width)

    def __call__(self, num_crops: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """FLOPs of samples (N,), by their crops and their positions."""
        tokens = num_tokens.astype(np.float64)
        return self.per_crop * num_crops + self.per_token * tokens + self.per_token_pair * tokens**2


def picture_costs(
    width: np.ndarray, height: np.ndarray, num_crops: int, config: VisionConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(crops, positions) of pictures, by their sizes; 0 crops where a picture is too narrow to be transformed.

    The whole columns at once; the same numbers as ``vision.image_transform.resized_size`` gives one by one.

    Args:
        width: (M,) pixels.
        height: (M,) pixels.
        num_crops: limit of tiles.
        config: gives tile and patch sizes.
    """
    long, short = np.maximum(width, height).astype(np.float64), np.minimum(width, height).astype(np.float64)
    ratio = long / short
    scale = np.ones(len(long), dtype=np.int64)
    for candidate in range(2, num_crops + 1):
        scale[(scale == candidate - 1) & (candidate * np.ceil(candidate / ratio) <= num_crops)] = candidate
    pixels = (scale * config.image_size / ratio).astype(np.int64)
    columns, rows = scale, -(-pixels // config.image_size)
    portrait = width < height
    rows, columns = np.where(portrait, columns, rows), np.where(portrait, rows, columns)
    merged = config.merged_grid_size
    crops = np.where(pixels > 0, rows * columns + 1, 0)
    return crops, (rows * columns + 1) * merged**2 + 1 + (rows + 1) * merged


def assign(costs: Sequence[float], num_shares: int, limit: int | None = None) -> list[list[int]]:
    """Splits items into shares of nearly equal cost; the same on every rank.

    Args:
        costs: one of each item, positive.
        num_shares: at most as many as items, so that none is empty.
        limit: most items of a share; None for no limit.

    Returns:
        Indices of each share's items, ascending.
    """
    assert 0 < num_shares <= len(costs) and (limit is None or limit * num_shares >= len(costs))
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    heap = [(0.0, share) for share in range(num_shares)]
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, share = heapq.heappop(heap)
        shares[share].append(item)
        if limit is None or len(shares[share]) < limit:
            heapq.heappush(heap, (load + costs[item], share))
    return [sorted(share) for share in shares]


def plan_micro_batches(
    costs: Sequence[float], lengths: Sequence[int], world_size: int, accumulation_steps: int, *, padded: bool
) -> list[list[list[int]]]:
    """Which samples of a global batch each rank takes in each of its forward passes.

    Ranks wait for each other in every pass (under ZeRO-2, ZeRO-3 and expert parallelism), so the passes of one turn
    are alike. Where rows are padded to the longest, every pass has the same number of rows and the samples of one
    turn are of similar length; without padding any number of samples may make up a pass.

    Args:
        costs: of each sample of the global batch.
        lengths: positions of each.
        world_size: ranks.
        accumulation_steps: passes of each rank.
        padded: whether rows are padded.

    Returns:
        [turn][rank] -> indices into the global batch, ascending; none is empty.
    """
    if padded:
        size = len(costs) // accumulation_steps
        by_length = sorted(range(len(costs)), key=lambda index: (-lengths[index], index))
        turns = [by_length[first : first + size] for first in range(0, len(costs), size)]
        return [
            [
                sorted(turn[item] for item in share)
                for share in assign([costs[item] for item in turn], world_size, size // world_size)
            ]
            for turn in turns
        ]
    shares = assign(costs, world_size * accumulation_steps)
    loads = [sum(costs[item] for item in share) for share in shares]
    order = sorted(range(len(shares)), key=lambda share: (-loads[share], share))
    plan = []
    for turn in range(accumulation_steps):
        ranks = order[turn * world_size : (turn + 1) * world_size]
        plan.append([shares[share] for share in (ranks if turn % 2 == 0 else reversed(ranks))])
    return plan
