"""transformers twins of our models, with the same weights, for parity tests.

Skips where transformers is absent. Tolerances follow the logits' scale: transformers' own sdpa and eager paths
differ by 5e-7 at a standard deviation of 0.2 and by 5e-5 at 2.2.
"""

import pytest
import torch

from phi35.config import ModelConfig
from phi35.model import CausalLM

transformers = pytest.importorskip("transformers")

INITIALIZER_RANGE = 0.1
"""Wide enough that the logits' standard deviation is about 1 on tiny models: an error shows."""


def rope_parameters(config: ModelConfig) -> dict[str, object]:
    """The rope fields as transformers 5 spells them."""
    if config.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "rope_type": "longrope",
        "rope_theta": config.rope_theta,
        "short_factor": list(config.rope_scaling.short_factor),
        "long_factor": list(config.rope_scaling.long_factor),
        "original_max_position_embeddings": config.original_max_position_embeddings,
    }


def phi3_pair(config: ModelConfig, seed: int = 0) -> tuple[CausalLM, torch.nn.Module]:
    """Our model and transformers' ``Phi3ForCausalLM`` with the same random weights, both in eval mode."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "rms_norm_eps max_position_embeddings original_max_position_embeddings sliding_window tie_word_embeddings "
        "bos_token_id eos_token_id pad_token_id"
    ).split()
    theirs_config = transformers.Phi3Config(
        **{name: getattr(config, name) for name in names},
        rope_parameters=rope_parameters(config),
        attn_implementation="sdpa",
    )
    theirs = transformers.Phi3ForCausalLM(theirs_config).eval()
    ours = CausalLM(config.replace(initializer_range=INITIALIZER_RANGE)).eval()
    ours.init_weights(torch.Generator().manual_seed(seed))
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and not missing
    return ours, theirs


def tolerance(logits: torch.Tensor) -> float:
    """1e-5 scaled by the logits' standard deviation where that exceeds 1."""
    return 1e-5 * max(1.0, float(logits.std()))
