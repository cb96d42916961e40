"""GPTQ (arXiv 2210.17323): codes that make up for each other's rounding, given what the weight is multiplied with.

A weight's columns are rounded one after the other, the most used first (in the order of the Hessian's diagonal); what a
column loses is added to those still to come. Grids are fixed before, group by group in the stored order, with squared
errors counted by the diagonal: so no permutation has to be stored.
"""

from dataclasses import dataclass

import torch

from phi35.quantization.codes import QuantizedTensor, fit_grid
from phi35.quantization.config import WeightFormat

DAMPING = 0.01
"""Share of the diagonal's mean that is added to it."""
BLOCK = 128
"""Columns whose losses are passed on together."""


@dataclass
class Hessian:
    """Sum of outer products of a weight's inputs: twice the layer's squared error is quadratic in it.

    Attributes:
        matrix: (columns, columns) float32.
        num_tokens: inputs that were added.
    """

    matrix: torch.Tensor
    num_tokens: int = 0

    @classmethod
    def new(cls, columns: int, device: torch.device) -> "Hessian":
        """Zero."""
        return cls(torch.zeros(columns, columns, device=device))

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs (..., columns)."""
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        self.matrix.addmm_(flat.T, flat)
        self.num_tokens += flat.shape[0]


def gptq(weight: torch.Tensor, one: WeightFormat, scale_dtype: torch.dtype, hessian: Hessian) -> QuantizedTensor:
    """Quantize (rows, columns) for the inputs that the Hessian has seen.

    Args:
        weight: (rows, columns) in any floating dtype.
        one: the format.
        scale_dtype: of 16-bit scales.
        hessian: of its inputs.

    Raises:
        ValueError: if the Hessian cannot be inverted, as with inputs that are no numbers.
    """
    weight = weight.to(hessian.matrix.device, torch.float32)
    rows, columns = weight.shape
    used = hessian.matrix.diagonal().clone()
    order = used.argsort(descending=True, stable=True)
    grid = fit_grid(weight, one, scale_dtype, importance=used + 1e-3 * used.mean() + 1e-30)
    group = torch.arange(columns, device=weight.device) // (columns // grid.zero.shape[1])
    scale, zero = grid.scale[:, group[order]], grid.zero[:, group[order]]
    factor = _inverse_factor(hessian.matrix, order)
    left, codes = weight[:, order], torch.empty_like(weight)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        block, losses = left[:, first:last].clone(), torch.empty(rows, last - first, device=weight.device)
        for place in range(last - first):
            at = first + place
            value, step, shift = block[:, place], scale[:, at], zero[:, at]
            code = grid.encode(value, step, shift)
            codes[:, at] = code
            losses[:, place] = (value - (code - shift) * step) / factor[at, at]
            block[:, place + 1 :] -= losses[:, place, None] * factor[at, at + 1 : last]
        left[:, last:] -= losses @ factor[first:last, last:]
    stored = torch.empty_like(codes)
    stored[:, order] = codes
    return grid.pack(stored)


def relative_loss(weight: torch.Tensor, restored: torch.Tensor, hessian: Hessian) -> float:
    """|| (weight - restored) X || / || weight X || over the inputs X that the Hessian has seen."""
    matrix = hessian.matrix
    weight = weight.to(matrix.device, torch.float32)
    lost = weight - restored.to(weight)
    whole = float(((weight @ matrix) * weight).sum())
    return float(((lost @ matrix) * lost).sum().clamp(min=0) / whole) ** 0.5 if whole > 0 else 0.0


def _inverse_factor(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, its columns in ``order``."""
    ordered = matrix[order][:, order]
    mean = float(ordered.diagonal().mean())
    eye = torch.arange(ordered.shape[0], device=ordered.device)
    damping = DAMPING * mean if mean > 0 else 1.0
    for _ in range(5):
        ordered[eye, eye] += damping
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return factor
        damping *= 10
    raise ValueError("calibration inputs give no usable statistics: are there values that are no numbers?")
