"""Rows of parquet files as documents (needs the extra ``data``)."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi35.data.skips import SkippedDocument


class ParquetRows:
    """Each row of each file one record, its columns the fields.

    One row group is held in memory; documents read in their order, or in stretches, read each group once.

    Raises:
        ValueError: if pyarrow is missing. Files that are no parquet are counted in ``left_out`` as "unreadable".
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ValueError("parquet files need pyarrow: pip install 'phi35[data]'") from error
        self.paths: list[Path] = []
        self.left_out: Counter[str] = Counter()
        self._groups: list[tuple[int, int, int]] = []  # file, row group, rows
        for path in paths:
            try:
                metadata = parquet.ParquetFile(path).metadata
            except (OSError, ValueError):  # pyarrow's own errors are among these
                self.left_out["unreadable"] += 1
                continue
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._groups += [(len(self.paths), group, size) for group, size in enumerate(sizes)]
            self.paths.append(path)
        self._ends = np.cumsum([size for _, _, size in self._groups]).tolist()
        self._held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": (-1, None)}

    def read(self, number: int) -> dict[str, Any]:
        group, row = self._place(number)
        if self._held[0] != group:
            self._held = (group, self._table(group))
        table = self._held[1]
        if table is None:
            raise SkippedDocument("unreadable", f"row group {group} of {self.where(number)} cannot be read")
        try:
            return dict(table.slice(row, 1).to_pylist()[0])
        except (UnicodeDecodeError, ValueError) as error:
            raise SkippedDocument("bad_utf8", str(error)) from error

    def where(self, number: int) -> str:
        group, row = self._place(number)
        file, inner, _ = self._groups[group]
        return f"{self.paths[file]}:row group {inner}, row {row}"

    def identity(self) -> list[Any]:
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in self.paths]

    def _place(self, number: int) -> tuple[int, int]:
        group = bisect_right(self._ends, number)
        return group, number - (self._ends[group - 1] if group else 0)

    def _table(self, group: int) -> Any:
        import pyarrow.parquet as parquet

        file, inner, _ = self._groups[group]
        try:
            return parquet.ParquetFile(self.paths[file]).read_row_group(inner)
        except (OSError, ValueError):
            return None
