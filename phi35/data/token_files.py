"""Documents as tokens in memory-mapped files, with the place of each document.

The project's own form is a folder: ``part-00000.tokens.npy`` (uint16 or uint32), ``part-00000.offsets.npy`` (n + 1
int64 starts of the documents, and the end), for chats ``part-00000.trained.npy`` (a bit per token), and last
``index.json`` with counts and SHA-256 sums. Also read: one ``.npy`` of tokens, cut behind each end-of-text, and the
``.bin`` and ``.idx`` pair of Megatron-LM. Nothing is unpickled, and ids are compared with the vocabulary where they
are read.
"""

import hashlib
import json
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

INDEX_NAME = "index.json"
FORMAT = 1
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_HASHED_AT_ONCE = 2**24


@dataclass(frozen=True)
class TokenPart:
    """One file of tokens.

    Attributes:
        tokens: (N,) integers.
        offsets: (n + 1,) int64 ascending places of the n documents' first tokens, and the end.
        trained: (ceil(N / 8),) uint8 bits of the tokens that are learned, first token in the highest bit; None for
            all tokens.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray | None = None


class TokenFiles:
    """All documents of some token files.

    Args:
        parts: the files.
        kind: "text" or "chat".
        identity: plain data that is equal for equal documents.
        end_token: id that ends an assistant's turn, for chats.
        skipped: what was left out when the files were made, by reason.
        is_shuffled: whether the documents stand in a random order already.
        is_complete: whether these are all documents, not the first of a longer run's.

    Raises:
        ValueError: if a part contradicts itself.
    """

    def __init__(
        self,
        parts: Sequence[TokenPart],
        *,
        kind: str = "text",
        identity: Any = None,
        end_token: int | None = None,
        skipped: dict[str, int] | None = None,
        is_shuffled: bool = False,
        is_complete: bool = True,
    ) -> None:
        self.parts, self.kind, self.identity = list(parts), kind, identity
        self.end_token, self.skipped = end_token, dict(skipped or {})
        self.is_shuffled, self.is_complete = is_shuffled, is_complete
        for number, part in enumerate(self.parts):
            _check_part(number, part)
        self._ends = np.cumsum([len(part.offsets) - 1 for part in self.parts]).tolist()
        self.num_tokens = sum(len(part.tokens) for part in self.parts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def length(self, document: int) -> int:
        """Tokens of a document."""
        part, place = self._place(document)
        return int(part.offsets[place + 1]) - int(part.offsets[place])

    def read(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens [start, stop) of a document as int64, and which of them are learned (None: all)."""
        part, place = self._place(document)
        first = int(part.offsets[place]) + start
        count = stop - start
        ids = part.tokens[first : first + count].astype(np.int64)
        if part.trained is None:
            return ids, None
        bits = np.unpackbits(part.trained[first // 8 : (first + count + 7) // 8])
        return ids, bits[first % 8 : first % 8 + count].astype(bool)

    def _place(self, document: int) -> tuple[TokenPart, int]:
        index = bisect_right(self._ends, document)
        return self.parts[index], document - (self._ends[index - 1] if index else 0)


def is_token_data(data: str | Path) -> bool:
    """Whether a path is one of the forms that ``open_tokens`` reads."""
    path = Path(data)
    return (path / INDEX_NAME).is_file() or path.is_file() and path.suffix in (".npy", ".bin", ".idx")


def open_tokens(
    data: str | Path, *, end_of_text: int, tokenizer: str | None = None, verify: bool = False
) -> TokenFiles:
    """Opens token files.

    Args:
        data: folder with an ``index.json``, a ``.npy`` file, or either file of a ``.bin`` and ``.idx`` pair.
        end_of_text: id behind which the documents of a single ``.npy`` file are cut.
        tokenizer: identity of the model's (``phi35.data.encoding.tokenizer_identity``), to compare with a folder's.
        verify: compare the folder's SHA-256 sums; sizes are always compared.

    Raises:
        ValueError: for missing, changed or contradictory files, or tokens of another tokenizer.
    """
    path = Path(data)
    if path.is_dir():
        return _open_folder(path, tokenizer, verify)
    identity = [path.name, path.stat().st_size]
    if path.suffix == ".npy":
        tokens = _load(path, np.integer)
        return TokenFiles([TokenPart(tokens, _cut(tokens, end_of_text))], identity=identity)
    return TokenFiles([_open_megatron(path)], identity=identity)


def read_index(folder: str | Path) -> dict[str, Any]:
    """The ``index.json`` of a token folder.

    Raises:
        ValueError: if it is none of this format.
    """
    path = Path(folder) / INDEX_NAME
    try:
        index = json.loads(path.read_text("utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, this version reads {FORMAT}")
        return dict(index)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} does not describe token files: {error!r}; prepare the data again") from error


def check_files(folder: str | Path, verify: bool = True) -> dict[str, Any]:
    """Compares a token folder with its ``index.json``, and gives that.

    Args:
        folder: to compare.
        verify: sums too, not sizes alone.

    Raises:
        ValueError: naming every file that is missing or changed.
    """
    folder, index, problems = Path(folder), read_index(folder), []
    for part in index["parts"]:
        for name, described in part["files"].items():
            path = folder / name
            if Path(name).name != name:
                problems.append(f"{name!r} is no plain file name")
            elif not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != described["size"]:
                problems.append(f"{name} has {path.stat().st_size} bytes instead of {described['size']}")
            elif verify and sha256(path) != described["sha256"]:
                problems.append(f"{name} has another SHA-256 sum: it was changed")
    if problems:
        raise ValueError(f"token folder {str(folder)!r} is damaged: {'; '.join(problems)}; prepare the data again")
    return index


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _open_folder(folder: Path, tokenizer: str | None, verify: bool) -> TokenFiles:
    index = check_files(folder, verify)
    if tokenizer not in (None, index["tokenizer"]):
        raise ValueError(
            f"token folder {str(folder)!r} was prepared with another tokenizer than the model's: prepare the data "
            "again, with --model naming the model that is trained"
        )
    parts = []
    for part in index["parts"]:
        name = part["name"]
        trained = _load(folder / f"{name}.trained.npy", np.uint8) if index["kind"] == "chat" else None
        tokens, offsets = (
            _load(folder / f"{name}.tokens.npy", np.integer),
            _load(folder / f"{name}.offsets.npy", np.int64),
        )
        parts.append(TokenPart(tokens, offsets, trained))
    return TokenFiles(
        parts,
        kind=index["kind"],
        identity=index["identity"],
        end_token=index.get("end_token"),
        skipped=index["skipped"],
        is_shuffled=index["shuffled"],
        is_complete=index["complete"],
    )


def _load(path: Path, dtype: Any) -> np.ndarray:
    """A memory-mapped one-dimensional array; an empty one cannot be mapped and is read."""
    try:
        array = np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is no array of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{str(path)!r} is an archive of arrays; give a .npy file")
    if array.ndim != 1 or not np.issubdtype(array.dtype, dtype):
        raise ValueError(f"{str(path)!r} must hold one dimension of whole numbers, got {array.dtype} {array.shape}")
    return array


def _cut(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """Offsets of documents that each end with the end-of-text id."""
    found = [np.zeros(1, dtype=np.int64)]
    for first in range(0, len(tokens), _HASHED_AT_ONCE):
        found.append(np.flatnonzero(tokens[first : first + _HASHED_AT_ONCE] == end_of_text) + (first + 1))
    offsets = np.concatenate(found)
    return offsets if offsets[-1] == len(tokens) else np.append(offsets, len(tokens))


def _open_megatron(path: Path) -> TokenPart:
    index, data = path.with_suffix(".idx"), path.with_suffix(".bin")
    for file in (index, data):
        if not file.is_file():
            raise ValueError(f"{str(path)!r} needs the file {file.name!r} beside it")
    with index.open("rb") as header_file:
        header = header_file.read(34)
        if len(header) != 34 or header[:9] != _MEGATRON_MAGIC:
            raise ValueError(f"{str(index)!r} is no Megatron index: it begins with {header[:9]!r}")
        version, code, num_sequences, num_bounds = struct.unpack("<QBQQ", header[9:])
        if version != 1 or code not in _MEGATRON_TYPES:
            raise ValueError(f"{str(index)!r} has version {version} and type {code}; known are 1 and {_MEGATRON_TYPES}")
        if index.stat().st_size < 34 + 12 * num_sequences + 8 * num_bounds:
            raise ValueError(f"{str(index)!r} ends before its {num_sequences} sequences do")
        lengths = np.frombuffer(header_file.read(4 * num_sequences), dtype="<i4").astype(np.int64)
        pointers = np.frombuffer(header_file.read(8 * num_sequences), dtype="<i8")
        bounds = np.frombuffer(header_file.read(8 * num_bounds), dtype="<i8")  # documents may hold several sequences
    dtype = np.dtype(_MEGATRON_TYPES[code])
    size = data.stat().st_size
    tokens = np.memmap(data, dtype=dtype, mode="r") if size else np.zeros(0, dtype=dtype)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    if not np.array_equal(ends[:-1] * dtype.itemsize, pointers) or size != ends[-1] * dtype.itemsize:
        raise ValueError(f"{str(index)!r} describes {int(ends[-1])} tokens in a row, {data.name!r} holds others")
    if not len(bounds) or bounds.min() < 0 or bounds.max() > num_sequences:
        raise ValueError(f"{str(index)!r} names documents beyond its {num_sequences} sequences")
    return TokenPart(tokens, ends[bounds])


def _check_part(number: int, part: TokenPart) -> None:
    offsets = part.offsets
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(part.tokens) or np.any(np.diff(offsets) < 0):
        raise ValueError(f"part {number} of the token files: its offsets do not ascend from 0 to {len(part.tokens)}")
    if part.trained is not None and len(part.trained) != -(-len(part.tokens) // 8):
        raise ValueError(f"part {number} of the token files: {len(part.trained)} bytes of bits for {len(part.tokens)}")
