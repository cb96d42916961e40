"""What llama.cpp's graphs of "phi3" and "phimoe" cannot compute, and what they compute in another way.

Both are one graph (llama.cpp, src/models/phi3.cpp): RMSNorm, LongRoPE factors, SwiGLU, softmax top-k routing whose
weights are divided by their sum, no sliding window. "phimoe" has biases, also of the norms, and "phi3" has none.
"""

from collections.abc import Iterator

from phi35.config import ModelConfig

ROUTINGS = ("equal", "softmax")


def architecture(config: ModelConfig) -> str:
    """The name under which llama.cpp knows the model."""
    return "phimoe" if config.is_sparse else "phi3"


def check(config: ModelConfig, text_only: bool, routing: str) -> None:
    """Check that llama.cpp can compute the model.

    Raises:
        ValueError: naming everything that it cannot.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing must be one of {ROUTINGS}, got {routing!r}")
    if problems := list(_problems(config, text_only)):
        raise ValueError("llama.cpp cannot run this model: " + "; ".join(problems))


def _problems(config: ModelConfig, text_only: bool) -> Iterator[str]:
    if config.vision is not None and not text_only:
        yield (
            "it has no image path for this family; text_only=True (--text-only) exports the text model alone, which "
            "then answers about no picture"
        )
    width = config.num_attention_heads * config.attention_head_dim
    if width != config.hidden_size:
        yield f"its heads together are hidden_size wide, and here {width} differs from {config.hidden_size}"
    if config.hidden_act != "silu":
        yield f"its feed-forwards are gated by silu, not {config.hidden_act}"
    scaling = config.rope_scaling
    if scaling is not None and scaling.short_mscale != scaling.long_mscale:
        yield (
            f"it scales rotary tables by one factor, and short_mscale {scaling.short_mscale} differs from long_mscale "
            f"{scaling.long_mscale}"
        )
    if config.blocksparse_block_size or config.mup_use_scaling or config.mup_embedding_multiplier != 1:
        yield "it has neither block-sparse attention nor muP's factors there"
    if config.mup_width_multiplier != 1 or config.dummy_token_indices:
        yield "it neither divides nor masks the logits there"
    if not config.is_sparse:
        if config.norm_type != "rmsnorm":
            yield f"a dense model has RMSNorm there, not {config.norm_type}"
        if config.attention_bias or config.mlp_bias or config.lm_head_bias:
            yield "a dense model has no biases there"
        return
    if config.decoder_sparse_step != 1:
        yield f"every layer is sparse there, and decoder_sparse_step is {config.decoder_sparse_step}"
    if config.shared_expert_intermediate_size:
        yield "it knows no shared expert beside this family's routed ones"
    if config.router_type == "topk" and not config.norm_topk_prob and config.num_experts_per_tok > 1:
        yield "it divides the chosen experts' weights by their sum, and norm_topk_prob is False"
    if config.norm_type != "rmsnorm" and config.quantization is not None:
        yield (
            "its norms take no mean from the residual stream, so that the weights that write to it must have none, "
            "which codes in few bits cannot be given: export the original with a type in few bits"
        )


def notes(config: ModelConfig, routing: str) -> Iterator[str]:
    """What llama.cpp computes otherwise, for the user to know."""
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        yield f"llama.cpp attends to all tokens where this model attends to the last {window:,}"
    if config.rope_scaling is not None:
        yield (
            f"llama.cpp takes the long rotary factors by the size of its context, not by the text's length: up to "
            f"{config.original_max_position_embeddings:,} tokens give it a context no larger than that"
        )
    if mixes_by_sparsemixer(config):
        how = (
            "both chosen experts weigh 1, as SparseMixer weighs them but for near ties"
            if routing == "equal"
            else "the chosen experts weigh by softmax and sum to 1, which the model was not trained for"
        )
        yield f"llama.cpp has no SparseMixer: {how}"


def mixes_by_sparsemixer(config: ModelConfig) -> bool:
    """Whether the experts' weights are SparseMixer's."""
    return config.is_sparse and config.router_type.startswith("sparsemixer")
