"""One decoding step over buffers that never move: captured once in a CUDA graph, then replayed for every token.

The step reads the tokens and lengths of all rows on the device, extends the cache, and chooses the next tokens on the
device, so that steps follow each other without the host. It computes what ``CausalLM.forward`` computes for one token a
row, up to rounding. Weights are read where they lie.
"""

import operator
import warnings
from typing import Any

import torch
from torch import nn

from phi35.attention import Attention
from phi35.block_sparse import block_pattern
from phi35.cache import KVCache
from phi35.config import ModelConfig
from phi35.kernels import availability, reference
from phi35.kernels.operands import Rope, StepState, norm_of
from phi35.kernels.operations import BatchOperations, ModuleOperations, PlainOperations, VectorOperations
from phi35.kernels.tuning import DEFAULT, StepTuning
from phi35.module_walk import stored_tensors, walk
from phi35.norm import LayerNorm, RMSNorm
from phi35.registry import resolve

_DEVICE = operator.attrgetter("device")


class CannotCaptureError(RuntimeError):
    """A module of the model asks the host in the middle of a step."""


class DecodeStep:
    """The step of one model over one cache.

    Args:
        model: a ``phi35.model.CausalLM`` in evaluation mode that ``limit`` has nothing against.
        cache: a ``KVCache`` with room for every token to come (a full row overwrites its last slot), or ``PagedRows``;
            its tensors are written in place.
        tuning: shapes of the kernels' programs.
        pdl: launch kernels programmatically; None where the device can.
        plain: use torch's operations instead of the kernels.
        state: of the step that this one continues, with a larger cache or other rows.

    Attributes:
        state: tokens, lengths, filters, draws: what passes from step to step.
        logits: (B, V) float32 of the last step.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        tuning: StepTuning = DEFAULT,
        pdl: bool | None = None,
        plain: bool = False,
        state: StepState | None = None,
    ) -> None:
        self.model, self.config, self.cache = model, model.config, cache
        device, dtype, batch = model.device, model.dtype, cache.batch_size
        self.state = StepState.new(batch, self.config.vocab_size, device) if state is None else state
        if state is None:
            self.state.lengths.copy_(cache.lengths)
            self.state.rope_long.copy_(cache.rope_long)
        if isinstance(cache, KVCache):
            # The cache's own bookkeeping reads and writes the step's.
            cache.lengths, cache.rope_long = self.state.lengths, self.state.rope_long
        head_width = self.config.num_attention_heads * self.config.attention_head_dim
        self.hidden = torch.zeros(batch, self.config.hidden_size, dtype=dtype, device=device)
        self.query = torch.zeros(batch, head_width, dtype=dtype, device=device)
        self.attended = torch.zeros_like(self.query)
        self.logits = torch.zeros(batch, self.config.vocab_size, dtype=torch.float32, device=device)
        self.rope = Rope(*model.model.rope.tables(device))
        self.operations = self._operations(tuning, pdl, plain)
        self.operations.follow(model.model)
        self._pattern = block_pattern(self.config)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._weights = fingerprint(model)

    @property
    def is_current(self) -> bool:
        """Whether the model's weights still lie where the step reads them."""
        return self._weights == fingerprint(self.model)

    @property
    def is_captured(self) -> bool:
        """Whether steps come from a graph."""
        return self._graph is not None

    @torch.no_grad()
    def run(self) -> None:
        """Take one step, from the graph once there is one."""
        if self._graph is not None:
            self._graph.replay()
            return
        self.run_layers()
        self.operations.choose(self.logits, self.state)

    @torch.no_grad()
    def run_layers(self) -> None:
        """The step but for the choice: ``logits`` are written, and one slot of each row of the cache."""
        decoder, ops, state = self.model.model, self.operations, self.state
        ops.embed(state.tokens, decoder.embed_tokens, self.hidden)
        for number, layer in enumerate(decoder.layers):
            attention, cache = layer.self_attn, self.cache.layer(number)
            norm = norm_of(layer.input_layernorm)
            ops.project_qkv(self.hidden, norm, attention.qkv_proj, self.rope, state, self.query, cache)
            if attention.scale is None and not attention.is_block_sparse:
                ops.attend(self.query, cache, state, self.attended, (attention.o_proj, layer.mlp))
            else:
                form = attention.scale, self._pattern if attention.is_block_sparse else None
                reference.attend(self.query, cache, state.lengths, self.attended, self.config.sliding_window, *form)
            ops.project_add(self.attended, attention.o_proj, self.hidden)
            feed_forward = ops.sparse if self.config.is_sparse_layer(number) else ops.dense
            feed_forward(self.hidden, norm_of(layer.post_attention_layernorm), layer.mlp)
        ops.project_logits(self.hidden, norm_of(decoder.norm), self.model.lm_head, self.logits)

    @torch.no_grad()
    def capture(self) -> None:
        """Capture the step in a CUDA graph; the first step of a process compiles the kernels.

        The state stays; the slots of the cache at the rows' lengths are written, which the next step writes anew.

        Raises:
            CannotCaptureError: if a module waits for the device. The step can be run without a graph.
        """
        values = vars(self.state)
        saved = {name: value.clone() for name, value in values.items()}
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._run_without_waiting()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            for name, value in values.items():
                value.copy_(saved[name])
        torch.cuda.synchronize(self.model.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.run()
        self._graph = graph

    def _run_without_waiting(self) -> None:
        """A step in which waiting for the device is an error."""
        mode = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
                torch.cuda.set_sync_debug_mode("error")
            self.run()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            raise CannotCaptureError(str(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def choose(self) -> None:
        """Choose the next tokens from ``logits`` without a step before, as after the prompts; lengths stay."""
        lengths = self.state.lengths.clone()
        self.operations.choose(self.logits, self.state)
        self.state.lengths.copy_(lengths)

    def _operations(self, tuning: StepTuning, pdl: bool | None, plain: bool) -> PlainOperations:
        act, window = self.config.hidden_act, self.config.sliding_window
        if plain:
            return PlainOperations(act, window)
        cache, heads = self.cache.layer(0), self.config.num_attention_heads
        if needs_modules(self.config):
            return ModuleOperations(act, window, cache, heads, tuning)
        if self.cache.batch_size > 1:
            return BatchOperations(act, window, cache, heads, tuning)
        pdl = availability.has_programmatic_launch(self.model.device) if pdl is None else pdl
        if self.config.quantization is not None:
            make = resolve("phi35.quantization.kernels.operations:FewBitOperations")
            return make(act, window, cache, heads, tuning, pdl)
        return VectorOperations(act, window, cache, heads, tuning, pdl)


def needs_modules(config: ModelConfig) -> bool:
    """Whether the kernels of a step do not know a model's feed-forward or head, so that those run as modules."""
    return (
        config.hidden_act == "gegelu"
        or config.mlp_bias
        or config.mup_width_multiplier != 1
        or bool(config.dummy_token_indices)
    )


def limit(model: Any, kv_cache_dtype: str | None = None) -> str | None:
    """Why the captured step does not take a model with such a cache, or None.

    Modules of other kinds than the decoder's own are no reason: they run as they are.
    """
    return availability.missing(model.device) or model_limit(model, kv_cache_dtype)


def model_limit(model: Any, kv_cache_dtype: str | None = None) -> str | None:
    """Why no device could take a model's step by kernels, or None."""
    if getattr(model, "spread", None) is not None:
        return "its parts are spread over devices"
    decoder, dtype = model.model, model.dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its activations are {dtype}"
    stop = waits_for_host if any_waits_for_host(model) else None
    devices = set(map(_DEVICE, stored_tensors(model, stop)))
    if len(devices) != 1:
        return f"its weights lie on {sorted(map(str, devices))}"
    if getattr(decoder, "sequence_parallel", None) is not None:
        return "processes share its rows"
    if model.config.attention_head_dim % 8 or model.config.hidden_size % 8:
        return "its head_dim or hidden_size is no multiple of 8"
    if kv_cache_dtype is not None and model.config.attention_head_dim % 16:
        return f"a cache in {kv_cache_dtype} needs a head_dim of a multiple of 16"
    last = decoder.norm
    for layer in decoder.layers:
        if type(layer.self_attn) is not Attention or layer._forward_hooks or layer._forward_pre_hooks:
            return f"a layer is not the decoder's own: {type(layer.self_attn).__name__}, or one with hooks"
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, last):
            if type(norm) not in (RMSNorm, LayerNorm, nn.LayerNorm) or norm.weight.dtype != dtype:
                return f"a norm is {type(norm).__name__} of {norm.weight.dtype}"
    return None


def waits_for_host(module: nn.Module) -> bool:
    """Whether a module reads on the host what the device has computed, as experts in host memory do.

    No CUDA graph holds it; its weights may lie in host memory.
    """
    # Of its class: a module that lacks a name looks through its parameters and raises, some microseconds each.
    return bool(getattr(type(module), "waits_for_host", False))


def any_waits_for_host(model: nn.Module) -> bool:
    """Whether some module of a model does."""
    return any(getattr(kind, "waits_for_host", False) for kind in set(map(type, walk(model))))


def fingerprint(model: Any) -> tuple[int, ...]:
    """Where the model's tensors lie."""
    return tuple(tensor.data_ptr() for tensor in stored_tensors(model))
