"""Shapes of the programs of the decoding kernels; importing them needs no Triton."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VectorConfig:
    """Shape of a program of a product with one vector.

    Attributes:
        rows: weight rows per program.
        num_warps: warps that share each row, 512 bytes a warp and load.
        wave: programs that run at once, about; each asks for weights of later ones too while it waits. 0: for none.
        ahead: how many waves' weights are asked for so.
    """

    rows: int = 4
    num_warps: int = 4
    wave: int = 0
    ahead: int = 1

    def chunk(self, width: int, itemsize: int) -> int:
        """Columns that all warps load at once, 16 bytes a thread; a power of two."""
        whole = self.num_warps * 32 * 16 // itemsize
        return min(whole, 1 << (width - 1).bit_length())

    def asked_ahead(self, rows: int, num_rows: int) -> tuple[int, int]:
        """First row and number of rows that the first wave asks for, of programs of ``rows`` rows each."""
        first = min(self.wave * rows, num_rows)
        return first, min(self.wave * self.ahead * rows, num_rows - first)


@dataclass(frozen=True)
class AttentionConfig:
    """Shape of a program of attention.

    Attributes:
        splits: programs that share the keys of a head.
        block: keys per step.
        num_warps: warps per program.
        num_stages: steps whose keys and values are in flight.
    """

    splits: int = 8
    block: int = 32
    num_warps: int = 4
    num_stages: int = 3
