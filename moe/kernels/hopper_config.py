"""Settings of the Hopper products, apart from the kernels so that choosing them imports no Gluon."""

from dataclasses import dataclass

BLOCK_K = 64  # depth per stage, and the unit that matrix widths must be multiples of


@dataclass(frozen=True)
class HopperConfig:
    """Tile sizes of one kind of product.

    Attributes:
        block_n: columns of the output per tile; for the gated product half are gate, half up.
        num_stages: stages in the ring.
        group: row tiles swept together over the columns, to reuse operands in the L2 cache.
        waves: as in ``moe.kernels.grouped_gemm.GemmConfig``.
    """

    block_n: int = 256
    num_stages: int = 3
    group: int = 16
    waves: int = 1


def fits(*sizes: int) -> bool:
    """Whether the kernels take matrices of these widths: whole depth blocks, so that no block spans two experts."""
    return all(size % BLOCK_K == 0 for size in sizes)
