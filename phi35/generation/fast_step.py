"""One decoding step over buffers that never move: captured once in a CUDA graph, then replayed for every token.

The step reads the tokens and lengths of all rows on the device, extends the cache, and chooses the next tokens on the
device, so that steps follow each other without the host. It computes what ``CausalLM.forward`` computes for one token a
row, up to rounding. Weights are read where they lie.
"""

from typing import Any

import torch
from torch import nn

from phi35.attention import Attention
from phi35.cache import KVCache
from phi35.feed_forward import GatedMLP
from phi35.kernels import availability
from phi35.kernels.operands import Norm, Rope, StepState
from phi35.kernels.operations import BatchOperations, Operations, PlainOperations, VectorOperations
from phi35.kernels.tuning import DEFAULT, StepTuning
from phi35.language_model_head import LanguageModelHead
from phi35.norm import RMSNorm
from phi35.registry import resolve


class DecodeStep:
    """The step of one model over one cache.

    Args:
        model: a ``phi35.model.CausalLM`` in evaluation mode that ``limit`` has nothing against.
        cache: preallocated; its tensors are written in place.
        tuning: shapes of the kernels' programs.
        pdl: launch kernels programmatically; None where the device can.
        plain: use torch's operations instead of the kernels.

    Attributes:
        state: tokens, lengths, filters, draws: what passes from step to step.
        logits: (B, V) float32 of the last step.
    """

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        tuning: StepTuning = DEFAULT,
        pdl: bool | None = None,
        plain: bool = False,
    ) -> None:
        self.model, self.config, self.cache = model, model.config, cache
        device, dtype, batch = model.device, model.dtype, cache.batch_size
        self.state = StepState.new(batch, self.config.vocab_size, device)
        self.state.lengths.copy_(cache.lengths)
        self.state.rope_long.copy_(cache.rope_long)
        head_width = self.config.num_attention_heads * self.config.attention_head_dim
        self.hidden = torch.zeros(batch, self.config.hidden_size, dtype=dtype, device=device)
        self.query = torch.zeros(batch, head_width, dtype=dtype, device=device)
        self.attended = torch.zeros_like(self.query)
        self.logits = torch.zeros(batch, self.config.vocab_size, dtype=torch.float32, device=device)
        self.rope = Rope(*model.model.rope.tables(device))
        self.operations = self._operations(tuning, pdl, plain)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def run(self) -> None:
        """Take one step, from the graph once there is one."""
        if self._graph is not None:
            self._graph.replay()
            return
        model, ops, state = self.model.model, self.operations, self.state
        ops.embed(state.tokens, model.embed_tokens.weight, self.hidden)
        for number, layer in enumerate(model.layers):
            attention, keys, values = layer.self_attn, self.cache.keys[number], self.cache.values[number]
            qkv, out = attention.qkv_proj, attention.o_proj
            norm = norm_of(layer.input_layernorm)
            ops.project_qkv(self.hidden, norm, qkv.weight, qkv.bias, self.rope, state, self.query, keys, values)
            ops.attend(self.query, keys, values, state, self.attended)
            ops.project_add(self.attended, out.weight, out.bias, self.hidden)
            feed_forward = ops.sparse if self.config.is_sparse_layer(number) else ops.dense
            feed_forward(self.hidden, norm_of(layer.post_attention_layernorm), layer.mlp)
        head = self.model.lm_head
        ops.project_logits(self.hidden, norm_of(model.norm), head.weight, head.bias, self.logits)
        ops.choose(self.logits, state)

    @torch.no_grad()
    def capture(self) -> None:
        """Capture the step in a CUDA graph; the first step of the process compiles the kernels. The state stays."""
        state = vars(self.state)
        saved = {name: value.clone() for name, value in state.items()}
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize(self.model.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        self._graph = graph
        for name, value in state.items():
            value.copy_(saved[name])

    def _operations(self, tuning: StepTuning, pdl: bool | None, plain: bool) -> Operations:
        act, window = self.config.hidden_act, self.config.sliding_window
        if plain:
            return PlainOperations(act, window)
        keys, heads = self.cache.keys[0], self.config.num_attention_heads
        if self.cache.batch_size > 1:
            return BatchOperations(act, window, keys, heads, tuning)
        pdl = availability.has_programmatic_launch(self.model.device) if pdl is None else pdl
        return VectorOperations(act, window, keys, heads, tuning, pdl)


def norm_of(module: nn.Module) -> Norm:
    """A norm module as the kernels take it."""
    if isinstance(module, RMSNorm):
        return Norm("rmsnorm", module.weight, module.weight, module.eps)
    assert isinstance(module, nn.LayerNorm)
    return Norm("layernorm", module.weight, module.bias, module.eps)


def limit(model: Any) -> str | None:
    """Why the captured step does not take a model, or None."""
    reason = availability.missing(model.device)
    if reason is not None:
        return reason
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "vision" not in name}
    if len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"its weights are {sorted(map(str, dtypes))}"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return f"its weights lie on {sorted(map(str, devices))}"
    config = model.config
    widths = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    widths["head_dim"] = config.attention_head_dim
    for name, width in widths.items():
        if width % 8:
            return f"{name} ({width}) is no multiple of 8"
    if type(model.lm_head) is not LanguageModelHead or type(model.model.embed_tokens) is not nn.Embedding:
        return "its head or its embedding is no plain matrix"
    for number, layer in enumerate(model.model.layers):
        reason = _layer_limit(layer, config.is_sparse_layer(number))
        if reason is not None:
            return f"layer {number}: {reason}"
    return None


def _layer_limit(layer: Any, sparse: bool) -> str | None:
    if type(layer.self_attn) is not Attention:
        return f"its attention is {type(layer.self_attn).__name__}"
    linear = [layer.self_attn.qkv_proj, layer.self_attn.o_proj]
    if sparse:
        reason = resolve("decoding.sparse_limit")(layer.mlp)
        if reason is not None:
            return reason
        dense = layer.mlp.shared_expert
    else:
        dense = layer.mlp
    if dense is not None:
        if type(dense) is not GatedMLP:
            return f"its feed-forward is {type(dense).__name__}"
        linear += [dense.gate_up_proj, dense.down_proj]
    kinds = {type(module).__name__ for module in linear if type(module) is not nn.Linear}
    return f"its products are {sorted(kinds)}" if kinds else None
