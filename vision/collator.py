"""From conversations with pictures to a training batch.

The prompt takes the published form: the chat template's text is cut at its ``<|image_N|>`` tags, every piece is
tokenized by itself (each with its own BOS, as the published processor does), and -N stands num_tokens times
where tag N stood. A reply ends ``<|end|>\\n<|endoftext|>``; labels cover the replies through ``<|end|>`` alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi35.config import ModelConfig
from vision.image_transform import ImageTransform, num_image_tokens, resized_size

IGNORED = -100
_TAG = re.compile(r"<\|image_(\d+)\|>")
_CONTROL = re.compile(r"<\|(?:user|assistant|system|end|endoftext|image|placeholder\d+)\|>")

Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Conversation:
    """One training sample: turns as (role, content) and its pictures as (H, W, 3) uint8 arrays."""

    messages: Messages
    images: tuple[np.ndarray, ...] = ()


class VisionCollator:
    """Makes batches of conversations: right-padded ids, labels on the replies, the crops of all pictures.

    Args:
        processor: anything with ``tokenizer`` (``encode``, ``apply_chat_template``, ``special_ids``) or such a
            tokenizer itself.
        config: a model config with ``vision``.
        max_length: longest allowed sequence in tokens; None takes ``config.max_position_embeddings``.

    Raises:
        ValueError: for a config without ``vision``.
    """

    def __init__(self, processor: Any, config: ModelConfig, *, max_length: int | None = None) -> None:
        if config.vision is None:
            raise ValueError("a vision collator needs a config with vision, got one without: take a vision preset")
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.vision = config.vision
        self.pad_token_id = config.pad_token_id
        self.max_length = max_length or config.max_position_embeddings
        self.transform = ImageTransform(config.vision)
        special = self.tokenizer.special_ids
        self._assistant, self._end = special["<|assistant|>"], special["<|end|>"]
        self._encoded: dict[tuple[Messages, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        side = config.vision.image_size
        self._is_one_tile = resized_size(side, side, config.vision.num_crops, config.vision) == (side, side)
        self._statistics: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """One batch.

        Returns:
            input_ids, labels (B, T) int64, attention_mask (B, T) int64 and, with pictures, pixel_values
            (C, 3, S, S) float32 and image_sizes (N, 2) int64.

        Raises:
            ValueError: as ``encode``.
        """
        return self.expand(self.compact(conversations))

    def compact(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """One batch on its way to the device, where ``expand`` completes it.

        Returns:
            As a call; but where all pictures are exactly one tile, they stay what they are, "pictures" (N, S, S, 3)
            uint8, in place of pixel_values: an eighth of the bytes.

        Raises:
            ValueError: as ``encode``.
        """
        images = [image for conversation in conversations for image in conversation.images]
        pictures = self._one_tile_pictures(images)
        if pictures is None:
            crops, sizes = self.crops(images)
            pixels = {"pixel_values": crops}
        else:
            sizes = [(self.vision.image_size, self.vision.image_size)] * len(images)
            pixels = {"pictures": pictures}
        counts = [num_image_tokens(height, width, self.vision) for height, width in sizes]
        rows, first = [], 0
        for conversation in conversations:
            number = len(conversation.images)
            rows.append(self.encode(conversation.messages, tuple(counts[first : first + number])))
            first += number
        length = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for index, (ids, targets) in enumerate(rows):
            input_ids[index, : len(ids)] = ids
            labels[index, : len(ids)] = targets
            attention_mask[index, : len(ids)] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if images:
            batch |= {**pixels, "image_sizes": torch.tensor(sizes)}
        return batch

    def expand(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of ``compact``, wherever it lies now, as a call gives it: the same numbers on every device."""
        if "pictures" not in batch:
            return batch
        rest = {name: value for name, value in batch.items() if name != "pictures"}
        return {**rest, "pixel_values": self._normalised(batch["pictures"])}

    def crops(self, images: Sequence[np.ndarray]) -> tuple[Tensor, list[tuple[int, int]]]:
        """(C, 3, S, S) float32 crops of all pictures, global views first, and their padded sizes (H, W).

        A picture of exactly one tile needs no resizing: its global view and its tile are the picture itself, and
        a batch of such pictures is normalised in one go. The result is that of ``ImageTransform``.
        """
        side = self.vision.image_size
        pictures = self._one_tile_pictures(images)
        if pictures is not None:
            return self._normalised(pictures), [(side, side)] * len(images)
        transformed = [self.transform(np.ascontiguousarray(image)) for image in images]
        if not transformed:
            return torch.zeros(0, 3, side, side), []
        return torch.cat([item.pixel_values for item in transformed]), [item.image_size for item in transformed]

    def _one_tile_pictures(self, images: Sequence[np.ndarray]) -> Tensor | None:
        """(N, S, S, 3) uint8 where all pictures are exactly one tile, else None."""
        side = self.vision.image_size
        if images and self._is_one_tile and all(image.shape == (side, side, 3) for image in images):
            return torch.from_numpy(np.stack(images))
        return None

    def _normalised(self, pictures: Tensor) -> Tensor:
        """(N, S, S, 3) uint8 to (2 N, 3, S, S) float32: each picture as its global view and its tile."""
        device = pictures.device
        if device not in self._statistics:
            # 255 as a tensor: by a number, a GPU multiplies with the reciprocal, which rounds otherwise.
            whole = torch.tensor(255.0, device=device)
            mean = torch.tensor(self.vision.image_mean, device=device).view(3, 1, 1)
            self._statistics[device] = (
                whole,
                mean,
                torch.tensor(self.vision.image_std, device=device).view(3, 1, 1),
            )
        whole, mean, std = self._statistics[device]
        plane = pictures.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return plane.div_(whole).sub_(mean).div_(std).repeat_interleave(2, dim=0)

    def encode(self, messages: Messages, num_tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(T,) ids and (T,) labels of one conversation, kept for the next time.

        Args:
            messages: (role, content) turns; contents may hold ``<|image_N|>`` tags; without any, the pictures come
                first in the first user turn.
            num_tokens: positions that each picture takes.

        Raises:
            ValueError: for a tag without picture, a picture without tag, a control token inside a content, a
                conversation without reply, or one over ``max_length``.
        """
        key = (messages, num_tokens)
        if key not in self._encoded:
            if len(self._encoded) >= 100_000:
                self._encoded.clear()
            self._encoded[key] = self._encode(messages, num_tokens)
        return self._encoded[key]

    def _encode(self, messages: Messages, num_tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        turns = _tagged(messages, len(num_tokens))
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=False)
        if not text.endswith("<|endoftext|>"):
            text += "<|endoftext|>"
        pieces = _TAG.split(text)
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids += [-int(piece)] * num_tokens[int(piece) - 1]
            else:
                ids += self.tokenizer.encode(piece)
        if len(ids) > self.max_length:
            raise ValueError(f"a conversation takes {len(ids)} tokens, more than max_length {self.max_length}")
        labels = [IGNORED] * len(ids)
        inside = False
        for position, token in enumerate(ids):
            if inside:
                labels[position] = token
            inside = (inside or token == self._assistant) and token != self._end
        if all(label == IGNORED for label in labels):
            raise ValueError(
                f"a training conversation needs an assistant's reply, got roles {[r for r, _ in messages]}"
            )
        return torch.tensor(ids), torch.tensor(labels)


def check_tags(messages: Messages, num_images: int) -> set[int]:
    """The image numbers that the contents name: all of the pictures', or none.

    Raises:
        ValueError: for an unknown role, a control token inside a content, or tags that do not match the pictures.
    """
    for role, content in messages:
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"a turn's role must be system, user or assistant, got {role!r}")
        if _CONTROL.search(content):
            raise ValueError(f"a turn's content must not hold control tokens, got {content!r}")
    numbers = {int(number) for _, content in messages for number in _TAG.findall(content)}
    if numbers and numbers != set(range(1, num_images + 1)):
        raise ValueError(f"the tags name images {sorted(numbers)}, but {num_images} pictures came")
    return numbers


def _tagged(messages: Messages, num_images: int) -> list[dict[str, str]]:
    """The turns as dicts, with tags in the first user turn if there were none; checked."""
    numbers = check_tags(messages, num_images)
    turns = [{"role": role, "content": content} for role, content in messages]
    if not numbers and num_images:
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            raise ValueError("pictures without tags go into the first user turn, but there is none")
        first["content"] = "".join(f"<|image_{n}|>\n" for n in range(1, num_images + 1)) + first["content"]
    return turns
