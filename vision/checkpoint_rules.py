"""Names of the published Phi-3-vision and Phi-3.5-vision checkpoints (``phi3_v``), as a table.

On disk the tower has the names of transformers' CLIP (with its spelling ``pre_layrnorm``); in memory those of
timm's VisionTransformer. Separators and projector keep their names.
"""

from phi35.checkpoint.rules import Ignore, Rule

_MEMORY = "model.vision_embed_tokens.img_processor."
_DISK = "model.vision_embed_tokens.img_processor.vision_model."
_BLOCK = _MEMORY + "blocks.{layer}."
_ENCODER = _DISK + "encoder.layers.{layer}."

RULES = (
    Rule(memory=_MEMORY + "cls_token", disk=(_DISK + "embeddings.class_embedding",), leading_ones=2),
    Rule(memory=_MEMORY + "pos_embed", disk=(_DISK + "embeddings.position_embedding.weight",), leading_ones=1),
    Rule(memory=_MEMORY + "patch_embed.proj.{kind}", disk=(_DISK + "embeddings.patch_embedding.{kind}",)),
    Rule(memory=_MEMORY + "norm_pre.{kind}", disk=(_DISK + "pre_layrnorm.{kind}",)),
    Rule(memory=_MEMORY + "norm.{kind}", disk=(_DISK + "post_layernorm.{kind}",)),
    Rule(memory=_BLOCK + "norm1.{kind}", disk=(_ENCODER + "layer_norm1.{kind}",)),
    Rule(memory=_BLOCK + "norm2.{kind}", disk=(_ENCODER + "layer_norm2.{kind}",)),
    Rule(
        memory=_BLOCK + "attn.qkv.{kind}",
        disk=tuple(_ENCODER + f"self_attn.{name}_proj." + "{kind}" for name in "qkv"),
    ),
    Rule(memory=_BLOCK + "attn.proj.{kind}", disk=(_ENCODER + "self_attn.out_proj.{kind}",)),
    Rule(memory=_BLOCK + "mlp.fc1.{kind}", disk=(_ENCODER + "mlp.fc1.{kind}",)),
    Rule(memory=_BLOCK + "mlp.fc2.{kind}", disk=(_ENCODER + "mlp.fc2.{kind}",)),
    Rule(memory="model.embed_tokens.weight", disk=("model.embed_tokens.weight",)),
    Rule(memory="model.embed_tokens.weight", disk=("model.vision_embed_tokens.wte.weight",)),
    Ignore(disk=_DISK + "embeddings.position_ids", reason="positions 0, 1, 2, … that older versions stored"),
)
