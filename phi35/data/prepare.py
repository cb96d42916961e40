"""Token files from documents: in parallel, in a fixed order, and never half done under a finished name.

Documents are taken in chunks by worker processes and written by this one in their order, so that the same documents
give the same bytes with any number of workers. Each part gets its name when it is whole, ``progress.json`` says which
parts stand, and ``index.json`` comes last: a preparation that was killed goes on behind its last part, and what has
an index is complete.
"""

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phi35.data.documents import Documents
from phi35.data.encoding import tokenizer_identity
from phi35.data.order import Shuffle
from phi35.data.skips import SkippedDocument
from phi35.data.token_files import FORMAT, INDEX_NAME, check_files, sha256

PROGRESS_NAME = "progress.json"
TOKENS_PER_PART = 2**27
DOCUMENTS_PER_CHUNK = 32
EXAMPLES_PER_REASON = 3


class Chunk(NamedTuple):
    """Some documents' tokens.

    Attributes:
        ids: (n,) tokens of all usable documents.
        lengths: tokens of each.
        trained: (n,) bool; None for texts.
        skipped: left out, by reason.
        examples: (reason, place, message) of some.
    """

    ids: np.ndarray
    lengths: list[int]
    trained: np.ndarray | None
    skipped: Counter[str]
    examples: list[tuple[str, str, str]]


@dataclass
class Report:
    """What a preparation did.

    Attributes:
        documents: used.
        tokens: in all.
        trained_tokens: of these learned.
        usable_tokens: of these in documents that a row can hold.
        skipped: documents left out, by reason.
        examples: by reason, the place of a few and what was wrong.
        parts: entries of the index.
        next_document: first document behind the finished parts.
    """

    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    usable_tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)
    next_document: int = 0

    def add(self, chunk: Chunk) -> None:
        """Counts a chunk."""
        self.documents += len(chunk.lengths)
        self.tokens += len(chunk.ids)
        self.trained_tokens += len(chunk.ids) if chunk.trained is None else int(chunk.trained.sum())
        self.skipped += chunk.skipped
        for reason, place, message in chunk.examples:
            known = self.examples.setdefault(reason, [])
            if len(known) < EXAMPLES_PER_REASON:
                known.append(f"{place}: {message}")


def prepare_tokens(
    documents: Documents,
    encoder: Any,
    output: str | Path,
    *,
    vocab_size: int,
    num_workers: int = 0,
    shuffle_seed: int | None = None,
    num_tokens: int | None = None,
    row_length: int | None = None,
    tokens_per_part: int = TOKENS_PER_PART,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Writes token files, or finds them written.

    Args:
        documents: to be taken in their order.
        encoder: ``TextEncoder`` or ``ChatEncoder``.
        output: folder to make; one with other token files in it is refused.
        vocab_size: of the model; ids beyond it are an error, and up to 65,536 take two bytes a token.
        num_workers: processes that encode; 0 does it in this one.
        shuffle_seed: takes the documents in a random order.
        num_tokens: stops after so many that can be used; None takes all.
        row_length: a chat longer than this cannot, for ``num_tokens``.
        tokens_per_part: a new file begins after so many.
        show_progress: a bar on the terminal.

    Returns:
        The index (``phi35.data.token_files``), with ``skipped`` and ``examples`` of what was left out.

    Raises:
        ValueError: if the folder holds other data, an id lies outside the vocabulary, or nothing can be used.
    """
    output = Path(output)
    files = documents.identity()
    settings = [encoder.identity(), shuffle_seed, vocab_size]
    identity = fingerprint([[Path(name).name, size] for name, size, _ in files], settings)
    request = fingerprint(files, settings, num_tokens, row_length, tokens_per_part)
    if (output / INDEX_NAME).is_file():
        index = check_files(output, verify=False)
        if index["request"] != request:
            raise ValueError(f"{str(output)!r} holds token files of other data or settings; give another folder")
        return index
    output.mkdir(parents=True, exist_ok=True)
    report = _resume(output, request)
    if report.next_document == 0:
        report.skipped = Counter(documents.left_out)
    writer = _PartWriter(output, encoder.kind, np.uint16 if vocab_size <= 2**16 else np.uint32, request, report)
    order = None if shuffle_seed is None else Shuffle(len(documents), shuffle_seed)
    complete = True
    with _progress(len(documents), report.next_document, show_progress) as bar:
        for first, chunk in _chunks(documents, encoder, order, report.next_document, num_workers):
            _check_vocabulary(chunk, vocab_size)
            last = min(first + DOCUMENTS_PER_CHUNK, len(documents))
            writer.add(chunk, last)
            bar.update(last - first)
            report.usable_tokens += _usable(chunk, row_length)
            if writer.pending_tokens >= tokens_per_part:
                writer.flush()
            if num_tokens is not None and report.usable_tokens >= num_tokens:
                complete = last == len(documents)
                break
    writer.flush()
    if not report.documents:
        raise ValueError(f"no document can be used: {dict(report.skipped)}; for example {report.examples}")
    return writer.finish(encoder, identity, complete=complete, shuffled=shuffle_seed is not None)


def encode_chunk(documents: Documents, encoder: Any, numbers: Sequence[int]) -> Chunk:
    """Tokens of some documents."""
    ids, trained, lengths = [], [], []
    skipped: Counter[str] = Counter()
    examples = []
    for number in numbers:
        try:
            encoded = encoder(documents.read(number))
        except SkippedDocument as error:
            skipped[error.reason] += 1
            if skipped[error.reason] <= EXAMPLES_PER_REASON:
                examples.append((error.reason, documents.where(number), str(error)[:200]))
            continue
        ids.append(encoded.ids)
        lengths.append(len(encoded.ids))
        if encoded.trained is not None:
            trained.append(encoded.trained)
    joined = np.concatenate(ids) if ids else np.zeros(0, dtype=np.uint32)
    bits = None
    if encoder.kind == "chat":
        bits = np.concatenate(trained) if trained else np.zeros(0, dtype=bool)
    return Chunk(joined, lengths, bits, skipped, examples)


def describe(index: dict[str, Any]) -> str:
    """A validation report of an index, for the terminal."""
    lines = [
        f"{index['documents']} documents, {index['tokens']} tokens ({index['trained_tokens']} learned) in "
        f"{len(index['parts'])} parts of {index['dtype']}"
    ]
    for reason, count in sorted(index["skipped"].items()):
        lines.append(f"  left out {count}: {reason}")
        lines += [f"    {example}" for example in index["examples"].get(reason, [])]
    return "\n".join(lines)


class _PartWriter:
    """Gathers chunks and writes them as parts."""

    def __init__(self, folder: Path, kind: str, dtype: Any, request: str, report: Report) -> None:
        self.folder, self.kind, self.dtype = folder, kind, dtype
        self.request, self.report = request, report
        self._ids: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._next = report.next_document
        self.pending_tokens = 0

    def add(self, chunk: Chunk, next_document: int) -> None:
        self.report.add(chunk)
        self._ids.append(chunk.ids.astype(self.dtype))
        self._lengths += chunk.lengths
        if chunk.trained is not None:
            self._trained.append(chunk.trained)
        self._next = next_document
        self.pending_tokens += len(chunk.ids)

    def flush(self) -> None:
        """Writes what was gathered as the next part, and after it the progress."""
        report = self.report
        report.next_document = self._next
        if self._lengths:
            name = f"part-{len(report.parts):05d}"
            arrays = {"tokens": np.concatenate(self._ids), "offsets": np.cumsum([0, *self._lengths], dtype=np.int64)}
            if self.kind == "chat":
                arrays["trained"] = np.packbits(np.concatenate(self._trained))
            files = {}
            for kind, array in arrays.items():
                path = self.folder / f"{name}.{kind}.npy"
                _write_array(path, array)
                files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
            counts = {"documents": len(self._lengths), "tokens": self.pending_tokens}
            report.parts.append({"name": name, **counts, "files": files})
        self._ids, self._trained, self._lengths, self.pending_tokens = [], [], [], 0
        _write_json(self.folder / PROGRESS_NAME, {"request": self.request, **vars(report)})

    def finish(self, encoder: Any, identity: str, *, complete: bool, shuffled: bool) -> dict[str, Any]:
        """Writes the index; from here on the folder counts as token files."""
        index = {
            "format": FORMAT,
            "kind": self.kind,
            "dtype": np.dtype(self.dtype).name,
            "end_token": getattr(encoder, "end", None),
            "identity": identity,
            "tokenizer": tokenizer_identity(encoder.tokenizer),
            "request": self.request,
            "complete": complete,
            "shuffled": shuffled,
            **{name: value for name, value in vars(self.report).items() if name != "next_document"},
        }
        _write_json(self.folder / INDEX_NAME, index)
        (self.folder / PROGRESS_NAME).unlink(missing_ok=True)
        return dict(json.loads(json.dumps(index)))


def _resume(output: Path, request: str) -> Report:
    """The report of a killed preparation of the same documents, whose finished parts are kept; else an empty one."""
    try:
        saved = json.loads((output / PROGRESS_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return Report()
    if saved.pop("request", None) != request:
        raise ValueError(f"{str(output)!r} holds an unfinished preparation of other data; give another folder")
    report = Report(**saved)
    report.skipped = Counter(report.skipped)
    for part in report.parts:
        for name, entry in part["files"].items():
            path = output / name
            if not path.is_file() or path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                return Report()
    return report


def _chunks(
    documents: Documents, encoder: Any, order: Shuffle | None, start: int, num_workers: int
) -> Iterator[tuple[int, Chunk]]:
    """(first place, chunk) of all documents from a place on, in order."""
    firsts = range(start, len(documents), DOCUMENTS_PER_CHUNK)

    def numbers(first: int) -> list[int]:
        places = range(first, min(first + DOCUMENTS_PER_CHUNK, len(documents)))
        return list(places) if order is None else [order(place) for place in places]

    if not num_workers:
        for first in firsts:
            yield first, encode_chunk(documents, encoder, numbers(first))
        return
    import multiprocessing

    # Not forked from this process, which may have threads of its own by now.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(documents, encoder)
    )
    try:
        waiting: deque[tuple[int, Future[Chunk]]] = deque()
        for first in firsts:
            waiting.append((first, pool.submit(_work, numbers(first))))
            if len(waiting) >= 3 * num_workers:
                place, future = waiting.popleft()
                yield place, future.result()
        while waiting:
            place, future = waiting.popleft()
            yield place, future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process died, probably for want of memory: take fewer workers; the same command goes on behind "
            "the last finished part"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_WORKER: list[Any] = []
"""What a worker process works with: sent once when it starts, not with every chunk."""


def _start_worker(documents: Documents, encoder: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER[:] = [documents, encoder]


def _work(numbers: list[int]) -> Chunk:
    return encode_chunk(_WORKER[0], _WORKER[1], numbers)


def _usable(chunk: Chunk, row_length: int | None) -> int:
    limit = row_length if chunk.trained is not None else None
    return sum(length for length in chunk.lengths if length > 1 and (limit is None or length <= limit))


def _check_vocabulary(chunk: Chunk, vocab_size: int) -> None:
    if len(chunk.ids) and int(chunk.ids.max()) >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {int(chunk.ids.max())}, the model's vocabulary ends at {vocab_size - 1}: give the "
            "tokenizer that belongs to the model (processor=FOLDER)"
        )


def _progress(total: int, done: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="document", desc="tokens", disable=not shown, dynamic_ncols=True)


def fingerprint(*values: Any) -> str:
    """Short digest of plain data."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _write_array(path: Path, array: np.ndarray) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
