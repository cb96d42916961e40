"""Outputs in the classes of transformers."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from phi35.interop.generation import CACHE_NAME
from phi35.model import CausalLM


def model_output(is_sparse: bool, *, cache: Any, aux_loss: Any, router_logits: Any, **values: Any) -> Any:
    """A causal model's output, a sparse one's with what its routers say."""
    values[CACHE_NAME] = cache
    if not is_sparse:
        return CausalLMOutputWithPast(**values)
    return MoeCausalLMOutputWithPast(**values, aux_loss=aux_loss, router_logits=router_logits)


@contextlib.contextmanager
def layer_states(causal_lm: CausalLM, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """Collects what goes into each layer, (B, T, D), while it is open."""
    states: list[torch.Tensor] = []
    hooks = []
    if wanted:
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
            for layer in causal_lm.model.layers
        ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
