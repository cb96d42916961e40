"""How many parameters a model has, and how many of them one token passes through, without allocating any."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from phi35.config import ModelConfig
from phi35.meta_model import meta_model
from phi35.model import CausalLM

BYTES_PER_VALUE = 2
"""Of a cached key or value in bfloat16."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: all of them; a tied head counts once.
        active: those a token's forward pass reads: of the experts, the chosen ones alone.
        trainable: those with a gradient.
    """

    total: int
    active: int
    trainable: int


def count_parameters(model: CausalLM | ModelConfig) -> ParameterCount:
    """Counts a model's parameters.

    Args:
        model: a model, on any device, or a config, whose model is then built on the meta device.
    """
    if isinstance(model, ModelConfig):
        model = meta_model(model)
    config = model.config
    if config.quantization is not None:
        # Packed weights are no parameters: those that they stand for are counted.
        plain = count_parameters(config.replace(quantization=None))
        return ParameterCount(
            plain.total, plain.active, trainable=_sum(p for p in model.parameters() if p.requires_grad)
        )
    total = _sum(model.parameters())
    experts = _sum(parameter for name, parameter in model.named_parameters() if ".mlp.experts." in name)
    idle = experts * (config.num_local_experts - config.num_experts_per_tok) // max(config.num_local_experts, 1)
    return ParameterCount(
        total=total,
        active=total - idle,
        trainable=_sum(parameter for parameter in model.parameters() if parameter.requires_grad),
    )


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = BYTES_PER_VALUE) -> int:
    """Bytes that keys and values of one token take in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.attention_head_dim * bytes_per_value


def _sum(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
