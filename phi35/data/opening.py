"""The text source of a training run: token files as they are, documents tokenized on first use."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi35.config import ModelConfig
from phi35.data.documents import Documents, open_documents
from phi35.data.encoding import ChatEncoder, TextEncoder, tokenizer_identity
from phi35.data.prepare import DOCUMENTS_PER_CHUNK, fingerprint, prepare_tokens
from phi35.data.skips import SkippedDocument
from phi35.data.source import TextSource
from phi35.data.stream import OVERLONG, DocumentStream, Mixture
from phi35.data.tar_members import refuse_remote
from phi35.data.token_files import TokenFiles, is_token_data, open_tokens

KINDS = ("auto", "text", "chat")
_SOURCE_KEYS = {"data", "weight", "kind", "text_field", "overlong"}


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
    is_main: bool | None = None,
    num_workers: int = 0,
    sources: list[dict[str, Any]] | None = None,
    kind: str = "auto",
    text_field: str = "text",
    overlong: str = "skip",
    packing: str = "best_fit",
    mask_documents: bool = True,
    buffer_size: int = 512,
    shuffle: bool = True,
    verify: bool = False,
    held_out: float = 0.0,
    part: str = "train",
) -> TextSource:
    """Opens text for training.

    Documents (JSON lines, text files, parquet, tar shards) are tokenized on first use into ``cache_folder``, in an
    order drawn from ``seed`` and only as far as the run needs; a longer run continues the same stream. Token files,
    as ``scripts/prepare_text.py`` and others write them, are read where they lie.

    Args:
        data: folder or file of documents or of tokens; "stdlib" for the running interpreter's library sources;
            "mixture" with ``sources``.
        model_config: its vocabulary must hold the tokenizer's ids.
        processor: has the ``tokenizer``.
        rank: this rank among those with rows of their own.
        world_size: their number.
        micro_batch_size: rows of a micro-batch.
        seed: of the order.
        sequence_length: tokens of a row.
        num_samples: rows the run will read.
        cache_folder: where token files of documents are kept.
        barrier: waits for all ranks.
        is_main: whether this process tokenizes; by default rank 0.
        num_workers: processes that tokenize and that read ahead.
        sources: several data sets, each a dict with ``data``, ``weight`` (share of the tokens, 1 where left out) and
            where they differ ``kind``, ``text_field`` and ``overlong``.
        kind: "text", "chat" (loss on the assistant's turns), or "auto": chat where the first usable record has
            messages.
        text_field: of records.
        overlong: what becomes of a chat longer than a row: "skip" or "drop_turns" (its last ones).
        packing: "best_fit", or "concatenate" for rows without padding that cut documents.
        mask_documents: whether the samples of a row are kept apart in attention and positions.
        buffer_size: documents that best fit chooses from.
        shuffle: False takes documents as they lie.
        verify: compare the SHA-256 sums of token folders.
        held_out: share of the documents that are kept from training, for evaluation.
        part: "train", or "held_out" for the documents that were kept; all else alike, both read the same token files.

    Raises:
        ValueError: for data that is missing, remote, or holds nothing usable, and for unknown options.
    """
    if (data == "mixture") != (sources is not None):
        raise ValueError("several data sets are given as data='mixture' with data_options.sources=[{data: ...}, ...]")
    common = {"kind": kind, "text_field": text_field, "overlong": overlong}
    described = [_checked(common | source) for source in (sources if sources is not None else [{"data": data}])]
    weights = [float(source.get("weight", 1.0)) for source in described]
    opener = _Opener(
        model_config=model_config,
        tokenizer=getattr(processor, "tokenizer", processor),
        cache_folder=cache_folder,
        barrier=barrier,
        is_main=rank == 0 if is_main is None else is_main,
        num_workers=num_workers,
        shuffle_seed=seed if shuffle else None,
        verify=verify,
    )
    streams = []
    # What the packer holds at the end was read too.
    needed = (num_samples + (buffer_size if packing == "best_fit" else 1)) * sequence_length
    if held_out:
        needed = int(needed / (1.0 - held_out) * 1.05) + 64 * sequence_length  # which documents is a matter of chance
    prepared: Counter[str] = Counter()
    for number, (source, weight) in enumerate(zip(described, weights, strict=True)):
        # A source may run ahead of its share by one document, which takes a row's length at most.
        share = needed if len(described) == 1 else int(needed * weight / sum(weights)) + 2 * sequence_length
        files = opener.open(source, share, sequence_length)
        prepared += Counter(files.skipped)
        streams.append(
            DocumentStream(
                files,
                number,
                max_length=sequence_length,
                seed=seed,
                shuffle=shuffle,
                overlong=source["overlong"],
                held_out=held_out,
                part=part,
            )
        )
    return TextSource(
        Mixture(streams, weights),
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        vocab_size=model_config.vocab_size,
        pad_token_id=model_config.pad_token_id,
        rank=rank,
        world_size=world_size,
        packing=packing,
        mask_documents=mask_documents,
        buffer_size=buffer_size,
        num_workers=num_workers,
        prepared=dict(prepared),
    )


class _Opener:
    """Opens each source of a run on every rank."""

    def __init__(
        self,
        *,
        model_config: ModelConfig,
        tokenizer: Any,
        cache_folder: Path,
        barrier: Callable[[], None],
        is_main: bool,
        num_workers: int,
        shuffle_seed: int | None,
        verify: bool,
    ) -> None:
        self.model_config, self.tokenizer = model_config, tokenizer
        self.cache_folder, self.barrier, self.is_main = cache_folder, barrier, is_main
        self.num_workers, self.shuffle_seed, self.verify = num_workers, shuffle_seed, verify

    def open(self, source: dict[str, Any], num_tokens: int, row_length: int) -> TokenFiles:
        data = source["data"]
        end_of_text = self.model_config.eos_token_id
        tokenizer = tokenizer_identity(self.tokenizer)
        if is_token_data(data):
            return open_tokens(data, end_of_text=end_of_text, tokenizer=tokenizer, verify=self.verify)
        documents = open_documents(data)
        if not len(documents):
            raise ValueError(f"data {data!r} holds no document; left out: {dict(documents.left_out)}")
        encoder = build_encoder(source["kind"], documents, self.tokenizer, end_of_text, source["text_field"])
        wanted = fingerprint(documents.identity(), encoder.identity(), num_tokens, row_length, self.shuffle_seed)
        folder = self.cache_folder / f"tokens-{wanted}"
        problem: ValueError | None = None
        if self.is_main:
            try:
                prepare_tokens(
                    documents,
                    encoder,
                    folder,
                    vocab_size=self.model_config.vocab_size,
                    num_workers=self.num_workers if len(documents) > 4 * DOCUMENTS_PER_CHUNK else 0,
                    shuffle_seed=self.shuffle_seed,
                    num_tokens=num_tokens,
                    row_length=row_length,
                )
            except ValueError as error:
                problem = error  # the others are waiting at the barrier
        self.barrier()
        if problem is not None:
            raise problem
        if not is_token_data(folder):
            raise ValueError(f"the first rank could not tokenize {data!r}: its message says why")
        return open_tokens(folder, end_of_text=end_of_text, tokenizer=tokenizer, verify=self.verify)


def build_encoder(
    kind: str, documents: Documents, tokenizer: Any, end_of_text: int, text_field: str = "text"
) -> TextEncoder | ChatEncoder:
    """The encoder of some documents.

    Args:
        kind: "text", "chat" or "auto".
        documents: looked at by "auto".
        tokenizer: of the model.
        end_of_text: id that ends every text.
        text_field: of records.
    """
    if kind == "auto":
        kind = "chat" if _has_messages(documents) else "text"
    return ChatEncoder(tokenizer) if kind == "chat" else TextEncoder(tokenizer, end_of_text, text_field)


def _has_messages(documents: Documents) -> bool:
    """Whether the first record that can be read is a chat."""
    for number in range(len(documents)):
        try:
            record = documents.read(number)
        except SkippedDocument:
            continue
        return isinstance(record, dict) and bool({"messages", "conversations"} & set(record))
    return False


def _checked(source: dict[str, Any]) -> dict[str, Any]:
    """A described source, its options checked."""
    problems = [f"unknown keys {sorted(set(source) - _SOURCE_KEYS)}"] if set(source) - _SOURCE_KEYS else []
    if "data" not in source:
        problems.append("'data' is missing")
    elif source["data"] != "stdlib":
        refuse_remote(source["data"])
    if source["kind"] not in KINDS:
        problems.append(f"kind must be one of {KINDS}, got {source['kind']!r}")
    if source["overlong"] not in OVERLONG:
        problems.append(f"overlong must be one of {OVERLONG}, got {source['overlong']!r}")
    if problems:
        raise ValueError(f"data source {source}: " + "; ".join(problems))
    return source
