"""Rows that hold several samples one after another, each of which attends to itself alone.

A packed row is described by the lengths of its samples; positions, LongRoPE's factor set and attention all follow
from them, so that every sample gets what it would get in a row of its own. In 16-bit floats on a GPU one kernel
(flash attention over cumulative lengths, ``torch.nn.attention.varlen``) does all samples of a batch; everywhere else
torch's attention runs sample by sample. Padding behind a row's last sample attends to itself and to nothing else.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

IGNORED_LABEL = -100

Kernel = Callable[[tuple[torch.Tensor, ...], torch.Tensor, int, int | None, float | None], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Where the samples of a batch of B rows of T tokens lie.

    Attributes:
        length: T.
        samples: per row the lengths of its samples, in order; they may leave padding at the row's end.
        segments: lengths of all n samples and paddings of the B T tokens, in order; none is 0.
        all_offsets: (N + 1,) int32 on the device: where each segment begins, and the end, which is repeated until N
            is a power of two.
        longest: length of the longest segment.
        kernel: attends to all samples at once, on CUDA; looked up here, outside of compiled layers.
    """

    length: int
    samples: tuple[tuple[int, ...], ...]
    segments: tuple[int, ...]
    all_offsets: torch.Tensor
    longest: int
    kernel: Kernel | None = None

    def to(self, device: torch.device) -> "PackedRows":
        """The same on another device."""
        kernel = _one_kernel() if device.type == "cuda" else None
        return dataclasses.replace(self, all_offsets=self.all_offsets.to(device), kernel=kernel)

    @property
    def offsets(self) -> torch.Tensor:
        """(n + 1,) int32 where each segment begins, and the end."""
        return self.all_offsets[: len(self.segments) + 1]

    @property
    def is_plain(self) -> bool:
        """Whether every row is one sample without padding."""
        return self.longest == self.length and len(self.segments) == len(self.samples)

    def position_ids(self) -> torch.Tensor:
        """(B, T) int64 positions, from 0 in each sample."""
        return self._of_tokens(self._index() - self.offsets[self._segment_of_token()])

    def sample_lengths(self) -> torch.Tensor:
        """(B, T) int64 length of the sample that each token belongs to."""
        return self._of_tokens(self.offsets.diff()[self._segment_of_token()].long())

    def _index(self) -> torch.Tensor:
        return torch.arange(len(self.samples) * self.length, device=self.offsets.device)

    def _segment_of_token(self) -> torch.Tensor:
        return torch.searchsorted(self.offsets[1:], self._index().to(torch.int32), right=True)

    def _of_tokens(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(len(self.samples), self.length)


def packed_rows(sequence_lengths: torch.Tensor, batch: int, length: int, device: torch.device) -> PackedRows:
    """The samples of a batch.

    Args:
        sequence_lengths: (B, S) int64 lengths of each row's samples in order, filled up with zeros; best on the host,
            where it is read.
        batch: B.
        length: T.
        device: of the token tensors.

    Raises:
        ValueError: for another shape, negative lengths, or samples that exceed a row.
    """
    if sequence_lengths.dim() != 2 or sequence_lengths.shape[0] != batch or sequence_lengths.is_floating_point():
        raise ValueError(
            f"sequence_lengths must be ({batch}, S) whole numbers, the lengths of each row's samples, got "
            f"{tuple(sequence_lengths.shape)} {sequence_lengths.dtype}"
        )
    samples: list[tuple[int, ...]] = []
    segments: list[int] = []
    for number, row in enumerate(sequence_lengths.tolist()):
        lengths = tuple(size for size in row if size)
        rest = length - sum(lengths)
        if rest < 0 or min(row, default=0) < 0:
            raise ValueError(
                f"sequence_lengths of row {number} are {row}: expected lengths >= 0, at most {length} in all"
            )
        samples.append(lengths)
        segments += [*lengths, rest] if rest else lengths
    empty = max(8, 1 << (len(segments) - 1).bit_length()) - len(segments)
    offsets = torch.tensor([0, *segments, *[0] * empty], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if device.type == "cuda":
        offsets = offsets.pin_memory()  # from other memory the copy would wait for the device
    return PackedRows(
        length=length,
        samples=tuple(samples),
        segments=tuple(segments),
        all_offsets=offsets.to(device, non_blocking=True),
        longest=max(segments),
        kernel=_one_kernel() if device.type == "cuda" else None,
    )


def attend_packed(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PackedRows,
    window: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention within each sample.

    Args:
        queries: (B, H, T, d).
        keys: (B, K, T, d), K a divisor of H.
        values: (B, K, T, d).
        rows: where the samples lie.
        window: keys that a query sees, itself among them; None for all.
        dropout: of the attention weights.
        scale: factor on the products of queries and keys; None takes 1 / sqrt(d).

    Returns:
        (B, H, T, d).
    """
    batch = queries.shape[0]
    flat = tuple(tensor.transpose(1, 2).flatten(0, 1) for tensor in (queries, keys, values))  # (B T, heads, d)
    kernel = rows.kernel if queries.dtype in (torch.float16, torch.bfloat16) and not dropout else None
    if torch.compiler.is_compiling():
        if kernel is None:
            raise ValueError(
                "compiled layers take packed rows on a GPU in 16 bit, without attention_dropout: set compile=false, "
                "or data_options.mask_documents=false"
            )
        # A bound that no batch changes, and one of few numbers of segments: else every batch would compile anew.
        attended = kernel(flat, rows.all_offsets, rows.length, window, scale)
    elif kernel is not None:
        attended = kernel(flat, rows.offsets, rows.longest, window, scale)
    else:
        attended = _one_by_one(flat, rows.segments, window, dropout, scale)
    return attended.unflatten(0, (batch, rows.length)).transpose(1, 2)


def ignore_first_tokens(labels: torch.Tensor, sequence_lengths: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) of packed rows without those that another sample would have to predict: each sample's first."""
    length = labels.shape[1]
    firsts = [
        number * length + first
        for number, row in enumerate(sequence_lengths.tolist())
        for first in itertools.accumulate(row[:-1], initial=0)
        if first < length
    ]
    index = torch.tensor(firsts, dtype=torch.int64)
    if labels.device.type == "cuda":
        index = index.pin_memory().to(labels.device, non_blocking=True)
    return labels.flatten().index_fill(0, index, IGNORED_LABEL).view_as(labels)


@functools.cache
def _one_kernel() -> Kernel:
    """Flash attention of all samples; takes tensors (B T, heads, d), offsets, longest, window and scale."""
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn  # its arguments differ between releases
    known = inspect.signature(varlen_attn).parameters  # without "enable_gqa" fewer keys are taken as they come

    def attend(
        flat: tuple[torch.Tensor, ...], offsets: torch.Tensor, longest: int, window: int | None, scale: float | None
    ) -> torch.Tensor:
        queries, keys, values = flat
        extra: dict[str, Any] = {"enable_gqa": queries.shape[1] != keys.shape[1]} if "enable_gqa" in known else {}
        if scale is not None and "scale" in known:
            extra["scale"] = scale
        elif scale is not None:
            queries = queries * (scale * queries.shape[2] ** 0.5)
        left = -1 if window is None or window >= longest else window - 1
        attended: torch.Tensor = varlen_attn(
            queries, keys, values, offsets, offsets, longest, longest, window_size=(left, 0), **extra
        )
        return attended

    return attend


def _one_by_one(
    flat: tuple[torch.Tensor, ...], segments: Sequence[int], window: int | None, dropout: float, scale: float | None
) -> torch.Tensor:
    """Sample by sample."""
    # One split, not slices: the backward pass of a slice writes a tensor of the whole's size.
    pieces = zip(*(tensor.split(segments) for tensor in flat), strict=True)
    attended = []
    for piece in pieces:
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in piece)  # (1, heads, n, d)
        size = query.shape[2]
        mask = None if window is None or size <= window else _window_mask(size, window, query.device)
        one = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        attended.append(one.squeeze(0).transpose(0, 1))
    return torch.cat(attended)


def _window_mask(size: int, window: int, device: torch.device) -> torch.Tensor:
    index = torch.arange(size, device=device)
    return (index <= index[:, None]) & (index > index[:, None] - window)
