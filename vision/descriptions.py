"""What a shard's JSON says about a sample: conversations about its pictures, checked before anything is decoded.

A description is ``{"messages": [{"role": ..., "content": ...}, ...]}`` or ``{"conversations": [{"messages": [...],
"weight": 1.0}, ...], "draws": n}``: alternatives about the same pictures, of which one is drawn each time; the
sample is visited n times an epoch. ``<|image_N|>`` in a content says where picture N goes, anywhere in the text and
in any turn; without a tag the pictures come first in the first user turn.
"""

import itertools
import random
import re
from dataclasses import dataclass
from typing import Any

TAG = re.compile(r"<\|image_(\d{1,9})\|>")
MAX_DRAWS = 10_000
_CONTROL = re.compile(r"<\|(?:user|assistant|system|end|endoftext|image|placeholder\d+)\|>")
_ROLES = ("system", "user", "assistant")

Messages = tuple[tuple[str, str], ...]


class SkippedSample(ValueError):
    """A sample that training passes over.

    Attributes:
        reason: the key under which it is counted.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Alternatives:
    """A parsed description: conversations about the sample's pictures and their cumulative weights."""

    messages: tuple[Messages, ...]
    cumulative_weights: tuple[float, ...]
    draws: int

    def draw(self, rng: random.Random) -> Messages:
        """One conversation, by weight."""
        if len(self.messages) == 1:
            return self.messages[0]
        return rng.choices(self.messages, cum_weights=self.cumulative_weights)[0]

    @property
    def text_length(self) -> int:
        """Characters of a conversation, the mean over the alternatives."""
        return sum(len(content) for turns in self.messages for _, content in turns) // len(self.messages)


def parse_description(description: Any, num_images: int | None = None, *, check: bool = True) -> Alternatives:
    """Checks and unpacks a sample's JSON.

    Args:
        description: the parsed JSON.
        num_images: pictures that the sample holds, to compare with the tags; None leaves that out.
        check: False leaves out ``check_turns``, for those who will ask it about the conversation that is drawn.

    Raises:
        SkippedSample: "bad_description" if it has not one of the two forms above, or names other pictures than the
            sample holds; "empty_text" if an assistant says nothing.
    """
    try:
        conversations = description.get("conversations") or [description]
        messages = tuple(
            tuple((turn["role"], turn["content"]) for turn in conversation["messages"])
            for conversation in conversations
        )
        weights = [float(conversation.get("weight", 1.0)) for conversation in conversations]
        draws = int(description.get("draws", 1))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise SkippedSample(
            "bad_description", f"a sample's JSON needs 'messages' or 'conversations' with role and content: {error!r}"
        ) from error
    usable = all(messages) and min(weights) >= 0 and 0 < sum(weights) < float("inf") and 1 <= draws <= MAX_DRAWS
    if not usable:
        raise SkippedSample(
            "bad_description",
            f"a sample's JSON needs turns in each conversation, weights >= 0 and draws in 1..{MAX_DRAWS}",
        )
    if not all(isinstance(text, str) for turns in messages for turn in turns for text in turn):
        raise SkippedSample("bad_description", "roles and contents of a sample's turns must be text")
    for turns in messages if check else ():
        check_turns(turns, num_images)
    return Alternatives(messages, tuple(itertools.accumulate(weights)), draws)


def check_turns(messages: Messages, num_images: int | None = None) -> set[int]:
    """The image numbers that the contents name: all of the pictures', or none.

    Args:
        messages: turns as (role, content).
        num_images: as in ``parse_description``.

    Raises:
        SkippedSample: for an unknown role, a content that is no text, a control token inside a content, no reply of
            an assistant or an empty one, and tags that do not match the pictures.
    """
    for role, content in messages:
        if role not in _ROLES:
            raise SkippedSample("bad_description", f"a turn's role must be system, user or assistant, got {role!r}")
        if not _is_unicode(content):
            raise SkippedSample("bad_description", "a turn's content holds half a surrogate pair, which is no text")
        if _CONTROL.search(content):
            raise SkippedSample("bad_description", f"a turn's content must not hold control tokens, got {content!r}")
    roles = [role for role, _ in messages]
    if "assistant" not in roles:
        raise SkippedSample("bad_description", f"a training conversation needs an assistant's reply, got roles {roles}")
    if any(role == "assistant" and not content.strip() for role, content in messages):
        raise SkippedSample("empty_text", "an assistant's reply is empty: there is nothing to learn from it")
    numbers = {int(number) for _, content in messages for number in TAG.findall(content)}
    if num_images is None:
        return numbers
    if numbers and numbers != set(range(1, num_images + 1)):
        shown = sorted(numbers)[:20]
        raise SkippedSample("bad_description", f"the tags name images {shown}, but {num_images} pictures came")
    if num_images and not numbers and "user" not in roles:
        raise SkippedSample("bad_description", "pictures without tags go into the first user turn, but there is none")
    return numbers


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
