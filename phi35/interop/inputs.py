"""Inputs as libraries around transformers shape them, put into the form of this package's models."""

from typing import Any

import torch
from torch import nn

from phi35.model import CausalLM


def packed_crops(causal_lm: CausalLM, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> torch.Tensor:
    """The real crops (C, 3, S, S) of images that stand one an entry.

    Args:
        causal_lm: a vision model.
        pixel_values: (N, most crops, 3, S, S), zeros after an image's last crop.
        image_sizes: (N, 2) heights and widths after padding.

    Raises:
        ValueError: if the sizes are missing or ask for more crops than an entry has.
    """
    tower = causal_lm.model.vision_embed_tokens
    if tower is None or image_sizes is None or len(image_sizes) != len(pixel_values):
        sizes = None if image_sizes is None else tuple(image_sizes.shape)
        raise ValueError(
            f"pixel_values {tuple(pixel_values.shape)}, one entry an image, need a vision model and as many "
            f"image_sizes (N, 2), got {sizes}"
        )
    counts = tower.crops_of_images(image_sizes)
    if max(counts) > pixel_values.shape[1]:
        raise ValueError(f"image_sizes ask for up to {max(counts)} crops and pixel_values have {pixel_values.shape[1]}")
    return torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)])


_FLATTENED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def sample_ends(flattened: dict[str, Any]) -> torch.Tensor | None:
    """Where the samples of the only row begin and end, of what flattening collators say of it.

    Raises:
        TypeError: for any other argument.
    """
    unknown = sorted(set(flattened) - _FLATTENED)
    if unknown:
        raise TypeError(f"unexpected arguments {unknown}")
    return flattened.get("cu_seq_lens_q")


def packed_lengths(position_ids: torch.Tensor | None, ends: torch.Tensor | None = None) -> torch.Tensor | None:
    """Lengths (B, S) of the samples that stand one after another in each row, filled up with zeros.

    Args:
        position_ids: (B, T) positions that begin at 0 with each sample; or
        ends: (S + 1,) where the samples of the only row begin and end, as flattening collators give it.

    Returns:
        None where every row holds one sample or the positions are of another kind.

    Raises:
        ValueError: if positions begin anew and do not count up from 0.
    """
    if ends is not None:
        return torch.diff(ends.long()).cpu()[None]
    if position_ids is None:
        return None
    if position_ids.dim() != 2:
        raise ValueError(f"position_ids must be (B, T), got {tuple(position_ids.shape)}")
    starts = position_ids == 0
    if not bool(starts[:, 1:].any()):
        return None
    columns = torch.arange(position_ids.shape[1], device=position_ids.device)
    begins = torch.where(starts, columns, 0).cummax(dim=1).values
    if not bool((position_ids == columns - begins).all()):
        raise ValueError("position_ids of packed samples must count up from 0 in each sample, the first included")
    rows = [torch.diff(row.nonzero().flatten(), append=columns.new_tensor([len(columns)])) for row in starts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).cpu()
