"""Training data from webdataset shards: a stream of batches whose order depends on the seed alone.

A sample's description is JSON, ``{"messages": [{"role": ..., "content": ...}, ...]}`` or
``{"conversations": [{"messages": [...], "weight": 1.0}, ...], "draws": n}``: alternatives about the same
pictures, of which one is drawn each time; the sample is visited n times an epoch. Everything random (order,
alternative, augmentation) follows from the seed and the position in the stream, so that the number of ranks and
workers changes nothing, and a state is one number.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from phi35.config import ModelConfig
from vision.augment import Augmentation
from vision.collator import Conversation, Messages, VisionCollator, check_tags
from vision.decode import open_image
from vision.shards import Sample, ShardIndex

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Alternatives:
    """A parsed description: conversations about the sample's pictures and their cumulative weights."""

    messages: tuple[Messages, ...]
    cumulative_weights: tuple[float, ...]
    draws: int

    def draw(self, rng: random.Random) -> Messages:
        """One conversation, by weight."""
        if len(self.messages) == 1:
            return self.messages[0]
        return rng.choices(self.messages, cum_weights=self.cumulative_weights)[0]


def parse_description(description: Any) -> Alternatives:
    """Checks and unpacks a sample's JSON.

    Raises:
        ValueError: if it has not one of the two forms above.
    """
    try:
        conversations = description.get("conversations") or [description]
        messages = tuple(
            tuple((str(turn["role"]), str(turn["content"])) for turn in conversation["messages"])
            for conversation in conversations
        )
        weights = [float(conversation.get("weight", 1.0)) for conversation in conversations]
        draws = int(description.get("draws", 1))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"a sample's JSON needs 'messages' or 'conversations' with role and content: {error!r}"
        ) from error
    if not all(messages) or min(weights) < 0 or sum(weights) <= 0 or not 1 <= draws <= 10_000:
        raise ValueError("a sample's JSON needs turns in each conversation, weights >= 0 and draws in 1..10000")
    return Alternatives(messages, tuple(itertools.accumulate(weights)), draws)


class ShardDataset(Dataset[tuple[Batch, int]]):
    """Batches by position in the endless stream of samples.

    Args:
        data: where the shards are (see ``vision.shards.find_shards``).
        collator: makes batches of conversations.
        seed: of order, alternatives and augmentation.
        shuffle: whether each epoch has its own order.
        augmentation: changes of training pictures, or None.
        cache_decoded: decode every picture once, here and now, and keep it (equal pictures once) in memory that
            workers share; gives the same batches. For data whose pixels fit into memory.

    Attributes:
        num_corrupt: samples left out because their description is unusable or names other pictures than they hold.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
        collator: VisionCollator,
        *,
        seed: int = 0,
        shuffle: bool = True,
        augmentation: Augmentation | None = None,
        cache_decoded: bool = False,
    ) -> None:
        self.index = ShardIndex(data)
        self.collator = collator
        self.seed = seed
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.num_corrupt = 0
        self._alternatives: list[Alternatives | None] = [self._parsed(sample) for sample in self.index.samples]
        draws = [0 if parsed is None else parsed.draws for parsed in self._alternatives]
        self._visits = np.repeat(np.arange(len(draws)), draws)
        if not len(self._visits):
            raise ValueError(f"none of the {len(draws)} samples in {data} has a usable description")
        self._order: tuple[int, np.ndarray] = (-1, self._visits)
        self._images: list[tuple[np.ndarray, ...] | None] | None = None
        if cache_decoded:
            known: dict[bytes, np.ndarray] = {}
            self._images = [self._decoded(sample, known) for sample in self.index.samples]

    @property
    def epoch_length(self) -> int:
        """Visits in one epoch."""
        return len(self._visits)

    def __getitem__(self, positions: tuple[int, int]) -> tuple[Batch, int]:
        """The batch of positions [first, first + count), compact, and how many unreadable samples it passed over."""
        first, count = positions
        conversations, skipped = [], 0
        for position in range(first, first + count):
            conversation, passed = self.conversation(position)
            conversations.append(conversation)
            skipped += passed
        return self.collator.compact(conversations), skipped

    def conversation(self, position: int) -> tuple[Conversation, int]:
        """The sample at a position of the stream; an unreadable one gives way to the next of its epoch.

        Raises:
            ValueError: if no sample of the epoch can be read.
        """
        epoch, start = divmod(position, self.epoch_length)
        order = self._epoch_order(epoch)
        rng = random.Random((self.seed * 1_000_003 + epoch) * 4_294_967_311 + start)
        for passed in range(self.epoch_length):
            number = int(order[(start + passed) % self.epoch_length])
            images = self._read_images(number)
            if images is None:
                continue
            alternatives = self._alternatives[number]
            assert alternatives is not None
            messages = alternatives.draw(rng)
            if self.augmentation is not None:
                images = tuple(self.augmentation(image, rng) for image in images)
            return Conversation(messages, images), passed
        raise ValueError(f"none of the pictures in {[str(path) for path in self.index.paths]} can be read")

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return self._visits
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self._visits))
        return self._order[1]

    def _parsed(self, sample: Sample) -> Alternatives | None:
        try:
            parsed = parse_description(self.index.describe(sample))
            for messages in parsed.messages:
                check_tags(messages, len(sample.images))
            return parsed
        except ValueError:
            self.num_corrupt += 1
            return None

    def _read_images(self, number: int) -> tuple[np.ndarray, ...] | None:
        if self._images is not None:
            return self._images[number]
        return self._decoded(self.index.samples[number], {})

    def _decoded(self, sample: Sample, known: dict[bytes, np.ndarray]) -> tuple[np.ndarray, ...] | None:
        """The sample's pictures as (H, W, 3) uint8, equal files decoded once; None if one is unreadable."""
        images = []
        for member in sample.images:
            content = self.index.read(member)
            digest = hashlib.sha256(content).digest()
            if digest not in known:
                try:
                    known[digest] = np.asarray(open_image(content))
                except ValueError:
                    return None
            images.append(known[digest])
        return tuple(images)


class _Positions(Sampler[tuple[int, int]]):
    """(first position, count) of one rank's batches, without end."""

    def __init__(self, start: int, stride: int, offset: int, count: int) -> None:
        self.start, self.stride, self.offset, self.count = start, stride, offset, count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for first in itertools.count(self.start + self.offset, self.stride):
            yield first, self.count


class ShardLoader:
    """One rank's batches without end, with a state that any other number of ranks or workers can resume.

    Step t hands rank r the positions [t * m * W + r * m, + m) of the stream, m samples a batch, W ranks.

    Args:
        dataset: the stream.
        batch_size: m, samples in one batch of one rank.
        rank: of this process.
        world_size: number of ranks.
        num_workers: processes that read ahead; 0 reads in this process.

    Attributes:
        num_skipped: unreadable samples that delivered batches passed over.

    Raises:
        ValueError: for sizes out of range.
    """

    def __init__(
        self, dataset: ShardDataset, *, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or num_workers < 0:
            raise ValueError(
                f"expected batch_size >= 1, 0 <= rank < world_size and num_workers >= 0, got batch_size={batch_size}, "
                f"rank={rank}, world_size={world_size}, num_workers={num_workers}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.num_skipped = 0
        self._position = 0

    @property
    def num_samples(self) -> int:
        """Samples (visits) in one epoch, over all ranks."""
        return self.dataset.epoch_length

    def __iter__(self) -> Iterator[Batch]:
        return map(self.expand, self.compact())

    def expand(self, batch: Batch) -> Batch:
        """A batch of ``compact``, on whatever device it is now, as ``iter`` gives it."""
        return self.dataset.collator.expand(batch)

    def compact(self) -> Iterator[Batch]:
        """The batches in the form that crosses to the device, for ``expand`` to complete there."""
        stride = self.batch_size * self.world_size
        positions = _Positions(self._position, stride, self.rank * self.batch_size, self.batch_size)
        options: dict[str, Any] = {}
        if self.num_workers:
            options = {"prefetch_factor": 2, "worker_init_fn": _one_thread}
        loader = DataLoader(
            self.dataset,
            sampler=positions,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
        for batch, skipped in loader:
            self._position += stride
            self.num_skipped += skipped
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last delivered batch, in samples over all ranks; JSON-able."""
        return {"position": self._position, "seed": self.dataset.seed, "epoch_length": self.dataset.epoch_length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved place; the next ``iter`` begins there.

        Raises:
            ValueError: if the state belongs to another seed or other data.
        """
        for name in ("seed", "epoch_length"):
            here = self.state_dict()[name]
            if state.get(name) != here:
                raise ValueError(
                    f"the saved data state has {name} {state.get(name)}, this data has {here}: resume with the same "
                    "shards and seed, or start the data anew"
                )
        self._position = int(state["position"])


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def open_source(
    data: str | Path | Sequence[str | Path],
    *,
    model_config: ModelConfig,
    processor: Any,
    rank: int = 0,
    world_size: int = 1,
    micro_batch_size: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    max_length: int | None = None,
    augmentation: Augmentation | dict[str, Any] | bool | None = None,
    cache_decoded: bool = False,
    shuffle: bool = True,
) -> ShardLoader:
    """The data source of a vision training: see ``ShardDataset`` and ``ShardLoader``.

    Args:
        data: shards.
        model_config: a config with ``vision``.
        processor: the model's processor or tokenizer.
        rank: of this process.
        world_size: number of ranks.
        micro_batch_size: samples in one batch of one rank.
        seed: of everything random.
        num_workers: reading processes.
        max_length: longest sequence in tokens.
        augmentation: changes of training pictures: True for the defaults, a dict of ``vision.augment.Augmentation``'s
            fields, None or False for none.
        cache_decoded: as in ``ShardDataset``.
        shuffle: as in ``ShardDataset``.

    Raises:
        ValueError: for unknown settings and unusable data.
    """
    collator = VisionCollator(processor, model_config, max_length=max_length)
    dataset = ShardDataset(
        data,
        collator,
        seed=seed,
        shuffle=shuffle,
        augmentation=_augmentation(augmentation),
        cache_decoded=cache_decoded,
    )
    return ShardLoader(dataset, batch_size=micro_batch_size, rank=rank, world_size=world_size, num_workers=num_workers)


def _augmentation(settings: Augmentation | dict[str, Any] | bool | None) -> Augmentation | None:
    if isinstance(settings, Augmentation):
        return settings
    if not isinstance(settings, dict):
        return Augmentation() if settings else None
    try:
        return Augmentation(**settings)
    except TypeError as error:
        raise ValueError(f"unknown augmentation setting: {error}") from error
