"""The vision models' processor as one of transformers, over the same transform and tokenizer.

Pictures come out one an entry, (most crops, 3, S, S) with zeros after the real ones, so that what slices batches by
picture keeps them whole; placeholders are the image token alone, in order. The published processor puts BOS before
every stretch of text. So does this one; but ``add_special_tokens=False`` leaves it out at the start of a text, where
``apply_chat_template`` has written it already.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from phi35.chat_template import flatten_messages, image_tag, render
from phi35.interop.tokenization import FamilyTokenizer
from phi35.loading import find_folder, load_config
from phi35.processor import IMAGE_TAG, Processor
from phi35.tokenizer import TOKEN_ROLES

_CALL_OPTIONS = (
    "images padding padding_side truncation max_length pad_to_multiple_of num_crops return_tensors add_special_tokens"
).split()


class Phi3VImageProcessor(BaseImageProcessor):
    """The HD transform for lists of pictures.

    Attributes:
        family: the processor it belongs to.
    """

    model_input_names = ["pixel_values", "image_sizes"]

    def __init__(self, family: Processor, **options: Any) -> None:
        super().__init__(**options)
        self.family = family

    def __call__(  # type: ignore[override]
        self, images: Any, return_tensors: str | None = None, num_crops: int | None = None, **options: Any
    ) -> BatchFeature:
        """Crops of pictures.

        Args:
            images: one, a list, or a list of lists; paths, PIL images, arrays or bytes.
            return_tensors: tensors come out whatever it says.
            num_crops: limit of tiles; None takes the model's own.
            **options: none.

        Returns:
            ``pixel_values`` (N, most crops, 3, S, S) float32, ``image_sizes`` (N, 2) int64 and ``num_img_tokens``, a
            list of N numbers.

        Raises:
            ValueError: for unknown options and pictures that cannot be read.
        """
        if options:
            raise ValueError(f"unknown options {sorted(options)}; known is num_crops")
        crops = [
            self.family.image_transform(image, self.family.num_crops if num_crops is None else num_crops)
            for image in _flat(images)
        ]
        if not crops:
            raise ValueError("no images came: leave out images=, or give at least one")
        most = max(len(one.pixel_values) for one in crops)
        pixel_values = crops[0].pixel_values.new_zeros(len(crops), most, *crops[0].pixel_values.shape[1:])
        for entry, one in zip(pixel_values, crops, strict=True):
            entry[: len(one.pixel_values)] = one.pixel_values
        sizes = torch.tensor([tuple(one.image_size) for one in crops], dtype=torch.int64)
        counts = [one.num_tokens for one in crops]
        return BatchFeature({"pixel_values": pixel_values, "image_sizes": sizes, "num_img_tokens": counts})

    def to_dict(self) -> dict[str, Any]:
        """Settings to show; ``save_pretrained`` of the processor writes the file."""
        return {"image_processor_type": type(self).__name__, "num_crops": self.family.num_crops}


class Phi3VProcessor(ProcessorMixin):
    """Texts and pictures to inputs of a vision model.

    Args:
        image_processor: of the same folder.
        tokenizer: of the same folder.
        chat_template: Jinja source in place of the tokenizer's.
    """

    image_processor: Phi3VImageProcessor
    tokenizer: FamilyTokenizer

    def __init__(
        self, image_processor: Phi3VImageProcessor, tokenizer: FamilyTokenizer, chat_template: str | None = None
    ) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.chat_template = chat_template or tokenizer.chat_template
        vision = image_processor.family.config.vision
        assert vision is not None
        self.image_token_id = vision.image_token_id
        self.image_token = tokenizer.convert_ids_to_tokens(self.image_token_id) or image_tag(1)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "Phi3VProcessor":  # type: ignore[override]
        """The processor of a folder or hub id.

        Args:
            folder: as ``phi35.load`` takes it.
            **options: ``num_crops``, the limit of tiles, and those of ``FamilyTokenizer.from_pretrained``.

        Raises:
            ValueError: as ``Processor.from_folder``, and for a folder of a text-only model.
        """
        found = find_folder(folder, options.get("revision"))
        family = Processor.from_folder(found, load_config(found))
        if family.config.vision is None:
            raise ValueError(f"{folder} holds a text-only model: AutoProcessor gives its tokenizer")
        if options.get("num_crops") is not None:
            family = Processor(
                family.tokenizer, family.config, None, family.settings | {"num_crops": options["num_crops"]}
            )
        return cls.of(
            family, **{name: value for name, value in options.items() if name in ("padding_side", "chat_template")}
        )

    @classmethod
    def of(cls, family: Processor, chat_template: str | None = None, **options: Any) -> "Phi3VProcessor":
        """The processor around one of this package."""
        return cls(Phi3VImageProcessor(family), FamilyTokenizer.of(family.tokenizer, **options), chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
        num_crops: int | None = None,
    ) -> BatchFeature:
        """A batch of inputs.

        Args:
            images: pictures of one text as a list, of B texts as B lists (or, one text each, as B pictures).
            text: one text or B; tags ``<|image_N|>`` count from 1 in each, and without tags pictures come first.
            videos: not supported.
            audio: not supported.
            return_tensors: "pt" for tensors; None gives ids as lists.
            padding: whether to pad to the longest text, or "max_length".
            padding_side: "left" or "right"; None takes the tokenizer's.
            truncation: cut texts without pictures at ``max_length``.
            max_length: most ids of a text.
            pad_to_multiple_of: pad on to a multiple of it.
            add_special_tokens: whether a text begins with BOS.
            num_crops: limit of tiles; None takes the model's own.

        Returns:
            ``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values`` (N, most crops, 3, S, S) and
            ``image_sizes`` (N, 2).

        Raises:
            ValueError: for what is not supported, texts and pictures that do not fit each other, and a limit that
                would cut a picture's places off.
        """
        if videos is not None or audio is not None or text is None:
            raise ValueError("the vision models take text= and images=, no videos and no audio")
        texts = [text] if isinstance(text, str) else list(text)
        nested = _nested(images, len(texts), isinstance(text, str))
        tagged = [
            self.image_processor.family.tagged(one, len(row), index)
            for index, (one, row) in enumerate(zip(texts, nested, strict=True))
        ]
        ordered = [[row[number - 1] for number in _numbers(one)] for one, row in zip(tagged, nested, strict=True)]
        pictures = self.image_processor(ordered, num_crops=num_crops) if any(ordered) else None
        counts = iter(pictures.pop("num_img_tokens") if pictures is not None else ())
        ids = []
        for one, row in zip(tagged, ordered, strict=True):
            row_ids = self._ids(one, [next(counts) for _ in row], add_special_tokens)
            if truncation and max_length is not None and len(row_ids) > max_length:
                if self.image_token_id in row_ids[max_length:]:
                    raise ValueError(
                        f"a text of {len(row_ids)} ids with pictures cannot be cut at max_length={max_length}: raise "
                        "it, or lower num_crops"
                    )
                row_ids = row_ids[:max_length]
            ids.append(row_ids)
        batch = self.tokenizer.pad(
            {"input_ids": ids},
            padding=padding or False,
            padding_side=padding_side,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
            return_attention_mask=True,
        )
        return BatchFeature({**batch, **(pictures or {})})

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tools: None = None,
        documents: None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """The text of a chat or of several, or the model's inputs.

        Args:
            conversation: messages, or a list of chats; contents are strings or lists of parts as
                ``phi35.chat_template.flatten_messages`` takes them, whose pictures are processed along.
            chat_template: Jinja source in place of the processor's.
            tools: not supported.
            documents: not supported.
            add_generation_prompt: begin the assistant's turn.
            continue_final_message: end within the last message.
            return_assistant_tokens_mask: not supported; train on prompt and completion instead.
            tokenize: give inputs, not text.
            return_tensors: as of the call.
            return_dict: give all inputs, not the ids alone.
            processor_kwargs: options of the call.
            **options: more of them; others are variables of the template.

        Raises:
            ValueError: for what is not supported and malformed messages.
        """
        if tools or documents or return_assistant_tokens_mask:
            raise ValueError(
                "tools, documents and return_assistant_tokens_mask are not supported for the vision models"
            )
        variables = {name: value for name, value in options.items() if name not in _CALL_OPTIONS}
        single = bool(conversation) and isinstance(conversation[0], Mapping)
        texts, images = [], []
        for messages in [conversation] if single else conversation:
            flat, found = flatten_messages(_with_pictures(messages))
            texts.append(self._rendered(flat, chat_template, add_generation_prompt, continue_final_message, variables))
            images.append(found)
        if not tokenize:
            return texts[0] if single else texts
        called = (
            dict(processor_kwargs or {}) | options | {"add_special_tokens": False, "return_tensors": return_tensors}
        )
        given = called.pop("images", None) or (images if any(images) else None)
        batch = self(images=given, text=texts, **called)
        return batch if return_dict else batch["input_ids"]

    def decode(self, *arguments: Any, **options: Any) -> Any:
        """As of the tokenizer."""
        return self.tokenizer.decode(*arguments, **options)

    def batch_decode(self, *arguments: Any, **options: Any) -> list[str]:
        """As of the tokenizer."""
        return self.tokenizer.batch_decode(*arguments, **options)

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> list[str]:
        """Write the tokenizer's files and ``preprocessor_config.json``, as ``phi35.save`` does."""
        self.image_processor.family.save(save_directory)
        self.tokenizer.save_pretrained(save_directory)
        return [str(path) for path in sorted(Path(save_directory).iterdir())]

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the call gives."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    def to_dict(self) -> dict[str, Any]:
        """Settings to show."""
        return {"processor_class": type(self).__name__, "image_processor": self.image_processor.to_dict()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()['image_processor']}, {self.tokenizer})"

    def _ids(self, text: str, num_tokens: Sequence[int], add_special_tokens: bool) -> list[int]:
        """Ids of a text with tags; the i-th tag takes ``num_tokens[i]`` places."""
        family, bos = self.tokenizer.family, self.tokenizer.bos_token
        ids: list[int] = []
        for place, chunk in enumerate(IMAGE_TAG.split(text)[::2]):
            if place:
                ids += [self.image_token_id] * num_tokens[place - 1]
            written = family.add_bos and bos is not None and chunk.startswith(bos)
            if family.add_bos and (written or place or add_special_tokens):
                ids.append(self.tokenizer.bos_token_id)
            body = chunk[len(bos) :] if written else chunk
            ids += self.tokenizer.backend_tokenizer.encode(body, add_special_tokens=False).ids
        return ids

    def _rendered(
        self,
        flat: list[dict[str, str]],
        template: str | None,
        prompt: bool,
        unfinished: bool,
        variables: dict[str, Any],
    ) -> str:
        family = self.tokenizer.family
        roles = variables | {name: getattr(self.tokenizer, name) for name in TOKEN_ROLES}
        chosen = template or self.chat_template
        text = render(chosen if isinstance(chosen, str) else family.chat_template, flat, prompt, **roles)
        if unfinished:
            last = flat[-1]["content"].rstrip()
            text = text[: text.rindex(last) + len(last)]
        begun = family.add_bos and not text.startswith(self.tokenizer.bos_token)
        return self.tokenizer.bos_token + text if begun else text


def _numbers(text: str) -> list[int]:
    """The number of each tag, in order."""
    return [int(number) for number in IMAGE_TAG.findall(text)]


def _flat(images: Any) -> list[Any]:
    if not isinstance(images, list | tuple):
        return [images]
    return [image for entry in images for image in (entry if isinstance(entry, list | tuple) else [entry])]


def _nested(images: Any, num_texts: int, single: bool) -> list[list[Any]]:
    """Pictures of each text."""
    if images is None:
        return [[] for _ in range(num_texts)]
    given = list(images) if isinstance(images, list | tuple) else [images]
    lists = [entry is None or isinstance(entry, list | tuple) for entry in given]
    if single and not any(lists):
        return [given]
    if len(given) != num_texts or (any(lists) and not all(lists)):
        raise ValueError(
            f"{num_texts} texts take {num_texts} lists of images, [] where there are none, got {len(given)} entries"
        )
    return [list(entry or []) if is_list else [entry] for entry, is_list in zip(given, lists, strict=True)]


def _with_pictures(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose image parts carry their picture under "image", wherever transformers lets it stand."""
    result = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = [_part(part) for part in content]
        result.append({**message, "content": content})
    return result


def _part(part: Any) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "image":
        return {name: part[name] for name in ("type", "text") if name in part} if isinstance(part, Mapping) else part
    picture = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
    return {"type": "image", "image": picture}
