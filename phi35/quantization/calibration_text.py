"""Calibration inputs from a text file."""

from pathlib import Path

import torch

from phi35.loading import find_folder, load_config, load_processor


def text_batches(source: str | Path, text: Path, samples: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Stretches of a text, evenly spread over it, as model inputs of one row each.

    Args:
        source: folder or hub id whose tokenizer reads the text.
        text: a UTF-8 file.
        samples: most stretches.
        length: tokens of a stretch.

    Raises:
        ValueError: if the folder has no tokenizer, the file is no text, or it is shorter than one stretch.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"samples and length must be at least 1, got {samples} and {length}")
    folder = find_folder(source)
    processor = load_processor(folder, load_config(folder))
    if processor is None:
        raise ValueError(f"{folder} has no tokenizer to read {text} with")
    try:
        written = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"calibration text {text} cannot be read: {error}") from error
    ids = processor.tokenizer.encode(written)
    if len(ids) < length:
        raise ValueError(f"{text} has {len(ids)} tokens: at least one stretch of {length} is needed")
    count = min(samples, len(ids) // length)
    starts = [place * (len(ids) - length) // max(1, count - 1) for place in range(count)]
    return [{"input_ids": torch.tensor([ids[start : start + length]])} for start in starts]
