"""Operands that the kernels and their plain forms share; importing them needs no Triton."""

from dataclasses import dataclass

import torch
from torch import nn

from phi35.cache_codes import decode, encode
from phi35.norm import RMSNorm


@dataclass(frozen=True)
class Norm:
    """A norm before a product: "rmsnorm", "layernorm" (with bias) or "none"."""

    kind: str
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


def norm_of(module: nn.Module) -> Norm:
    """A norm module as the kernels take it."""
    if isinstance(module, RMSNorm):
        return Norm("rmsnorm", module.weight, module.weight, module.eps)
    assert isinstance(module, nn.LayerNorm)
    return Norm("layernorm", module.weight, module.bias, module.eps)


@dataclass(frozen=True)
class Rope:
    """Rotary tables (2, d/2) and scalings (2,) of the short and the long factors, float32."""

    inv_freq: torch.Tensor
    scaling: torch.Tensor


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer.

    Attributes:
        keys: (B, K, slots, d) of B rows; with a table (pages, K, page size, d), shared by all rows.
        values: like ``keys``.
        table: (B, n) int32, the page that holds each stretch of a row's slots; None where rows lie whole.
        key_scales: like ``keys`` without the last dimension, where those are codes; else None.
        value_scales: like ``key_scales``.
        kind: what the codes are (``phi35.cache_codes``); None where keys and values are numbers.
        number_dtype: of what codes stand for, as attention takes it.
        repeats: how many rows side by side share their keys and values, as tokens of one row in a step.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor | None = None
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None
    kind: str | None = None
    number_dtype: torch.dtype | None = None
    repeats: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values as ``read`` gives them."""
        return self.keys.dtype if self.number_dtype is None else self.number_dtype

    @property
    def num_kv(self) -> int:
        """Heads of keys K."""
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        """Width d of a head."""
        return self.keys.shape[3]

    @property
    def page_size(self) -> int:
        """Slots of a page; 0 where rows lie whole."""
        return 0 if self.table is None else self.keys.shape[2]

    @property
    def num_rows(self) -> int:
        """Rows B."""
        return self.keys.shape[0] if self.table is None else self.table.shape[0]

    @property
    def num_slots(self) -> int:
        """Slots of a row; a row that needs more overwrites its last one."""
        return self.keys.shape[2] if self.table is None else self.table.shape[1] * self.keys.shape[2]

    def store(
        self, rows: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values (n, K, d) into slots (n,) of rows (n,); returns them as ``read`` will give them."""
        if self.table is not None:
            size = self.keys.shape[2]
            rows, slots = self.table[rows, slots // size].long(), slots % size
        kept = []
        for target, scales, given in (
            (self.keys, self.key_scales, keys),
            (self.values, self.value_scales, values),
        ):
            if self.kind is None or scales is None:
                target.transpose(1, 2)[rows, slots] = given
            else:
                codes, steps = encode(given, self.kind)
                target.transpose(1, 2)[rows, slots] = codes
                scales.transpose(1, 2)[rows, slots] = steps
                given = decode(codes, steps, self.kind, given.dtype)
            kept.append(given)
        return kept[0], kept[1]

    def read(self, row: int | slice, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first slots of some rows, (n, K, num_slots, d); copies where there are pages or codes."""
        rows = slice(row, row + 1) if isinstance(row, int) else row
        keys, values = (self._gathered(tensor, rows, num_slots) for tensor in (self.keys, self.values))
        if self.kind is None or self.key_scales is None or self.value_scales is None:
            return keys, values
        scales = (self._gathered(tensor, rows, num_slots) for tensor in (self.key_scales, self.value_scales))
        key_scales, value_scales = scales
        return (
            decode(keys, key_scales, self.kind, self.dtype),
            decode(values, value_scales, self.kind, self.dtype),
        )

    def _gathered(self, tensor: torch.Tensor, rows: slice, num_slots: int) -> torch.Tensor:
        if self.table is None:
            return tensor[rows, :, :num_slots]
        table = self.table[rows, : -(-num_slots // self.keys.shape[2])].long()
        # One copy: stretches of a page and head, picked in the order of rows, heads, pages.
        num_kv = tensor.shape[1]
        places = table[:, None, :] * num_kv + torch.arange(num_kv, device=table.device)[:, None]
        stretches = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        picked = stretches.flatten(0, 1).index_select(0, places.flatten()).view(tensor.dtype)
        return picked.view(len(table), num_kv, -1, *tensor.shape[3:])[:, :, :num_slots]


ROW_FIELDS = (
    "tokens",
    "lengths",
    "rope_long",
    "steps",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "penalty",
    "seen",
    "masked",
    "allowed",
)
MASK_BITS = 32
"""Tokens of a word of a mask, the first in its lowest bit."""


@dataclass(frozen=True)
class StepState:
    """What passes from step to step on the device; the sampler moves it on.

    Attributes:
        tokens: (B,) int64 last token of each row, the step's input.
        lengths: (B,) int64 tokens in the cache.
        rope_long: (B,) bool rows under the long factors.
        steps: (B,) int64 tokens chosen so far.
        temperature: (B,) float32, 0 for greedy.
        top_k: (B,) int32; the vocabulary's size for none.
        top_p: (B,) float32; 1 for none.
        min_p: (B,) float32; 0 for none.
        penalty: (B,) float32 repetition penalty; 1 for none.
        draws: (n, B) float64 uniform numbers; step t reads row t mod n.
        seen: (B, V) uint8, nonzero for tokens that the penalty counts.
        masked: (B,) uint8, nonzero for rows that choose among allowed tokens alone.
        allowed: (B, ceil(V / 32)) int32, a bit for each token; read where ``masked``.
        history: (r, B) int32 chosen tokens; step t writes row t mod r. In host memory that the device can write.
        logprobs: (r, B) float32 log-probabilities of the chosen tokens under the unfiltered logits.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    rope_long: torch.Tensor
    steps: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    penalty: torch.Tensor
    draws: torch.Tensor
    seen: torch.Tensor
    masked: torch.Tensor
    allowed: torch.Tensor
    history: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def new(cls, batch: int, vocab: int, device: torch.device, ring: int = 64, draws: int = 256) -> "StepState":
        """Zeros, and filters that are off."""
        pinned = device.type == "cuda"

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            tokens=zeros(batch, dtype=torch.int64),
            lengths=zeros(batch, dtype=torch.int64),
            rope_long=zeros(batch, dtype=torch.bool),
            steps=zeros(batch, dtype=torch.int64),
            temperature=zeros(batch, dtype=torch.float32),
            top_k=torch.full((batch,), vocab, dtype=torch.int32, device=device),
            top_p=torch.ones(batch, device=device),
            min_p=zeros(batch, dtype=torch.float32),
            penalty=torch.ones(batch, device=device),
            draws=zeros(draws, batch, dtype=torch.float64),
            seen=zeros(batch, vocab, dtype=torch.uint8),
            masked=zeros(batch, dtype=torch.uint8),
            allowed=zeros(batch, -(-vocab // MASK_BITS), dtype=torch.int32),
            history=torch.zeros(ring, batch, dtype=torch.int32, pin_memory=pinned),
            logprobs=torch.zeros(ring, batch, pin_memory=pinned),
        )

    def first(self, count: int) -> "StepState":
        """The first rows of this state, sharing its memory."""
        rows = {name: getattr(self, name)[:count] for name in ROW_FIELDS}
        rings = {name: getattr(self, name)[:, :count] for name in ("draws", "history", "logprobs")}
        return StepState(**rows, **rings)

    def select(self, places: torch.Tensor) -> "StepState":
        """A state of copies of these rows (n,) int64; its rings are new and empty."""
        chosen = StepState.new(len(places), self.seen.shape[1], self.tokens.device)
        for name in ROW_FIELDS:
            getattr(chosen, name).copy_(getattr(self, name)[places])
        chosen.draws.copy_(self.draws[:, places])
        return chosen

    def write(self, places: torch.Tensor, other: "StepState") -> None:
        """Put the rows of another state in these places; the rings stay."""
        for name in ROW_FIELDS:
            getattr(self, name)[places] = getattr(other, name)
