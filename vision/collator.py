"""From conversations with pictures to a training batch.

The prompt takes the published form: the chat template's text is cut at its ``<|image_N|>`` tags, every piece is
tokenized by itself (each with its own BOS, as the published processor does), and -N stands num_tokens times
where tag N stood. Labels cover the assistant's replies through their ``<|end|>``, and of a last reply also what follows
it, ``\\n<|endoftext|>``, as the published fine-tuning does.

A batch is padded on the right, or packed: all samples in one row, one after the other, with their lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi35.config import ModelConfig
from vision.descriptions import TAG, Messages, SkippedSample, check_turns
from vision.image_transform import num_image_tokens, padded_picture
from vision.pixels import CropMaker

IGNORED = -100
_REMEMBERED_TOKENS = 2**22
_LONGEST_TOKEN = 128
"""Characters; no tokenizer of the family comes near, so that a text beyond is too long before it is tokenized."""


@dataclass(frozen=True)
class Conversation:
    """One training sample: turns as (role, content) and its pictures as (H, W, 3) uint8 arrays."""

    messages: Messages
    images: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Example:
    """One training sample as numbers.

    Attributes:
        input_ids: (T,) int64; -i where features of picture i go.
        labels: (T,) int64, -100 where nothing is learned.
        pictures: padded pictures (H, W, 3) uint8, H and W multiples of the tile side.
    """

    input_ids: Tensor
    labels: Tensor
    pictures: tuple[np.ndarray, ...] = field(default=(), repr=False)


class VisionCollator:
    """Makes batches of conversations.

    Args:
        processor: anything with ``tokenizer`` (``encode``, ``apply_chat_template``, ``special_ids``) or such a
            tokenizer itself.
        config: a model config with ``vision``.
        max_length: longest allowed sequence in tokens; None takes ``config.max_position_embeddings``.
        num_crops: limit of tiles of a picture; None takes the config's.
        packed: one row for all samples in place of padded rows.

    Raises:
        ValueError: for a config without ``vision``.
    """

    def __init__(
        self,
        processor: Any,
        config: ModelConfig,
        *,
        max_length: int | None = None,
        num_crops: int | None = None,
        packed: bool = False,
    ) -> None:
        if config.vision is None:
            raise ValueError("a vision collator needs a config with vision, got one without: take a vision preset")
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.config = config
        self.vision = config.vision
        self.num_crops = config.vision.num_crops if num_crops is None else num_crops
        self.max_length = max_length or config.max_position_embeddings
        self.packed = packed
        self._make_crops = CropMaker(config.vision)
        special = self.tokenizer.special_ids
        self._assistant, self._end = special["<|assistant|>"], special["<|end|>"]
        self._encoded: dict[tuple[Messages, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        self._num_remembered = 0

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """One batch, complete.

        Returns:
            As ``compact``, with pixel_values (C, 3, S, S) float32 in place of the pictures' bytes.

        Raises:
            SkippedSample: as ``example``.
        """
        return self.expand(self.compact([self.example(conversation) for conversation in conversations]))

    def example(self, conversation: Conversation) -> Example:
        """One sample as numbers.

        Raises:
            SkippedSample: a ValueError that says why the sample cannot be trained on: "bad_description",
                "empty_text", "image_too_narrow" or "sequence_too_long".
        """
        pictures = []
        for image in conversation.images:
            try:
                pictures.append(padded_picture(image, self.num_crops, self.vision))
            except ValueError as error:
                raise SkippedSample("image_too_narrow", str(error)) from error
        num_tokens = tuple(num_image_tokens(picture.shape[0], picture.shape[1], self.vision) for picture in pictures)
        return Example(*self.encode(conversation.messages, num_tokens), tuple(pictures))

    def compact(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """One batch on its way to the device, where ``expand`` completes it.

        Returns:
            input_ids, labels (B, T) int64; attention_mask (B, T) int64, or, packed, sequence_lengths (1, B) int64 with
            B = 1 row otherwise; with pictures their bytes, "pictures" (sum of H * W * 3,) uint8, and image_sizes
            (N, 2) int64.
        """
        batch = self._packed(examples) if self.packed else self._padded(examples)
        pictures = [picture for example in examples for picture in example.pictures]
        if pictures:
            batch["pictures"] = torch.from_numpy(np.concatenate([picture.reshape(-1) for picture in pictures]))
            batch["image_sizes"] = torch.tensor([picture.shape[:2] for picture in pictures])
        return batch

    def expand(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of ``compact``, wherever it lies now, with its pictures as crops; image_sizes best on the host."""
        if "pictures" not in batch:
            return batch
        rest = {name: value for name, value in batch.items() if name != "pictures"}
        sizes = [(height, width) for height, width in batch["image_sizes"].tolist()]
        return {**rest, "pixel_values": self._make_crops(batch["pictures"], sizes)}

    def encode(self, messages: Messages, num_tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(T,) ids and (T,) labels of one conversation, kept for the next time.

        Args:
            messages: (role, content) turns; contents may hold ``<|image_N|>`` tags; without any, the pictures come
                first in the first user turn.
            num_tokens: positions that each picture takes.

        Raises:
            SkippedSample: for a tag without picture, a picture without tag, a control token inside a content, a
                conversation without reply, or one over ``max_length``.
        """
        key = (messages, num_tokens)
        if key not in self._encoded:
            encoded = self._encode(messages, num_tokens)
            if self._num_remembered > _REMEMBERED_TOKENS:
                self._encoded.clear()
                self._num_remembered = 0
            self._num_remembered += len(encoded[0])
            self._encoded[key] = encoded
        return self._encoded[key]

    def _encode(self, messages: Messages, num_tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        turns = _tagged(messages, len(num_tokens))
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=False)
        if not text.endswith("<|endoftext|>"):
            text += "<|endoftext|>"
        pieces = TAG.split(text)
        if (
            len(text) > _LONGEST_TOKEN * self.max_length
            or sum(num_tokens[int(number) - 1] for number in pieces[1::2]) > self.max_length
        ):
            raise SkippedSample("sequence_too_long", f"a conversation takes far more than {self.max_length} tokens")
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids += [-int(piece)] * num_tokens[int(piece) - 1]
            else:
                ids += self.tokenizer.encode(piece)
        if len(ids) > self.max_length:
            raise SkippedSample(
                "sequence_too_long", f"a conversation takes {len(ids)} tokens, more than max_length {self.max_length}"
            )
        return torch.tensor(ids), torch.tensor(self._labels(ids, messages[-1][0] == "assistant"))

    def _labels(self, ids: list[int], ends_with_reply: bool) -> list[int]:
        labels = [IGNORED] * len(ids)
        inside = False
        last_end = len(ids)
        for position, token in enumerate(ids):
            if inside and token >= 0:  # a picture that an assistant shows is not to be predicted
                labels[position] = token
            if token == self._end:
                last_end = position
            inside = (inside or token == self._assistant) and token != self._end
        if ends_with_reply:
            labels[last_end:] = ids[last_end:]
        return labels

    def _padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        length = max(len(example.input_ids) for example in examples)
        input_ids = torch.full((len(examples), length), self.config.pad_token_id)
        labels = torch.full((len(examples), length), IGNORED)
        attention_mask = torch.zeros(len(examples), length, dtype=torch.int64)
        for index, example in enumerate(examples):
            end = len(example.input_ids)
            input_ids[index, :end], labels[index, :end] = example.input_ids, example.labels
            attention_mask[index, :end] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _packed(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows, first = [], 0
        for example in examples:  # tags count through the row
            rows.append(torch.where(example.input_ids < 0, example.input_ids - first, example.input_ids))
            first += len(example.pictures)
        return {
            "input_ids": torch.cat(rows)[None],
            "labels": torch.cat([example.labels for example in examples])[None],
            "sequence_lengths": torch.tensor([[len(row) for row in rows]]),
        }


def _tagged(messages: Messages, num_images: int) -> list[dict[str, str]]:
    """The turns as dicts, with tags in the first user turn if there were none; checked."""
    numbers = check_turns(messages, num_images)
    turns = [{"role": role, "content": content} for role, content in messages]
    if not numbers and num_images:
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"] = "".join(f"<|image_{n}|>\n" for n in range(1, num_images + 1)) + first["content"]
    return turns
