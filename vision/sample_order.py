"""Which sample stands at which position of an endless stream: a function of the seed and the position alone.

Nothing is carried from one position to the next: no shuffle buffer to save, no generator to wind on. A resumed run
therefore needs one number, and any number of ranks and reading processes walk through one and the same stream.
"""

import numpy as np


class EpochOrder:
    """The visits of one data set, each epoch in an order of its own.

    Args:
        draws: (N,) how often each sample is visited in an epoch.
        shard_sizes: samples of each shard, adding up to N.
        seed: of the order.
        shuffle: False visits the samples as they lie.
        stretch: None shuffles all visits of an epoch together. A number shuffles the shards and then, within
            stretches of so many visits, the samples: reads then stay within few shards at a time, which spinning
            disks and network file systems want; two samples of one shard come closer together than by chance.

    Raises:
        ValueError: if nothing is ever visited.
    """

    def __init__(
        self, draws: np.ndarray, shard_sizes: list[int], *, seed: int, shuffle: bool = True, stretch: int | None = None
    ) -> None:
        assert sum(shard_sizes) == len(draws)
        if stretch is not None and stretch < 1:
            raise ValueError(f"a stretch is a number of samples shuffled together, at least 1, got {stretch}")
        self._visits = np.repeat(np.arange(len(draws), dtype=np.int32), draws)
        if not len(self._visits):
            raise ValueError("an epoch without samples")
        ends = np.concatenate([[0], np.cumsum(shard_sizes)])
        # Position of each shard's first visit: visits are sorted by sample, samples by shard.
        self._shard_starts = np.searchsorted(self._visits, ends)
        self._seed, self._shuffle, self._stretch = seed, shuffle, stretch
        self._known: tuple[tuple[int, int], np.ndarray] = ((-1, -1), self._visits)

    def __len__(self) -> int:
        return len(self._visits)

    def __call__(self, epoch: int, place: int) -> int:
        """Number of the sample that is visited at a place of an epoch."""
        if not self._shuffle:
            return int(self._visits[place])
        number, offset = (0, place) if self._stretch is None else divmod(place, self._stretch)
        if self._known[0] != (epoch, number):
            self._known = ((epoch, number), self._shuffled(epoch, number))
        return int(self._known[1][offset])

    def _shuffled(self, epoch: int, number: int) -> np.ndarray:
        if self._stretch is None:
            return np.random.default_rng([self._seed, epoch]).permutation(self._visits)
        shards = np.random.default_rng([self._seed, epoch]).permutation(len(self._shard_starts) - 1)
        lengths = np.diff(self._shard_starts)[shards]
        ends = np.cumsum(lengths)
        places = np.arange(number * self._stretch, min((number + 1) * self._stretch, len(self._visits)))
        shard = np.searchsorted(ends, places, side="right")
        stretch = self._visits[self._shard_starts[shards[shard]] + places - (ends - lengths)[shard]]
        return np.random.default_rng([self._seed, epoch, number]).permutation(stretch)


class Mixture:
    """Which of several data sets each position reads, in exact proportion to their weights.

    Blocks of ``BLOCK`` positions hold the same number of each data set, shuffled anew in every block.

    Args:
        weights: one positive number for each data set.
        seed: of the order.

    Raises:
        ValueError: for weights that are not positive and finite, or too many of them.
    """

    BLOCK = 10_000

    def __init__(self, weights: list[float], seed: int) -> None:
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"mixture weights must be positive numbers, got {weights}")
        if len(weights) > self.BLOCK // 10:
            raise ValueError(f"a mixture holds at most {self.BLOCK // 10} data sets, got {len(weights)}")
        self._counts = _shares(weights, self.BLOCK)
        self._seed = seed
        self._known: tuple[int, np.ndarray, np.ndarray] | None = None

    def __call__(self, position: int) -> tuple[int, int]:
        """(data set, position in its own stream) of a position of the mixed stream."""
        if len(self._counts) == 1:
            return 0, position
        block, offset = divmod(position, self.BLOCK)
        if self._known is None or self._known[0] != block:
            self._known = (block, *self._block(block))
        _, sources, ranks = self._known
        source = int(sources[offset])
        return source, block * int(self._counts[source]) + int(ranks[offset])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each offset its data set, and how often that came before within the block."""
        sources = np.repeat(np.arange(len(self._counts)), self._counts)
        sources = np.random.default_rng([self._seed, 1, block]).permutation(sources)
        ranks = np.empty(self.BLOCK, dtype=np.int64)
        for source, count in enumerate(self._counts):
            ranks[sources == source] = np.arange(count)
        return sources, ranks


def _shares(weights: list[float], total: int) -> np.ndarray:
    """Whole numbers in proportion to the weights, at least 1 each, that add up to ``total`` (largest remainders)."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() != total:
        difference = exact - counts
        step = 1 if counts.sum() < total else -1
        difference = np.where(counts + step < 1, -np.inf, step * difference)
        counts[int(np.argmax(difference))] += step
    return counts
