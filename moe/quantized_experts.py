"""Experts whose weights are held in few bits; they follow the protocol of ``moe.experts.Experts``.

Prefill and decode kernels read codes and scales directly where they can run. Else the experts that have tokens are
restored one at a time, so that no more than one expert's weights exist beside the codes.
"""

import torch

from moe.experts import ACTIVATIONS, combine, combine_in_order, sort_by_expert
from moe.kernels import backend as kernels_backend
from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.config import WeightFormat
from phi35.quantization.linear import kernels_take, quantized_linear
from phi35.quantization.modules import FewBitModule


class QuantizedExperts(FewBitModule):
    """E gated feed-forwards in few bits: ``gate_up_proj`` (E, 2F, D), gate first, and ``down_proj`` (E, D, F).

    Forward only; gradients reach the tokens, not the weights.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        one: WeightFormat,
        scale_dtype: torch.dtype,
        hidden_act: str = "silu",
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_act = num_experts, hidden_act
        self.hold("gate_up_proj", one, (num_experts, 2 * intermediate_size, hidden_size), scale_dtype)
        self.hold("down_proj", one, (num_experts, hidden_size, intermediate_size), scale_dtype)

    @property
    def qweight(self) -> torch.Tensor:
        """The codes of ``gate_up_proj``, by the name under which PEFT looks for a quantized layer's device."""
        return self.held("gate_up_proj").codes

    def forward(
        self, hidden_states: torch.Tensor, expert_indices: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts: (N, D) from (N, D), (N, k) and (N, k), as ``Experts.forward``."""
        given = (hidden_states, expert_indices, expert_weights)
        weights = (self.held("gate_up_proj"), self.held("down_proj"))
        if not (torch.is_grad_enabled() and hidden_states.requires_grad) and _kernels_take(hidden_states, weights[0]):
            from moe.kernels import quantized

            return quantized.run_experts(*given, *weights, self.hidden_act)
        return loop(*given, *weights, self.hidden_act)

    def has_kernels_for_few(self, hidden_states: torch.Tensor) -> bool:
        """As ``Experts.has_kernels_for_few``."""
        return _kernels_take(hidden_states, self.held("gate_up_proj"))

    def combine_choices(self, rows: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
        """As ``Experts.combine_choices``."""
        if self.has_kernels_for_few(rows):
            return kernels_backend.combine_choices(rows, expert_weights)
        return combine_in_order(rows, expert_weights, rows.dtype)


def _kernels_take(hidden_states: torch.Tensor, weight: QuantizedTensor) -> bool:
    # Matrix units would round float32 activations.
    return hidden_states.dtype != torch.float32 and kernels_take(hidden_states, weight)


def loop(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: QuantizedTensor,
    down_proj: QuantizedTensor,
    hidden_act: str = "silu",
) -> torch.Tensor:
    """A pair of products per expert that has tokens, on any device; reads the counts on the host."""
    rows = sort_by_expert(hidden_states, expert_indices, gate_up_proj.shape[0])
    activation = ACTIVATIONS[hidden_act]
    ends = rows.ends.tolist()
    outputs = []
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start < end:
            gate, up = quantized_linear(rows.values[start:end], gate_up_proj.part(expert)).chunk(2, dim=-1)
            outputs.append(quantized_linear(activation(gate) * up, down_proj.part(expert)))
    joined = torch.cat(outputs) if outputs else rows.values
    return combine(joined, rows.inverse, expert_weights, hidden_states.dtype)
