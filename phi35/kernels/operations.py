"""The operations of a decoding step by one signature, in three makes: one token, a batch, and plain torch.

Each make is made for one step of fixed batch and cache, and writes into the buffers it is handed, so that a step can be
captured in a CUDA graph.
"""

from typing import Any, Protocol

import torch
from torch.nn import functional as F

from phi35.kernels import reference
from phi35.kernels.operands import Norm, Rope, StepState
from phi35.kernels.reference import normed
from phi35.kernels.tuning import StepTuning
from phi35.registry import resolve


class Operations(Protocol):
    """What a step is made of; B rows, hidden (B, D). See ``phi35.kernels.reference`` for what each computes."""

    def embed(self, tokens: torch.Tensor, table: torch.Tensor, hidden: torch.Tensor) -> None:
        """hidden = rows of the embedding."""

    def project_qkv(
        self,
        hidden: torch.Tensor,
        norm: Norm,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rope: Rope,
        state: StepState,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Norm, product, rotation, store into the cache."""

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, state: StepState, out: torch.Tensor
    ) -> None:
        """Attention over the cache, the new token included."""

    def project_add(
        self, vector: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor
    ) -> None:
        """hidden += product."""

    def dense(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """hidden += the dense feed-forward of the normed hidden."""

    def sparse(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """hidden += the sparse feed-forward of the normed hidden."""

    def project_logits(
        self, hidden: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None, logits: torch.Tensor
    ) -> None:
        """Norm and head."""

    def choose(self, logits: torch.Tensor, state: StepState) -> None:
        """The next tokens; moves the state on."""


class PlainOperations:
    """Any device, dtype and batch, in torch; the choice is left to the host."""

    def __init__(self, hidden_act: str, sliding_window: int | None) -> None:
        self.hidden_act, self.window = hidden_act, sliding_window

    def embed(self, tokens: torch.Tensor, table: torch.Tensor, hidden: torch.Tensor) -> None:
        """See ``Operations``."""
        torch.index_select(table, 0, tokens, out=hidden)

    def project_qkv(
        self,
        hidden: torch.Tensor,
        norm: Norm,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rope: Rope,
        state: StepState,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """See ``Operations``."""
        reference.project_qkv(hidden, norm, weight, bias, rope, state.lengths, state.rope_long, query, keys, values)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, state: StepState, out: torch.Tensor
    ) -> None:
        """See ``Operations``."""
        reference.attend(query, keys, values, state.lengths, out, self.window)

    def project_add(
        self, vector: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor
    ) -> None:
        """See ``Operations``."""
        reference.project_add(vector, weight, bias, hidden)

    def dense(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``Operations``."""
        hidden.add_(mlp(normed(hidden, norm))[0])

    def sparse(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``Operations``."""
        hidden.add_(mlp(normed(hidden, norm)[:, None])[0][:, 0])

    def project_logits(
        self, hidden: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None, logits: torch.Tensor
    ) -> None:
        """See ``Operations``."""
        reference.project_logits(hidden, norm, weight, bias, logits)

    def choose(self, logits: torch.Tensor, state: StepState) -> None:
        """Greedy alone: moves the state on as the kernel does."""
        reference.choose(logits, state)


class BatchOperations(PlainOperations):
    """A batch on CUDA: products by cuBLAS, everything between them by kernels."""

    def __init__(
        self, hidden_act: str, sliding_window: int | None, keys: torch.Tensor, num_heads: int, tuning: StepTuning
    ) -> None:
        from phi35.kernels import attention, batched, sampling

        super().__init__(hidden_act, sliding_window)
        self._attention, self._batched, self._sampling = attention, batched, sampling
        self.tuning, self.pdl = tuning, False
        batch, num_kv, slots, head_dim = keys.shape
        self.attention_config = tuning.attention(batch, num_kv, num_heads // num_kv, slots)
        self.scratch = attention.AttentionScratch(
            batch, num_kv, num_heads // num_kv, head_dim, self.attention_config.splits, keys.device
        )

    def embed(self, tokens: torch.Tensor, table: torch.Tensor, hidden: torch.Tensor) -> None:
        """See ``Operations``."""
        self._sampling.embed(tokens, table, hidden, self.pdl)

    def project_qkv(
        self,
        hidden: torch.Tensor,
        norm: Norm,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rope: Rope,
        state: StepState,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """See ``Operations``."""
        projected = F.linear(normed(hidden, norm), weight, bias)
        self._batched.rotate_and_store(projected, rope, state.lengths, state.rope_long, query, keys, values)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, state: StepState, out: torch.Tensor
    ) -> None:
        """See ``Operations``."""
        self._attention.attend(
            query, keys, values, state.lengths, out, self.scratch, self.window, self.attention_config, self.pdl
        )

    def project_add(
        self, vector: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor
    ) -> None:
        """See ``Operations``."""
        hidden.addmm_(vector, weight.t())
        if bias is not None:
            hidden.add_(bias)

    def dense(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``Operations``."""
        gate_up = F.linear(normed(hidden, norm), mlp.gate_up_proj.weight)
        acted = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self._batched.gate_rows(gate_up, acted, self.hidden_act)
        hidden.addmm_(acted, mlp.down_proj.weight.t())

    def choose(self, logits: torch.Tensor, state: StepState) -> None:
        """See ``Operations``."""
        self._sampling.choose(logits, state, self.pdl)


class VectorOperations(BatchOperations):
    """One token on CUDA: everything by kernels, each launched while its predecessor still runs."""

    def __init__(
        self,
        hidden_act: str,
        sliding_window: int | None,
        keys: torch.Tensor,
        num_heads: int,
        tuning: StepTuning,
        pdl: bool,
    ) -> None:
        from phi35.kernels import vector

        super().__init__(hidden_act, sliding_window, keys, num_heads, tuning)
        self._vector, self.pdl = vector, pdl
        self._acted: dict[int, torch.Tensor] = {}
        self._sparse_scratch: dict[tuple[int, ...], Any] = {}

    def project_qkv(
        self,
        hidden: torch.Tensor,
        norm: Norm,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rope: Rope,
        state: StepState,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """See ``Operations``."""
        config = self.tuning.qkv
        operands = (hidden, norm, weight, bias, rope, state.lengths, state.rope_long, query, keys, values)
        self._vector.project_qkv(*operands, config, self.pdl)

    def project_add(
        self, vector: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor
    ) -> None:
        """See ``Operations``."""
        self._vector.project_add(vector, weight, bias, hidden, self.tuning.add(weight.shape[1]), self.pdl)

    def dense(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``Operations``."""
        gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
        width = down.shape[1]
        if width not in self._acted:
            self._acted[width] = hidden.new_empty(1, width)
        acted = self._acted[width]
        self._vector.project_gate_up(hidden, norm, gate_up, acted, self.hidden_act, self.tuning.gate_up, self.pdl)
        self.project_add(acted, down, None, hidden)

    def sparse(self, hidden: torch.Tensor, norm: Norm, mlp: Any) -> None:
        """See ``Operations``."""
        run = resolve("decoding.sparse")
        run(mlp, hidden, norm, self._sparse_scratch, self.tuning, self.pdl)
        if mlp.shared_expert is not None:
            # The router's kernel left the normed token behind.
            token = self._sparse_scratch[mlp.experts.down_proj.shape].normed
            shared = mlp.shared_expert
            plain = Norm("none", norm.weight, norm.bias, norm.eps)
            width = shared.down_proj.weight.shape[1]
            acted = self._acted.setdefault(width, hidden.new_empty(1, width))
            self._vector.project_gate_up(
                token, plain, shared.gate_up_proj.weight, acted, self.hidden_act, self.tuning.gate_up, self.pdl
            )
            self.project_add(acted, shared.down_proj.weight, None, hidden)

    def project_logits(
        self, hidden: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None, logits: torch.Tensor
    ) -> None:
        """See ``Operations``."""
        self._vector.project_logits(hidden, norm, weight, bias, logits, self.tuning.logits, self.pdl)
