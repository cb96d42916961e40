"""Tensors as GGUF stores them: plain, or in blocks of 32 values that share a scale.

Values are cut into blocks by the ``gguf`` package. Codes of ``phi35 quantize`` are only packed anew: blocks of 32 with
repeated scales stand for any larger group, so that calibrated codes stay as they are.
"""

from typing import Any

import numpy as np
import torch

from phi35.quantization.codes import QuantizedTensor, unpack

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BLOCK = 32
_BYTES = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34)}
_BYTES |= {"q5_1": (32, 24), "q5_0": (32, 22), "q4_1": (32, 20), "q4_0": (32, 18)}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
"""``general.file_type``."""

_PLAIN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def stored_bytes(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in bytes of a tensor (..., columns)."""
    values, size = _BYTES[kind]
    return (*shape[:-1], shape[-1] // values * size)


def fits(kind: str, columns: int) -> bool:
    """Whether rows of so many columns can be stored in a type."""
    return columns % _BYTES[kind][0] == 0


def plain_type(dtype: torch.dtype) -> str:
    """The type that keeps values of a dtype as they are."""
    return _PLAIN.get(dtype, "f32")


def code_type(weight_format: Any) -> str | None:
    """The type that keeps the codes of a format, if there is one: fp8 and int8 with zero points have none."""
    if weight_format.type != "int" or (weight_format.group_size or BLOCK) % BLOCK:
        return None
    if weight_format.bits == 8:
        return "q8_0" if weight_format.symmetric else None
    return "q4_0" if weight_format.symmetric else "q4_1"


def encode(values: torch.Tensor, kind: str, name: str) -> np.ndarray[Any, Any]:
    """Values (..., columns) as bytes of a type.

    Raises:
        ValueError: if float16 cannot hold them.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == "bf16":
        return values.bfloat16().contiguous().view(torch.uint8).numpy()
    wide = values.float().contiguous()
    if kind == "f16" and float(wide.abs().max()) > 65504:
        raise ValueError(f"{name} holds values past the range of float16: take type bf16")
    return quantize(wide.numpy(), GGMLQuantizationType[kind.upper()]).view(np.uint8)


def encode_codes(weight: QuantizedTensor) -> np.ndarray[Any, Any]:
    """Codes (..., rows, columns) as blocks of 32 that hold the same codes.

    Scales become float16, zero points minima; of bfloat16 scales nothing is lost but below 2^-24.
    """
    one, shape = weight.format, weight.shape
    flat = QuantizedTensor.of(
        one, {suffix: tensor.flatten(0, tensor.dim() - 2) for suffix, tensor in weight.tensors().items()}
    )
    rows, columns = flat.shape
    scale = flat.scale.float() if flat.row_scale is None else flat.scale.float() * flat.row_scale
    per_row = columns // BLOCK
    codes = unpack(flat.codes, one.bits).to(torch.uint8).view(rows, per_row, BLOCK)
    scales = scale.repeat_interleave(per_row // scale.shape[1], dim=1)[..., None]
    parts = [scales.half()]
    if flat.zero_point is not None:
        zeros = unpack(flat.zero_point.T.contiguous(), one.bits).T.float()
        minima = -zeros * scale
        parts.append(minima.repeat_interleave(per_row // scale.shape[1], dim=1)[..., None].half())
    if one.bits == 8:
        parts.append((codes.int() - 128).to(torch.int8))
    else:
        # A byte holds values i and i + 16 of a block.
        parts.append(codes[..., :16] | codes[..., 16:] << 4)
    packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)
    return packed.view(*shape[:-1], -1).numpy()
