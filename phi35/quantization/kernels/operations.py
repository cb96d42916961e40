"""The operations of a captured decoding step of one token for models whose weights are in few bits.

What is not quantized runs as in any other model (``phi35.kernels.operations``).
"""

from typing import Any

import torch

from phi35.feed_forward import GatedMLP
from phi35.kernels.operands import LayerCache, Norm, Rope, StepState, norm_of
from phi35.kernels.operations import VectorOperations
from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.kernels import vector as kernels
from phi35.quantization.kernels.prepared import Prepared, buffer_words
from phi35.quantization.kernels.shapes import SPAN, FewBitShapes, WordConfig, choose
from phi35.quantization.modules import QuantizedHead, QuantizedLinear
from phi35.registry import resolve


class FewBitOperations(VectorOperations):
    """One token on CUDA; each product of a quantized weight is one kernel, with norm, gate and residual in it.

    Where a product's result goes to another product in few bits, its kernel leaves it there as integers too
    (``prepared``); ``follow`` says which those are.

    Attributes:
        shapes: how the kernels run; set before the step is captured.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.shapes = FewBitShapes()
        self._readers: dict[int, tuple[Any, Norm]] = {}
        self._buffers: dict[tuple[int, bool], torch.Tensor] = {}
        self._left: tuple[Any, Prepared] | None = None

    def follow(self, decoder: Any) -> None:
        """Note which product reads what a residual product writes, and behind which norm."""
        layers = list(decoder.layers)
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            if type(layer.mlp) is not GatedMLP:
                continue
            norm = norm_of(layer.post_attention_layernorm)
            self._readers[id(layer.self_attn.o_proj)] = (layer.mlp.gate_up_proj, norm)
            if after is not None:
                norm = norm_of(after.input_layernorm)
                self._readers[id(layer.mlp.down_proj)] = (after.self_attn.qkv_proj, norm)

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
        weight, source = few_bits(linear), self._take(linear)
        if weight is None:
            return super().project_qkv(hidden, norm, linear, rope, state, query, cache)
        config = self._config(self.shapes.qkv, weight, source)
        if cache.kind is not None:
            projected = self._projected.setdefault(weight.shape[0], hidden.new_empty(1, weight.shape[0]))
            kernels.project(hidden, norm, weight, linear.bias, projected, config, self.pdl, source=source)
            return self._rotate_and_store(projected, rope, state, query, cache)
        inputs = (hidden, norm, weight, linear.bias, rope, state.lengths, state.rope_long)
        kernels.project_qkv(*inputs, query, cache, config, self.pdl, source)

    def project_add(self, vector: torch.Tensor, linear: Any, hidden: torch.Tensor) -> None:
        """See ``PlainOperations``."""
        weight, source = few_bits(linear), self._take(linear)
        if weight is None:
            return super().project_add(vector, linear, hidden)
        given = self.shapes.short_add if weight.shape[1] <= 4096 else self.shapes.long_add
        reader, norm = self._readers.get(id(linear), (None, None))
        config = self._config(given, weight, source, self._is_left_to(reader))
        target = self._target(reader, norm, weight.shape[0], config.rows)
        kernels.project(vector, None, weight, linear.bias, hidden, config, self.pdl, True, source, target)

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
        kernels.project(hidden, norm, weight, head.bias, logits, choose(weight), self.pdl)

    def _gate_up_down(self, source: torch.Tensor, norm: Norm, mlp: Any, hidden: torch.Tensor) -> None:
        """hidden += the feed-forward of the normed source."""
        weight, left = mlp.gate_up_proj.held(), self._take(mlp.gate_up_proj)
        acted = self._acted.setdefault(weight.shape[0], source.new_empty(1, weight.shape[0] // 2))
        config = self._config(self.shapes.gate_up, weight, left)
        target = self._target(mlp.down_proj, None, weight.shape[0] // 2, config.rows // 2)
        kernels.project_gate_up(source, norm, weight, acted, self.hidden_act, config, self.pdl, left, target)
        self.project_add(acted, mlp.down_proj, hidden)

    def _config(
        self, given: WordConfig | None, weight: QuantizedTensor, source: Prepared | None, leaves: bool = False
    ) -> WordConfig:
        """The shape that was asked for, unless it needs a prepared vector where there is none."""
        if given is None or (source is None and given.groups > 1):
            return choose(weight, source is not None, leaves)
        return given

    def _is_left_to(self, reader: Any) -> bool:
        """Whether vectors are left as integers for a product."""
        weight = None if reader is None else few_bits(reader)
        if weight is None or weight.format.type != "int":
            return False
        return self.shapes.prepares if weight.format.bits == 4 else self.shapes.prepares_bytes

    def _target(self, reader: Any, norm: Norm | None, width: int, rows: int) -> Prepared | None:
        """Where to leave a vector of ``width`` for the product ``reader``, from programs of ``rows`` rows; or None."""
        weight = few_bits(reader) if self._is_left_to(reader) else None
        if weight is None or (norm is not None and norm.kind != "rmsnorm"):
            return None
        if rows % SPAN or width % rows or width % (2 * SPAN):
            return None
        # A kernel may read one vector and leave another of the same width.
        place = width, norm is None
        if place not in self._buffers:
            self._buffers[place] = torch.zeros(buffer_words(width), dtype=torch.int32, device=weight.codes.device)
        prepared = Prepared(self._buffers[place], weight.format.kind, norm, 0 if norm is None else width // rows)
        self._left = reader, prepared
        return prepared

    def _take(self, linear: Any) -> Prepared | None:
        """What the kernel before has left for this product, or None."""
        left, self._left = self._left, None
        return left[1] if left is not None and left[0] is linear else None


def few_bits(linear: Any) -> QuantizedTensor | None:
    """The quantized weight of a module that is nothing but that (and a bias); None for any other module."""
    if type(linear) not in (QuantizedLinear, QuantizedHead) or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    return linear.held()
