"""The dense feed-forward: a gated linear unit (arXiv 2002.05202) with gate and up projection in one matrix.

phi-3-small's form of it, "gegelu", gates by quick GELU, adds one to what the gate multiplies, and clamps both. The
published code leaves infinite values unclamped, which no finite weight gives; here they are clamped too.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from phi35.config import ModelConfig
from phi35.fused import gated_activation
from phi35.outputs import RouterOutput
from phi35.recompute import given_again

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu}


def gegelu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """quick_gelu(min(gate, limit)) * (clamp(up, -limit, limit) + 1), quick_gelu(x) = x sigmoid(1.702 x)."""
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-limit, limit) + 1.0)


class GatedMLP(nn.Module):
    """down_proj(act(gate) * up), with ``gate_up_proj`` holding the gate's rows first.

    Args:
        config: the model.
        intermediate_size: width; None takes that of the config's dense layers.

    Attributes:
        fused: gate by ``phi35.fused``.
        lean: gate once more in the backward pass instead of keeping the result.
    """

    fused = lean = False

    def __init__(self, config: ModelConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = intermediate_size or config.dense_intermediate_size or config.intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.hidden_act, self.limit = config.hidden_act, config.gegelu_limit

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, RouterOutput | None]:
        """Map (B, T, D) to ((B, T, D), None): the dense layer routes nothing."""
        gate_up = self.gate_up_proj(hidden_states)
        if not (self.fused or self.lean):
            gate, up = gate_up.chunk(2, dim=-1)
            if self.limit is not None:
                return self.down_proj(gegelu(gate, up, self.limit)), None
            return self.down_proj(ACTIVATIONS[self.hidden_act](gate) * up), None
        acted, source = gated_activation(gate_up, self.hidden_act, self.limit), gate_up.detach()
        with given_again(acted, lambda: gated_activation(source, self.hidden_act, self.limit), enabled=self.lean):
            return self.down_proj(acted), None
