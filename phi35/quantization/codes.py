"""Weights to codes and back: grids, rounding, packing.

A row of a weight (rows, columns) is cut into groups; a group's values are (code - zero) * scale. Codes are stored as
compressed-tensors stores them: unsigned, little end first in int32 words along a row (eight of 4 bits, four of 8);
zero points in the same way, but along the rows. fp8 codes are torch's ``float8_e4m3fn``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from phi35.quantization.config import WeightFormat

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
CHUNK_VALUES = 2**19
"""Values that are quantized at once, in float32: few enough to stay in the second-level cache, which is four times as
fast as 2^23 on one core."""
DEVICE_CHUNK_VALUES = 2**23
"""The same on a GPU, where launches count."""

_STEPS = (-8.0, 8.0, 7.5, 8.5, -8.5, 9.0, 9.5)
"""Symmetric 4-bit scales that are tried: the largest value of a group, over these."""

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""4-bit scales with zero points that are tried: these shares of the range, over 15 steps."""

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight (..., rows, columns) in few bits.

    Attributes:
        format: how it is stored.
        codes: (..., rows, columns / codes per word) int32, or (..., rows, columns) float8_e4m3fn.
        scale: (..., rows, groups) bfloat16 or float16; uint8 under 8-bit scales.
        zero_point: (..., rows / codes per word, groups) int32; None where the format is symmetric.
        row_scale: (..., rows, 1) float32 that multiplies 8-bit scales; else None.
    """

    format: WeightFormat
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it stands for."""
        per_word = self.format.per_word if self.format.type == "int" else 1
        return (*self.codes.shape[:-1], self.codes.shape[-1] * per_word)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Suffix of the stored name -> tensor."""
        found = {code_suffix(self.format): self.codes, "_scale": self.scale}
        for suffix, tensor in (("_zero_point", self.zero_point), ("_row_scale", self.row_scale)):
            if tensor is not None:
                found[suffix] = tensor
        return found

    @staticmethod
    def of(one: WeightFormat, tensors: Mapping[str, torch.Tensor]) -> "QuantizedTensor":
        """The same from suffixes and tensors."""
        return QuantizedTensor(
            one,
            tensors[code_suffix(one)],
            tensors["_scale"],
            tensors.get("_zero_point"),
            tensors.get("_row_scale"),
        )

    def part(self, index: int) -> "QuantizedTensor":
        """Entry ``index`` along the first dimension, as views."""
        return QuantizedTensor.of(self.format, {suffix: tensor[index] for suffix, tensor in self.tensors().items()})

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Rows start to stop of a weight (rows, columns), as views; multiples of the codes per word."""
        step = self.format.per_word
        cut = {
            suffix: tensor[start // step : -(-stop // step)] if suffix == "_zero_point" else tensor[start:stop]
            for suffix, tensor in self.tensors().items()
        }
        return QuantizedTensor.of(self.format, cut)


def code_suffix(one: WeightFormat) -> str:
    """What the name of the codes ends in: nothing for fp8, whose codes are the weight's own tensor."""
    return "_packed" if one.type == "int" else ""


def tensor_specs(one: WeightFormat, shape: tuple[int, ...], scale_dtype: torch.dtype) -> Specs:
    """Suffix -> (shape, dtype) of the tensors that stand for a weight (..., rows, columns)."""
    *front, rows, columns = shape
    groups = one.num_groups(columns)
    specs: Specs = {}
    if one.type == "int":
        specs["_packed"] = ((*front, rows, columns // one.per_word), torch.int32)
    else:
        specs[""] = ((*front, rows, columns), FP8)
    specs["_scale"] = ((*front, rows, groups), scale_dtype if one.scale_bits == 16 else torch.uint8)
    if not one.symmetric:
        specs["_zero_point"] = ((*front, rows // one.per_word, groups), torch.int32)
    if one.scale_bits == 8:
        specs["_row_scale"] = ((*front, rows, 1), torch.float32)
    return specs


@dataclass(frozen=True)
class Grid:
    """The values that codes stand for: (code - zero) * scale.

    Attributes:
        format: of the codes.
        stored_scale: (rows, groups), as stored.
        zero: (rows, groups) float32 whole numbers; the middle code in symmetric formats, 0 for fp8.
        row_scale: (rows, 1) float32 or None.
    """

    format: WeightFormat
    stored_scale: torch.Tensor
    zero: torch.Tensor
    row_scale: torch.Tensor | None = None

    @property
    def scale(self) -> torch.Tensor:
        """(rows, groups) float32, as the stored one counts."""
        wide = self.stored_scale.float()
        return wide if self.row_scale is None else wide * self.row_scale

    def encode(self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Nearest codes of float32 values, as float32; scale and zero broadcast against the values."""
        ratio = torch.where(scale == 0, 0.0, values / scale)
        if self.format.type == "float":
            return ratio.clamp(-FP8_MAX, FP8_MAX).to(FP8).float()
        return (ratio + zero).round_().clamp_(0, (1 << self.format.bits) - 1)

    def pack(self, codes: torch.Tensor) -> QuantizedTensor:
        """The stored form, from codes (rows, columns) as ``encode`` returns them."""
        one = self.format
        packed = codes.to(FP8) if one.type == "float" else pack(codes, one.bits)
        zeros = None if one.symmetric else pack(self.zero.T, one.bits).T.contiguous()
        return QuantizedTensor(one, packed, self.stored_scale, zeros, self.row_scale)


def fit_grid(
    weight: torch.Tensor, one: WeightFormat, scale_dtype: torch.dtype, importance: torch.Tensor | None = None
) -> Grid:
    """Scales and zero points for a weight, group by group.

    Those of 4-bit formats are searched among a few for the least squared error; others follow from the range alone.

    Args:
        weight: (rows, columns) float32.
        one: the format.
        scale_dtype: of 16-bit scales.
        importance: (columns,) float32 weights of the squared error, or None.

    Returns:
        The grid, its scales rounded as they are stored.
    """
    rows, columns = weight.shape
    groups = weight.view(rows, one.num_groups(columns), -1)
    counted = None if importance is None else importance.view(1, groups.shape[1], -1)
    if not one.symmetric:
        return _fit_with_zeros(groups, one, scale_dtype, counted)
    largest = groups.abs().amax(dim=-1)
    zero = torch.full_like(largest, 0 if one.type == "float" else one.middle)
    if one.type == "float":
        return _stored(one, largest / FP8_MAX, zero, scale_dtype)
    if one.bits == 8:
        return _stored(one, largest / (one.middle - 0.5), zero, scale_dtype)
    # A negative scale gives the code -8, which has no positive twin, to the other sign. Bytes have no sign.
    candidates = [largest / steps for steps in _STEPS if steps > 0 or one.scale_bits == 16]
    return _stored(one, _best(groups, candidates, [zero] * len(candidates), one, counted)[0], zero, scale_dtype)


def _fit_with_zeros(
    groups: torch.Tensor, one: WeightFormat, scale_dtype: torch.dtype, counted: torch.Tensor | None
) -> Grid:
    top = (1 << one.bits) - 1
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
    scales = [(high - low) * share / top for share in (_SHARES if one.bits == 4 else (1.0,))]
    zeros = [_whole_zero(low, high, scale, top) for scale in scales]
    scale, _ = _best(groups, scales, zeros, one, counted)
    grid = _stored(one, scale, torch.zeros_like(scale), scale_dtype)
    return Grid(one, grid.stored_scale, _whole_zero(low, high, grid.scale, top), grid.row_scale)


def _whole_zero(low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, top: int) -> torch.Tensor:
    """The code of zero under which the middle of the range is the middle of the codes."""
    middle = torch.where(scale == 0, 0.0, (low + high) / (2 * scale))
    return (top / 2 - middle).round().clamp(0, top)


def _best(
    groups: torch.Tensor,
    scales: list[torch.Tensor],
    zeros: list[torch.Tensor],
    one: WeightFormat,
    counted: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, groups) scale and zero with the least squared error among some."""
    if len(scales) == 1:
        return scales[0], zeros[0]
    least = torch.full_like(scales[0], torch.inf)
    best, best_zero = scales[0], zeros[0]
    for scale, zero in zip(scales, zeros, strict=True):
        wide, shift = torch.where(scale == 0, 1.0, scale).unsqueeze(-1), zero.unsqueeze(-1)
        wrong = (groups / wide).add_(shift).round_().clamp_(0, (1 << one.bits) - 1).sub_(shift)
        wrong = wrong.mul_(wide).sub_(groups).square_()
        error = (wrong if counted is None else wrong.mul_(counted)).sum(dim=-1)
        better = error < least
        least = torch.where(better, error, least)
        best, best_zero = torch.where(better, scale, best), torch.where(better, zero, best_zero)
    return best, best_zero


def _stored(one: WeightFormat, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> Grid:
    if one.scale_bits == 16:
        return Grid(one, scale.to(dtype), zero)
    assert bool((scale >= 0).all()), "bytes have no sign"
    row_scale = scale.amax(dim=-1, keepdim=True) / 255
    steps = torch.where(row_scale == 0, 0.0, scale / row_scale)
    # A group with values keeps a scale: at 0 all of them would vanish.
    codes = torch.where(scale > 0, steps.round().clamp(1, 255), 0.0)
    return Grid(one, codes.to(torch.uint8), zero, row_scale)


def round_to_nearest(weight: torch.Tensor, one: WeightFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Quantize (rows, columns), or a stack of them, each value to the nearest code; memory beside it is bounded."""
    if weight.dim() > 2:
        return _stacked([round_to_nearest(part, one, scale_dtype) for part in weight])
    rows, columns = weight.shape
    values = CHUNK_VALUES if weight.device.type == "cpu" else DEVICE_CHUNK_VALUES
    step = max(1, values // columns // one.per_word) * one.per_word
    parts = []
    for start in range(0, rows, step):
        chunk = weight[start : start + step].float()
        grid = fit_grid(chunk, one, scale_dtype)
        groups = chunk.view(chunk.shape[0], grid.zero.shape[1], -1)
        codes = grid.encode(groups, grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1))
        parts.append(grid.pack(codes.view(chunk.shape)))
    joined = {suffix: torch.cat([part.tensors()[suffix] for part in parts]) for suffix in parts[0].tensors()}
    return QuantizedTensor.of(one, joined)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (..., rows, columns) that the codes stand for; the product with the scale is taken in float32.

    Args:
        quantized: codes and scales.
        dtype: of the result.
        zeros: (..., rows, groups) zero points that are unpacked already, in place of the packed ones.
    """
    one = quantized.format
    scale = quantized.scale.float()
    if quantized.row_scale is not None:
        scale = scale * quantized.row_scale
    codes = (quantized.codes if one.type == "float" else unpack(quantized.codes, one.bits)).float()
    groups = codes.view(*codes.shape[:-1], scale.shape[-1], -1)
    if zeros is None and quantized.zero_point is not None:
        zeros = unpacked_zeros(quantized)
    if one.type == "int":
        groups = groups - (one.middle if zeros is None else zeros.unsqueeze(-1))
    return (groups * scale.unsqueeze(-1)).view(codes.shape).to(dtype)


def unpacked_zeros(quantized: QuantizedTensor) -> torch.Tensor:
    """Zero points (..., rows, groups) as uint8."""
    assert quantized.zero_point is not None
    return unpack(quantized.zero_point.mT, quantized.format.bits).mT


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers (..., n) below 2^bits as int32 words (..., n * bits / 32), the first in the lowest bits."""
    values = codes.to(torch.uint8)
    if bits == 4:
        pairs = values.unflatten(-1, (-1, 2))
        values = pairs[..., 0] | (pairs[..., 1] << 4)
    # Flat, because torch looks at the strides of dimensions of size 1, too.
    return values.reshape(-1).view(torch.int32).view(*codes.shape[:-1], -1)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers of ``pack``, uint8 (..., n)."""
    values = words.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)
    return values


def _stacked(parts: list[QuantizedTensor]) -> QuantizedTensor:
    names = parts[0].tensors()
    return QuantizedTensor.of(
        parts[0].format, {suffix: torch.stack([part.tensors()[suffix] for part in parts]) for suffix in names}
    )
