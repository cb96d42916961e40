"""Tiny phi-3-small models with weights that all matter, and what the slow reference says of them."""

import functools

import phi_3_small_reference as reference
import torch

import phi35
from phi35 import presets
from phi35.checkpoint.rules import to_disk
from phi35.config_io import to_hf_dict

LENGTH = 150  # 64 tokens are local to a query: 150 show the stripes
ORIGINAL = 100


@functools.cache
def small_model(kind="8k"):
    """A tiny twin in float64 whose weights, biases and norms are all random and large enough to matter."""
    config = presets.get(f"tiny-phi-3-small-{kind}")
    if kind == "128k":
        config = config.replace(original_max_position_embeddings=ORIGINAL, max_position_embeddings=16 * ORIGINAL)
    # A wide residual stream with factor 10 would drown attention: smaller embeddings let all parts show.
    model = phi35.create(config, seed=0, dtype="float64")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            deviation = 0.1 if "embed" in name else 0.3
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, deviation, generator=generator)
    return model


@functools.cache
def sample(length=LENGTH, seed=0):
    ids = torch.randint(3, 1000, (length,), generator=torch.Generator().manual_seed(seed))
    return tuple(ids.tolist())


@functools.cache
def expected(kind="8k", ids=None):
    model = small_model(kind)
    state = {name: tensor.clone() for name, tensor in to_disk(model.config, model.state_dict()).items()}
    dummies = model.config.dummy_token_indices
    return reference.logits(to_hf_dict(model.config), state, list(ids or sample()), dummies)


def real(logits):
    """Without the masked ids, whose least number would hide differences of the others."""
    return logits[..., :1064]
