"""Rows of packed samples as endless micro-batches of one rank.

The stream of rows is fixed by the files and the seed alone. Micro-batch t of rank r takes rows [t m W + r m, +m) for
micro-batches of m on W ranks, so that a global batch holds the same rows for any number of ranks. Every rank walks
the whole plan, which is lengths alone, and reads the tokens of its own rows.
"""

import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from phi35.data.packing import Row, build_packer
from phi35.data.stream import Mixture, PreparedPartEnded
from phi35.data.token_files import TokenFiles
from phi35.packed_attention import IGNORED_LABEL

Batch = dict[str, torch.Tensor]


class TextSource:
    """Endless micro-batches of packed text for one rank.

    Args:
        mixture: the stream of pieces.
        sequence_length: tokens of a row.
        micro_batch_size: rows of a micro-batch.
        vocab_size: ids at or above it are replaced and not learned.
        pad_token_id: of the tokens behind a row's last sample.
        rank: this rank.
        world_size: number of ranks.
        packing: "best_fit" or "concatenate".
        mask_documents: whether the samples of a row are kept apart; False makes a row one sample.
        buffer_size: pieces that best fit chooses from.
        num_workers: processes that read tokens ahead; 0 reads in this one.
        prepared: left out before training, by reason.

    Raises:
        ValueError: for unknown packings.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        sequence_length: int,
        micro_batch_size: int,
        vocab_size: int,
        pad_token_id: int,
        rank: int = 0,
        world_size: int = 1,
        packing: str = "best_fit",
        mask_documents: bool = True,
        buffer_size: int = 512,
        num_workers: int = 0,
        prepared: dict[str, int] | None = None,
    ) -> None:
        self.mixture = mixture
        self.packer = build_packer(packing, sequence_length, buffer_size)
        self.rows = _Rows(
            [stream.files for stream in mixture.streams], sequence_length, vocab_size, pad_token_id, mask_documents
        )
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.num_workers = num_workers
        plan = [packing, buffer_size if packing == "best_fit" else None, sequence_length, mixture.weights]
        streams: list[list[Any]] = [
            [stream.files.identity, stream.seed, stream.shuffle, stream.overlong]
            + ([stream.held_out, stream.part] if stream.held_out else [])
            for stream in mixture.streams
        ]
        self.identity = hashlib.sha256(json.dumps([plan, streams]).encode()).hexdigest()[:16]
        self._prepared = Counter(prepared or {})
        self._own_skips: Counter[str] = Counter()
        self._num_rows = 0
        self._state = self._plan_state()

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches from the present position on."""
        self._return_to(self._state)
        states: deque[dict[str, Any]] = deque()
        if not self.num_workers:
            batches: Any = (self.rows[rows] for rows in self._plan(states))
        else:
            batches = DataLoader(
                self.rows,
                sampler=_Plan(self._plan(states)),
                batch_size=None,
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
                prefetch_factor=4,
                worker_init_fn=_one_thread,
                generator=torch.Generator(),  # else its seed comes from the generator of dropout, and resumes differ
                multiprocessing_context="fork",  # shares the mapped files; other ways would copy them
            )
        for batch, skipped in batches:
            self._state = states.popleft()  # of this batch, not of those that workers have ahead
            self._own_skips.update(skipped)
            yield batch
        raise ValueError("the prepared part of the data ended before the run did: remove the run's cache folder")

    def skips(self) -> dict[str, int]:
        """Documents left out so far, by reason; what all ranks see alike is counted by the first."""
        total = Counter(self._own_skips)
        if self.rank == 0:
            for counts in (self._prepared, *(stream["skipped"] for stream in self._state["mixture"]["streams"])):
                total.update(counts)
        return dict(total)

    def state_dict(self) -> dict[str, Any]:
        """Position after the last micro-batch handed out, in rows over all ranks, with what the packer holds."""
        return {**self._state, "identity": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position, on any number of ranks.

        Raises:
            ValueError: if the position belongs to other data or another packing.
        """
        if state.get("identity") != self.identity:
            raise ValueError(
                "the saved data position belongs to other data, another order or another packing (sequence_length, "
                "packing, buffer_size, weights, seed): resume with the same, or give another output_dir"
            )
        self._state = {name: value for name, value in state.items() if name != "identity"}

    def _plan(self, states: deque[dict[str, Any]]) -> Iterator[tuple[Row, ...]]:
        """This rank's rows of each micro-batch; the state behind each goes to ``states``."""
        while True:
            try:
                rows = [self.packer.next_row(self.mixture) for _ in range(self.micro_batch_size * self.world_size)]
            except PreparedPartEnded:
                return  # workers read ahead of what the run needs
            self._num_rows += len(rows)
            states.append(self._plan_state())
            first = self.rank * self.micro_batch_size
            yield tuple(rows[first : first + self.micro_batch_size])

    def _plan_state(self) -> dict[str, Any]:
        return {
            "samples": self._num_rows,
            "waiting": self.packer.state_dict(),
            "mixture": self.mixture.state_dict(),
        }

    def _return_to(self, state: dict[str, Any]) -> None:
        self._num_rows = int(state["samples"])
        self.packer.load_state_dict(state["waiting"])
        self.mixture.load_state_dict(state["mixture"])


class _Rows(Dataset[tuple[Batch, dict[str, int]]]):
    """Batches of planned rows, and how many samples of them could not be used."""

    def __init__(
        self, files: Sequence[TokenFiles], length: int, vocab_size: int, pad_token_id: int, mask_documents: bool
    ) -> None:
        self.files, self.length = list(files), length
        self.vocab_size, self.pad_token_id, self.mask_documents = vocab_size, pad_token_id, mask_documents

    def __getitem__(self, rows: tuple[Row, ...]) -> tuple[Batch, dict[str, int]]:
        """``input_ids``, ``labels`` (m, T) int64, ``attention_mask`` where a row has padding, and ``sequence_lengths``.

        Labels are -100 for padding, for what is not learned and, where samples are kept apart, for the first token
        of each.
        """
        shape = (len(rows), self.length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        lengths = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
        skipped: Counter[str] = Counter()
        for number, row in enumerate(rows):
            first = 0
            for index, piece in enumerate(row):
                ids, learned = self.files[piece.source].read(piece.document, piece.start, piece.stop)
                place = slice(first, first + piece.length)
                mask[number, place] = 1
                lengths[number, index] = piece.length
                first += piece.length
                if ids.min() < 0 or ids.max() >= self.vocab_size:
                    skipped["bad_tokens"] += 1
                    continue
                input_ids[number, place] = ids
                labels[number, place] = ids if learned is None else np.where(learned, ids, IGNORED_LABEL)
                if self.mask_documents:
                    labels[number, place.start] = IGNORED_LABEL
        batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if not mask.all():
            batch["attention_mask"] = torch.from_numpy(mask)
        if self.mask_documents:
            batch["sequence_lengths"] = torch.from_numpy(lengths)
        return batch, dict(skipped)  # torch, copying a Counter, would count twice


class _Plan(Sampler[tuple[Row, ...]]):
    """The plan as a data loader takes it."""

    def __init__(self, plan: Iterator[tuple[Row, ...]]) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[tuple[Row, ...]]:
        return itertools.chain(self.plan)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
