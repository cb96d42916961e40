"""DoRA (arXiv 2402.09353) of weights in few bits: rows of W + s B A have trained lengths, apart from their directions.

A row is m (w + s b A) / |w + s b A|. As in the paper's section 4.3 the denominator gets no gradient. The whole matrix
is never restored for it:

    |w + s b A|^2 = |w|^2 + 2 s (w A^T) . b + s^2 b (A A^T) b^T

The first term follows from the codes and is worked out once; the second costs one product of the codes with the r rows
of A.
"""

import torch
from torch import nn

from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.linear import blocks_of_rows, product


class Magnitude(nn.Module):
    """The trained lengths m of the rows, by PEFT's name ``lora_magnitude_vector.<adapter>.weight`` (out,) float32.

    Args:
        lengths: (out,) those of the rows as they are.
    """

    def __init__(self, lengths: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(lengths)

    def forward(self, lengths: torch.Tensor) -> torch.Tensor:
        """What the rows of lengths (out,) are multiplied with to have the trained ones."""
        return self.weight / lengths


class RowSquares:
    """Squared lengths of a quantized weight's rows, worked out again only where the codes are others."""

    def __init__(self) -> None:
        self._key: tuple[tuple[int, int], ...] | None = None
        self._squares: torch.Tensor | None = None

    def __call__(self, weight: QuantizedTensor) -> torch.Tensor:
        """(rows,) float32."""
        # A tensor made in inference mode cannot be changed outside of it, and counts no versions.
        tensors = weight.tensors().values()
        key = tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors)
        if self._squares is None or key != self._key:
            parts = [block.square().sum(dim=1) for block in blocks_of_rows(weight, torch.float32)]
            self._key, self._squares = key, torch.cat(parts)
        return self._squares


@torch.no_grad()
def row_lengths(
    weight: QuantizedTensor, squares: torch.Tensor, first: nn.Module, second: nn.Module, scaling: float
) -> torch.Tensor:
    """Lengths (out,) float32 of the rows of W + s B A.

    Args:
        weight: W (out, in).
        squares: (out,) float32, those of W.
        first: the linear layer of A (r, in).
        second: that of B (out, r).
        scaling: s.
    """
    narrow, wide = _matrix(first).float(), _matrix(second).float()
    across = product(narrow, weight).float().T  # (out, r)
    total = squares + scaling * ((2 * across + scaling * (wide @ (narrow @ narrow.T))) * wide).sum(dim=1)
    return total.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()


def _matrix(layer: nn.Module) -> torch.Tensor:
    """A linear layer's weight; under ZeRO-3, which gathers it for the layer's own pass alone, by such a pass."""
    weight = layer.get_parameter("weight")
    if not hasattr(weight, "ds_id"):
        return weight
    columns = layer.in_features
    assert isinstance(columns, int)
    rows: torch.Tensor = layer(torch.eye(columns, dtype=weight.dtype, device=weight.device))
    return rows.T
