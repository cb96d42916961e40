"""Names of the published Phi-3.5-MoE checkpoints (``phimoe``), as a table.

On disk attention has separate projections with biases, and every expert has its own three matrices: w1 the
gate, w3 the up projection, w2 the down projection. In memory the projections are fused and the experts stacked.
A shared expert, which no published model has, is named like the others; dense layers keep their phi3 names.
"""

from phi35.checkpoint.rules import Rule
from phi35.config import ModelConfig


def _query_key_value(config: ModelConfig) -> tuple[int, ...]:
    queries = config.num_attention_heads * config.attention_head_dim
    keys = config.num_key_value_heads * config.attention_head_dim
    return (queries, keys, keys)


_LAYER = "model.layers.{layer}."

RULES = (
    Rule(
        memory=_LAYER + "self_attn.qkv_proj.{kind}",
        disk=tuple(_LAYER + f"self_attn.{name}_proj." + "{kind}" for name in "qkv"),
        sizes=_query_key_value,
    ),
    Rule(memory=_LAYER + "mlp.router.weight", disk=(_LAYER + "block_sparse_moe.gate.weight",)),
    Rule(
        memory=_LAYER + "mlp.experts.gate_up_proj",
        disk=tuple(_LAYER + "block_sparse_moe.experts.{expert}." + f"{name}.weight" for name in ("w1", "w3")),
        stack="expert",
    ),
    Rule(
        memory=_LAYER + "mlp.experts.down_proj",
        disk=(_LAYER + "block_sparse_moe.experts.{expert}.w2.weight",),
        stack="expert",
    ),
    # Quantized experts: codes, scales, zero points.
    Rule(
        memory=_LAYER + "mlp.experts.gate_up_proj_{kind}",
        disk=tuple(_LAYER + "block_sparse_moe.experts.{expert}." + f"{name}.weight_{{kind}}" for name in ("w1", "w3")),
        stack="expert",
    ),
    Rule(
        memory=_LAYER + "mlp.experts.down_proj_{kind}",
        disk=(_LAYER + "block_sparse_moe.experts.{expert}.w2.weight_{kind}",),
        stack="expert",
    ),
    Rule(
        memory=_LAYER + "mlp.shared_expert.gate_up_proj.{kind}",
        disk=tuple(_LAYER + f"block_sparse_moe.shared_expert.{name}." + "{kind}" for name in ("w1", "w3")),
    ),
    Rule(
        memory=_LAYER + "mlp.shared_expert.down_proj.{kind}",
        disk=(_LAYER + "block_sparse_moe.shared_expert.w2.{kind}",),
    ),
)
