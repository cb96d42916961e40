"""Chat templates: rendering a folder's own Jinja template, and the family's template where a folder has none.

A template is data from a checkpoint, so it runs in Jinja's immutable sandbox, set up as transformers sets up its
own (``trim_blocks``, ``lstrip_blocks``, loop controls, ``raise_exception``, ``tojson``): published templates give
the same text here as there.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant")

FAMILY_TEMPLATE = (
    "{% for turn in messages if turn.role != 'system' or turn.content %}"
    "{{ '<|' + turn.role + '|>\n' + turn.content + '<|end|>\n' }}"
    "{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
"""What phi-3.5-mini's template renders: an empty system turn is left out, and a chat that asks for no reply ends
in ``<|endoftext|>``. Used for folders that bring no template of their own."""


def image_tag(number: int) -> str:
    """The tag that stands for image ``number`` (from 1) in a prompt."""
    return f"<|image_{number}|>"


def flatten_messages(messages: Sequence[Message]) -> tuple[list[dict[str, str]], list[Any]]:
    """Chat messages with plain string contents, and the images found in them.

    A content is a string or a list of parts: ``{"type": "text", "text": ...}`` or ``{"type": "image"}``; an image
    part becomes the next tag and a line feed, and may carry its picture under the key ``image``.

    Raises:
        ValueError: for messages of another form, naming the first bad one.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            "messages must be a non-empty list of {'role': ..., 'content': ...} dicts, got " + _shown(messages)
        )
    flat: list[dict[str, str]] = []
    images: list[Any] = []
    num_tags = 0
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"messages[{index}] must be a dict with 'role' and 'content', got {_shown(message)}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"messages[{index}]['role'] must be one of {ROLES}, got {role!r}")
        if isinstance(content, list | tuple):
            pieces = []
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind == "text" and isinstance(part.get("text"), str):
                    pieces.append(part["text"])
                elif kind == "image":
                    num_tags += 1
                    pieces.append(image_tag(num_tags) + "\n")
                    if part.get("image") is not None:
                        images.append(part["image"])
                else:
                    raise ValueError(
                        f"messages[{index}]['content'] holds {_shown(part)}; expected {{'type': 'text', 'text': ...}} "
                        "or {'type': 'image'} parts"
                    )
            content = "".join(pieces)
        if not isinstance(content, str):
            raise ValueError(
                f"messages[{index}]['content'] must be a str or a list of parts, got {type(content).__name__}"
            )
        flat.append({"role": role, "content": content})
    if images and len(images) != num_tags:
        raise ValueError(
            f"{len(images)} of {num_tags} image parts carry a picture: give all of them an 'image', or none and pass "
            "images="
        )
    return flat, images


def render(template: str, messages: list[dict[str, str]], add_generation_prompt: bool, **tokens: str | None) -> str:
    """The prompt string of a chat.

    Args:
        template: Jinja source.
        messages: role and content of each turn, contents as strings.
        add_generation_prompt: whether the text ends where the assistant's reply begins.
        tokens: what the template may name: ``bos_token``, ``eos_token``, ...

    Raises:
        ValueError: if the template refuses the messages or is broken.
    """
    import jinja2

    try:
        return _compiled(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **tokens
        )
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError) as error:  # code of a template may fail
        raise ValueError(f"the tokenizer's chat template cannot render these messages: {error}") from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
