"""Small corpora and the text sources that tests open over them."""

import json

import numpy as np

from phi35 import presets
from phi35.data.opening import open_text
from phi35.data.source import TextSource
from phi35.data.stream import DocumentStream, Mixture
from phi35.data.token_files import TokenFiles, TokenPart
from phi35.processor import Processor
from phi35.training.build import SMALL_MODEL

CONFIG = presets.get("tiny-phi-3.5-mini")


def small_processor():
    """The processor with the package's tokenizer."""
    return Processor.from_folder(SMALL_MODEL, CONFIG)


def opened(data, cache, num_samples=8, **options):
    """A text source of one rank over documents, rows of 16 tokens."""
    settings = {
        "model_config": CONFIG,
        "processor": small_processor(),
        "rank": 0,
        "world_size": 1,
        "micro_batch_size": 2,
        "seed": 0,
        "sequence_length": 16,
        "num_samples": num_samples,
        "cache_folder": cache,
        "barrier": lambda: None,
        "buffer_size": 8,
    }
    return open_text(str(data), **{**settings, **options})


def numbered_tokens(lengths, start=0, trained=None, kind="text", end_token=None):
    """Token files in memory: tokens count up, so that every token tells where it stood."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(start, start + offsets[-1])
    bits = None if trained is None else np.packbits(np.asarray(trained, dtype=bool))
    part = TokenPart(tokens, offsets, bits)
    return TokenFiles([part], kind=kind, identity=[start, *lengths], end_token=end_token)


def packed_source(files, sequence_length=10, micro_batch_size=1, rank=0, world_size=1, seed=0, weights=None, **options):
    """A text source over token files in memory."""
    files = files if isinstance(files, list) else [files]
    overlong = options.pop("overlong", "skip")
    shuffle = options.pop("shuffle", True)
    streams = [
        DocumentStream(one, number, max_length=sequence_length, seed=seed, overlong=overlong, shuffle=shuffle)
        for number, one in enumerate(files)
    ]
    return TextSource(
        Mixture(streams, weights or [1.0] * len(files)),
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        **{"vocab_size": 10**6, "pad_token_id": 999_999, "buffer_size": 4, **options},
    )


def write_lines(path, records):
    """JSON lines; what is a str or bytes already is written as it stands."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def chat(*contents):
    """A record with messages: user and assistant by turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]}
