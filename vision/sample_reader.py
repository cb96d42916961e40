"""From a sample's place in the shards to a training example, or to the reason why there is none."""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vision.augment import Augmentation
from vision.balance import CostModel, picture_costs
from vision.collator import Conversation, Example, VisionCollator
from vision.decode import DecodingLimits, ImageTooLargeError, open_image
from vision.descriptions import Alternatives, SkippedSample, parse_description
from vision.image_transform import resized_size
from vision.shards import ShardIndex

MAX_PIXELS = 2**26
"""Pixels of a picture, 67 million: Pillow decodes one in 270 MB, and takes as much again to convert it."""
_CHARACTERS_PER_TOKEN = 4
_TOKENS_AROUND = 24


class SampleReader:
    """The samples of one data set, by number.

    Args:
        data: shards (see ``vision.shards.find_shards``).
        collator: turns conversations into examples.
        augmentation: changes of training pictures, or None.
        max_pixels: larger pictures are passed over.
        fast_jpeg: let the JPEG decoder reduce pictures of more than twice the needed size: three times as fast for
            photographs of many megapixels, with other pixels (measured: by half a grey level in the mean, by 26 at
            the sharpest edge).
        cache_decoded: parse every description and decode every picture once, here and now, and keep them (equal
            pictures once) in memory that worker processes share. For data whose pixels fit into memory.

    Attributes:
        draws: (N,) visits of each sample in an epoch; 0 for those that the index tells to be unusable.
        left_out: samples and members that are never visited, by reason.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
        collator: VisionCollator,
        *,
        augmentation: Augmentation | None = None,
        max_pixels: int = MAX_PIXELS,
        fast_jpeg: bool = False,
        cache_decoded: bool = False,
    ) -> None:
        self.index = ShardIndex(data)
        self.collator = collator
        self.augmentation = augmentation
        reduced = fast_jpeg and augmentation is None
        self._limits = DecodingLimits(max_pixels=max_pixels, jpeg_size=self._needed_size if reduced else None)
        self.left_out = Counter(self.index.left_out)
        self.draws = self._usable_draws(max_pixels)
        self._parsed: dict[int, Alternatives] | None = None
        self._images: dict[int, tuple[np.ndarray, ...] | SkippedSample] = {}
        if cache_decoded:
            self._parsed = {}
            known: dict[bytes, np.ndarray] = {}
            for number in np.flatnonzero(self.draws).tolist():
                try:
                    self._parsed[number] = self._alternatives(number)
                    self._images[number] = self._decoded(number, known)
                except SkippedSample as error:
                    self._images[number] = error

    def __call__(self, number: int, rng: random.Random) -> Example:
        """One example; everything random about it comes from ``rng``.

        Raises:
            SkippedSample: with the reason.
        """
        messages = self._alternatives(number).draw(rng)
        images = self._images.get(number)
        if images is None:
            images = self._decoded(number, {})
        if isinstance(images, SkippedSample):
            raise images
        if self.augmentation is not None:
            images = tuple(self.augmentation(image, rng) for image in images)
        return self.collator.example(Conversation(messages, images))

    def costs(self, numbers: np.ndarray, model: CostModel) -> tuple[np.ndarray, np.ndarray]:
        """(FLOPs, positions) of samples (n,) as far as the index tells: exact for pictures, an estimate for text."""
        crops = np.array([self._sum(self._picture_crops, number) for number in numbers])
        tokens = np.array([self._sum(self._picture_tokens, number) for number in numbers])
        tokens = tokens + self.index.table.text_length[numbers] // _CHARACTERS_PER_TOKEN + _TOKENS_AROUND
        return model(crops, tokens), tokens

    def _sum(self, column: np.ndarray, number: int) -> int:
        return int(column[self.index.first_image[number] : self.index.first_image[number + 1]].sum())

    def _usable_draws(self, max_pixels: int) -> np.ndarray:
        table, collator = self.index.table, self.collator
        crops, tokens = picture_costs(table.width, table.height, collator.num_crops, collator.vision)
        self._picture_crops, self._picture_tokens = crops.astype(np.int16), tokens.astype(np.int32)
        too_large = table.width.astype(np.int64) * table.height > max_pixels
        owner = np.repeat(np.arange(len(table)), table.num_images)
        total = np.bincount(owner, weights=tokens, minlength=len(table))
        draws = table.draws.copy()
        for reason, unusable in (
            ("image_too_large", np.bincount(owner, weights=too_large, minlength=len(table)) > 0),
            ("image_too_narrow", np.bincount(owner, weights=crops == 0, minlength=len(table)) > 0),
            ("sequence_too_long", total > collator.max_length),
        ):
            unusable = unusable & (draws > 0)
            if unusable.any():
                self.left_out[reason] += int(unusable.sum())
            draws[unusable] = 0
        if not draws.any():
            raise ValueError(
                f"none of the {len(table)} samples in {[str(path) for path in self.index.paths[:5]]} can be trained "
                f"on; left out: {dict(self.left_out)}"
            )
        return draws

    def _needed_size(self, width: int, height: int) -> tuple[int, int]:
        long, short = resized_size(
            max(width, height), min(width, height), self.collator.num_crops, self.collator.vision
        )
        return (long, short) if width >= height else (short, long)

    def _alternatives(self, number: int) -> Alternatives:
        """The sample's conversations, checked where they are kept; else the collator checks the one that is drawn."""
        if self._parsed is not None and number in self._parsed:
            return self._parsed[number]
        num_images = int(self.index.table.num_images[number])
        return parse_description(self.index.describe(number), num_images, check=self._parsed is not None)

    def _decoded(self, number: int, known: dict[bytes, np.ndarray]) -> tuple[np.ndarray, ...]:
        """The sample's pictures as (H, W, 3) uint8, equal files decoded once."""
        images = []
        for content in self.index.read_images(number):
            digest = hashlib.sha256(content).digest() if self._parsed is not None else b""
            if digest in known:
                images.append(known[digest])
                continue
            try:
                image = np.asarray(open_image(content, self._limits))
            except ImageTooLargeError as error:
                raise SkippedSample("image_too_large", str(error)) from error
            except ValueError as error:
                raise SkippedSample("unreadable_image", str(error)) from error
            images.append(image)
            if self._parsed is not None:
                known[digest] = image
        return tuple(images)
