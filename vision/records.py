"""One record of somebody's data set as a sample of ours: a description and references to its pictures.

Forms, told by the fields of the record:

====================================  ====================================================================
``messages``                          turns as {"role", "content"}; contents as text or as typed parts
``conversations`` with from, value    LLaVA: human and gpt, ``<image>`` where a picture goes
``conversations`` with messages       alternatives about the same pictures, as in our own shards
``texts``                             a list of {"user", "assistant"}: one conversation, turn after turn
``question``, ``answer``              one turn each
``text`` or ``caption``               the answer to a fixed request
====================================  ====================================================================

Pictures come under ``image`` or ``images``: a path below the root of pictures, bytes, {"bytes", "path"} (the form of
Hugging Face's data sets), or a list of these.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from phi35.chat_template import flatten_messages, image_tag
from vision.descriptions import TAG, SkippedSample, parse_description

CAPTION_REQUEST = "Describe the image."
_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

ImageReference = str | bytes


def to_sample(record: Any, request: str = CAPTION_REQUEST) -> tuple[dict[str, Any], list[ImageReference]]:
    """The sample of a record.

    Args:
        record: a mapping in one of the forms above.
        request: what a caption answers.

    Returns:
        The description, checked, and its pictures: paths as they stand in the record, or bytes.

    Raises:
        SkippedSample: "bad_record" for another form; or why the description cannot be trained on.
    """
    if not isinstance(record, Mapping):
        raise SkippedSample("bad_record", f"a record must be a mapping, got {type(record).__name__}")
    images = _references(record)
    conversations = record.get("conversations")
    if _is_list_of(conversations, "messages"):
        alternatives = [
            {**conversation, "messages": _tagged(_turns(conversation["messages"])[0], len(images))}
            for conversation in conversations
        ]
        description: dict[str, Any] = {"conversations": alternatives}
    else:
        turns, more = _conversation(record, request)
        images += [_reference(one) for one in more]
        description = {"messages": _tagged(turns, len(images))}
    if "draws" in record:
        description["draws"] = record["draws"]
    parse_description(description, len(images))
    return description, images


def _conversation(record: Mapping[str, Any], request: str) -> tuple[list[dict[str, str]], list[Any]]:
    """Turns of a record, and pictures found among them."""
    conversations = record.get("conversations")
    if record.get("messages") is not None:
        return _turns(record["messages"])
    if _is_list_of(conversations, "value"):
        turns = []
        for turn in conversations:
            role = _ROLES.get(turn.get("from"))
            if role is None or not isinstance(turn["value"], str):
                raise SkippedSample("bad_record", f"a LLaVA turn needs from (human, gpt) and value, got {turn!r:.200}")
            turns.append({"role": role, "content": turn["value"]})
        return turns, []
    if _is_list_of(record.get("texts"), "user"):
        pairs = [(("user", turn["user"]), ("assistant", turn.get("assistant"))) for turn in record["texts"]]
        return _turns([{"role": role, "content": text} for pair in pairs for role, text in pair])
    question, answer = record.get("question", request), record.get("answer")
    if answer is None:
        answer = record.get("text", record.get("caption"))
    if answer is None:
        raise SkippedSample(
            "bad_record",
            "a record needs messages, conversations, texts, question and answer, text or caption, got fields "
            f"{sorted(map(str, record))}",
        )
    return _turns([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _is_list_of(value: Any, name: str) -> TypeGuard[list[Any]]:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(one, Mapping) and name in one for one in value)
    )


def _turns(messages: Any) -> tuple[list[dict[str, str]], list[Any]]:
    try:
        return flatten_messages(messages)
    except ValueError as error:
        raise SkippedSample("bad_record", str(error)[:500]) from error


def _tagged(turns: list[dict[str, str]], num_images: int) -> list[dict[str, str]]:
    """Turns whose ``<image>`` placeholders became numbered tags, where the record uses them."""
    if any(TAG.search(turn["content"]) for turn in turns):
        return turns
    count = sum(turn["content"].count(_PLACEHOLDER) for turn in turns)
    if not count:
        return turns
    if count != num_images:
        raise SkippedSample("bad_record", f"{count} {_PLACEHOLDER} placeholders stand for {num_images} pictures")
    number, tagged = 0, []
    for turn in turns:
        head, *rest = turn["content"].split(_PLACEHOLDER)
        for piece in rest:
            number += 1
            head += image_tag(number) + piece
        tagged.append({**turn, "content": head})
    return tagged


def _references(record: Mapping[str, Any]) -> list[ImageReference]:
    value = record.get("images", record.get("image"))
    if value is None:
        return []
    if isinstance(value, str | bytes | Mapping | Path):
        value = [value]
    if not isinstance(value, Sequence):
        raise SkippedSample("bad_record", f"pictures must be a path, bytes or a list, got {type(value).__name__}")
    return [_reference(one) for one in value]


def _reference(value: Any) -> ImageReference:
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str | bytes) or not value:
        raise SkippedSample("bad_record", f"a picture must be a path or bytes, got {type(value).__name__}")
    return value
