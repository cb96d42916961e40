"""The endless stream of pieces: each source in its own shuffled order, sources mixed by their share of tokens.

Everything follows from the files, the seed and the place in each source: a state is a few numbers, and every rank
walks the same stream.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from phi35.data.order import Shuffle
from phi35.data.packing import Piece
from phi35.data.token_files import TokenFiles

OVERLONG = ("skip", "drop_turns")


class PreparedPartEnded(Exception):
    """The documents that were prepared for this run are used up, and there are more."""


class DocumentStream:
    """The pieces of one source without end, each epoch in another order.

    A text longer than a row becomes several pieces. A chat is never cut within a turn: one that is too long is left
    out, or loses its last turns, so that it ends with a reply and its ``<|end|>``; either is counted.

    Args:
        files: the documents.
        number: of the source, for its pieces.
        max_length: tokens of a row.
        seed: of the order.
        shuffle: False takes the documents as they lie.
        overlong: what becomes of a chat that is too long: "skip" or "drop_turns".
        held_out: share of the documents that are kept from training.
        part: "train", or "held_out" for those alone.

    Attributes:
        skipped: documents left out so far, by reason.
    """

    def __init__(
        self,
        files: TokenFiles,
        number: int,
        *,
        max_length: int,
        seed: int,
        shuffle: bool = True,
        overlong: str = "skip",
        held_out: float = 0.0,
        part: str = "train",
    ) -> None:
        self.held_out, self.part = held_out, part
        self.files, self.number, self.max_length = files, number, max_length
        self.seed, self.shuffle, self.overlong = seed, shuffle, overlong
        self.skipped: Counter[str] = Counter()
        self._epoch = self._place = self._start = 0
        self._order: tuple[int, Shuffle] | None = None
        self._passed_over = 0
        if not len(files):
            raise ValueError("the data holds no document")

    def __next__(self) -> Piece:
        while self._passed_over <= len(self.files):
            document = self._document()
            length = self._usable_length(document) if self._start == 0 else self.files.length(document)
            start, stop = self._start, min(self._start + self.max_length, length)
            self._start = stop
            if stop >= length:
                self._start, self._place = 0, self._place + 1
            if stop > start:
                self._passed_over = 0
                return Piece(self.number, document, start, stop)
            self._passed_over += 1
        raise ValueError(f"no document of the data can be used; left out: {dict(self.skipped)}")

    def __iter__(self) -> Iterator[Piece]:
        return self

    def state_dict(self) -> dict[str, Any]:
        """Place behind the last piece."""
        place = {"epoch": self._epoch, "place": self._place, "start": self._start}
        return {**place, "skipped": dict(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved place."""
        self._epoch, self._place, self._start = (int(state[name]) for name in ("epoch", "place", "start"))
        self.skipped = Counter(state["skipped"])

    def _document(self) -> int:
        """Number of the document at the present place, after turning to the next epoch where one has ended."""
        if self._place == len(self.files):
            if not self.files.is_complete:
                raise PreparedPartEnded
            self._epoch, self._place = self._epoch + 1, 0
        # What was shuffled when it was made keeps that order: a longer run's files begin with the same documents.
        if not self.shuffle or (self.files.is_shuffled and self._epoch == 0):
            return self._place
        if self._order is None or self._order[0] != self._epoch:
            self._order = (self._epoch, Shuffle(len(self.files), self.seed, self.number, self._epoch))
        return self._order[1](self._place)

    def _usable_length(self, document: int) -> int:
        """Tokens to take of a document; 0 leaves it out, and counts it where it is this part's."""
        if self.held_out and is_held_out(document, self.held_out) != (self.part == "held_out"):
            return 0
        length = self.files.length(document)
        if length < 2:
            self.skipped["empty"] += 1
            return 0
        if self.files.kind != "chat" or length <= self.max_length:
            return length
        shorter = self._through_last_reply(document) if self.overlong == "drop_turns" else 0
        self.skipped["shortened" if shorter else "too_long"] += 1
        return shorter

    def _through_last_reply(self, document: int) -> int:
        """Length of a chat through the last reply that ends within a row; 0 where none does."""
        ids, trained = self.files.read(document, 0, self.max_length)
        if trained is None:
            return 0
        ends = np.flatnonzero(trained & (ids == self.files.end_token))
        return int(ends[-1]) + 1 if len(ends) else 0


def is_held_out(document: int, share: float) -> bool:
    """Whether a document is kept from training: a matter of its number alone, so that longer runs keep it too."""
    drawn = hashlib.blake2b(f"held out {document}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "little") < share * 2**64


class Mixture:
    """Pieces of several streams: the next one always from the stream that is furthest behind its share of tokens.

    Args:
        streams: one per source.
        weights: shares, not necessarily adding up to 1.

    Raises:
        ValueError: for weights that are not positive.
    """

    def __init__(self, streams: Sequence[DocumentStream], weights: Sequence[float]) -> None:
        if len(streams) != len(weights) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be positive numbers, one for each source, got {list(weights)}")
        self.streams, self.weights = list(streams), [weight / sum(weights) for weight in weights]
        self._taken = [0] * len(streams)

    def __next__(self) -> Piece:
        chosen = min(range(len(self.streams)), key=lambda number: self._taken[number] / self.weights[number])
        piece = next(self.streams[chosen])
        self._taken[chosen] += piece.length
        return piece

    def __iter__(self) -> Iterator[Piece]:
        return self

    def state_dict(self) -> dict[str, Any]:
        """Places and shares behind the last piece."""
        return {"taken": list(self._taken), "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved state."""
        self._taken = [int(count) for count in state["taken"]]
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(saved)
