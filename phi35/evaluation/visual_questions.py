"""Questions about pictures as the harnesses for vision models ask them: for lmms-eval and for VLMEvalKit.

lmms-eval (0.7) finds the model by its name once this package is installed beside it:

    python -m lmms_eval --model phi35 --model_args model=FOLDER,batch_size=8 --tasks mmmu_val

VLMEvalKit takes any object with ``generate(message, dataset)`` from its table of models:

    vlmeval.config.supported_VLM["phi35"] = functools.partial(KitModel.from_folder, "FOLDER")

Pictures without a tag come first, in order, as the models were trained; ``<image>`` in a question stands where its
picture goes. The card of Phi-3.5-vision advises 16 crops for one picture and 4 for several: ``num_crops=None`` does so.
"""

import json
from collections.abc import Sequence
from typing import Any

from phi35.api import generate, resolve_model
from phi35.processor import Processor
from phi35.scoring import score

PLACE = "<image>"
OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def crops_for(images: Sequence[Any], num_crops: int | None) -> int:
    """Limit of tiles for the pictures of one question."""
    if num_crops is not None:
        return num_crops
    return 16 if len(images) == 1 else 4


def with_tags(text: str, num_images: int) -> str:
    """A question whose ``<image>`` are the model's own tags.

    Raises:
        ValueError: if it has another number of places than pictures.
    """
    places = text.count(PLACE)
    if places == 0:
        return text
    if places != num_images:
        raise ValueError(f"a question has {places} places for pictures ({PLACE}) and comes with {num_images}")
    for number in range(1, places + 1):
        text = text.replace(PLACE, f"<|image_{number}|>", 1)
    return text


class LmmsModel:
    """A model as lmms-eval asks it; ``phi35.evaluation.lmms`` makes it a class of the harness.

    Args:
        model: folder, hub id, (model, processor), or None for the small model.
        batch_size: questions that run together.
        max_new_tokens: most tokens of an answer where a task does not say.
        num_crops: limit of tiles a picture; None takes 16 for one and 4 for several.
        device: where a folder is loaded.
        dtype: of its weights.
    """

    is_simple = True
    task_dict: dict[str, Any]
    cache_hook: Any

    def __init__(
        self,
        model: Any = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 1024,
        num_crops: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)
        if unknown:
            raise ValueError(f"model_args {sorted(unknown)} are unknown")
        if int(batch_size) < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.pair = resolve_model(model, device, dtype)
        self.batch_size, self.max_new_tokens, self.num_crops = int(batch_size), int(max_new_tokens), num_crops

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers to (question, options, doc_to_visual, doc_id, task, split)."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            options = self._options(requests[numbers[0]].args[1])
            for first in range(0, len(numbers), self.batch_size):
                batch = numbers[first : first + self.batch_size]
                pictures = [self._pictures(*requests[number].args[2:6]) for number in batch]
                texts = [with_tags(requests[n].args[0], len(shown)) for n, shown in zip(batch, pictures, strict=True)]
                crops = [[crops_for(shown, self.num_crops)] * len(shown) for shown in pictures]
                given: dict[str, Any] = {"images": pictures, "num_crops": crops} if any(pictures) else {}
                found: Any = generate(texts, model=self.pair, **given, **options)
                for number, text in zip(batch, found, strict=True):
                    answers[number] = str(text)
                    self.cache_hook.add_partial("generate_until", requests[number].args, str(text))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of (question, continuation, doc_to_visual, doc_id, task, split)."""
        found = []
        for request in requests:
            text, continuation, *where = request.args
            if callable(continuation):
                continuation = continuation(self._doc(*where[1:4]))
            pictures = self._pictures(*where[:4])
            given: dict[str, Any] = {}
            if pictures:
                given = {"images": pictures, "num_crops": crops_for(pictures, self.num_crops)}
            one: Any = score(with_tags(text, len(pictures)), continuation, model=self.pair, **given)
            found.append((one.logprob, one.is_greedy))
        return found

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not to be had: these tasks ask in turns that hang on the answers before."""
        raise ValueError("tasks of several rounds are not served by this model class; choose generate_until tasks")

    def _doc(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _pictures(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> list[Any]:
        return list(doc_to_visual(self._doc(doc_id, task, split)) or []) if doc_to_visual is not None else []

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The harness's generation arguments as ours; beams and samples of several are refused.

        Raises:
            ValueError: for arguments that have no counterpart.
        """
        left = {name: value for name, value in given.items() if value is not None}
        options = {name: left.pop(name) for name in OPTIONS if name in left}
        if left.pop("do_sample", None) is False or not options.get("temperature"):
            options["temperature"] = 0.0
        until = left.pop("until", [])
        options["stop"] = [until] if isinstance(until, str) else [text for text in until if text]
        options["max_new_tokens"] = int(left.pop("max_new_tokens", self.max_new_tokens))
        if left.pop("num_beams", 1) != 1:
            raise ValueError("num_beams must be 1: this project decodes without beams")
        for name in ("image_aspect_ratio", "use_cache"):  # settings of other models' preprocessing
            left.pop(name, None)
        if left:
            raise ValueError(f"generation arguments {sorted(left)} are unknown here; take them out of the task")
        return options


class KitModel:
    """A model as VLMEvalKit asks it: the methods of its ``vlmeval.vlm.base.BaseModel``.

    Args:
        model: a ``phi35.model.CausalLM`` with vision.
        processor: the model's.
        num_crops: limit of tiles a picture; None takes 16 for one and 4 for several.
        **options: of ``phi35.generate``; ``max_new_tokens`` is 2,048 unless given.
    """

    INTERLEAVE = True
    INSTALL_REQ = False
    allowed_types = ("text", "image")
    is_api = False

    def __init__(self, model: Any, processor: Processor, num_crops: int | None = None, **options: Any) -> None:
        self.pair, self.num_crops, self.options = (model, processor), num_crops, {"max_new_tokens": 2048, **options}
        self.dump_image_func: Any = None

    @classmethod
    def from_folder(
        cls, folder: str, device: str | None = None, dtype: str | None = None, **options: Any
    ) -> "KitModel":
        """Load a folder or hub id."""
        return cls(*resolve_model(folder, device, dtype), **options)

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Never: the kit's own prompts are taken."""
        return False

    def set_dump_image(self, dump_image_func: Any) -> None:
        """The kit tells how a dataset's pictures are written."""
        self.dump_image_func = dump_image_func

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """The answer to a message.

        Args:
            message: a text, a part ``{"type": "text" | "image", "value": ...}``, or a list of parts in their order.
            dataset: name of the dataset; of no effect.

        Raises:
            ValueError: for parts of other kinds.
        """
        return self.generate_inner(self._parts(message), dataset)

    def chat(self, messages: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to turns ``{"role": ..., "content": message}``, messages as of ``generate``."""
        turns = [{"role": turn["role"], "content": self._parts(turn["content"])} for turn in messages]
        return self.chat_inner(turns, dataset)

    def _parts(self, message: Any) -> list[dict[str, Any]]:
        parts = message if isinstance(message, list | tuple) else [message]
        parts = [{"type": "text", "value": part} if isinstance(part, str) else part for part in parts]
        wrong = [part for part in parts if not isinstance(part, dict) or part.get("type") not in self.allowed_types]
        if wrong:
            raise ValueError(f"a message's parts must be of type {self.allowed_types}, got {wrong[0]!r}")
        return parts

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to parts, whose pictures stay where they stand."""
        images = [part["value"] for part in message if part["type"] == "image"]
        texts, number = [], 0
        for part in message:
            if part["type"] == "image":
                number += 1
                texts.append(f"<|image_{number}|>")
            else:
                texts.append(part["value"])
        given: dict[str, Any] = {}
        if images:
            given = {"images": images, "num_crops": crops_for(images, self.num_crops)}
        return str(generate("\n".join(texts), model=self.pair, **given, **self.options))

    def chat_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to turns ``{"role": ..., "content": parts}``."""
        images: list[Any] = []
        messages = []
        for turn in message:
            texts = []
            for part in turn["content"]:
                if part["type"] == "image":
                    images.append(part["value"])
                    texts.append(f"<|image_{len(images)}|>")
                else:
                    texts.append(part["value"])
            messages.append({"role": turn["role"], "content": "\n".join(texts)})
        given: dict[str, Any] = {}
        if images:
            given = {"images": images, "num_crops": crops_for(images, self.num_crops)}
        return str(generate(messages=messages, model=self.pair, **given, **self.options))
