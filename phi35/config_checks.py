"""What must hold between the fields of a ``ModelConfig``."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi35.config import ModelConfig

ROUTER_TYPES = ("sparsemixer", "sparsemixer-paper", "topk")
"""SparseMixer-v2 as published, with the paper's gradient of the experts, and softmax top-k (``moe/router.py``)."""


def inconsistencies(config: "ModelConfig") -> Iterator[str]:
    """Names each field, or group of fields, that cannot stand: one sentence a problem."""
    counts = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings original_max_position_embeddings"
    )
    for name in counts.split():
        if getattr(config, name) <= 0:
            yield f"{name} must be positive, got {getattr(config, name)}"
    if config.num_attention_heads <= 0 or config.num_key_value_heads <= 0:
        return
    if config.num_attention_heads % config.num_key_value_heads:
        yield (
            f"num_attention_heads ({config.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({config.num_key_value_heads})"
        )
    if config.attention_head_dim % 2:
        yield f"head_dim must be even for rotary embeddings, got {config.head_dim}"
    if config.norm_type not in ("rmsnorm", "layernorm"):
        yield f"norm_type must be 'rmsnorm' or 'layernorm', got {config.norm_type!r}"
    if config.hidden_act not in ("silu", "gelu", "gegelu"):
        yield f"hidden_act must be 'silu', 'gelu' or 'gegelu', got {config.hidden_act!r}"
    if config.sliding_window is not None and config.sliding_window <= 0:
        yield f"sliding_window must be positive or None, got {config.sliding_window}"
    if config.rope_scaling is not None:
        for name in ("short_factor", "long_factor"):
            length = len(getattr(config.rope_scaling, name))
            if length != config.attention_head_dim // 2:
                yield (
                    f"rope_scaling.{name} must hold head_dim / 2 = {config.attention_head_dim // 2} numbers, "
                    f"got {length}"
                )
    elif config.max_position_embeddings > config.original_max_position_embeddings:
        yield (
            f"max_position_embeddings ({config.max_position_embeddings}) exceeds original_max_position_embeddings "
            f"({config.original_max_position_embeddings}) without rope_scaling: give the LongRoPE factors or set "
            "both lengths equal"
        )
    for name in ("attention_dropout", "embd_pdrop", "resid_pdrop", "ffn_pdrop"):
        if not 0 <= (getattr(config, name) or 0) < 1:
            yield f"{name} must be in [0, 1), got {getattr(config, name)}"
    if config.num_local_experts < 0:
        yield f"num_local_experts must be 0 (dense) or positive, got {config.num_local_experts}"
    if config.num_local_experts:
        if not 1 <= config.num_experts_per_tok <= config.num_local_experts:
            yield (
                f"num_experts_per_tok ({config.num_experts_per_tok}) must lie between 1 and num_local_experts "
                f"({config.num_local_experts})"
            )
        if config.router_type not in ROUTER_TYPES:
            yield f"router_type must be one of {ROUTER_TYPES}, got {config.router_type!r}"
        if config.router_type.startswith("sparsemixer") and config.num_experts_per_tok != 2:
            yield f"SparseMixer routes to exactly 2 experts, got num_experts_per_tok={config.num_experts_per_tok}"
        if config.router_type != "topk" and not config.norm_topk_prob:
            yield "norm_topk_prob=False is for router_type 'topk'; SparseMixer's weights are never normalised"
    yield from _mixed_layer_problems(config)
    yield from _small_model_problems(config)


def _mixed_layer_problems(config: "ModelConfig") -> Iterator[str]:
    if not config.is_sparse:
        for name, default in (("decoder_sparse_step", 1), ("shared_expert_intermediate_size", 0)):
            if getattr(config, name) != default:
                yield f"{name}={getattr(config, name)} needs num_local_experts > 0; this model is dense"
    elif not 1 <= config.decoder_sparse_step <= config.num_hidden_layers:
        yield (
            f"decoder_sparse_step must lie between 1 and num_hidden_layers ({config.num_hidden_layers}), so that at "
            f"least one layer is sparse, got {config.decoder_sparse_step}"
        )
    if config.shared_expert_intermediate_size < 0:
        yield (
            "shared_expert_intermediate_size must be 0 (none) or positive, got "
            f"{config.shared_expert_intermediate_size}"
        )
    if config.dense_intermediate_size is not None:
        if config.dense_intermediate_size <= 0:
            yield f"dense_intermediate_size must be positive or None, got {config.dense_intermediate_size}"
        if not config.is_sparse or config.decoder_sparse_step == 1:
            yield (
                "dense_intermediate_size is the width of dense layers between sparse ones: it needs "
                "num_local_experts > 0 and decoder_sparse_step > 1"
            )


def _small_model_problems(config: "ModelConfig") -> Iterator[str]:
    """Of what phi-3-small brought: gegelu, muP's factors, block-sparse attention, masked ids."""
    if (config.hidden_act == "gegelu") != (config.gegelu_limit is not None):
        yield (
            "gegelu_limit is the clamp of hidden_act 'gegelu': give both or neither, got "
            f"{config.gegelu_limit} with {config.hidden_act!r}"
        )
    if config.gegelu_limit is not None and config.gegelu_limit <= 0:
        yield f"gegelu_limit must be positive, got {config.gegelu_limit}"
    if config.is_sparse and (config.hidden_act == "gegelu" or config.mlp_bias):
        yield "experts have neither hidden_act 'gegelu' nor biases (mlp_bias): both are for dense models"
    for name in ("mup_embedding_multiplier", "mup_attn_multiplier", "mup_width_multiplier"):
        if getattr(config, name) <= 0:
            yield f"{name} must be positive (1 for none), got {getattr(config, name)}"
    if config.vision is not None and config.mup_embedding_multiplier != 1:
        yield "mup_embedding_multiplier is for text models: what it does to image features is not defined"
    if config.blocksparse_block_size < 0:
        yield f"blocksparse_block_size must be 0 (none) or positive, got {config.blocksparse_block_size}"
    if config.blocksparse_block_size:
        for name in ("blocksparse_num_local_blocks", "blocksparse_vert_stride"):
            if getattr(config, name) <= 0:
                yield f"{name} must be positive, got {getattr(config, name)}"
        if config.sliding_window is not None:
            yield "block-sparse attention has no sliding_window: set it to None, or blocksparse_block_size to 0"
    every = config.dense_attention_every_n_layers
    if every < 0:
        yield f"dense_attention_every_n_layers must be 0 (none) or positive, got {every}"
    outside = [token for token in config.dummy_token_indices if not 0 <= token < config.vocab_size]
    if outside:
        yield f"dummy_token_indices must lie within the {config.vocab_size} ids of the vocabulary, got {outside[:5]}"
