"""transformers' ``PhimoeForCausalLM`` with the weights of a sparse model of ours.

transformers never uses its long LongRoPE factors; ``factors="long"`` hands them to it as its short ones, so that the
formula can be compared beyond the original length.
"""

from typing import Any

import pytest
import torch

from phi35.config import ModelConfig
from phi35.model import CausalLM

transformers = pytest.importorskip("transformers")

INITIALIZER_RANGE = 0.1
"""Wide enough that the logits' standard deviation is about 1 on tiny models and experts are far apart."""


def phimoe_pair(config: ModelConfig, seed: int = 0, factors: str = "short") -> tuple[CausalLM, Any]:
    """Our model and transformers' with the same random weights and biases, both in eval mode.

    Args:
        config: a sparse config with LongRoPE.
        seed: of the weights.
        factors: the LongRoPE factors that transformers uses, "short" or "long".
    """
    config = config.replace(initializer_range=INITIALIZER_RANGE)
    ours = CausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    ours.init_weights(generator)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("bias"):  # zeros would hide a bias that is left out
                parameter.normal_(0.0, 0.05, generator=generator)
    theirs = transformers.PhimoeForCausalLM(_config(config, factors)).eval()
    theirs.load_state_dict(_unfused(ours.state_dict(), config))
    return ours, theirs


def _config(config: ModelConfig, factors: str) -> Any:
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "rms_norm_eps max_position_embeddings sliding_window tie_word_embeddings bos_token_id eos_token_id "
        "pad_token_id attention_bias lm_head_bias num_local_experts num_experts_per_tok router_jitter_noise "
        "input_jitter_noise router_aux_loss_coef attention_dropout"
    ).split()
    scaling = config.rope_scaling
    assert scaling is not None
    return transformers.PhimoeConfig(
        **{name: getattr(config, name) for name in names},
        head_dim=config.head_dim,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": config.rope_theta,
            "short_factor": list(scaling.short_factor if factors == "short" else scaling.long_factor),
            "long_factor": list(scaling.long_factor),
            "short_mscale": scaling.short_mscale,
            "long_mscale": scaling.long_mscale,
            "original_max_position_embeddings": config.original_max_position_embeddings,
        },
        attn_implementation="sdpa",
    )


def _unfused(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our state dict under transformers' in-memory names."""
    queries = config.num_attention_heads * config.attention_head_dim
    keys = config.num_key_value_heads * config.attention_head_dim
    theirs = {}
    for name, tensor in state.items():
        if ".qkv_proj." in name:
            for letter, part in zip("qkv", tensor.split((queries, keys, keys)), strict=True):
                theirs[name.replace("qkv_proj", f"{letter}_proj")] = part
        else:
            theirs[name] = tensor
    return theirs
