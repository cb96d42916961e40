"""Normalisation layers: RMSNorm (arXiv 1910.07467) for the dense models, LayerNorm for Phi-3.5-MoE."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from phi35.config import ModelConfig
from phi35.fused import add_norm
from phi35.jitter import Jitter


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 and returned in the input's dtype.

    Attributes:
        fused: take ``add_norm`` by ``phi35.fused``.
    """

    fused = False

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        keep: bool = False,
        jitter: Jitter | None = None,
    ) -> Any:
        """Normalise (..., D) to (..., D).

        Args:
            hidden_states: (..., D).
            residual: (..., D) added first.
            keep: return the sum too: (sum, normalised).
            jitter: multiplies the result.
        """
        if self.fused:
            total, normed = add_norm(hidden_states, residual, self.weight, None, self.eps, False, jitter)
        else:
            total = hidden_states if residual is None else hidden_states + residual
            normed = F.rms_norm(total, self.weight.shape, self.weight, self.eps)
            normed = normed if jitter is None else normed * jitter.noise(normed)
        return (total, normed) if keep else normed

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm with the interface of ``RMSNorm``."""

    fused = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        keep: bool = False,
        jitter: Jitter | None = None,
    ) -> Any:
        """As ``RMSNorm.forward``."""
        if self.fused:
            total, normed = add_norm(hidden_states, residual, self.weight, self.bias, self.eps, True, jitter)
        else:
            total = hidden_states if residual is None else hidden_states + residual
            normed = super().forward(total)
            normed = normed if jitter is None else normed * jitter.noise(normed)
        return (total, normed) if keep else normed


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm that a config asks for, over ``hidden_size``."""
    if config.norm_type == "rmsnorm":
        return RMSNorm(config.hidden_size, config.rms_norm_eps)
    return LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
