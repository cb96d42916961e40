"""Answers as JSON: whole, or as a stream of server-sent events."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from phi35.serving.calls import Call
from phi35.serving.errors import ApiError
from phi35.serving.protocol import ChatRequest, CompletionRequest, dumps
from phi35.serving.text import Piece, chat_logprobs, completion_logprobs

DONE = "data: [DONE]\n\n"
PING = ": waiting\n\n"


class ChatForm:
    """Chat completions.

    Args:
        call: whose answers are written.
    """

    def __init__(self, call: Call) -> None:
        assert isinstance(call.request, ChatRequest)
        self.call, self.request = call, call.request
        self._frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": call.request.model}

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The body of an answer that was not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finish_reason,
            }
            for index, piece in enumerate(pieces)
        ]
        return {**self._frame, "object": "chat.completion", "choices": choices, "usage": self.call.usage}

    def first(self, index: int) -> dict[str, Any]:
        """The chunk that opens an answer."""
        return self.chunk([self._choice(index, {"role": "assistant", "content": ""}, None, None)])

    def more(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Chunks of a piece."""
        chunks = []
        if piece.text or piece.tokens:
            chunks.append(self.chunk([self._choice(index, {"content": piece.text}, self._logprobs(piece), None)]))
        if piece.finish_reason is not None:
            chunks.append(self.chunk([self._choice(index, {}, None, piece.finish_reason)]))
        return chunks

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk around choices; none for the one that tells the usage."""
        return {**self._frame, "object": "chat.completion.chunk", "choices": choices}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return chat_logprobs(self.call.service.processor.tokenizer, piece.tokens)

    @staticmethod
    def _choice(index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionForm:
    """Completions.

    Args:
        call: whose answers are written.
    """

    def __init__(self, call: Call) -> None:
        assert isinstance(call.request, CompletionRequest)
        self.call, self.request = call, call.request
        self._frame = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": call.request.model}
        self._frame["object"] = "text_completion"

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The body of an answer that was not streamed."""
        choices = [
            self._choice(index, self._echo(index) + piece.text, piece, piece.finish_reason)
            for index, piece in enumerate(pieces)
        ]
        return {**self.chunk(choices), "usage": self.call.usage}

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk that opens an answer, where the prompt is to be repeated."""
        echo = self._echo(index)
        return self.chunk([self._choice(index, echo, None, None)]) if echo else None

    def more(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The chunk of a piece."""
        if not (piece.text or piece.tokens or piece.finish_reason):
            return []
        return [self.chunk([self._choice(index, piece.text, piece, piece.finish_reason)])]

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk around choices; none for the one that tells the usage."""
        return {**self._frame, "choices": choices}

    def _echo(self, index: int) -> str:
        """The prompt, where the caller wants it back."""
        if not self.request.echo:
            return ""
        prompt = self.call.prompts[index // self.request.n]
        if prompt.text is not None:
            return prompt.text
        return self.call.service.processor.tokenizer.decode(prompt.inputs["input_ids"], skip_special=False)

    def _choice(self, index: int, text: str, piece: Piece | None, finish_reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs is not None and piece is not None:
            logprobs = completion_logprobs(self.call.service.processor.tokenizer, piece.tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


Form = ChatForm | CompletionForm


async def whole(form: Form) -> dict[str, Any]:
    """All answers of a call, when they are there.

    Raises:
        ApiError: if it fails or takes too long.
    """
    call = form.call
    try:
        pieces: list[list[Piece]] = [[] for _ in call.answers]
        async for update in call.updates():
            for index, piece in update:
                pieces[index].append(piece)
        joined = [
            Piece(
                "".join(piece.text for piece in parts),
                tuple(token for piece in parts for token in piece.tokens),
                parts[-1].finish_reason,
            )
            for parts in pieces
        ]
        return form.whole(joined)
    finally:
        call.close()


async def events(form: Form) -> AsyncIterator[str]:
    """Server-sent events of a call; what goes wrong on the way becomes an event with an error."""
    call, options = form.call, form.request.stream_options
    with_usage = options is not None and options.include_usage
    extra = {"usage": None} if with_usage else {}
    try:
        for index in range(len(call.answers)):
            if (opening := form.first(index)) is not None:
                yield _event(opening | extra)
        async for update in call.updates():
            if not update:
                yield PING
            for index, piece in update:
                for chunk in form.more(index, piece):
                    yield _event(chunk | extra)
        if with_usage:
            yield _event(form.chunk([]) | {"usage": call.usage})
    except ApiError as error:
        yield _event(error.body())
    finally:
        call.close()
    yield DONE


def _event(value: dict[str, Any]) -> str:
    return f"data: {dumps(value)}\n\n"
