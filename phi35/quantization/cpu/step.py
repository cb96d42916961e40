"""One decoding step of a few-bit model in one call of the C kernel, from the first layer to the final norm.

A step reads every weight once, at the speed of memory, so that the time between its products counts: torch's
operations and the waking of threads take a sixth of a step of phi-3.5-mini. Models, caches and passes that the kernel
does not know run module by module, with the same results up to rounding.
"""

import array
from typing import Any

import torch
from torch import nn

from phi35.attention import Attention, AttentionPlan
from phi35.cache import KVCache
from phi35.config import ModelConfig
from phi35.feed_forward import GatedMLP
from phi35.model import DecoderLayer
from phi35.norm import RMSNorm
from phi35.quantization.cpu import native
from phi35.quantization.modules import QuantizedLinear

_NAMES = ("weight_packed", "weight_scale", "weight_row_scale", "weight_zero_point")


def decode(decoder: Any, hidden_states: torch.Tensor, plan: AttentionPlan, cache: KVCache) -> torch.Tensor | None:
    """The decoder's layers and final norm for one token of each row, whose keys and values are stored.

    Args:
        decoder: a ``phi35.model.Decoder``.
        hidden_states: (B, 1, D) embeddings; they stay as they are.
        plan: of this pass.
        cache: with room for the token.

    Returns:
        (B, 1, D), or None where the kernel does not take the pass; nothing is stored then.
    """
    if not _takes_pass(decoder, hidden_states, plan, cache) or not _takes_config(decoder.config):
        return None
    table = array.array("q")
    for layer, keys, values in zip(decoder.layers, cache.keys, cache.values, strict=True):
        found = _layer_numbers(layer, hidden_states.dtype)
        if found is None:
            return None
        table.extend(found)
        table.extend((keys.data_ptr(), values.data_ptr()))
    if not _is_plain(decoder.norm, RMSNorm) or decoder.norm.weight.dtype != hidden_states.dtype:
        return None
    return _run(decoder, hidden_states, plan, cache, table)


def _run(
    decoder: Any, hidden_states: torch.Tensor, plan: AttentionPlan, cache: KVCache, table: "array.array[int]"
) -> torch.Tensor:
    config, batch = decoder.config, hidden_states.shape[0]
    stream = hidden_states.clone(memory_format=torch.contiguous_format)
    slots = plan.slots
    places = torch.full((batch,), slots) if isinstance(slots, int) else torch.as_tensor(slots).view(batch).contiguous()
    cos, sin = (part.expand(batch, 1, 1, -1).contiguous() for part in plan.cos_sin)
    numbers = (
        config.num_hidden_layers,
        batch,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.attention_head_dim,
        config.dense_intermediate_size or config.intermediate_size,
        cache.keys[0].shape[2],
        config.sliding_window or 0,
        native.KINDS[stream.dtype],
        torch.get_num_threads(),
        table.buffer_info()[0],
        *(tensor.data_ptr() for tensor in (places, cos, sin, decoder.norm.weight, stream)),
    )
    scale = config.attention_scale or config.attention_head_dim**-0.5
    native.step(array.array("q", numbers), config.rms_norm_eps, scale)
    return stream


def _takes_pass(decoder: Any, hidden_states: torch.Tensor, plan: AttentionPlan, cache: KVCache) -> bool:
    known = hidden_states.device.type == "cpu" and hidden_states.dtype in native.KINDS
    few = hidden_states.shape[1] == 1 and 0 < hidden_states.shape[0] <= native.MAX_TOKENS
    plain = plan.packed is None and plan.sequence_parallel is None and plan.block_sparse is None
    stored = plan.slots is not None and cache.kind is None and cache.dtype == hidden_states.dtype
    quiet = not (decoder.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
    fits = known and few and plain and stored and type(cache) is KVCache
    return fits and quiet and native.best_variant() == "avx512"


def _takes_config(config: ModelConfig) -> bool:
    dense = not any(config.is_sparse_layer(number) for number in range(config.num_hidden_layers))
    return dense and config.norm_type == "rmsnorm" and config.hidden_act == "silu" and config.gegelu_limit is None


# Modules are asked for their parts by their dictionaries: ``nn.Module.__getattr__`` would cost a percent of a step.
def _layer_numbers(layer: nn.Module, dtype: torch.dtype) -> list[int] | None:
    """A layer's weights as numbers and addresses, without its cache; None where a module is of another kind."""
    if not _is_plain(layer, DecoderLayer):
        return None
    parts = layer._modules
    attention, mlp = parts["self_attn"], parts["mlp"]
    if not (_is_plain(attention, Attention) and _is_plain(mlp, GatedMLP)):
        return None
    numbers: list[int] = []
    for parent, name in ((attention, "qkv_proj"), (attention, "o_proj"), (mlp, "gate_up_proj"), (mlp, "down_proj")):
        linear = parent._modules[name]  # type: ignore[union-attr]
        found = _linear_numbers(linear, dtype) if isinstance(linear, QuantizedLinear) else []
        if not found:
            return None
        numbers += found
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = parts[name]
        if not isinstance(norm, RMSNorm) or not _is_plain(norm, RMSNorm) or norm.weight.dtype != dtype:
            return None
        numbers.append(norm.weight.data_ptr())
    return numbers


def _linear_numbers(linear: QuantizedLinear, dtype: torch.dtype) -> list[int]:
    """A weight in the order of ``Linear`` in ``step_avx512.h``; nothing where the kernel does not know it."""
    one, held, bias = linear._formats["weight"], linear._buffers, linear.bias
    if one.type != "int" or not _is_plain(linear, QuantizedLinear) or bias is not None and bias.dtype != dtype:
        return []
    numbers: list[int] = []
    for tensor in (*(held.get(name) for name in _NAMES), bias):
        if tensor is None:
            numbers.append(0)
        elif tensor.is_cpu and tensor.is_contiguous():
            numbers.append(tensor.data_ptr())
        else:
            return []
    scale = held["weight_scale"]
    assert scale is not None
    sizes = [linear.out_features, linear.in_features, scale.shape[-1], one.bits, native.SCALE_KINDS[scale.dtype]]
    return numbers + sizes


def _is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)
