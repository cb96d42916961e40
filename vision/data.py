"""Training data from webdataset shards: an endless stream of samples whose order depends on the seed alone.

Position p of the stream is a data set (by the mixture's weights), an epoch and a place in it, a sample, one of its
conversations and an augmentation, all functions of the seed and p. A global batch is G positions in a row; which rank
computes which of them changes nothing but the time. So the number of ranks, of reading processes and of accumulation
steps leaves the order as it is, and the whole state of a run (epoch, shard, place in it, what a shuffle buffer or a
packer would hold) is one number: the first position of the next global batch.
"""

import itertools
import random
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from phi35.config import ModelConfig
from phi35.training.stopping import close_at_exit, ignore_stop_signals
from vision.augment import Augmentation
from vision.balance import CostModel, plan_micro_batches
from vision.collator import Example, VisionCollator
from vision.descriptions import SkippedSample
from vision.sample_order import EpochOrder, Mixture
from vision.sample_reader import MAX_PIXELS, SampleReader

Batch = dict[str, Tensor]
Data = str | Path | Sequence[str | Path]
MAX_CONSECUTIVE_SKIPS = 1000


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How a global batch is divided.

    Attributes:
        micro_batch_size: samples of one forward pass of one rank (the mean, where passes are packed and balanced).
        rank: of this process.
        world_size: number of ranks.
        accumulation_steps: forward passes of a rank in one optimizer step.
        balanced: share samples between ranks by their work, not in turn.
    """

    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulation_steps: int = 1
    balanced: bool = True

    def __post_init__(self) -> None:
        if min(self.micro_batch_size, self.accumulation_steps) < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"expected micro_batch_size >= 1, accumulation_steps >= 1 and 0 <= rank < world_size, got {self}"
            )

    @property
    def global_batch_size(self) -> int:
        """G, samples of one optimizer step over all ranks."""
        return self.micro_batch_size * self.world_size * self.accumulation_steps


class ShardDataset(Dataset[tuple[Batch, dict[str, int]]]):
    """Batches of the endless stream, by (first position of the global batch, forward pass).

    Args:
        readers: the data sets.
        weights: their parts of the stream.
        collator: makes batches.
        shape: division of a global batch.
        seed: of everything random.
        shuffle: whether each epoch has its own order.
        shuffle_stretch: as ``vision.sample_order.EpochOrder``'s ``stretch``.
    """

    def __init__(
        self,
        readers: Sequence[SampleReader],
        weights: Sequence[float],
        collator: VisionCollator,
        shape: BatchShape,
        *,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_stretch: int | None = None,
    ) -> None:
        self.readers, self.collator, self.shape, self.seed = list(readers), collator, shape, seed
        self.mixture = Mixture(list(weights), seed)
        self.orders = [
            EpochOrder(reader.draws, reader.index.shard_sizes, seed=seed, shuffle=shuffle, stretch=shuffle_stretch)
            for reader in self.readers
        ]
        self.settings = {
            "seed": seed,
            "shuffle": shuffle,
            "shuffle_stretch": shuffle_stretch,
            "weights": [float(weight) for weight in weights],
            "sources": [[reader.index.digest, len(order)] for reader, order in zip(readers, self.orders, strict=True)],
        }
        self._costs = CostModel.of(collator.config)
        self._plan: tuple[int, list[list[list[int]]]] = (-1, [])

    def __getitem__(self, place: tuple[int, int]) -> tuple[Batch, dict[str, int]]:
        """A batch of this rank, compact, and what was passed over on the way, by reason."""
        skips: Counter[str] = Counter()
        examples = [self.example(position, skips) for position in self.positions(*place)]
        return self.collator.compact(examples), dict(skips)  # torch, copying a Counter, would count twice

    def positions(self, first: int, turn: int) -> list[int]:
        """Positions that this rank takes in a forward pass of the global batch that begins at ``first``."""
        shape = self.shape
        if not shape.balanced or shape.world_size * shape.accumulation_steps == 1:
            start = first + (turn * shape.world_size + shape.rank) * shape.micro_batch_size
            return list(range(start, start + shape.micro_batch_size))
        if self._plan[0] != first:
            costs, lengths = self.costs(first, shape.global_batch_size)
            plan = plan_micro_batches(
                costs, lengths, shape.world_size, shape.accumulation_steps, padded=not self.collator.packed
            )
            self._plan = (first, plan)
        return [first + item for item in self._plan[1][turn][shape.rank]]

    def costs(self, first: int, count: int) -> tuple[list[float], list[int]]:
        """(FLOPs, positions in the sequence) of ``count`` samples from a position of the stream, estimated."""
        places = [self._locate(position) for position in range(first, first + count)]
        costs, lengths = [0.0] * count, [0] * count
        for source, reader in enumerate(self.readers):
            items = [item for item, place in enumerate(places) if place[0] == source]
            numbers = np.array([self.orders[source](*places[item][1:]) for item in items], dtype=np.int64)
            for item, cost, length in zip(items, *reader.costs(numbers, self._costs), strict=True):
                costs[item], lengths[item] = float(cost), int(length)
        return costs, lengths

    def example(self, position: int, skips: Counter[str]) -> Example:
        """The sample at a position of the stream; one that cannot be used gives way to the next of its epoch.

        Args:
            position: from 0, without end.
            skips: the reason is counted here where this position's own sample cannot be used, so that each visit of
                such a sample counts once, on one rank.

        Raises:
            ValueError: if too many in a row cannot be used.
        """
        source, epoch, start = self._locate(position)
        order, reader = self.orders[source], self.readers[source]
        rng = random.Random(((self.seed * 1_000_003 + epoch) * 1009 + source) * 4_294_967_311 + start)
        last: SkippedSample | None = None
        for passed in range(min(len(order), MAX_CONSECUTIVE_SKIPS)):
            number = order(epoch, (start + passed) % len(order))
            try:
                return reader(number, rng)
            except SkippedSample as error:
                if not passed:
                    skips[error.reason] += 1
                last = error
        raise ValueError(
            f"{passed + 1} samples in a row of {reader.index.paths[0].parent} cannot be used; the last: {last}"
        )

    def _locate(self, position: int) -> tuple[int, int, int]:
        """(data set, epoch, place) of a position."""
        source, within = self.mixture(position)
        return source, *divmod(within, len(self.orders[source]))


class _Places(Sampler[tuple[int, int]]):
    """(first position of a global batch, forward pass), without end."""

    def __init__(self, start: int, shape: BatchShape) -> None:
        self.start, self.shape = start, shape

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for first in itertools.count(self.start, self.shape.global_batch_size):
            for turn in range(self.shape.accumulation_steps):
                yield first, turn


class ShardLoader:
    """One rank's batches without end, with a state that any other number of ranks or workers can resume.

    Args:
        dataset: the stream.
        num_workers: processes that read ahead; 0 reads in this process.

    Attributes:
        wait_seconds: time that ``next`` waited for batches so far.
    """

    def __init__(self, dataset: ShardDataset, *, num_workers: int = 0) -> None:
        if num_workers < 0:
            raise ValueError(f"expected num_workers >= 0, got {num_workers}")
        self.dataset = dataset
        self.num_workers = num_workers
        self.wait_seconds = 0.0
        self._skips: Counter[str] = Counter()
        if dataset.shape.rank == 0:  # every rank reads the same index
            for reader in dataset.readers:
                self._skips += reader.left_out
        self._position = 0
        self._taken = 0

    @property
    def num_samples(self) -> int:
        """Samples (visits) in one epoch of all data sets, over all ranks."""
        return sum(map(len, self.dataset.orders))

    def skips(self) -> dict[str, int]:
        """What this rank has passed over since it started, by reason; what no rank visits counts on rank 0."""
        return dict(sorted(self._skips.items()))

    def __iter__(self) -> Iterator[Batch]:
        return map(self.expand, self.compact())

    def expand(self, batch: Batch) -> Batch:
        """A batch of ``compact``, on whatever device it is now, as ``iter`` gives it."""
        return self.dataset.collator.expand(batch)

    def compact(self) -> Iterator[Batch]:
        """The batches in the form that crosses to the device, for ``expand`` to complete there."""
        batches = self._batches()
        close_at_exit(batches)
        return batches

    def _batches(self) -> Generator[Batch, None, None]:
        options: dict[str, Any] = {}
        if self.num_workers:
            options = {"prefetch_factor": 2, "worker_init_fn": _begin_worker}
            options["multiprocessing_context"] = "fork"  # shares the index and cached pictures; other ways copy them
        shape = self.dataset.shape
        loader = DataLoader(
            self.dataset,
            sampler=_Places(self._position, shape),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # Else it draws its seed from the global generator, and the dropout of a resumed run differs.
            generator=torch.Generator(),
            **options,
        )
        self._taken = 0
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch, skips = next(batches)
            self.wait_seconds += time.perf_counter() - began
            self._skips.update(skips)
            self._taken += 1
            if self._taken == shape.accumulation_steps:
                self._position, self._taken = self._position + shape.global_batch_size, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in samples over all ranks; JSON-able.

        Within a global batch it is the beginning of that batch: a run that stopped there computes all of it again.
        """
        return {"position": self._position, **self.dataset.settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved place; the next ``iter`` begins there.

        Raises:
            ValueError: if the state belongs to another seed, order or other data.
        """
        here = self.dataset.settings
        other = [name for name in here if state.get(name) != here[name]]
        if other:
            name = other[0]
            raise ValueError(
                f"the saved data state has {name} {state.get(name)}, this data has {here[name]}: resume with the same "
                "shards, mixture and seed, or start the data anew"
            )
        self._position = int(state["position"])


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    ignore_stop_signals()


def open_source(
    data: Data,
    *,
    model_config: ModelConfig,
    processor: Any,
    rank: int = 0,
    world_size: int = 1,
    micro_batch_size: int = 1,
    accumulation_steps: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    sources: Sequence[Mapping[str, Any]] | None = None,
    max_length: int | None = None,
    num_crops: int | None = None,
    packed: bool = False,
    balanced: bool = True,
    augmentation: Augmentation | dict[str, Any] | bool | None = None,
    cache_decoded: bool = False,
    shuffle: bool = True,
    shuffle_stretch: int | None = None,
    max_pixels: int = MAX_PIXELS,
    fast_jpeg: bool = False,
    held_out: float = 0.0,
    part: str = "train",
) -> ShardLoader:
    """The data source of a vision training: see ``ShardDataset`` and ``ShardLoader``.

    Args:
        data: shards (see ``vision.shards.find_shards``); "mixture" with ``sources``.
        model_config: a config with ``vision``.
        processor: the model's processor or tokenizer.
        rank: of this process.
        world_size: number of ranks.
        micro_batch_size: samples in one batch of one rank.
        accumulation_steps: batches of a rank in one optimizer step.
        seed: of everything random.
        num_workers: reading processes.
        sources: several data sets, each a dict with ``data`` and ``weight`` (part of the samples; 1 if left out).
        max_length: longest sequence in tokens.
        num_crops: limit of tiles of a picture, in place of the model config's.
        packed: samples of a batch stand in one row, in place of rows padded to the longest.
        balanced: share each global batch between ranks by the work that samples cause.
        augmentation: changes of training pictures: True for the defaults, a dict of ``vision.augment.Augmentation``'s
            fields, None or False for none.
        cache_decoded: as in ``vision.sample_reader.SampleReader``.
        shuffle: whether each epoch has its own order.
        shuffle_stretch: shuffle shards, and samples within stretches of so many, in place of the whole epoch.
        max_pixels: larger pictures are passed over.
        fast_jpeg: as in ``SampleReader``.
        held_out: share of the samples of each data set that are kept from training, at least one.
        part: "train", or "held_out" for the samples that were kept.

    Raises:
        ValueError: for unknown settings and unusable data.
    """
    collator = VisionCollator(processor, model_config, max_length=max_length, num_crops=num_crops, packed=packed)
    shape = BatchShape(
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        balanced=balanced,
    )
    described = _sources(data, sources)
    reading: dict[str, Any] = {
        "augmentation": _augmentation(augmentation),
        "max_pixels": max_pixels,
        "fast_jpeg": fast_jpeg,
        "cache_decoded": cache_decoded,
    }
    readers = [SampleReader(source, collator, **reading) for source, _ in described]
    if held_out:
        for reader in readers:
            reader.draws = _draws_of_part(reader.draws, held_out, part)
    dataset = ShardDataset(
        readers,
        [weight for _, weight in described],
        collator,
        shape,
        seed=seed,
        shuffle=shuffle,
        shuffle_stretch=shuffle_stretch,
    )
    return ShardLoader(dataset, num_workers=num_workers)


def _draws_of_part(draws: np.ndarray, held_out: float, part: str) -> np.ndarray:
    """Visits of each sample in an epoch, none for the other part's; the choice hangs on the number of samples alone."""
    count = min(len(draws) - 1, max(1, round(held_out * len(draws))))
    chosen = np.zeros(len(draws), dtype=bool)
    chosen[np.random.default_rng([len(draws), 20_011]).permutation(len(draws))[:count]] = True
    return np.where(chosen == (part == "held_out"), draws, 0)


def _sources(data: Data, sources: Sequence[Mapping[str, Any]] | None) -> list[tuple[Data, float]]:
    """Data sets and their weights."""
    if (data == "mixture") != (sources is not None):
        raise ValueError("several data sets are given as data='mixture' with data_options.sources=[{data: ...}, ...]")
    if sources is None:
        return [(data, 1.0)]
    for source in sources:
        if not isinstance(source, Mapping) or "data" not in source or set(source) - {"data", "weight"}:
            raise ValueError(f"each of data_options.sources needs 'data' and may have 'weight', got {source!r}")
    try:
        return [(source["data"], float(source.get("weight", 1.0))) for source in sources]
    except (TypeError, ValueError) as error:
        raise ValueError(f"weights of data_options.sources must be numbers: {error}") from error


def _augmentation(settings: Augmentation | dict[str, Any] | bool | None) -> Augmentation | None:
    if isinstance(settings, Augmentation):
        return settings
    if not isinstance(settings, dict):
        return Augmentation() if settings else None
    try:
        return Augmentation(**settings)
    except TypeError as error:
        raise ValueError(f"unknown augmentation setting: {error}") from error
