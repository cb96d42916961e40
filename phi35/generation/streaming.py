"""Text from a growing row of tokens, piece by piece.

Tokens become bytes and bytes become characters only when complete, so that no piece holds half a character; the
pieces of a stream, put together, are the text that ``Tokenizer.decode`` gives, up to the first stop string.
"""

import codecs
from collections.abc import Sequence

from phi35.generation.stopping import StopStrings
from phi35.tokenizer import Tokenizer


class TextStream:
    """Turns one row's new tokens into text.

    Args:
        tokenizer: gives each token's bytes.
        stops: stop strings; the text ends before the first.
        skip_special: leave special tokens out.

    Attributes:
        num_decoded: characters that the tokens so far have made.
        num_released: characters given out; less where text is held back that may become a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), skip_special: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self._stops = StopStrings(stops)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._to_strip = tokenizer.num_stripped_spaces
        self.num_decoded = self.num_released = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.stopped

    def feed(self, token_id: int) -> str:
        """The text that one more token makes certain; often empty."""
        return self._count(
            self._stops.feed(self._text(self.tokenizer.token_bytes(token_id, self.skip_special), final=False))
        )

    def finish(self) -> str:
        """The rest of the text: no more tokens will come. An unfinished character becomes U+FFFD."""
        return self._count(self._stops.feed(self._text(b"", final=True)) + self._stops.finish())

    def _count(self, released: str) -> str:
        self.num_released += len(released)
        return released

    def _text(self, data: bytes, final: bool) -> str:
        text = self._characters.decode(data, final)
        while self._to_strip and text:
            # Decoding a whole text takes its leading spaces away; here the first characters come one by one.
            self._to_strip -= 1
            if not text.startswith(" "):
                self._to_strip = 0
            text = text.removeprefix(" ")
        self.num_decoded += len(text)
        return text


def text_of(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of new tokens, cut before the first stop string."""
    stream = TextStream(tokenizer, stops)
    return "".join([*(stream.feed(int(token_id)) for token_id in ids), stream.finish()])
