"""Which pieces of documents share a row: best fit over a buffer, or one behind the other.

Both packers look at lengths alone and are plain functions of the stream they are fed, so that every rank packs alike
and a position is their state.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol


class Piece(NamedTuple):
    """Tokens [start, stop) of a document of a source."""

    source: int
    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


Row = tuple[Piece, ...]


class Packer(Protocol):
    """Makes rows of at most ``length`` tokens from an endless stream of pieces."""

    def next_row(self, pieces: Iterator[Piece]) -> Row: ...

    def state_dict(self) -> list[list[int]]: ...

    def load_state_dict(self, state: list[list[int]]) -> None: ...


class BestFitPacker:
    """A row begins with the piece that has waited longest and takes, as long as one fits, the largest that fits.

    Args:
        length: tokens of a row; no piece is longer.
        buffer_size: pieces to choose from.
    """

    def __init__(self, length: int, buffer_size: int) -> None:
        self.length, self.buffer_size = length, buffer_size
        self._waiting: dict[int, Piece] = {}  # by arrival
        self._by_length: list[tuple[int, int]] = []  # (length, -arrival): of equal ones the oldest stands last
        self._arrivals = 0

    def next_row(self, pieces: Iterator[Piece]) -> Row:
        """The next row's pieces, in the order in which they stand."""
        while len(self._waiting) < self.buffer_size:
            self._add(next(pieces))
        first = next(iter(self._waiting))
        row = [self._take(bisect_left(self._by_length, (self._waiting[first].length, -first)))]
        room = self.length - row[0].length
        while place := bisect_right(self._by_length, (room, 1)):
            row.append(self._take(place - 1))
            room -= row[-1].length
        return tuple(row)

    def state_dict(self) -> list[list[int]]:
        """The waiting pieces, the longest waiting first."""
        return [list(piece) for piece in self._waiting.values()]

    def load_state_dict(self, state: list[list[int]]) -> None:
        """Goes to a saved state."""
        self._waiting, self._by_length, self._arrivals = {}, [], 0
        for piece in state:
            self._add(Piece(*piece))

    def _add(self, piece: Piece) -> None:
        assert 0 < piece.length <= self.length
        self._waiting[self._arrivals] = piece
        insort(self._by_length, (piece.length, -self._arrivals))
        self._arrivals += 1

    def _take(self, place: int) -> Piece:
        _, arrival = self._by_length.pop(place)
        return self._waiting.pop(-arrival)


class ConcatenatingPacker:
    """Rows without a gap: one document behind the other, cut where the row ends and continued in the next.

    Args:
        length: tokens of a row.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._rest: Piece | None = None

    def next_row(self, pieces: Iterator[Piece]) -> Row:
        """The next row's pieces."""
        row: list[Piece] = []
        room = self.length
        while room:
            piece = self._rest or next(pieces)
            taken = min(room, piece.length)
            row.append(piece._replace(stop=piece.start + taken))
            self._rest = piece._replace(start=piece.start + taken) if taken < piece.length else None
            room -= taken
        return tuple(row)

    def state_dict(self) -> list[list[int]]:
        """What is left of the last document."""
        return [] if self._rest is None else [list(self._rest)]

    def load_state_dict(self, state: list[list[int]]) -> None:
        """Goes to a saved state."""
        self._rest = Piece(*state[0]) if state else None


def build_packer(name: str, length: int, buffer_size: int) -> Any:
    """The packer of a name, "best_fit" or "concatenate".

    Raises:
        ValueError: for another name, or a buffer below 1.
    """
    if name == "concatenate":
        return ConcatenatingPacker(length)
    if name != "best_fit":
        raise ValueError(f"packing must be 'best_fit' or 'concatenate', got {name!r}")
    if buffer_size < 1:
        raise ValueError(f"buffer_size must be at least 1, got {buffer_size}")
    return BestFitPacker(length, buffer_size)
