"""The operations of a captured decoding step of one token for models whose weights are in few bits.

What is not quantized runs as in any other model (``phi35.kernels.operations``).
"""

from typing import Any

import torch

from phi35.feed_forward import GatedMLP
from phi35.kernels.operands import LayerCache, Norm, Rope, StepState
from phi35.kernels.operations import VectorOperations
from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.kernels import vector as kernels
from phi35.quantization.modules import QuantizedHead, QuantizedLinear
from phi35.registry import resolve


class FewBitOperations(VectorOperations):
    """One token on CUDA; each product of a quantized weight is one kernel, with norm, gate and residual in it."""

    def project_qkv(
        self,
        hidden: torch.Tensor,
        norm: Norm,
        linear: Any,
        rope: Rope,
        state: StepState,
        query: torch.Tensor,
        cache: LayerCache,
    ) -> None:
        """See ``PlainOperations``."""
        weight = few_bits(linear)
        if weight is None:
            return super().project_qkv(hidden, norm, linear, rope, state, query, cache)
        if cache.kind is not None:
            projected = self._projected.setdefault(weight.shape[0], hidden.new_empty(1, weight.shape[0]))
            kernels.project(hidden, norm, weight, linear.bias, projected, kernels.choose(weight), self.pdl)
            return self._rotate_and_store(projected, rope, state, query, cache)
        inputs = (hidden, norm, weight, linear.bias, rope, state.lengths, state.rope_long)
        kernels.project_qkv(*inputs, query, cache, kernels.choose(weight), self.pdl)

    def project_add(self, vector: torch.Tensor, linear: Any, hidden: torch.Tensor) -> None:
        """See ``PlainOperations``."""
        weight = few_bits(linear)
        if weight is None:
            return super().project_add(vector, linear, hidden)
        kernels.project(vector, None, weight, linear.bias, hidden, kernels.choose(weight), self.pdl, add=True)

    def dense(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``PlainOperations``."""
        if type(mlp) is not GatedMLP or few_bits(mlp.gate_up_proj) is None:
            return super().dense(hidden, norm, mlp)
        self._gate_up_down(hidden, norm, mlp, hidden)

    def sparse(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``PlainOperations``."""
        shared = mlp.shared_expert
        plain_shared = shared is not None and few_bits(shared.gate_up_proj) is None
        if plain_shared or resolve("decoding.few_bit_sparse_limit")(mlp, hidden.dtype) is not None:
            return super().sparse(hidden, norm, mlp)
        token = resolve("decoding.few_bit_sparse")(mlp, hidden, norm, self._sparse_scratch, self.pdl)
        if shared is not None:
            self._gate_up_down(token, Norm("none", norm.weight, norm.bias, norm.eps), shared, hidden)

    def project_logits(self, hidden: torch.Tensor, norm: Norm, head: Any, logits: torch.Tensor) -> None:
        """See ``PlainOperations``."""
        weight = few_bits(head)
        if weight is None:
            return super().project_logits(hidden, norm, head, logits)
        kernels.project(hidden, norm, weight, head.bias, logits, kernels.choose(weight), self.pdl)

    def _gate_up_down(self, source: torch.Tensor, norm: Norm, mlp: Any, hidden: torch.Tensor) -> None:
        """hidden += the feed-forward of the normed source."""
        weight = mlp.gate_up_proj.held()
        acted = self._acted.setdefault(weight.shape[0], source.new_empty(1, weight.shape[0] // 2))
        kernels.project_gate_up(source, norm, weight, acted, self.hidden_act, kernels.choose(weight), self.pdl)
        self.project_add(acted, mlp.down_proj, hidden)


def few_bits(linear: Any) -> QuantizedTensor | None:
    """The quantized weight of a module that is nothing but that (and a bias); None for any other module."""
    if type(linear) not in (QuantizedLinear, QuantizedHead) or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    return linear.held()
