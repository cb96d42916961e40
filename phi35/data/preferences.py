"""Pairs of replies, one preferred to the other: JSON lines to packed rows, pictures included.

A record holds a prompt and two replies to it:

    {"messages": [{"role": "user", "content": "..."}], "chosen": "...", "rejected": "...", "images": ["a.png"]}

``messages`` may be called ``prompt``, which may be a text; replies may be lists of turns; without a prompt, two whole
conversations that begin alike are taken. Paths of pictures are relative to the file. In a row each pair's two samples
stand side by side, the chosen one first; what is compared are the tokens of the replies, through ``<|end|>``.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from phi35.chat_template import ROLES
from phi35.data.documents import JoinedDocuments, Record, open_documents
from phi35.data.encoding import END_OF_TEXT, ChatEncoder, tokenizer_identity
from phi35.data.packing import Row
from phi35.data.skips import SkippedDocument
from phi35.data.source import Batch, TextSource
from phi35.data.stream import DocumentStream, Mixture
from phi35.packed_attention import IGNORED_LABEL

Turns = list[dict[str, str]]
_IMAGE_TAG = re.compile(r"<\|image_\d+\|>")


@dataclass(frozen=True)
class Reply:
    """A prompt with one reply, as numbers.

    Attributes:
        input_ids: (n,) int64; -i where features of picture i go.
        labels: (n,) int64, -100 outside the reply.
        pictures: the processor's ``pixel_values`` and ``image_sizes``; empty without pictures.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pictures: dict[str, torch.Tensor]


class PreferencePairs:
    """Numbered pairs, encoded when they are asked for.

    Args:
        documents: the records.
        processor: of the model.

    Attributes:
        lengths: (n, 2) tokens of the chosen and the rejected sample.
        skipped: records left out, by reason.
        reference: (n, 2) float32 log-probabilities of the replies under the reference, once known.
    """

    kind = "chat"  # never cut
    is_complete, is_shuffled = True, False

    def __init__(self, documents: JoinedDocuments, processor: Any) -> None:
        self.documents, self.processor = documents, processor
        self.encoder = ChatEncoder(processor.tokenizer)
        self.lengths = np.zeros((len(documents), 2), dtype=np.int64)
        self._numbers = np.arange(len(documents))
        self.skipped: Counter[str] = Counter()
        self.reference: torch.Tensor | None = None
        tokenizer = tokenizer_identity(processor.tokenizer), processor.tokenizer.add_bos
        settings = [tokenizer, getattr(processor, "num_crops", None), documents.identity()]
        self.identity = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._numbers)

    def length(self, number: int) -> int:
        """Tokens of both samples."""
        return int(self.lengths[number].sum())

    def measure(self) -> dict[str, Any]:
        """What ``restrict`` wants: encodes every record once."""
        measured: dict[str, Any] = {"numbers": [], "lengths": []}
        skipped: Counter[str] = Counter()
        for number in range(len(self)):
            try:
                pair = self.read_pair(number)
            except SkippedDocument as error:
                skipped[error.reason] += 1
                continue
            measured["numbers"].append(number)
            measured["lengths"].append([len(reply.input_ids) for reply in pair])
        return {**measured, "skipped": dict(skipped)}

    def restrict(self, measured: dict[str, Any]) -> None:
        """Leaves the pairs that can be used, with their lengths."""
        self._numbers = np.array(measured["numbers"], dtype=np.int64)
        self.lengths = np.array(measured["lengths"], dtype=np.int64).reshape(-1, 2)
        self.skipped = Counter(measured["skipped"])

    def read_pair(self, number: int) -> tuple[Reply, Reply]:
        """The chosen and the rejected sample.

        Raises:
            SkippedDocument: for a record that cannot be used, with the reason.
        """
        number = int(self._numbers[number])
        record = self.documents.read(number)
        prompt, chosen, rejected = pair_of(record)
        images = self._images(record, number)
        given = "".join(turn["content"] for turn in prompt)
        if images and not _IMAGE_TAG.search(given):
            tags = "".join(f"<|image_{one}|>\n" for one in range(1, len(images) + 1))
            first = next((turn for turn in prompt if turn["role"] == "user"), None)
            if first is None:
                raise SkippedDocument("bad_messages", "pictures need a user's turn in the prompt")
            first["content"] = tags + first["content"]
        return self._encoded(prompt, chosen, images), self._encoded(prompt, rejected, images)

    def _images(self, record: Any, number: int) -> list[Any]:
        images = record.get("images") or []
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise SkippedDocument("bad_images", "expected a list of paths under 'images'")
        if images and self.processor.config.vision is None:
            raise SkippedDocument("bad_images", "the model reads text only")
        folder = Path(self.documents.where(number).rpartition(":")[0]).parent
        return [str(folder / image) for image in images]

    def _encoded(self, prompt: Turns, reply: Turns, images: list[Any]) -> Reply:
        for turn in reply:
            if self.encoder.control.search(turn["content"]) or _IMAGE_TAG.search(turn["content"]):
                raise SkippedDocument("control_token", f"a reply holds a control token: {turn['content']!r:.100}")
        try:
            text = self.processor.tokenizer.apply_chat_template([*prompt, *reply], add_generation_prompt=False)
            text += "" if text.endswith(END_OF_TEXT) else END_OF_TEXT
            batch = self.processor([text], images=[images] if images else None)
        except (ValueError, OSError) as error:
            raise SkippedDocument("bad_images" if images else "bad_messages", str(error)) from error
        ids = batch["input_ids"][0]
        learned = self.encoder.learned(ids.numpy())
        earlier = sum(turn["role"] == "assistant" for turn in prompt)
        openings = np.flatnonzero(ids.numpy() == self.encoder.assistant)
        if len(openings) <= earlier:
            raise SkippedDocument("no_reply", "the template opens no turn for the reply")
        learned[: openings[earlier]] = False
        labels = torch.where(torch.from_numpy(learned), ids, IGNORED_LABEL)
        return Reply(ids, labels, {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch})


def pair_of(record: Record) -> tuple[Turns, Turns, Turns]:
    """Prompt, chosen and rejected reply of a record.

    Raises:
        SkippedDocument: "bad_messages", "no_reply" or "equal_replies".
    """
    if not isinstance(record, dict) or "chosen" not in record or "rejected" not in record:
        raise SkippedDocument("bad_messages", "expected a record with 'chosen' and 'rejected'")
    prompt = record.get("messages", record.get("prompt"))
    chosen, rejected = (_turns(record[name], "assistant", name) for name in ("chosen", "rejected"))
    if prompt is not None:
        turns = _turns(prompt, "user", "messages")
    else:
        pairs = zip(chosen, rejected, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
        turns, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not turns:
        raise SkippedDocument("bad_messages", "a pair needs a prompt: under 'messages', or the same first turns")
    for reply in (chosen, rejected):
        if not reply or reply[0]["role"] != "assistant" or not reply[0]["content"].strip():
            raise SkippedDocument("no_reply", f"a reply must begin with an assistant's turn, got {reply!r:.100}")
    if chosen == rejected:
        raise SkippedDocument("equal_replies", "both replies are the same")
    return turns, chosen, rejected


def _turns(value: Any, role: str, name: str) -> Turns:
    given = [{"role": role, "content": value}] if isinstance(value, str) else value
    good = isinstance(given, list) and all(
        isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str) for turn in given
    )
    if not good:
        raise SkippedDocument("bad_messages", f"expected a text or a list of turns under {name!r}, got {value!r:.100}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in given]


class PreferenceSource(TextSource):
    """Endless micro-batches of packed pairs for one rank; as ``TextSource``, whose arguments it takes.

    Batches hold ``input_ids``, ``labels`` (m, T), ``sequence_lengths`` (m, 2 P), chosen and rejected in turn, ``pairs``
    (m, P) int64, each pair's number, -1 for none, and where there are pictures ``pixel_values`` and ``image_sizes``.
    """

    def __init__(self, pairs: PreferencePairs, mixture: Mixture, **options: Any) -> None:
        super().__init__(mixture, prepared=dict(pairs.skipped), **options)
        self.pairs = pairs
        self.rows = PairRows(pairs, options["sequence_length"], options["pad_token_id"])  # type: ignore[assignment]


class PairRows(Dataset[tuple[Batch, dict[str, int]]]):
    """Batches of planned rows."""

    def __init__(self, pairs: PreferencePairs, length: int, pad_token_id: int) -> None:
        self.pairs, self.length, self.pad_token_id = pairs, length, pad_token_id

    def __getitem__(self, rows: tuple[Row, ...]) -> tuple[Batch, dict[str, int]]:
        """See ``PreferenceSource``."""
        return self.batch([[piece.document for piece in row] for row in rows]), {}

    def batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Rows of pairs, by their numbers."""
        most = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), self.length), self.pad_token_id)
        labels = torch.full((len(rows), self.length), IGNORED_LABEL)
        mask = torch.zeros(len(rows), self.length, dtype=torch.int64)
        lengths = torch.zeros(len(rows), 2 * most, dtype=torch.int64)
        numbers = torch.full((len(rows), most), -1)
        pictures: dict[str, list[torch.Tensor]] = {"pixel_values": [], "image_sizes": []}
        for index, row in enumerate(rows):
            first = images = 0
            for place, number in enumerate(row):
                numbers[index, place] = number
                for side, reply in enumerate(self.pairs.read_pair(number)):
                    ids, end = reply.input_ids, first + len(reply.input_ids)
                    input_ids[index, first:end] = torch.where(ids < 0, ids - images, ids)  # counted through the row
                    labels[index, first:end], mask[index, first:end] = reply.labels, 1
                    lengths[index, 2 * place + side] = len(ids)
                    images += len(reply.pictures.get("image_sizes", ()))
                    for name, tensor in reply.pictures.items():
                        pictures[name].append(tensor)
                    first = end
        batch = {"input_ids": input_ids, "labels": labels, "sequence_lengths": lengths, "pairs": numbers}
        if not mask.all():
            batch["attention_mask"] = mask
        batch |= {name: torch.cat(parts) for name, parts in pictures.items() if parts}
        if self.pairs.reference is not None:
            known = self.pairs.reference[numbers.clamp(min=0)]
            batch["reference_log_probs"] = torch.where(numbers[..., None] < 0, 0.0, known).flatten(1)
        return batch


def open_preferences(
    data: str,
    *,
    model_config: Any,
    processor: Any,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    seed: int,
    sequence_length: int,
    cache_folder: Path,
    barrier: Callable[[], None],
    is_main: bool,
    num_workers: int = 0,
    buffer_size: int = 256,
    shuffle: bool = True,
    held_out: float = 0.0,
    part: str = "train",
) -> PreferenceSource:
    """Opens pairs of replies for training.

    Every record is encoded once, on rank 0, for its length; lengths are kept in ``cache_folder``.

    Args:
        data: folder or file of JSON lines.
        model_config: of the model.
        processor: of the model.
        rank: this rank among those with rows of their own.
        world_size: their number.
        micro_batch_size: rows of a micro-batch.
        seed: of the order.
        sequence_length: tokens of a row; a pair that takes more is left out.
        cache_folder: for the lengths.
        barrier: waits for all ranks.
        is_main: whether this process measures.
        num_workers: processes that read ahead.
        buffer_size: pairs that best fit chooses from.
        shuffle: False takes pairs as they lie.
        held_out: share of the pairs that are kept from training.
        part: "train" or "held_out".

    Raises:
        ValueError: for data that is missing or holds no usable pair.
    """
    pairs = PreferencePairs(open_documents(data), processor)
    known = cache_folder / f"pairs-{pairs.identity}.json"
    if is_main and not known.is_file():
        cache_folder.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(pairs.measure()))
    barrier()
    pairs.restrict(json.loads(known.read_text()))
    totals = pairs.lengths.sum(axis=1)
    if not (totals <= sequence_length).any():
        raise ValueError(
            f"data {data!r} holds no pair that fits sequence_length {sequence_length}: of {len(pairs)} usable ones the "
            f"shortest takes {int(totals.min()) if len(totals) else 0} tokens; left out {dict(pairs.skipped)}"
        )
    options = {"max_length": sequence_length, "seed": seed, "shuffle": shuffle, "held_out": held_out, "part": part}
    stream = DocumentStream(pairs, 0, **options)  # type: ignore[arg-type]  # has what a stream asks of token files
    return PreferenceSource(
        pairs,
        Mixture([stream], [1.0]),
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        vocab_size=model_config.vocab_size,
        pad_token_id=model_config.pad_token_id,
        rank=rank,
        world_size=world_size,
        buffer_size=min(buffer_size, int((totals <= sequence_length).sum())),
        num_workers=num_workers,
    )
