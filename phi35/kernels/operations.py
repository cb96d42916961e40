"""The operations of a decoding step by one signature, in three makes: plain torch, a batch, and one token.

B rows, hidden (B, D). An operation takes the model's own modules, so that what it does not know (quantized weights,
adapters) runs as the module runs it. Each make is made for one step of fixed batch and cache and writes into the
buffers it is handed, so that a step can be captured in a CUDA graph.
"""

from typing import Any

import torch
from torch import nn

from phi35.feed_forward import GatedMLP
from phi35.kernels import reference
from phi35.kernels.operands import LayerCache, Norm, Rope, StepState
from phi35.kernels.reference import normed
from phi35.kernels.tuning import StepTuning
from phi35.language_model_head import LanguageModelHead
from phi35.registry import resolve


class PlainOperations:
    """Any device, dtype and batch, in torch. The choice is greedy alone; other choices are the host's."""

    def __init__(self, hidden_act: str, sliding_window: int | None) -> None:
        self.hidden_act, self.window = hidden_act, sliding_window

    def follow(self, decoder: Any) -> None:
        """Told once, before the first step, whose layers it will be called for."""

    def embed(self, tokens: torch.Tensor, embedding: Any, hidden: torch.Tensor) -> None:
        """hidden = embeddings of the tokens (B,)."""
        hidden.copy_(embedding(tokens))

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
        """Norm, product, rotation; query (B, H d) and one slot of each row of the cache are written."""
        projected = linear(normed(hidden, norm))
        reference.rotate_and_store(projected, rope, state.lengths, state.rope_long, query, cache)

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        state: StepState,
        out: torch.Tensor,
        following: tuple[Any, Any],
    ) -> None:
        """out (B, H d) = attention over the cache, the new token included; ``following``: o_proj and feed-forward."""
        reference.attend(query, cache, state.lengths, out, self.window)

    def project_add(self, vector: torch.Tensor, linear: Any, hidden: torch.Tensor) -> None:
        """hidden += product of a vector (B, W)."""
        hidden.add_(linear(vector))

    def dense(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """hidden += the dense feed-forward of the normed hidden."""
        hidden.add_(mlp(normed(hidden, norm))[0])

    def sparse(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """hidden += the sparse feed-forward of the normed hidden."""
        hidden.add_(mlp(normed(hidden, norm)[:, None])[0][:, 0])

    def project_logits(self, hidden: torch.Tensor, norm: Norm, head: Any, logits: torch.Tensor) -> None:
        """logits (B, V) float32 = head of the normed hidden."""
        logits.copy_(head(normed(hidden, norm)))

    def choose(self, logits: torch.Tensor, state: StepState) -> None:
        """The next tokens; moves the state on."""
        reference.choose(logits, state)


class BatchOperations(PlainOperations):
    """A batch on CUDA: products as the modules make them (cuBLAS), everything between them by kernels."""

    def __init__(
        self, hidden_act: str, sliding_window: int | None, cache: LayerCache, num_heads: int, tuning: StepTuning
    ) -> None:
        from phi35.kernels import attention, batched, sampling

        super().__init__(hidden_act, sliding_window)
        self._attention, self._batched, self._sampling = attention, batched, sampling
        self.tuning, self.pdl = tuning, False
        batch, num_kv = cache.num_rows // cache.repeats, cache.num_kv
        group = cache.repeats * (num_heads // num_kv)
        self.attention_config = tuning.attention(batch, num_kv, group, cache.num_slots, cache.kind is not None)
        splits, device = self.attention_config.splits, cache.keys.device
        self.scratch = attention.AttentionScratch(batch, num_kv, group, cache.head_dim, splits, device)

    def embed(self, tokens: torch.Tensor, embedding: Any, hidden: torch.Tensor) -> None:
        """See ``PlainOperations``."""
        if type(embedding) is not nn.Embedding:
            return super().embed(tokens, embedding, hidden)
        self._sampling.embed(tokens, embedding.weight, hidden, self.pdl)

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
        projected = linear(normed(hidden, norm))
        self._batched.rotate_and_store(projected, rope, state.lengths, state.rope_long, query, cache)

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        state: StepState,
        out: torch.Tensor,
        following: tuple[Any, Any],
    ) -> None:
        """See ``PlainOperations``."""
        options = (self.scratch, self.window, self.attention_config, self.pdl)
        self._attention.attend(query, cache, state.lengths, out, *options, self._ahead(*following))

    def _ahead(self, linear: Any, mlp: Any) -> tuple[torch.Tensor, ...]:
        """Weights to bring into the cache during attention: none where the products read them more than once."""
        return ()

    def project_add(self, vector: torch.Tensor, linear: Any, hidden: torch.Tensor) -> None:
        """See ``PlainOperations``."""
        if not is_plain(linear, hidden.dtype):
            return super().project_add(vector, linear, hidden)
        hidden.addmm_(vector, linear.weight.t())
        if linear.bias is not None:
            hidden.add_(linear.bias)

    def dense(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``PlainOperations``."""
        if type(mlp) is not GatedMLP:
            return super().dense(hidden, norm, mlp)
        gate_up = mlp.gate_up_proj(normed(hidden, norm))
        acted = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self._batched.gate_rows(gate_up, acted, self.hidden_act)
        self.project_add(acted, mlp.down_proj, hidden)

    def choose(self, logits: torch.Tensor, state: StepState) -> None:
        """See ``PlainOperations``."""
        self._sampling.choose(logits, state, self.pdl)


class ModuleOperations(BatchOperations):
    """A batch on CUDA of a model whose feed-forward or head the kernels do not know: those run as their modules do."""

    def dense(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``PlainOperations``."""
        PlainOperations.dense(self, hidden, norm, mlp)


class VectorOperations(BatchOperations):
    """One token on CUDA: plain weights by kernels, each launched while its predecessor still runs."""

    def __init__(
        self,
        hidden_act: str,
        sliding_window: int | None,
        cache: LayerCache,
        num_heads: int,
        tuning: StepTuning,
        pdl: bool,
    ) -> None:
        from phi35.kernels import vector

        super().__init__(hidden_act, sliding_window, cache, num_heads, tuning)
        self._vector, self.pdl, self.dtype = vector, pdl, cache.dtype
        self._acted: dict[int, torch.Tensor] = {}
        self._projected: dict[int, torch.Tensor] = {}
        self._sparse_scratch: dict[tuple[int, ...], Any] = {}

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
        if not is_plain(linear, hidden.dtype):
            return super().project_qkv(hidden, norm, linear, rope, state, query, cache)
        if cache.kind is not None:
            projected = self._projected.setdefault(len(linear.weight), hidden.new_empty(1, len(linear.weight)))
            options = (self.tuning.qkv, self.pdl)
            self._vector.project_logits(hidden, norm, linear.weight, linear.bias, projected, *options)
            return self._rotate_and_store(projected, rope, state, query, cache)
        operands = (hidden, norm, linear.weight, linear.bias, rope, state.lengths, state.rope_long)
        self._vector.project_qkv(*operands, query, cache, self.tuning.qkv, self.pdl)

    def _rotate_and_store(
        self, projected: torch.Tensor, rope: Rope, state: StepState, query: torch.Tensor, cache: LayerCache
    ) -> None:
        """The rest of ``project_qkv`` where a head's scale takes all of its numbers, which lie in many programs."""
        self._batched.rotate_and_store(projected, rope, state.lengths, state.rope_long, query, cache, self.pdl)

    def _ahead(self, linear: Any, mlp: Any) -> tuple[torch.Tensor, ...]:
        """As much of o_proj, then of the dense gate and up rows, as ``tuning.ahead_bytes`` allows."""
        dtype = self.dtype
        if not self.pdl or not self.tuning.ahead_bytes or not is_plain(linear, dtype):
            return ()
        room = self.tuning.ahead_bytes // linear.weight.element_size()
        rows = min(linear.weight.shape[0], room // linear.weight.shape[1])
        regions = [linear.weight[:rows]]
        if type(mlp) is GatedMLP and is_plain(mlp.gate_up_proj, dtype):
            weight = mlp.gate_up_proj.weight
            half = weight.shape[0] // 2
            rows = min(half, (room - regions[0].numel()) // (2 * weight.shape[1]))
            if rows > 0:
                regions += [weight[:rows], weight[half : half + rows]]
        return tuple(regions)

    def project_add(self, vector: torch.Tensor, linear: Any, hidden: torch.Tensor) -> None:
        """See ``PlainOperations``."""
        if not is_plain(linear, hidden.dtype):
            return super().project_add(vector, linear, hidden)
        config = self.tuning.add(vector.shape[1])
        self._vector.project_add(vector, linear.weight, linear.bias, hidden, config, self.pdl)

    def dense(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``PlainOperations``."""
        if type(mlp) is not GatedMLP or not is_plain(mlp.gate_up_proj, hidden.dtype):
            return super().dense(hidden, norm, mlp)
        weight = mlp.gate_up_proj.weight
        acted = self._acted.setdefault(weight.shape[0], hidden.new_empty(1, weight.shape[0] // 2))
        self._vector.project_gate_up(hidden, norm, weight, acted, self.hidden_act, self.tuning.gate_up, self.pdl)
        self.project_add(acted, mlp.down_proj, hidden)

    def sparse(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``PlainOperations``."""
        if resolve("decoding.sparse_limit")(mlp, hidden.dtype) is not None:
            return super().sparse(hidden, norm, mlp)
        token = resolve("decoding.sparse")(mlp, hidden, norm, self._sparse_scratch, self.tuning, self.pdl)
        if mlp.shared_expert is not None:
            shared = mlp.shared_expert.gate_up_proj.weight
            acted = self._acted.setdefault(shared.shape[0], hidden.new_empty(1, shared.shape[0] // 2))
            none = Norm("none", norm.weight, norm.bias, norm.eps)
            self._vector.project_gate_up(token, none, shared, acted, self.hidden_act, self.tuning.gate_up, self.pdl)
            self.project_add(acted, mlp.shared_expert.down_proj, hidden)

    def project_logits(self, hidden: torch.Tensor, norm: Norm, head: Any, logits: torch.Tensor) -> None:
        """See ``PlainOperations``."""
        if not is_plain(head, hidden.dtype):
            return super().project_logits(hidden, norm, head, logits)
        self._vector.project_logits(hidden, norm, head.weight, head.bias, logits, self.tuning.logits, self.pdl)


def is_plain(linear: Any, dtype: torch.dtype) -> bool:
    """Whether a module is nothing but a matrix of this dtype (and a bias) whose rows the kernels can read."""
    if type(linear) not in (nn.Linear, LanguageModelHead) or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    weight = linear.weight
    return weight.dtype == dtype and weight.is_contiguous() and weight.shape[1] % 8 == 0
