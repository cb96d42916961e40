"""The key-value cache: preallocated or growing tensors with a length per row.

Rows are compact: padding is never stored, so that slot j of a row holds the key of its j-th real token and
a row in a batch is laid out exactly as it would be alone. Each row also records under which LongRoPE factor
set its keys were rotated, since keys of one set are wrong beside queries of the other. Numbers are held in the model's
dtype, or as bytes with scales (``phi35.cache_codes``).
"""

from collections.abc import Sequence
from typing import Any

import torch

from phi35.cache_codes import CODE_DTYPE, SCALE_DTYPE, check_kind, decode, encode
from phi35.config import ModelConfig
from phi35.kernels.operands import LayerCache

GROWTH_SLOTS = 256
"""A growing cache is enlarged to a multiple of this many slots, at least doubling."""


class KVCache:
    """Keys and values of every layer.

    Args:
        config: the model's config.
        batch_size: rows B.
        max_length: tokens per row to preallocate; None grows as needed.
        device: where the tensors lie.
        dtype: of keys and values.
        kv_cache_dtype: "int8" or "fp8" stores them in eight bits; None in ``dtype``.
        layer_devices: where each layer's keys and values lie; None: all on ``device``, as the lengths do.

    Attributes:
        keys: of each layer (B, K, slots, d), numbers or codes.
        values: like ``keys``.
        key_scales: of each layer (B, K, slots); empty where no codes are stored.
        value_scales: like ``key_scales``.
        lengths: (B,) int64, real tokens stored per row.
        rope_long: (B,) bool, rows whose keys stand under the long factors.
        num_slots: host-side upper bound of ``lengths``.
        uniform_length: host-side length shared by all rows, or None where rows may differ.

    Raises:
        ValueError: for a batch size or length below 1, or an unknown ``kv_cache_dtype``.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_cache_dtype: str | None = None,
        layer_devices: Sequence[torch.device] | None = None,
    ) -> None:
        check_kind(kv_cache_dtype)
        if batch_size < 1:
            raise ValueError(f"batch_size of a cache must be at least 1, got {batch_size}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length of a cache must be at least 1 or None, got {max_length}")
        self.config = config
        self.max_length = max_length
        self.capacity = max_length or 0
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.rope_long = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.num_slots = 0
        self.uniform_length: int | None = 0
        self.dtype, self.kind = dtype, kv_cache_dtype
        shape = (batch_size, config.num_key_value_heads, self._allocated(self.capacity), config.attention_head_dim)
        self.keys, self.values, self.key_scales, self.value_scales = new_tensors(
            config, shape, device, dtype, self.kind, layer_devices
        )

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' tensors."""
        return sum(tensor.nbytes for tensors in self._stored() for tensor in tensors)

    def reserve(self, num_slots: int) -> None:
        """Make room for ``num_slots`` tokens in every row.

        Raises:
            ValueError: if a preallocated cache is too small.
        """
        if num_slots <= self.capacity:
            return
        if self.max_length is not None:
            raise ValueError(
                f"the cache holds {self.max_length} tokens a row and {num_slots} are needed: make it with a larger "
                "max_length, or with max_length=None to let it grow"
            )
        self._reallocate(-(-max(num_slots, 2 * self.capacity) // GROWTH_SLOTS) * GROWTH_SLOTS)

    def resize(self, capacity: int) -> None:
        """Make room for exactly ``capacity`` tokens in every row, of a preallocated cache too; no fewer than before.

        Raises:
            ValueError: if that is less than it has room for.
        """
        if capacity < self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens a row, and {capacity} would be fewer")
        if self.max_length is not None:
            self.max_length = capacity
        if capacity > self.capacity:
            self._reallocate(capacity)

    def _reallocate(self, capacity: int) -> None:
        for tensors in self._stored():
            for layer, old in enumerate(tensors):
                new = old.new_zeros(*old.shape[:2], self._allocated(capacity), *old.shape[3:])
                new[:, :, : self.capacity] = old[:, :, : self.capacity]
                tensors[layer] = new
        self.capacity = capacity

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor | int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one chunk of one layer.

        Args:
            layer: index of the layer.
            keys: (B, K, T, d), rotated.
            values: (B, K, T, d).
            slots: first slot of the chunk where all rows agree, else (B, T) int64 slots; ``capacity`` is the slot
                that takes padding and is never read.

        Returns:
            Keys and values as ``read`` will give them.
        """
        if self.kind is None:
            self._put(self.keys[layer], keys, slots)
            self._put(self.values[layer], values, slots)
            return keys, values
        kept = []
        for codes, scales, given in (
            (self.keys[layer], self.key_scales[layer], keys),
            (self.values[layer], self.value_scales[layer], values),
        ):
            encoded = encode(given, self.kind)
            self._put(codes, encoded[0], slots)
            self._put(scales, encoded[1], slots)
            kept.append(decode(*encoded, self.kind, given.dtype))
        return kept[0], kept[1]

    def _put(self, target: torch.Tensor, values: torch.Tensor, slots: torch.Tensor | int) -> None:
        if isinstance(slots, int):
            target[:, :, slots : slots + values.shape[2]] = values
            return
        rows = torch.arange(self.batch_size, device=slots.device)[:, None]
        target.transpose(1, 2)[rows, slots] = values.transpose(1, 2)

    def read(self, layer: int, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values (B, K, num_slots, d): views, or what the codes stand for."""
        return self.layer(layer).read(slice(None), num_slots)

    def layer(self, number: int) -> LayerCache:
        """One layer's keys and values as a decoding step takes them, the slot for padding last."""
        return layer_of(self, number)

    def select_rows(self, rows: torch.Tensor) -> "KVCache":
        """A new cache holding copies of the given rows, in the given order.

        Args:
            rows: (n,) int64 indices or (B,) bool mask.
        """
        rows = self._indices(rows)
        chosen = KVCache.__new__(KVCache)
        chosen.config, chosen.max_length, chosen.capacity = self.config, self.max_length, self.capacity
        chosen.dtype, chosen.kind = self.dtype, self.kind
        chosen.lengths, chosen.rope_long = self.lengths[rows], self.rope_long[rows]
        chosen.num_slots, chosen.uniform_length = self.num_slots, self.uniform_length
        chosen.keys, chosen.values, chosen.key_scales, chosen.value_scales = (
            [tensor[rows.to(tensor.device)] for tensor in tensors] for tensors in self._stored()
        )
        return chosen

    def write_rows(self, rows: torch.Tensor, other: "KVCache") -> None:
        """Replace the given rows by the rows of another cache, in order.

        Raises:
            ValueError: if the number of rows or the kind of storage differs, or a preallocated cache is too small.
        """
        rows = self._indices(rows)
        if self.kind != other.kind:
            raise ValueError(f"this cache stores {self.kind or self.dtype} and the other {other.kind or other.dtype}")
        if rows.numel() != other.batch_size:
            raise ValueError(f"{rows.numel()} rows were chosen and the other cache has {other.batch_size}")
        self.reserve(other.num_slots)
        for mine, theirs in zip(self._stored(), other._stored(), strict=True):
            for layer in range(len(mine)):
                places = rows.to(mine[layer].device)
                mine[layer][places, :, : other.num_slots] = theirs[layer][:, :, : other.num_slots]
        self.lengths[rows], self.rope_long[rows] = other.lengths, other.rope_long
        self.num_slots = max(self.num_slots, other.num_slots)
        if self.uniform_length != other.uniform_length:
            self.uniform_length = other.uniform_length if rows.numel() == self.batch_size else None

    def reset_rows(self, rows: torch.Tensor) -> None:
        """Empty the given rows (indices or bool mask)."""
        rows = self._indices(rows)
        self.lengths[rows], self.rope_long[rows] = 0, False
        if rows.unique().numel() == self.batch_size:
            self.num_slots, self.uniform_length = 0, 0
        elif rows.numel():
            self.uniform_length = None

    def crop(self, rows: torch.Tensor, lengths: torch.Tensor | int) -> None:
        """Shorten rows to at most the given lengths: (n,) int64 or one number."""
        rows = self._indices(rows)
        limit = torch.as_tensor(lengths, device=self.lengths.device, dtype=torch.int64)
        self.lengths[rows] = torch.minimum(self.lengths[rows], limit.expand_as(rows))
        longest, shortest = int(self.lengths.max()), int(self.lengths.min())
        self.num_slots, self.uniform_length = longest, longest if longest == shortest else None

    def _indices(self, rows: torch.Tensor) -> torch.Tensor:
        rows = torch.as_tensor(rows, device=self.lengths.device)
        return rows.nonzero().flatten() if rows.dtype == torch.bool else rows.long()

    def _stored(self) -> tuple[list[torch.Tensor], ...]:
        return self.keys, self.values, self.key_scales, self.value_scales

    @staticmethod
    def _allocated(capacity: int) -> int:
        return capacity + 1


def new_tensors(
    config: ModelConfig,
    shape: tuple[int, ...],
    device: torch.device | str,
    dtype: torch.dtype,
    kind: str | None,
    layer_devices: Sequence[torch.device] | None = None,
) -> tuple[list[torch.Tensor], ...]:
    """Keys and values of this shape for every layer, and their scales (none where ``kind`` is None); zeros."""
    devices = [device] * config.num_hidden_layers if layer_devices is None else layer_devices
    stored = dtype if kind is None else CODE_DTYPE
    numbers = [[torch.zeros(shape, device=one, dtype=stored) for one in devices] for _ in range(2)]
    scaled = devices if kind is not None else []
    scales = [[torch.zeros(shape[:-1], device=one, dtype=SCALE_DTYPE) for one in scaled] for _ in range(2)]
    return numbers[0], numbers[1], scales[0], scales[1]


def layer_of(cache: Any, number: int, table: torch.Tensor | None = None) -> LayerCache:
    """One layer of a cache (this one, or one of pages) as the kernels take it."""
    if cache.kind is None:
        return LayerCache(cache.keys[number], cache.values[number], table)
    scales = cache.key_scales[number], cache.value_scales[number]
    return LayerCache(cache.keys[number], cache.values[number], table, *scales, cache.kind, cache.dtype)
