"""The members of a tar file by position, for files that nobody vouches for.

Nothing is extracted, so that a name can lead nowhere; links, devices, folders and sparse files are passed over, a
header that asks for much memory is refused, and a file that ends early gives what it holds whole.
"""

import glob
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_MAX_HEADER_READ = 2**20


class TarMember(NamedTuple):
    """One regular file in a tar: its name, and offset and size of its bytes."""

    name: str
    offset: int
    size: int


def tar_members(path: Path, left_out: Counter[str]) -> Iterator[TarMember]:
    """The regular members of an uncompressed tar file, in order.

    Args:
        path: of the file.
        left_out: counts "foreign_member" for everything but regular files, "truncated_shard" where the file ends
            within a member, "unreadable_shard" where it is no uncompressed tar.
    """
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            headers: Any = _Headers(file)
            archive = tarfile.open(fileobj=headers, mode="r:")
            try:
                for member in archive:
                    if not member.isreg() or member.issparse():
                        left_out["foreign_member"] += 1
                    elif member.offset_data + member.size > length:
                        left_out["truncated_shard"] += 1
                        return  # nothing can stand behind it
                    else:
                        yield TarMember(member.name, member.offset_data, member.size)
            except (tarfile.ReadError, EOFError):
                left_out["truncated_shard"] += 1
    except (OSError, tarfile.TarError):
        left_out["unreadable_shard"] += 1


def local_files(data: str | Path | Sequence[str | Path], pattern: str, kind: str) -> list[Path]:
    """The files that a folder, a file, a glob pattern or a list of these names, sorted within each.

    Args:
        data: what to look at.
        pattern: of the names within a folder, such as ``*.tar``.
        kind: of the files, for the message.

    Raises:
        ValueError: for a URL, a ``pipe:`` command, or a source that matches no file.
    """
    sources = [data] if isinstance(data, str | Path) else list(data)
    paths: list[Path] = []
    for source in sources:
        text = refuse_remote(source)
        if Path(text).is_dir():
            found = sorted(Path(text).glob(pattern))
        else:
            found = [Path(text)] if Path(text).is_file() else sorted(map(Path, glob.glob(text)))
        if not found:
            raise ValueError(f"no {kind} at {text!r}: expected a folder of {pattern} files, a file or a glob pattern")
        paths += found
    if not paths:
        raise ValueError(f"expected at least one of {kind}, got an empty list")
    return paths


def refuse_remote(source: str | Path) -> str:
    """The source as text.

    Raises:
        ValueError: for a URL or a ``pipe:`` command, which are never opened or run.
    """
    text = str(source)
    if text.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):
        raise ValueError(f"data is read from local files only, got {text!r}: copy it to a folder first")
    return text


class _Headers:
    """The file as tarfile sees it: a header that asks for more than a MiB (a long name, say) is refused."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_READ:
            raise tarfile.ReadError(f"a tar header of {size} bytes")
        content: bytes = self._file.read(size)
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())
