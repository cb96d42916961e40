"""Where records come from: a folder of pictures, JSONL, JSON, parquet.

Any range of records can be read on its own, so that processes share the work.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vision.shard_index import IMAGE_SUFFIXES

Record = tuple[str, Any]
"""Where a record stands (for reports) and the record; an exception in its place says that it cannot be read."""


class RecordSource(Protocol):
    """Records by number.

    Attributes:
        files: what the records are read from.
    """

    files: list[Path]

    def __len__(self) -> int:
        """Number of records."""
        ...

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """The records [start, stop), in order."""
        ...


def open_records(path: str | Path) -> RecordSource:
    """The records of a file or folder, by its kind.

    Args:
        path: a folder (of pictures with .txt or .json beside them, or of .parquet files), or a .jsonl, .json or
            .parquet file.

    Raises:
        ValueError: for anything else, and an empty source.
    """
    path = Path(path)
    source: RecordSource
    if path.is_dir():
        tables = sorted(path.rglob("*.parquet"))
        source = ParquetRecords(tables) if tables else FolderRecords(path)
    elif not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; give a folder, or a .jsonl, .json or .parquet file")
    elif path.suffix == ".jsonl":
        source = JsonLineRecords(path)
    elif path.suffix == ".json":
        source = JsonRecords(path)
    elif path.suffix == ".parquet":
        source = ParquetRecords([path])
    else:
        raise ValueError(f"{str(path)!r} is no source of records: expected a folder, .jsonl, .json or .parquet")
    if not len(source):
        raise ValueError(f"{str(path)!r} holds no record")
    return source


class FolderRecords:
    """Pictures with a file of the same name beside them: .txt (a caption) or .json (a record)."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(file for file in folder.rglob("*") if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Iterator[Record]:
        for image in self.files[start:stop]:
            try:
                yield str(image), self._record(image)
            except (OSError, ValueError, RecursionError) as error:
                yield str(image), error

    def _record(self, image: Path) -> dict[str, Any]:
        text = image.with_suffix(".txt")
        if text.is_file():
            return {"image": str(image.absolute()), "text": text.read_text("utf-8").strip()}
        description = json.loads(image.with_suffix(".json").read_text("utf-8"))
        if not isinstance(description, dict):
            raise ValueError(f"a description must be a mapping, got {type(description).__name__}")
        named = [name for name in ("image", "images") if name in description]
        return description if named else {**description, "image": str(image.absolute())}


class JsonLineRecords:
    """One JSON value a line."""

    def __init__(self, path: Path) -> None:
        self.files = [path]
        offsets = [0]
        with path.open("rb") as file:
            for line in file:
                offsets.append(offsets[-1] + len(line))
        self._offsets = np.array(offsets)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, start: int, stop: int) -> Iterator[Record]:
        with self.files[0].open("rb") as file:
            file.seek(self._offsets[start])
            for number in range(start, min(stop, len(self))):
                line = file.read(self._offsets[number + 1] - self._offsets[number])
                try:
                    yield f"{self.files[0]}:{number + 1}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"{self.files[0]}:{number + 1}", error


class JsonRecords:
    """A JSON list, as LLaVA's data come; held in memory."""

    def __init__(self, path: Path) -> None:
        self.files = [path]
        try:
            self._records = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
        if not isinstance(self._records, list):
            raise ValueError(f"{str(path)!r} must hold a list of records, got {type(self._records).__name__}")

    def __len__(self) -> int:
        return len(self._records)

    def read(self, start: int, stop: int) -> Iterator[Record]:
        for number, record in enumerate(self._records[start:stop], start):
            name = record.get("id") if isinstance(record, dict) else None
            yield f"{self.files[0]}[{number}]{'' if name is None else f' {name}'}", record


class ParquetRecords:
    """Rows of parquet files."""

    def __init__(self, files: list[Path]) -> None:
        parquet = _parquet()
        self.files = files
        groups: list[tuple[int, int, int]] = []  # file, row group, rows
        for number, file in enumerate(files):
            metadata = parquet.ParquetFile(file).metadata
            groups += [(number, group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]
        self._groups = groups
        self._starts = np.concatenate([[0], np.cumsum([rows for _, _, rows in groups], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Iterator[Record]:
        parquet = _parquet()
        for (number, group, rows), first in zip(self._groups, self._starts[:-1].tolist(), strict=True):
            if first >= stop or first + rows <= start:
                continue
            table = parquet.ParquetFile(self.files[number]).read_row_group(group)
            begin, end = max(start - first, 0), min(stop - first, rows)
            for offset, record in enumerate(table.slice(begin, end - begin).to_pylist(), begin):
                for name in ("messages", "conversations", "texts"):
                    if isinstance(record.get(name), str):  # JSON in a column of text
                        try:
                            record[name] = json.loads(record[name])
                        except (ValueError, RecursionError) as error:
                            record = error
                            break
                yield f"{self.files[number]} group {group} row {offset}", record


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("parquet files need the package pyarrow: pip install pyarrow") from error
    return pyarrow.parquet
