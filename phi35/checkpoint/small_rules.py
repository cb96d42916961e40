"""Names of the published phi-3-small checkpoints (``phi3small``), as a table.

On disk the rows of ``query_key_value`` stand group by group: the queries that share a key, that key, its value; and
``up_proj`` has the gate's rows and the others in turn. In memory both have the order of the phi3 models.
"""

from phi35.checkpoint.rules import RowGroups, Rule
from phi35.config import ModelConfig


def _query_key_value(config: ModelConfig) -> RowGroups:
    width = config.attention_head_dim
    queries = config.num_attention_heads // config.num_key_value_heads * width
    return RowGroups(config.num_key_value_heads, (queries, width, width))


def _gate_up(config: ModelConfig) -> RowGroups:
    return RowGroups(config.intermediate_size, (1, 1))


_LAYER = "model.layers.{layer}."

RULES = (
    Rule(
        memory=_LAYER + "self_attn.qkv_proj.{kind}",
        disk=(_LAYER + "self_attn.query_key_value.{kind}",),
        groups=_query_key_value,
    ),
    Rule(memory=_LAYER + "self_attn.o_proj.{kind}", disk=(_LAYER + "self_attn.dense.{kind}",)),
    Rule(memory=_LAYER + "mlp.gate_up_proj.{kind}", disk=(_LAYER + "mlp.up_proj.{kind}",), groups=_gate_up),
    Rule(memory="model.norm.{kind}", disk=("model.final_layernorm.{kind}",)),
)
