"""Which kernel runs which product: a table from measurements (docs/moe.md), not a search at run time."""

from dataclasses import dataclass

import torch

from moe.kernels.decode import DecodeConfig
from moe.kernels.grouped_gemm import GemmConfig
from moe.kernels.hopper_config import HopperConfig, fits

ProductConfig = GemmConfig | HopperConfig


@dataclass(frozen=True)
class Tuning:
    """How each of the six grouped products runs.

    Attributes:
        up: rows times gate_up_proj, gated in the epilogue.
        down: rows times down_proj.
        down_rows: gradient of the rows of ``down``.
        up_rows: gradient of the rows of ``up``.
        down_weights: gradient of down_proj.
        up_weights: gradient of gate_up_proj.
    """

    up: ProductConfig
    down: ProductConfig
    down_rows: ProductConfig
    up_rows: ProductConfig
    down_weights: ProductConfig
    up_weights: ProductConfig


# H200, hidden 4096, ffn 6400, 16 experts, top-2, bfloat16, Triton 3.6, TFLOP/s at 4,096 and 16,384 tokens:
#                      torch grouped    Triton      Hopper (Gluon)
#   up, gated, saved        -         543, 574        633, 622
#   down                628, 666      691, 673        654, 651
#   down_rows           603, 645      668, 669        668, 652
#   up_rows             588, 652      698, 688        634, 665
#   down_weights        466, 630      480, 624        615, 645
#   up_weights          474, 653      513, 652        640, 674
# The gradients of weights have short sums, so that stores under the next tile's loads decide; in the others the plain
# pipeline's common load of both halves wins.
_WIDE = GemmConfig()
HOPPER = Tuning(
    up=HopperConfig(num_stages=4),
    down=_WIDE,
    down_rows=_WIDE,
    up_rows=_WIDE,
    down_weights=HopperConfig(),
    up_weights=HopperConfig(),
)
PORTABLE = Tuning(up=_WIDE, down=_WIDE, down_rows=_WIDE, up_rows=_WIDE, down_weights=_WIDE, up_weights=_WIDE)
_NARROW = GemmConfig(block_n=64, block_k=32)
INTERPRETED = Tuning(
    up=_NARROW, down=_NARROW, down_rows=_NARROW, up_rows=_NARROW, down_weights=_NARROW, up_weights=_NARROW
)


def choose(dtype: torch.dtype, device: torch.device, widths: tuple[int, int], hidden_act: str) -> Tuning:
    """Configuration for this dtype and device, (hidden_size, intermediate_size) and activation."""
    if device.type != "cuda":
        return INTERPRETED
    # The Hopper kernels know bfloat16 and silu, and Blackwell has other matrix instructions.
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if hopper and dtype == torch.bfloat16 and hidden_act == "silu" and fits(*widths):
        return HOPPER
    return PORTABLE


def choose_decode(num_tokens: int) -> DecodeConfig:
    """Configuration of the small-batch path."""
    # Up to 16 tokens share a tile; more make it larger, which the deeper pipeline no longer fits into.
    return DecodeConfig() if num_tokens <= 16 else DecodeConfig(depth=128)
