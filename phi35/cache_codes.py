"""Keys and values in eight bits: how the key-value cache stores them where it is asked to.

Each head of each token has a scale of its own (bfloat16), so that a token is stored once and never touched again,
whatever comes after it. Two kinds:

- "int8": the nearest of 255 even steps, kept as code + 128 in a byte.
- "fp8": the nearest e4m3 number (arXiv 2209.05433), which is finer near zero and coarser near a head's largest value.

Attention sees the stored numbers everywhere, also within the chunk that stores them: a text then does not depend on how
its prompt was cut.
"""

import torch

KINDS = ("int8", "fp8")
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""What a head's largest value becomes."""
SCALE_DTYPE = torch.bfloat16
CODE_DTYPE = torch.uint8


def check_kind(kind: object) -> None:
    """Check a ``kv_cache_dtype``.

    Raises:
        ValueError: if it is neither None nor one of ``KINDS``.
    """
    problem = kind_problem(kind)
    if problem is not None:
        raise ValueError(problem)


def kind_problem(kind: object) -> str | None:
    """What is wrong with a ``kv_cache_dtype``, or None."""
    if kind is None or kind in KINDS:
        return None
    return f"kv_cache_dtype must be one of {KINDS}, or None for the model's own dtype, got {kind!r}"


def encode(values: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (..., d) uint8 and scales (...) bfloat16 of finite keys or values (..., d)."""
    wide = values.float()
    scales = (wide.abs().amax(dim=-1) / LARGEST[kind]).to(SCALE_DTYPE)
    step = scales.float().unsqueeze(-1)
    ratio = torch.where(step == 0, 0.0, wide / step).clamp_(-LARGEST[kind], LARGEST[kind])
    if kind == "int8":
        return (ratio.round_() + 128).to(CODE_DTYPE), scales
    return ratio.to(torch.float8_e4m3fn).view(CODE_DTYPE), scales


def decode(codes: torch.Tensor, scales: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """What codes (..., d) and scales (...) stand for, (..., d) in ``dtype``: one product, rounded once."""
    # Codes and scales are exact in bfloat16; float16 might lose a scale.
    wide = torch.float32 if dtype == torch.float16 else dtype
    numbers = codes.to(wide).sub_(128) if kind == "int8" else codes.view(torch.float8_e4m3fn).to(wide)
    return numbers.mul_(scales.to(wide).unsqueeze(-1)).to(dtype)


def cache_bytes(num_numbers: int, head_dim: int, kind: str | None, dtype: torch.dtype) -> int:
    """Bytes of so many keys and values, scales included."""
    if kind is None:
        return num_numbers * dtype.itemsize
    return num_numbers * CODE_DTYPE.itemsize + num_numbers // head_dim * SCALE_DTYPE.itemsize
