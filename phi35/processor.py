"""From prompts and pictures to model inputs (the published Phi-3.5-vision processor, for batches).

A prompt is split at its ``<|image_N|>`` tags, every text chunk is tokenized on its own (with BOS where the
tokenizer's config asks for it: the vision model) and where tag i stood comes the id -i, once for each of the
image's features. Departures from the published code: batches, prompts without tags, repeated tags, and pixels of
the real crops alone. Text-only models use the same class without an image transform.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from phi35 import registry
from phi35.chat_template import Message, flatten_messages, image_tag
from phi35.config import ModelConfig
from phi35.tokenizer import Tokenizer

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
USER_TURN = "<|user|>\n"
NumCrops = int | Sequence[Any] | None


class Processor:
    """Tokenizer, image transform and chat template of one model.

    Args:
        tokenizer: the folder's tokenizer.
        config: the model's config; with ``vision`` set, images are accepted.
        image_transform: callable(image, num_crops) giving ``pixel_values`` (c, 3, S, S), ``image_size`` (H, W) and
            ``num_tokens``, maybe with a method ``many`` for lists of both; None builds the one of the config.
        settings: the contents of ``preprocessor_config.json``; its ``num_crops`` is the default limit of tiles.

    Raises:
        ValueError: if the settings contradict the config.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        image_transform: Any = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.settings = dict(settings or {})
        self.image_transform = image_transform
        if config.vision is None:
            return
        for name in ("image_mean", "image_std"):
            given, expected = self.settings.get(name), getattr(config.vision, name)
            if given is not None and tuple(given) != tuple(expected):
                raise ValueError(
                    f"preprocessor_config.json has {name} {list(given)} and the model's config {list(expected)}: "
                    "they must be equal"
                )
        self.num_crops = _checked_num_crops(self.settings.get("num_crops", config.vision.num_crops))
        if image_transform is None:
            self.image_transform = registry.resolve("processor.images")(config.vision)

    @classmethod
    def from_folder(cls, folder: str | Path, config: ModelConfig) -> "Processor":
        """Read a model folder's tokenizer files and, for a vision model, its ``preprocessor_config.json``."""
        folder = Path(folder)
        path = folder / "preprocessor_config.json"
        settings = json.loads(path.read_text("utf-8")) if config.vision is not None and path.is_file() else None
        return cls(Tokenizer.from_folder(folder), config, settings=settings)

    def __call__(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Any] | None = None,
        num_crops: NumCrops = None,
    ) -> dict[str, torch.Tensor]:
        """A batch of model inputs.

        Args:
            prompts: one text, or B texts. Tags ``<|image_N|>`` count from 1 in each prompt, in any order, and may
                repeat; without tags the images come first: at the start of the first user turn, else of the text.
            images: for one text a list of pictures (paths, PIL images, HWC uint8 arrays, bytes); for B texts a list
                of B such lists.
            num_crops: limit of tiles for all images, or one per image in the nesting of ``images``; None takes the
                model's own.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T) int64, padded on the left; with images also ``pixel_values``
            (C, 3, S, S) float32, the crops of all images one after another, and ``image_sizes`` (N, 2) int64.

        Raises:
            ValueError: for empty or mistyped prompts, images that do not match the prompts or their tags, and
                files that cannot be read.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else []
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"prompts must be a non-empty str or a non-empty list of non-empty str, got {prompts!r}")
        nested = _nested(images, len(texts), isinstance(prompts, str))
        limits = self._limits(num_crops, nested, isinstance(prompts, str))
        texts = [
            self.tagged(text, len(row), index) for index, (text, row) in enumerate(zip(texts, nested, strict=True))
        ]
        flat = self.crops([image for row in nested for image in row], [limit for row in limits for limit in row])
        ends = list(accumulate(len(row) for row in nested))
        crops = [flat[end - len(row) : end] for row, end in zip(nested, ends, strict=True)]
        ids = [self._ids(text, [crop.num_tokens for crop in row]) for text, row in zip(texts, crops, strict=True)]
        batch = self.pad(ids)
        if flat:
            batch["pixel_values"] = torch.cat([crop.pixel_values for crop in flat])
            batch["image_sizes"] = torch.tensor([tuple(crop.image_size) for crop in flat], dtype=torch.int64)
        return batch

    def crops(self, images: Sequence[Any], limits: Sequence[int]) -> list[Any]:
        """What the transform makes of all pictures, side by side where it can."""
        many = getattr(self.image_transform, "many", None)
        if many is not None:
            return many(images, limits)
        return [self.image_transform(*pair) for pair in zip(images, limits, strict=True)]

    def pad(self, ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Rows of ids -> ``input_ids`` and ``attention_mask`` (B, T) int64, padded on the left."""
        longest = max(len(row) for row in ids)
        pad_id = self.tokenizer.pad_token_id
        pad_id = self.config.pad_token_id if pad_id is None else pad_id
        padded = [[pad_id] * (longest - len(row)) + list(row) for row in ids]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt string of a chat; image parts of a content become tags, numbered over the whole chat."""
        flat, _ = flatten_messages(messages)
        return self.tokenizer.apply_chat_template(flat, add_generation_prompt)

    def decode(self, ids: Any, skip_special: bool = True) -> str:
        """Text of one row of ids (a list or a 1-D tensor); placeholders of images have no text."""
        return self.tokenizer.decode(ids, skip_special)

    def batch_decode(self, ids: Any, skip_special: bool = True) -> list[str]:
        """Texts of rows of ids: a list of lists or a (B, T) tensor."""
        return [self.decode(row, skip_special) for row in ids]

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files and, for a vision model, ``preprocessor_config.json``."""
        folder = Path(folder)
        self.tokenizer.save(folder)
        if self.config.vision is None:
            return
        vision = self.config.vision
        settings = {key: value for key, value in self.settings.items() if key != "auto_map"} | {
            "image_processor_type": "Phi3VImageProcessor",
            "processor_class": "Phi3VProcessor",
            "do_convert_rgb": True,
            "num_crops": self.num_crops,
            "num_img_tokens": vision.merged_grid_size**2,
            "image_mean": list(vision.image_mean),
            "image_std": list(vision.image_std),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")

    def tagged(self, text: str, num_images: int, index: int = 0) -> str:
        """The prompt, number ``index`` of its batch, with a tag for every image.

        Raises:
            ValueError: where tags and images disagree, or the model reads text only and images come.
        """
        if self.config.vision is None:
            if num_images:
                raise ValueError(f"prompt {index} comes with {num_images} images and this model reads text only")
            return text
        tags = {int(number) for number in IMAGE_TAG.findall(text)}
        if not tags:
            block = "".join(image_tag(number) + "\n" for number in range(1, num_images + 1))
            at = text.find(USER_TURN)
            at = 0 if at < 0 else at + len(USER_TURN)
            return text[:at] + block + text[at:]
        wrong = sorted(number for number in tags if not 1 <= number <= num_images)
        if wrong:
            raise ValueError(
                f"prompt {index} has {', '.join(map(image_tag, wrong))} for {num_images} images; tags count from 1"
            )
        untagged = sorted(set(range(1, num_images + 1)) - tags)
        if untagged:
            raise ValueError(
                f"prompt {index} has no {', '.join(map(image_tag, untagged))} for its images: tag every image, or none"
            )
        return text

    def _ids(self, text: str, num_tokens: Sequence[int]) -> list[int]:
        if self.config.vision is None:
            return self.tokenizer.encode(text)
        pieces = IMAGE_TAG.split(text)  # text, number, text, number, ..., text
        ids = self.tokenizer.encode(pieces[0])
        for number, chunk in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
            ids += [-number] * num_tokens[number - 1] + self.tokenizer.encode(chunk)
        return ids

    def _limits(self, num_crops: NumCrops, nested: list[list[Any]], single: bool) -> list[list[int]]:
        """num_crops of every image, nested as the images are."""
        if self.config.vision is None:
            return [[0] * len(row) for row in nested]
        if not isinstance(num_crops, list | tuple):
            limit = self.num_crops if num_crops is None else _checked_num_crops(num_crops)
            return [[limit] * len(row) for row in nested]
        limits = [list(num_crops)] if single else [_row(entry, len(row)) for entry, row in _pairs(num_crops, nested)]
        if [len(row) for row in limits] != [len(row) for row in nested]:
            raise ValueError(f"num_crops {num_crops} must be one number, or one per image, nested like images")
        return [[_checked_num_crops(limit) for limit in row] for row in limits]


def _nested(images: Sequence[Any] | None, num_prompts: int, single: bool) -> list[list[Any]]:
    if images is None:
        return [[] for _ in range(num_prompts)]
    if not isinstance(images, list | tuple):
        raise ValueError(f"images must be a list, got {type(images).__name__}: put a single picture in a list")
    if single:
        if any(isinstance(image, list | tuple) for image in images):
            raise ValueError("one prompt takes a flat list of images; lists of lists go with a list of prompts")
        return [list(images)]
    if len(images) != num_prompts or not all(row is None or isinstance(row, list | tuple) for row in images):
        raise ValueError(
            f"a list of {num_prompts} prompts takes a list of {num_prompts} lists of images ([] where there are none)"
        )
    return [list(row or []) for row in images]


def _pairs(num_crops: Sequence[Any], nested: list[list[Any]]) -> list[tuple[Any, list[Any]]]:
    if len(num_crops) != len(nested):
        raise ValueError(f"num_crops has {len(num_crops)} entries for {len(nested)} prompts")
    return list(zip(num_crops, nested, strict=True))


def _row(entry: Any, num_images: int) -> list[Any]:
    return list(entry) if isinstance(entry, list | tuple) else [entry] * num_images


def _checked_num_crops(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"num_crops must be a positive whole number, got {value!r}")
    return value
