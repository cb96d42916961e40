"""Stop strings, found across token boundaries.

The text ends before the stop string that is complete first (of two that end at the same character, the longer
one). Text that might still become a stop string is held back, so that a reader of a stream never sees anything
taken back.
"""

from collections.abc import Sequence


class StopStrings:
    """Cuts a growing text before the first stop string.

    Args:
        stops: the strings; none of them empty.

    Attributes:
        stopped: whether a stop string was found; nothing is released after that.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Take more text and release what certainly stands before every stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [(start + len(stop), start) for stop in self.stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released, self._held = self._held[: min(found)[1]], ""
            return released
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def finish(self) -> str:
        """Release what was held back: no more text will come."""
        released, self._held = self._held, ""
        return released


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings that a caller's ``stop`` means.

    Raises:
        ValueError: if it is neither None, a string nor a list.
    """
    if stop is None or isinstance(stop, str):
        return () if stop is None else (stop,)
    if not isinstance(stop, list | tuple):
        raise ValueError(f"stop must be a string or a list of strings, got {stop!r}")
    return tuple(stop)


def stop_problems(stops: Sequence[str]) -> list[str]:
    """What is wrong with a list of stop strings, as messages."""
    bad = [stop for stop in stops if not isinstance(stop, str) or not stop]
    return [f"stop must hold non-empty strings, got {bad[0]!r}"] if bad else []


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
