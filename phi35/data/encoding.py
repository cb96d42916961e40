"""From documents to tokens, and which of them are learned: all of a text, an assistant's turns of a chat.

A text is data: what looks like a control token in it becomes the pieces of its characters. It ends with the
end-of-text token. A chat goes through the tokenizer's template as a prompt does; learned is what an assistant would
have to produce: everything behind the tokens with which the template opens its turn, through ``<|end|>``. Positions
decide, never an id's value: padding and ``<|endoftext|>`` share one.
"""

import hashlib
import json
import re
from typing import Any, NamedTuple

import numpy as np

from phi35.chat_template import ROLES
from phi35.data.documents import Record
from phi35.data.skips import SkippedDocument
from phi35.tokenizer import Tokenizer

ASSISTANT, END, END_OF_TEXT = "<|assistant|>", "<|end|>", "<|endoftext|>"
_FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
_IMAGE_TAG = re.compile(r"<\|image_\d+\|>")


class Encoded(NamedTuple):
    """One document's tokens.

    Attributes:
        ids: (n,) uint32.
        trained: (n,) bool, tokens that are learned; None for all.
    """

    ids: np.ndarray
    trained: np.ndarray | None


class TextEncoder:
    """Texts, or records with a text field.

    Args:
        tokenizer: of the model.
        field: of records.
        end_of_text: id that ends every text.
    """

    kind = "text"

    def __init__(self, tokenizer: Tokenizer, end_of_text: int, field: str = "text") -> None:
        self.tokenizer, self.field, self.end_of_text = tokenizer, field, end_of_text
        self._backend: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_backend": None}

    def __call__(self, record: Record) -> Encoded:
        """Tokens of a document.

        Raises:
            SkippedDocument: "missing_text", "empty" or "bad_utf8".
        """
        text = record if isinstance(record, str) else record.get(self.field)
        if not isinstance(text, str):
            raise SkippedDocument("missing_text", f"expected a string under {self.field!r}, got {type(text).__name__}")
        if not text:
            raise SkippedDocument("empty", "an empty text")
        _check_unicode(text)
        if self._backend is None:
            import tokenizers

            self._backend = tokenizers.Tokenizer.from_str(self.tokenizer.definition)
            self._backend.encode_special_tokens = True  # a text is no prompt: nothing in it controls anything
        ids = self._backend.encode(text, add_special_tokens=False).ids
        begin = [self.tokenizer.bos_token_id] if self.tokenizer.add_bos else []
        return Encoded(np.array([*begin, *ids, self.end_of_text], dtype=np.uint32), None)

    def identity(self) -> list[Any]:
        """Plain data that is equal for encoders that give equal tokens."""
        return [
            self.kind,
            self.field,
            self.end_of_text,
            tokenizer_identity(self.tokenizer),
            self.tokenizer.add_bos,
        ]


class ChatEncoder:
    """Records with ``messages`` (role, content), or with ``conversations`` in ShareGPT's form (from, value).

    Args:
        tokenizer: of the model; its template must open an assistant's turn by ``<|assistant|>`` and end it by
            ``<|end|>``.

    Raises:
        ValueError: if it does not.
    """

    kind = "chat"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        special = tokenizer.special_ids
        missing = [token for token in (ASSISTANT, END, END_OF_TEXT) if token not in special]
        if missing:
            raise ValueError(f"chat data needs a tokenizer with the tokens {missing}")
        self.assistant, self.end = special[ASSISTANT], special[END]
        # What the template puts behind <|assistant|> belongs to the prompt of a reply, not to the reply.
        self._opening = tokenizer.encode(ASSISTANT + "\n", add_special_tokens=False)[1:]
        self.control = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        if not self.learned(np.array(tokenizer.encode(tokenizer.apply_chat_template(probe, False)))).any():
            raise ValueError(
                f"the tokenizer's chat template marks no assistant's turn by {ASSISTANT} and {END}: give the tokenizer "
                "that belongs to the model (processor=FOLDER)"
            )

    def __call__(self, record: Record) -> Encoded:
        """Tokens of a chat; turns behind the last reply are left out.

        Raises:
            SkippedDocument: "bad_messages", "no_reply", "control_token" or "bad_utf8".
        """
        turns = self._turns(record)
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=False)
        except ValueError as error:
            raise SkippedDocument("bad_messages", str(error)) from error
        if not text.endswith(END_OF_TEXT):
            text += END_OF_TEXT
        ids = np.array(self.tokenizer.encode(text), dtype=np.uint32)
        return Encoded(ids, self.learned(ids))

    def identity(self) -> list[Any]:
        """Plain data that is equal for encoders that give equal tokens."""
        template = _fingerprint(self.tokenizer.chat_template)
        return [self.kind, tokenizer_identity(self.tokenizer), template, self.tokenizer.add_bos]

    def _turns(self, record: Record) -> list[dict[str, str]]:
        """The checked turns through the last reply."""
        turns = _messages(record)
        for turn in turns:
            if turn["role"] not in ROLES or not isinstance(turn["content"], str):
                raise SkippedDocument("bad_messages", f"expected a role of {ROLES} and a text, got {turn!r:.200}")
            _check_unicode(turn["content"])
            found = self.control.search(turn["content"]) or _IMAGE_TAG.search(turn["content"])
            if found:
                raise SkippedDocument("control_token", f"a turn's content holds {found[0]!r}")
        replies = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not replies or not any(turns[index]["content"].strip() for index in replies):
            raise SkippedDocument("no_reply", f"no assistant says anything: {[turn['role'] for turn in turns]}")
        return turns[: replies[-1] + 1]

    def learned(self, ids: np.ndarray) -> np.ndarray:
        """(n,) bool: behind each opening of an assistant's turn, through the next ``<|end|>``."""
        learned = np.zeros(len(ids), dtype=bool)
        ends = np.flatnonzero(ids == self.end)
        for start in np.flatnonzero(ids == self.assistant):
            first = int(start) + 1
            if ids[first : first + len(self._opening)].tolist() == self._opening:
                first += len(self._opening)
            end = int(np.searchsorted(ends, start))
            if end < len(ends):
                learned[first : int(ends[end]) + 1] = True
        return learned


def _messages(record: Record) -> list[dict[str, Any]]:
    """The turns of a record in either form, with role and content."""
    if not isinstance(record, dict):
        raise SkippedDocument("bad_messages", "expected a record with 'messages', got a text")
    turns = record.get("messages") or record.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise SkippedDocument("bad_messages", f"expected a list of turns under 'messages', got {type(turns).__name__}")
    found = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list) and all(_is_text_part(part) for part in content):
            content = "".join(part["text"] for part in content)
        found.append({"role": _FOREIGN_ROLES.get(role, role) if isinstance(role, str) else role, "content": content})
    return found


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SkippedDocument("bad_utf8", f"half a surrogate pair, which is no text: {error}") from error


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """Short digest that is equal for tokenizers that give equal ids."""
    return _fingerprint(tokenizer.definition)


def _fingerprint(text: str) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]
