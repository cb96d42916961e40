"""A file of JSON lines that a run appends to, which outlives resumes, rollbacks and a full disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi35.training.console import warn
from phi35.training.curves import read_lines

Line = dict[str, Any]


class LineFile:
    """Lines with a ``step``; what cannot be written waits in memory for the next attempt.

    Args:
        path: of the file.
        first_step: later lines, of an earlier attempt, leave the file.

    Attributes:
        lines: all of them.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        self.lines: list[Line] = read_lines(path)
        self._num_bytes = 0
        self._waiting = ""
        self._warned = False
        if self.lines or path.is_file():
            self.rewind(first_step)

    def append(self, lines: Sequence[Line]) -> None:
        """Adds lines at the end."""
        self.lines.extend(lines)
        self._waiting += _text(lines)
        self._write()

    def rewind(self, step: int) -> None:
        """Removes the lines after a step."""
        self.lines[:] = [line for line in self.lines if line["step"] <= step]
        self._num_bytes, self._waiting = 0, _text(self.lines)
        self._write()

    def _write(self) -> None:
        """Writes what waits where the last good write ended, over what a failed one may have left."""
        content = self._waiting.encode()
        try:
            with open(self.path, "r+b" if self.path.is_file() else "wb") as file:
                file.truncate(self._num_bytes)
                file.seek(self._num_bytes)
                file.write(content)
        except OSError as error:
            if not self._warned:
                warn(f"{self.path} cannot be written ({error}); its lines wait in memory, and the run goes on")
            self._warned = True
            return
        self._num_bytes += len(content)
        self._waiting, self._warned = "", False


def _text(lines: Sequence[Line]) -> str:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
