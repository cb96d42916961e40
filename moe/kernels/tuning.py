"""Which product runs how, by size: a table from measurements (docs/moe.md), not a search at run time."""

from dataclasses import dataclass

import torch

from moe.kernels.decode import DecodeConfig
from moe.kernels.grouped_gemm import GemmConfig


@dataclass(frozen=True)
class Tuning:
    """How each of the six grouped products runs: a Triton configuration, or None for torch's grouped product.

    Attributes:
        up: rows times gate_up_proj, gated in the epilogue (with None: in a pass of its own).
        down: rows times down_proj.
        down_rows: gradient of the rows of ``down``.
        up_rows: gradient of the rows of ``up``.
        down_weights: gradient of down_proj.
        up_weights: gradient of gate_up_proj.
    """

    up: GemmConfig | None = GemmConfig()
    down: GemmConfig | None = GemmConfig()
    down_rows: GemmConfig | None = GemmConfig()
    up_rows: GemmConfig | None = GemmConfig()
    down_weights: GemmConfig | None = GemmConfig()
    up_weights: GemmConfig | None = GemmConfig()


def choose(num_pairs: int, dtype: torch.dtype, device: torch.device) -> Tuning:
    """Configuration for N k pairs on this device."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        small = GemmConfig(block_n=64, block_k=32)  # float32 in the interpreter, or float16
        return Tuning(up=small, down=small, down_rows=small, up_rows=small, down_weights=small, up_weights=small)
    return Tuning()


def choose_decode(num_tokens: int) -> DecodeConfig:
    """Configuration of the small-batch path."""
    return DecodeConfig()
