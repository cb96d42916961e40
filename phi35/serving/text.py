"""An answer's text as its tokens come, and the log-probabilities that belong to each piece."""

import dataclasses
from typing import Any

from phi35.generation.requests import Emitted
from phi35.generation.streaming import TextStream
from phi35.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenEntry:
    """A token whose text has been given out.

    Attributes:
        token_id: the token.
        logprob: its log-probability under the model.
        alternatives: the most likely tokens in its place.
        start: characters of the answer before it.
    """

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    start: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """More of an answer.

    Attributes:
        text: whole characters, never a part of a stop string.
        tokens: those that begin in the text; none of a stop string, nor the stop token.
        finish_reason: "stop" or "length" with the last piece.
    """

    text: str
    tokens: tuple[TokenEntry, ...]
    finish_reason: str | None


class AnswerText:
    """The text of one answer.

    Args:
        tokenizer: of the model.
        stops: stop strings.

    Attributes:
        num_tokens: tokens so far.
        finish_reason: why it has ended.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._stream = TextStream(tokenizer, stops)
        self._held: list[TokenEntry] = []

    def feed(self, events: list[Emitted]) -> Piece:
        """The piece that new tokens make certain; the last of them may end the answer."""
        text = ""
        for one in events:
            if one.token_id >= 0:
                self.num_tokens += 1
                entry = TokenEntry(one.token_id, one.logprob, one.alternatives, self._stream.num_decoded)
                text += self._stream.feed(one.token_id)
                silent = not self.tokenizer.token_bytes(one.token_id)
                if not (silent and one.finish_reason == "stop"):
                    self._held.append(entry)
            self.finish_reason = one.finish_reason
        if self.finish_reason is not None:
            text += self._stream.finish()
        return Piece(text, self._released(), self.finish_reason)

    def _released(self) -> tuple[TokenEntry, ...]:
        """Tokens that begin in text that has been given out, or after it where nothing is held back."""
        end = self._stream.num_released
        if self._stream.stopped or end < self._stream.num_decoded:
            count = sum(entry.start < end for entry in self._held)
        else:
            count = len(self._held)
        released, self._held = self._held[:count], self._held[count:]
        return tuple(released)


def chat_logprobs(tokenizer: Tokenizer, tokens: tuple[TokenEntry, ...]) -> dict[str, Any]:
    """``logprobs`` of a chat's choice."""
    content = []
    for one in tokens:
        others = [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in one.alternatives]
        content.append({**_chat_token(tokenizer, one.token_id, one.logprob), "top_logprobs": others})
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, tokens: tuple[TokenEntry, ...]) -> dict[str, Any]:
    """``logprobs`` of a completion's choice; offsets count from the answer's first character."""
    return {
        "tokens": [_text(tokenizer, one.token_id) for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [{_text(tokenizer, token_id): value for token_id, value in one.alternatives} for one in tokens],
        "text_offset": [one.start for one in tokens],
    }


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id, skip_special=False)
    return {"token": data.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(data)}


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id, skip_special=False).decode("utf-8", errors="replace")
