"""Calls become model inputs: chats through the model's template, pictures within limits, one after the other."""

import asyncio
import base64
import binascii
import concurrent.futures
import copy
import dataclasses
import re
from typing import Any

import torch

from phi35 import api, registry
from phi35.processor import Processor
from phi35.serving.errors import ApiError, invalid
from phi35.serving.fetching import PictureFetcher
from phi35.serving.protocol import ChatRequest, ImagePart
from phi35.serving.settings import ServingSettings

DATA_URL = re.compile(r"data:(?P<kind>image/[\w.+-]+)?(;[\w-]+=[\w-]+)*;base64,")
PREPARED_AT_ONCE = 2
"""Calls whose pictures are decoded at a time; each holds one whole picture."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the batcher takes it.

    Attributes:
        inputs: ``input_ids`` (T,) int64, and with pictures ``pixel_values`` and ``image_sizes``.
        text: as it was tokenized; None where ids came.
    """

    inputs: dict[str, torch.Tensor]
    text: str | None

    @property
    def num_tokens(self) -> int:
        """Tokens T, those of pictures among them."""
        return len(self.inputs["input_ids"])


class _LimitedOpening:
    """Opens pictures within limits."""

    def __init__(self, max_pixels: int) -> None:
        self._limits = registry.resolve("images.limits")(max_pixels=max_pixels)
        self._open = registry.resolve("images.open")
        self._too_large = registry.resolve("images.too_large")

    def __call__(self, image: bytes) -> Any:
        try:
            return self._open(image, self._limits)
        except self._too_large as error:
            raise invalid(str(error), "messages", "image_too_large") from None


class PromptBuilder:
    """Makes prompts, away from the event loop.

    Args:
        processor: of the model.
        dtype: of the model, in which pixels wait.
        settings: of the server.
    """

    def __init__(self, processor: Processor, dtype: torch.dtype, settings: ServingSettings) -> None:
        self.settings, self.dtype = settings, dtype
        self.reads_images = processor.config.vision is not None
        self.processor = copy.copy(processor)
        if self.reads_images:
            self.processor.image_transform = _limited(processor.image_transform, settings.max_image_pixels)
        self._fetcher = PictureFetcher(settings.max_image_bytes, settings.image_timeout, settings.image_networks)
        self._threads = concurrent.futures.ThreadPoolExecutor(PREPARED_AT_ONCE, "phi35-prompts")

    def close(self) -> None:
        """Let no more be prepared."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, function: Any, *arguments: Any) -> Any:
        """Call a function in a thread; its ValueError becomes a refusal of the call."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        except ValueError as error:
            raise invalid(str(error)) from None

    async def chat(self, call: ChatRequest) -> Prompt:
        """The prompt of a chat.

        Raises:
            ApiError: 400 for whatever is wrong with its turns and pictures.
        """
        parts = [
            part
            for message in call.messages
            if isinstance(message.content, list)
            for part in message.content
            if isinstance(part, ImagePart)
        ]
        if parts and not self.reads_images:
            raise invalid("the messages hold pictures and this model reads text only", "messages")
        if len(parts) > self.settings.max_images:
            raise invalid(f"{len(parts)} pictures came and at most {self.settings.max_images} may", "messages")
        pictures = {id(part): await self._picture(part.image_url.url) for part in parts}
        return await self.run(self._chat, call, pictures)

    async def completion(self, prompt: str | list[int]) -> Prompt:
        """The prompt of a completion: the text as it stands, or its ids."""
        return await self.run(self._completion, prompt)

    async def _picture(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return await self.run(self._decoded, url)
        if not self.settings.image_urls:
            raise invalid(
                "pictures come as data URLs (data:image/png;base64,...): this server fetches none",
                "messages",
                "image_url_not_allowed",
            )
        return await self._fetcher.fetch(url)

    def _decoded(self, url: str) -> bytes:
        head = DATA_URL.match(url[:200])
        if head is None:
            raise ValueError("a picture's data URL must begin like data:image/png;base64,")
        text = url[head.end() :]
        if len(text) * 3 // 4 > self.settings.max_image_bytes + 2:
            raise _too_large(self.settings.max_image_bytes)
        try:
            content = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"a picture's data URL is not valid base64: {error}") from None
        if len(content) > self.settings.max_image_bytes:
            raise _too_large(self.settings.max_image_bytes)
        return content

    def _chat(self, call: ChatRequest, pictures: dict[int, bytes]) -> Prompt:
        messages, limits = [], []
        for message in call.messages:
            content: Any = message.content
            if isinstance(content, list):
                content = []
                for part in message.content:
                    if isinstance(part, ImagePart):
                        content.append({"type": "image", "image": pictures[id(part)]})
                        limits.append(1 if part.image_url.detail == "low" else call.num_crops)
                    else:
                        content.append({"type": "text", "text": getattr(part, "text", "")})
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": content})
        text, images = api.chat_text(self.processor, messages, None, None)
        api.refuse_tags_without_images(self.processor, text)
        default = getattr(self.processor, "num_crops", None)
        return self._prompt(text, images, [limit or default for limit in limits] if limits else None)

    def _completion(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            api.refuse_tags_without_images(self.processor, prompt)
            return self._prompt(prompt, None, None)
        vocab = self.processor.config.vocab_size
        outside = [token for token in prompt if not 0 <= token < vocab]
        if outside:
            raise ValueError(f"prompt holds {outside[:3]}, outside the vocabulary of {vocab}")
        return Prompt({"input_ids": torch.tensor(prompt)}, None)

    def _prompt(self, text: str, images: Any, num_crops: list[Any] | None) -> Prompt:
        batch = self.processor(text, images=images, num_crops=num_crops)
        inputs = {"input_ids": batch["input_ids"][0]}
        if "pixel_values" in batch:
            inputs |= {"pixel_values": batch["pixel_values"].to(self.dtype), "image_sizes": batch["image_sizes"]}
        return Prompt(inputs, text)


def _limited(transform: Any, max_pixels: int) -> Any:
    """A transform that opens pictures within limits, and keeps crops of those that come again."""
    if not hasattr(transform, "opened_by"):
        raise ValueError(
            f"the server opens pictures within limits and {type(transform).__name__} opens its own: give the processor "
            "a vision.image_transform.ImageTransform"
        )
    limited = transform.opened_by(_LimitedOpening(max_pixels))
    limited.cache = registry.resolve("images.cache")()
    return limited


def _too_large(limit: int) -> ApiError:
    return invalid(f"a picture is larger than {limit} bytes", "messages", "image_too_large")
