"""Text as packed samples: files to tokens once, tokens to samples by position.

The stream of samples is fixed by the files and the seed alone: a sample is a window of ``sequence_length`` tokens of
the concatenated files; windows are shuffled within stretches of ``SHUFFLED`` and begin again, in another order, at the
end. Micro-batch t of rank r takes samples
[t m W + r m, +m) for micro-batches of m on W ranks, so that a global batch holds the same samples for any number of
ranks, and a position in the stream is one number.
"""

import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi35.config import ModelConfig

SHUFFLED = 4096
"""Windows shuffled together. Stretches, not the whole, so that a longer run continues a shorter one's stream."""
TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst")


class TextSource:
    """Endless micro-batches of packed text for one rank.

    Args:
        tokens: (N,) integer array, in memory or memory-mapped.
        sequence_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
        rank: this rank.
        world_size: number of ranks.
        seed: of the order.

    Raises:
        ValueError: if there are fewer tokens than one sample needs.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        sequence_length: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.num_samples = len(tokens) // sequence_length
        if self.num_samples == 0:
            raise ValueError(f"the data holds {len(tokens)} tokens, fewer than one sample of {sequence_length}")
        self.tokens, self.sequence_length = tokens, sequence_length
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.seed = seed
        self._position = 0
        self._order: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.zeros(0, dtype=np.int64))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            first = self._position + self.rank * self.micro_batch_size
            rows = [self._sample(index) for index in range(first, first + self.micro_batch_size)]
            self._position += self.micro_batch_size * self.world_size
            input_ids = torch.from_numpy(np.stack(rows).astype(np.int64))  # (m, T)
            yield {"input_ids": input_ids, "labels": input_ids.clone()}

    def _sample(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.num_samples)
        stretch, offset = divmod(place, SHUFFLED)
        if self._order[0] != (epoch, stretch):
            size = min(SHUFFLED, self.num_samples - stretch * SHUFFLED)
            order = np.random.default_rng([self.seed, epoch, stretch]).permutation(size)
            self._order = ((epoch, stretch), order)
        start = (stretch * SHUFFLED + int(self._order[1][offset])) * self.sequence_length
        return self.tokens[start : start + self.sequence_length]

    def state_dict(self) -> dict[str, Any]:
        """Position after the last micro-batch handed out, in samples over all ranks."""
        return {"samples": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position, on any number of ranks."""
        self._position = int(state["samples"])


def open_text(
    data: str,
    *,
    model_config: ModelConfig,
    processor: Any,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    seed: int,
    sequence_length: int,
    num_samples: int,
    cache_folder: Path,
    barrier: Callable[[], None],
    num_workers: int = 0,
) -> TextSource:
    """Opens a folder of text files, tokenized on first use into ``cache_folder``.

    Files are taken in an order drawn from ``seed``, and only as many as the run needs; a longer run continues the
    same stream.

    Args:
        data: folder, or "stdlib" for the running interpreter's library sources.
        model_config: its vocabulary must hold the tokenizer's ids.
        processor: has ``tokenizer.encode``; each file ends with the end-of-text id.
        rank: this rank; rank 0 tokenizes.
        world_size: number of ranks.
        micro_batch_size: samples of a micro-batch.
        seed: of the files' order.
        sequence_length: tokens of a sample.
        num_samples: samples the run will read.
        cache_folder: where the token file is kept.
        barrier: waits for all ranks.
        num_workers: unused by text, which is read from memory.

    Raises:
        ValueError: if the folder is missing or holds no text.
    """
    files = text_files(data)
    random.Random(seed).shuffle(files)
    tokenizer = getattr(processor, "tokenizer", processor)
    needed = -(-num_samples // SHUFFLED) * SHUFFLED * sequence_length
    path = cache_folder / f"tokens-{_fingerprint(files, tokenizer, needed)}.npy"
    if rank == 0 and not path.exists():
        _tokenize(files, tokenizer, model_config, needed, path)
    barrier()
    return TextSource(
        np.load(path, mmap_mode="r", allow_pickle=False),
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )


def text_files(data: str) -> list[Path]:
    """Text files below a folder in sorted order; "stdlib" is the interpreter's library without its tests.

    Raises:
        ValueError: if the folder is missing or holds no text file.
    """
    if data == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
        files = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts[:-1])]
    else:
        root = Path(data)
        if not root.is_dir():
            raise ValueError(f"data folder {data!r} does not exist; give a folder with text files, or 'stdlib'")
        files = [path for path in root.rglob("*") if path.is_file() and path.suffix in TEXT_SUFFIXES]
    if not files:
        raise ValueError(f"data folder {str(root)!r} holds no file that ends in one of {TEXT_SUFFIXES}")
    return sorted(files)


def _fingerprint(files: list[Path], tokenizer: Any, needed: int) -> str:
    probe = tokenizer.encode("def probe(self):\n    return 'ß' + str(12345)  # tokenizer identity")
    described = [[(str(path), path.stat().st_size, int(path.stat().st_mtime)) for path in files], probe, needed]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _tokenize(files: list[Path], tokenizer: Any, model_config: ModelConfig, needed: int, path: Path) -> None:
    pieces: list[np.ndarray] = []
    count = 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        ids = [*tokenizer.encode(text), model_config.eos_token_id]
        if max(ids) >= model_config.vocab_size:
            raise ValueError(
                f"the tokenizer gives id {max(ids)}, the model's vocabulary ends at {model_config.vocab_size - 1}: "
                "give the tokenizer that belongs to the model (processor=FOLDER)"
            )
        pieces.append(np.asarray(ids, dtype=np.uint16 if model_config.vocab_size <= 2**16 else np.uint32))
        count += len(ids)
        if count >= needed:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(partial, "wb") as file_handle:
        np.save(file_handle, np.concatenate(pieces), allow_pickle=False)
    partial.rename(path)
