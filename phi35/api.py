"""``phi35.generate``: prompts, chats and pictures in, text out.

A prompt is wrapped as a user turn by the model's own chat template, unless it spells role tags such as ``<|user|>``
itself: then it goes in as it stands. Pictures without tags come first in the (first) user turn, in order.
"""

import dataclasses
import difflib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from phi35 import registry
from phi35.chat_template import Message, flatten_messages, image_tag
from phi35.device import pick_device, pick_dtype
from phi35.generation.decoding import Decoding
from phi35.generation.stopping import stop_strings
from phi35.generation.streaming import TextStream, text_of
from phi35.image_cache import ImageFeatureCache
from phi35.processor import IMAGE_TAG, Processor

ROLE_TAGS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
DRAFT_PROBE = "Two tokenizers that agree here, 12,345 times <|user|>\n<|end|> über 漢字, are taken for one."
MODEL_VARIABLE = "PHI35_MODEL"
SMALL_MODEL = Path(__file__).parent / "small_model"


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer with its tokens.

    Attributes:
        text: as ``generate`` returns it otherwise.
        token_ids: all new tokens, the stop token (and tokens of a stop string) among them.
        logprobs: natural logarithm of each token's probability under the model itself, before the repetition penalty,
            the temperature and the filters.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def generate(
    prompt: str | Sequence[str] | None = None,
    images: Sequence[Any] | None = None,
    *,
    messages: Sequence[Message] | None = None,
    model: Any = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] | None = None,
    seed: int | Sequence[int] | None = None,
    stream: bool = False,
    num_crops: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: Any = None,
    expert_memory: int | str | None = None,
    rope_mode: str = "reference",
    kv_cache_dtype: str | None = None,
    return_logprobs: bool = False,
    speculation: str | None = None,
    draft_model: Any = None,
    num_draft_tokens: int | None = None,
    **unknown: Any,
) -> "str | list[str] | Iterator[str] | Answer | list[Answer]":
    """Answer a prompt, a list of prompts, or a chat.

    Args:
        prompt: a text, or a list of texts (then a list comes back). Image tags ``<|image_N|>`` are optional. A text
            with role tags of its own (``<|user|>``, ...) is not wrapped in a chat.
        images: paths, PIL images, HWC uint8 arrays or bytes; for a list of prompts a list of such lists.
        messages: a chat instead of a prompt: ``[{"role": "user", "content": "..."}, ...]``; contents may be lists of
            text and image parts.
        model: folder or hub id, a (model, processor) pair, or a model that ``phi35.load`` returned; None takes the
            environment variable PHI35_MODEL, read at each call, else the small model inside the package. Models
            named by folder or id stay in memory, the latest two; a folder whose files changed is read anew.
        system: text of a system turn put first.
        max_new_tokens: most tokens of an answer.
        temperature: 0 for the most likely tokens (greedy), else sampling.
        top_k: sample from the k most likely tokens.
        top_p: sample from the smallest set that holds this probability.
        min_p: leave out tokens less likely than this fraction of the most likely.
        repetition_penalty: above 1 makes tokens that occurred less likely.
        stop: string or strings that end an answer and are cut off.
        seed: the same seed gives the same text; a list gives each prompt its own.
        stream: return an iterator of pieces of the answer (for one prompt).
        num_crops: limit of tiles for the images, or one per image in their nesting.
        device: where a model named by folder or id is loaded: by default CUDA where there is one, else the CPU.
        dtype: of its weights: by default float32 on the CPU and bfloat16 elsewhere (float16 or float32, with a warning,
            where the device has none); "auto" as stored.
        quantization: "int4", "int8", "fp8" or a ``QuantizationConfig``, to round a folder's weights as they are read.
        expert_memory: device memory for the experts of a folder's sparse model, the others stay on the host: "40GB".
        rope_mode: "reference" or "pinned", see ``phi35.generation.decoding``.
        kv_cache_dtype: "int8" or "fp8" holds keys and values in eight bits; None in the model's dtype.
        return_logprobs: return ``Answer`` objects, with tokens and their log-probabilities, in place of texts.
        speculation: "prompt_lookup" drafts tokens from the text so far and checks them together; the answer stays the
            same and may come faster (docs/inference.md says where).
        draft_model: a smaller model that drafts tokens instead: folder, hub id, pair or loaded model, of the same
            tokenizer.
        num_draft_tokens: most tokens drafted at a time; None takes 8 from text and 4 from a model.
        **unknown: refused, with the nearest known names.

    Returns:
        str, list of str for a list of prompts, or an iterator of str with ``stream=True``; with ``return_logprobs``
        an ``Answer`` or a list of them.

    Raises:
        ValueError: for unknown keywords and bad arguments, naming them.
        OSError: if the model is a hub id and the hub cannot be reached.
    """
    _refuse(unknown)
    if (prompt is None) == (messages is None):
        raise ValueError("give exactly one of prompt= and messages=")
    single = messages is not None or isinstance(prompt, str)
    if stream and return_logprobs:
        raise ValueError("return_logprobs=True gives finished answers: leave out stream=True")
    if stream and not single:
        raise ValueError("stream=True takes one prompt: a list of prompts gives a list of finished texts")
    loaded, processor = resolve_model(model, device, dtype, quantization, expert_memory)
    texts: str | list[str]
    if messages is not None:
        texts, images = chat_text(processor, messages, images, system)
    else:
        assert prompt is not None
        texts = prompt_texts(processor, prompt, images, system)
    refuse_tags_without_images(processor, texts)
    batch = processor(texts, images=images, num_crops=num_crops)
    stops = stop_strings(stop)
    if draft_model is not None:
        draft_model = _drafting(draft_model, processor, device, dtype)
    decoding = Decoding(
        loaded,
        **batch,
        tokenizer=processor.tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stops,
        seed=seed,
        rope_mode=rope_mode,
        kv_cache_dtype=kv_cache_dtype,
        return_logprobs=return_logprobs,
        speculation=speculation,
        draft_model=draft_model,
        num_draft_tokens=num_draft_tokens,
    )
    if stream:
        return _pieces(decoding, processor, stops)
    while not decoding.done:
        decoding.step()
    rows = [decoding.new_ids(row) for row in range(len(decoding.rows))]
    answers = [text_of(processor.tokenizer, ids, stops) for ids in rows]
    if not return_logprobs:
        return answers[0] if single else answers
    full = [
        Answer(text, tuple(ids), tuple(decoding.logprobs(row)))
        for row, (text, ids) in enumerate(zip(answers, rows, strict=True))
    ]
    return full[0] if single else full


def _drafting(
    draft_model: Any, processor: Processor, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> Any:
    """The model that ``draft_model=`` means."""
    named = isinstance(draft_model, str | os.PathLike)
    draft, own = resolve_model(draft_model, device if named else None, dtype if named else None)
    if own.tokenizer.encode(DRAFT_PROBE) != processor.tokenizer.encode(DRAFT_PROBE):
        raise ValueError("draft_model= reads text by another tokenizer than the model: give one of the same family")
    return draft


def resolve_model(
    model: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: Any = None,
    expert_memory: int | str | None = None,
) -> tuple[Any, Processor]:
    """The model and processor that ``model=`` means (see ``generate``).

    Raises:
        ValueError: if it names nothing that can be loaded, or ways of loading are given with a loaded model.
        OSError: if it is a hub id and the hub cannot be reached.
    """
    variable = os.environ.get(MODEL_VARIABLE) if model is None else None
    if model is None:
        model = variable or SMALL_MODEL
    if isinstance(model, str | os.PathLike):
        picked = pick_device(device)
        try:
            kind = dtype if dtype == "auto" else pick_dtype(dtype, picked)
            return _loaded(*_state(os.fspath(model)), picked, kind, quantization, expert_memory)
        except (ValueError, OSError) as error:
            if not variable:
                raise
            failure = ValueError if isinstance(error, ValueError) else OSError
            raise failure(f"the environment variable {MODEL_VARIABLE} names {variable!r}: {error}") from error
    if device is not None or dtype is not None:
        raise ValueError("device= and dtype= choose how a folder is loaded; a loaded model has its own: use model.to")
    if quantization is not None or expert_memory is not None:
        raise ValueError("quantization= and expert_memory= choose how a folder is loaded: give them to phi35.load")
    pair = model if isinstance(model, tuple) else (model, getattr(model, "processor", None))
    if len(pair) != 2 or not isinstance(pair[1], Processor):
        raise ValueError(
            "model= must be a folder, a hub id, or (model, processor) as phi35.load returns them, got "
            f"{type(model).__name__} without a processor"
        )
    return pair


def _state(name: str) -> tuple[str, tuple[tuple[str, int, int], ...]]:
    """A folder's whole path, with the time and size of each file: a model saved anew is another one."""
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        return name, ()
    stats = [(entry.name, entry.stat()) for entry in os.scandir(folder) if entry.is_file()]
    return str(folder.resolve()), tuple(sorted((file, stat.st_mtime_ns, stat.st_size) for file, stat in stats))


@lru_cache(maxsize=2)
def _loaded(
    name: str,
    state: tuple[tuple[str, int, int], ...],
    device: torch.device,
    dtype: str | torch.dtype,
    quantization: Any,
    expert_memory: int | str | None,
) -> tuple[Any, Processor]:
    """Models by name, state of their files and ways of loading: the two used last stay in memory."""
    from phi35.loading import load

    model, processor = load(name, device, dtype, quantization=quantization, expert_memory=expert_memory)
    if processor is None:
        raise ValueError(f"{name} has no tokenizer, so that it cannot answer text: add its tokenizer.json")
    if model.config.vision is not None:
        model.image_feature_cache = ImageFeatureCache()
        processor.image_transform.cache = registry.resolve("images.cache")()
    return model, processor


def _refuse(unknown: Mapping[str, Any]) -> None:
    if not unknown:
        return
    known = [name for name in inspect.signature(generate).parameters if name != "unknown"]
    hints = []
    for name in sorted(unknown):
        near = difflib.get_close_matches(name, known, n=2)
        hints.append(f"{name!r}" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    raise ValueError(f"unknown keyword {', '.join(hints)}; known are {', '.join(known)}")


def prompt_texts(
    processor: Processor, prompt: str | Sequence[str], images: Sequence[Any] | None, system: str | None
) -> str | list[str]:
    """Prompts as the model reads them: wrapped in a chat where they spell no role tags themselves."""
    if isinstance(prompt, str):
        return _prompt_text(processor, prompt, _count(images), system)
    if not isinstance(prompt, list | tuple) or not prompt:
        raise ValueError(f"prompt must be a str or a non-empty list of str, got {prompt!r}")
    counts = [0] * len(prompt)
    if isinstance(images, list | tuple) and len(images) == len(prompt):
        counts = [_count(row) for row in images]
    return [_prompt_text(processor, text, count, system) for text, count in zip(prompt, counts, strict=True)]


def _prompt_text(processor: Processor, prompt: str, num_images: int, system: str | None) -> str:
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt must be a non-empty str, got {prompt!r}")
    if any(tag in prompt for tag in ROLE_TAGS):
        if system is not None:
            raise ValueError("system= has no place in a prompt that spells role tags itself: write the turn there")
        return prompt
    return _rendered(processor, [{"role": "user", "content": prompt}], num_images, system)


def chat_text(
    processor: Processor, messages: Sequence[Message], images: Sequence[Any] | None, system: str | None
) -> tuple[str, Sequence[Any] | None]:
    """A chat as the model reads it, and its pictures in order.

    Raises:
        ValueError: for malformed messages, or pictures both in them and beside them.
    """
    flat, found = flatten_messages(messages)
    if found and images is not None:
        raise ValueError("the messages carry pictures and images= came too: give them in one place")
    images = found or images
    return _rendered(processor, flat, _count(images), system), images


def refuse_tags_without_images(processor: Processor, texts: str | list[str]) -> None:
    """To a text-only processor a tag is text like any other; here its writer surely meant a picture."""
    tag = IMAGE_TAG.search(texts if isinstance(texts, str) else "\n".join(texts))
    if tag and processor.config.vision is None:
        raise ValueError(f"the prompt has {tag[0]} and this model reads text only: take the tag out")


def _count(images: Any) -> int:
    """How many pictures a list holds; 0 for what is no list, which the processor refuses."""
    return len(images) if isinstance(images, list | tuple) else 0


def _rendered(processor: Processor, messages: list[dict[str, str]], num_images: int, system: str | None) -> str:
    """The chat's text, with tags for untagged images at the start of the first user turn."""
    tagged = any(IMAGE_TAG.search(message["content"]) for message in messages)
    if num_images and not tagged and processor.config.vision is not None:
        turn = next((turn for turn in messages if turn["role"] == "user"), None)
        if turn is None:
            raise ValueError("images need a user turn to stand in, and the messages have none")
        block = "".join(image_tag(number) + "\n" for number in range(1, num_images + 1))
        place = messages.index(turn)
        messages = [*messages[:place], {**turn, "content": block + turn["content"]}, *messages[place + 1 :]]
    if system is not None:
        if messages[0]["role"] == "system":
            raise ValueError("the messages begin with a system turn and system= came too: give one of them")
        messages = [{"role": "system", "content": system}, *messages]
    return processor.apply_chat_template(messages)


def _pieces(decoding: Decoding, processor: Processor, stops: Sequence[str]) -> Iterator[str]:
    """The answer of the only row, piece by piece."""
    text = TextStream(processor.tokenizer, stops)
    while not decoding.done:
        for _, token_id in decoding.step():
            if piece := text.feed(token_id):
                yield piece
    if piece := text.finish():
        yield piece
