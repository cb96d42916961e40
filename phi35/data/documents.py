"""Documents where they lie: JSON lines, text files, tar shards and parquet, each readable by its number.

Opening looks at names and at line ends, never at the whole; reading one document costs one seek, so that any order
and any number of processes can go through a corpus. What cannot be used raises ``SkippedDocument`` with a reason.
"""

import json
import sysconfig
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from phi35.data.parquet import ParquetRows
from phi35.data.skips import SkippedDocument
from phi35.data.tar_members import refuse_remote, tar_members

TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst")
MAX_DOCUMENT_BYTES = 64 * 2**20
_SCANNED_AT_ONCE = 2**24

Record = str | dict[str, Any]


class Documents(Protocol):
    """Numbered documents.

    Attributes:
        left_out: what opening passed over, by reason.
    """

    left_out: Counter[str]

    def __len__(self) -> int: ...

    def read(self, number: int) -> Record:
        """A text, or a record of fields; raises SkippedDocument."""
        ...

    def where(self, number: int) -> str:
        """The place of a document, for messages."""
        ...

    def identity(self) -> list[Any]:
        """Names, sizes and times of the files, as plain data: equal for equal documents."""
        ...


class TextFiles:
    """Each file one document."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.left_out: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, number: int) -> Record:
        path = self.paths[number]
        try:
            if path.stat().st_size > MAX_DOCUMENT_BYTES:
                raise SkippedDocument("too_large", f"{path} takes {path.stat().st_size} bytes")
            return _text(path.read_bytes())
        except OSError as error:
            raise SkippedDocument("unreadable", str(error)) from error

    def where(self, number: int) -> str:
        return str(self.paths[number])

    def identity(self) -> list[Any]:
        return [_identity(path) for path in self.paths]


class JsonLines:
    """Each line of each file one record: a JSON object, or a string."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.left_out: Counter[str] = Counter()
        self._starts = [_line_starts(path) for path in self.paths]
        self._ends = np.cumsum([len(starts) - 1 for starts in self._starts]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def read(self, number: int) -> Record:
        path, line, starts = self._place(number)
        first, last = int(starts[line]), int(starts[line + 1])
        if last - first > MAX_DOCUMENT_BYTES:
            raise SkippedDocument("too_large", f"line {line + 1} of {path} takes {last - first} bytes")
        return _record(_bytes_at(path, first, last - first))

    def where(self, number: int) -> str:
        path, line, _ = self._place(number)
        return f"{path}:{line + 1}"

    def identity(self) -> list[Any]:
        return [_identity(path) for path in self.paths]

    def _place(self, number: int) -> tuple[Path, int, np.ndarray]:
        file = bisect_right(self._ends, number)
        return self.paths[file], number - (self._ends[file - 1] if file else 0), self._starts[file]


class TextShards:
    """Webdataset shards of text: each member ``KEY.txt`` or ``KEY.json`` of an uncompressed tar one document."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.left_out: Counter[str] = Counter()
        names, places = [], []
        for shard, path in enumerate(self.paths):
            for member in tar_members(path, self.left_out):
                if Path(member.name).suffix not in (".txt", ".json") or ".." in Path(member.name).parts:
                    self.left_out["foreign_member"] += 1
                    continue
                names.append(member.name)
                places.append((shard, member.offset, member.size))
        self._names = names
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, number: int) -> Record:
        shard, offset, size = (int(value) for value in self._places[number])
        if size > MAX_DOCUMENT_BYTES:
            raise SkippedDocument("too_large", f"{self.where(number)} takes {size} bytes")
        content = _bytes_at(self.paths[shard], offset, size)
        return _text(content) if self._names[number].endswith(".txt") else _record(content)

    def where(self, number: int) -> str:
        return f"{self.paths[int(self._places[number, 0])]}:{self._names[number]}"

    def identity(self) -> list[Any]:
        return [_identity(path) for path in self.paths]


class JoinedDocuments:
    """Several collections one after the other."""

    def __init__(self, parts: Sequence[Documents], left_out: Counter[str] | None = None) -> None:
        self.parts = list(parts)
        self.left_out = sum((part.left_out for part in self.parts), left_out or Counter())
        self._ends = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def read(self, number: int) -> Record:
        part, inner = self._place(number)
        return part.read(inner)

    def where(self, number: int) -> str:
        part, inner = self._place(number)
        return part.where(inner)

    def identity(self) -> list[Any]:
        return [entry for part in self.parts for entry in part.identity()]

    def _place(self, number: int) -> tuple[Documents, int]:
        index = bisect_right(self._ends, number)
        return self.parts[index], number - (self._ends[index - 1] if index else 0)


KINDS: tuple[tuple[tuple[str, ...], Any], ...] = (
    ((".jsonl",), JsonLines),
    ((".parquet",), ParquetRows),
    ((".tar",), TextShards),
    (TEXT_SUFFIXES, TextFiles),
)
"""Which files hold documents, by the ends of their names."""


def open_documents(data: str | Path) -> JoinedDocuments:
    """The documents of a folder (searched to any depth), or of one file.

    Args:
        data: path; "stdlib" for the running interpreter's library sources.

    Raises:
        ValueError: if there is none, or ``data`` is a URL or a command.
    """
    left_out: Counter[str] = Counter()
    files = document_files(data, left_out)
    parts = []
    for suffixes, opener in KINDS:
        chosen = [path for path in files if path.suffix in suffixes]
        if chosen:
            parts.append(opener(chosen))
    return JoinedDocuments(parts, left_out)


def document_files(data: str | Path, left_out: Counter[str] | None = None) -> list[Path]:
    """The files of ``open_documents``, in sorted order.

    Args:
        data: path; "stdlib" for the running interpreter's library sources without tests and tables.
        left_out: counts "outside_link" for links that lead out of the folder.

    Raises:
        ValueError: if the path is missing or holds no document, or is a URL or a command.
    """
    if str(data) == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        # Tables of characters and keywords are no text to learn from: the loss falls on them and rises behind them.
        skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "encodings", "pydoc_data"}
        found = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts[:-1])]
        return sorted(found)
    root = Path(refuse_remote(data))
    known = [suffix for suffixes, _ in KINDS for suffix in suffixes]
    if root.is_file() and root.suffix in known:
        return [root]
    if not root.is_dir():
        state = f"ends in none of {known}" if root.is_file() else "does not exist"
        raise ValueError(f"data {str(data)!r} {state}; give a folder with documents, such a file, or 'stdlib'")
    home = root.resolve()
    files = []
    for path in root.rglob("*"):
        if path.suffix not in known or not path.is_file():
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            if left_out is not None:
                left_out["outside_link"] += 1
            continue
        files.append(path)
    if not files:
        raise ValueError(f"data folder {str(root)!r} holds no file that ends in one of {known}")
    return sorted(files)


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _line_starts(path: Path) -> np.ndarray:
    """(n + 1,) int64 offsets of the lines' first bytes, and the end."""
    found = [np.zeros(1, dtype=np.int64)]
    position = 0
    with path.open("rb") as file:
        while block := file.read(_SCANNED_AT_ONCE):
            found.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10) + (position + 1))
            position += len(block)
    starts = np.concatenate(found)
    return starts if starts[-1] == position else np.append(starts, position)


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise SkippedDocument("unreadable", str(error)) from error
    if len(content) != size:
        raise SkippedDocument("unreadable", f"{path} ended early: it was changed while it was in use")
    return content


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise SkippedDocument("bad_utf8", str(error)) from error


def _record(content: bytes) -> Record:
    text = _text(content)
    if not text.strip():
        raise SkippedDocument("empty", "an empty line")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SkippedDocument("broken_json", str(error)) from error
    if not isinstance(record, dict | str):
        raise SkippedDocument("broken_json", f"expected an object or a string, got {type(record).__name__}")
    return record
