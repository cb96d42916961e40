"""Normalisation layers: RMSNorm (arXiv 1910.07467) for the dense models, LayerNorm for Phi-3.5-MoE."""

import torch
from torch import nn
from torch.nn import functional as F

from phi35.config import ModelConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 and returned in the input's dtype."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise (..., D) to (..., D)."""
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm that a config asks for, over ``hidden_size``."""
    if config.norm_type == "rmsnorm":
        return RMSNorm(config.hidden_size, config.rms_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
