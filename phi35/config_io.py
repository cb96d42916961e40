"""Between the published ``config.json`` files and ``ModelConfig``.

Four ``model_type`` values stand for the family: ``phi3`` (dense), ``phi3small``, ``phimoe`` (sparse, LayerNorm) and
``phi3_v`` (with the image path). Both spellings of the rotary fields are read: ``rope_scaling`` with ``rope_theta``,
and the ``rope_parameters`` of transformers 5. Both are written, and the published class names, so that transformers 4
and 5, vLLM and llama.cpp read an export. What a published type cannot say (another norm, top-k routing, a small
tower) is written under extra keys, which other programs ignore, and read back.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from phi35.config import ROPE_TYPES, ModelConfig, RopeScaling, VisionConfig
from phi35.quantization import config as quantization

ARCHITECTURES = {
    "phi3": "Phi3ForCausalLM",
    "phi3small": "Phi3SmallForCausalLM",
    "phimoe": "PhiMoEForCausalLM",
    "phi3_v": "Phi3VForCausalLM",
}
"""Class names as the published checkpoints spell them."""

OTHER_SPELLINGS = {"PhimoeForCausalLM": "phimoe"}
"""Class names of transformers that differ from the published ones."""

FAMILY_STOP_IDS = (32007, 32001, 32000)
"""``<|end|>``, ``<|assistant|>``, ``<|endoftext|>``: the list of phi-3.5-mini's own generation_config.json."""

SMALL_STOP_IDS = (100266, 100263, 100257)
"""The same of phi-3-small's own vocabulary."""

SMALL_VOCAB_SIZE = 100352
SMALL_DUMMY_IDS = (100256, *range(100258, 100261), 100264, 100265, *range(100267, SMALL_VOCAB_SIZE))
"""Ids that phi-3-small never writes: fillers, and special tokens of cl100k_base that it has no use for."""

UNUSED_EOS = 2
"""``</s>``, which the vision config names as its end although no model of the family ever writes it."""

# What a file means that leaves a field out: the defaults of the published configuration classes.
_DENSE_DEFAULTS: dict[str, Any] = {"norm_type": "rmsnorm", "num_local_experts": 0}
_SPARSE_DEFAULTS: dict[str, Any] = {
    "norm_type": "layernorm",
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "num_local_experts": 16,
    "router_aux_loss_coef": 0.001,
    "eos_token_id": 2,
}
_SMALL_DEFAULTS: dict[str, Any] = {
    "norm_type": "layernorm",
    "vocab_size": SMALL_VOCAB_SIZE,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "hidden_act": "gegelu",
    "gegelu_limit": 20.0,
    # The published file says attention_bias false, and the published classes build every projection with one.
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "embd_pdrop": 0.1,
    "ffn_pdrop": 0.1,
    "max_position_embeddings": 8192,
    "original_max_position_embeddings": 8192,
    "rope_theta": 1e6,
    "mup_use_scaling": True,
    "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0,
    "blocksparse_block_size": 64,
    "dense_attention_every_n_layers": 2,
    "dummy_token_indices": SMALL_DUMMY_IDS,
    "bos_token_id": 100257,
    "eos_token_id": 100257,
    "pad_token_id": 100257,
    "stop_token_ids": SMALL_STOP_IDS,
}
_DEFAULTS = {
    "phi3": _DENSE_DEFAULTS,
    "phi3small": _SMALL_DEFAULTS,
    "phimoe": _SPARSE_DEFAULTS,
    "phi3_v": _DENSE_DEFAULTS,
}

_COMMON_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "rms_norm_eps attention_dropout initializer_range max_position_embeddings original_max_position_embeddings "
    "rope_theta sliding_window tie_word_embeddings bos_token_id eos_token_id pad_token_id"
).split()
_KEYS = {
    "phi3": [*_COMMON_KEYS, "attention_bias", "embd_pdrop", "resid_pdrop"],
    "phi3_v": [*_COMMON_KEYS, "embd_pdrop", "resid_pdrop"],
    "phimoe": [
        *_COMMON_KEYS,
        *"attention_bias lm_head_bias num_local_experts num_experts_per_tok router_jitter_noise".split(),
        *"input_jitter_noise router_aux_loss_coef resid_pdrop".split(),
    ],
    "phi3small": (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "gegelu_limit rms_norm_eps attention_dropout embd_pdrop ffn_pdrop initializer_range max_position_embeddings "
        "rope_theta tie_word_embeddings mup_use_scaling mup_attn_multiplier mup_embedding_multiplier "
        "mup_width_multiplier blocksparse_block_size blocksparse_num_local_blocks blocksparse_vert_stride "
        "blocksparse_homo_head_pattern dense_attention_every_n_layers bos_token_id eos_token_id pad_token_id"
    ).split(),
}
_RENAMED = {
    "phimoe": {"resid_pdrop": "hidden_dropout"},
    "phi3small": {
        "intermediate_size": "ff_intermediate_size",
        "rms_norm_eps": "layer_norm_epsilon",
        "attention_dropout": "attention_dropout_prob",
        "embd_pdrop": "embedding_dropout_prob",
        "ffn_pdrop": "ffn_dropout_prob",
        "rope_theta": "rope_embedding_base",
        "attention_bias": "query_key_value_bias",
    },
}
_CONSTANTS: dict[str, dict[str, Any]] = {
    "phimoe": {"output_router_logits": False},
    "phi3small": {
        "attention_bias": False,
        "ff_dim_multiplier": None,
        "gegelu_pad_to_256": True,
        "pad_sequence_to_multiple_of_64": True,
        "reorder_and_upcast_attn": False,
        "rope_position_scale": 1.0,
    },
}
_OF_SMALL = (
    "mlp_bias gegelu_limit mup_embedding_multiplier mup_use_scaling mup_width_multiplier blocksparse_block_size"
).split()
"""Fields that no other published dense model has."""
_NOT_STORED = {"model_type", "rope_scaling", "vision", "experts_backend", "head_dim", "quantization"}
_EMBEDDING_LAYER = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
_VISION_KEYS = {"hidden_size": "image_dim_out", "model_name": "model_name"}


def from_hf_dict(
    data: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """The config that a checkpoint folder describes.

    Args:
        data: contents of ``config.json``.
        generation: contents of ``generation_config.json``, for the ids that stop generation.
        preprocessor: contents of ``preprocessor_config.json``, for the image path's tiles and normalisation.

    Raises:
        ValueError: for an architecture outside the family, contradictory or unsupported rotary fields, quantized
            weights that another program made, or inconsistent sizes.
    """
    model_type = _model_type(data)
    values = dict(_DEFAULTS[model_type])
    if data.get("quantization_config"):
        values["quantization"] = quantization.from_entry(data["quantization_config"])
    renamed = _RENAMED.get(model_type, {})
    for field in dataclasses.fields(ModelConfig):
        key = renamed.get(field.name, field.name)
        if field.name not in _NOT_STORED and data.get(key) is not None:
            values[field.name] = data[key]
    for name in ("sliding_window", "head_dim"):
        values[name] = data.get(name)
    if model_type == "phi3small":
        _read_small(data, values)
    if data.get("num_key_value_heads", 0) is None:
        values["num_key_value_heads"] = values.get("num_attention_heads", 32)
    values |= _rope_fields(data, model_type, values)
    ends = values.get("eos_token_id")
    ends = list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    usual = SMALL_STOP_IDS if model_type == "phi3small" else FAMILY_STOP_IDS
    values["stop_token_ids"] = _stop_ids(data, generation, ends, values.get("vocab_size", 32064), usual)
    if ends:
        values["eos_token_id"] = values["stop_token_ids"][-1] if ends[0] == UNUSED_EOS else ends[0]
    if model_type == "phi3_v":
        values["vision"] = _read_vision(data, preprocessor or {})
    return ModelConfig(model_type=model_type, **values)


def to_hf_dict(config: ModelConfig, dtype: torch.dtype | str = torch.bfloat16) -> dict[str, Any]:
    """Contents of ``config.json`` for a model: published names and values, extra keys only where needed.

    Args:
        config: the model.
        dtype: of the weights that stand beside the file.
    """
    model_type = published_model_type(config)
    renamed = _RENAMED.get(model_type, {})
    result: dict[str, Any] = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type}
    implied = ModelConfig(**({"original_max_position_embeddings": 131072} | _DEFAULTS[model_type]))
    for field in dataclasses.fields(ModelConfig):
        value = getattr(config, field.name)
        if field.name in _NOT_STORED:
            continue
        if field.name in _KEYS[model_type] or value != getattr(implied, field.name):
            result[renamed.get(field.name, field.name)] = list(value) if isinstance(value, tuple) else value
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        result["head_dim"] = config.head_dim
    result["rope_scaling"], result["rope_parameters"] = _write_rope(config, model_type)
    if config.vision is not None:
        result |= _write_vision(config.vision)
    result |= _CONSTANTS.get(model_type, {})
    if model_type == "phi3small":
        result["blocksparse_triton_kernel_block_size"] = config.blocksparse_block_size
    result["torch_dtype"] = str(dtype).removeprefix("torch.")
    result["use_cache"] = True
    if config.quantization is not None:
        result["quantization_config"] = quantization.to_entry(config.quantization)
    return dict(sorted(result.items()))


def to_generation_dict(config: ModelConfig) -> dict[str, Any]:
    """Contents of ``generation_config.json``: the ids that really end an answer."""
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.stop_token_ids),
        "pad_token_id": config.pad_token_id,
    }


def published_model_type(config: ModelConfig) -> str:
    """The published ``model_type`` that comes nearest to a model; one with image path and experts is ``phi3_v``."""
    if config.vision is not None:
        return "phi3_v"
    if config.is_sparse:
        return "phimoe"
    plain = ModelConfig()
    return "phi3small" if any(getattr(config, name) != getattr(plain, name) for name in _OF_SMALL) else "phi3"


def _model_type(data: Mapping[str, Any]) -> str:
    classes = {name: model_type for model_type, name in ARCHITECTURES.items()} | OTHER_SPELLINGS
    model_type = data.get("model_type") or next(
        (classes[name] for name in data.get("architectures") or () if name in classes), None
    )
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"config.json has model_type {data.get('model_type')!r} and architectures {data.get('architectures')!r}: "
            f"expected one of {sorted(ARCHITECTURES)}"
        )
    return model_type


def _read_small(data: Mapping[str, Any], values: dict[str, Any]) -> None:
    """What only ``phi3small`` files say, and what they leave to the published tokenizer."""
    if data.get("ff_dim_multiplier") is not None:
        raise ValueError(f"ff_dim_multiplier is {data['ff_dim_multiplier']}: give ff_intermediate_size instead")
    if data.get("rope_position_scale", 1.0) != 1.0:
        raise ValueError(f"rope_position_scale is {data['rope_position_scale']}: only 1.0 is supported")
    for name, key in (("gegelu_limit", "gegelu_limit"), ("ffn_pdrop", "ffn_dropout_prob")):
        if key in data and data[key] is None:
            values[name] = None
    if "dummy_token_indices" not in data and values["vocab_size"] != SMALL_VOCAB_SIZE:
        values["dummy_token_indices"] = ()


def _rope_fields(data: Mapping[str, Any], model_type: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_scaling and original_max_position_embeddings from either spelling."""
    old = _read_rope(data.get("rope_scaling"), "rope_scaling")
    new = _read_rope(data.get("rope_parameters"), "rope_parameters")
    top = {
        "rope_theta": data.get(_RENAMED.get(model_type, {}).get("rope_theta", "rope_theta")),
        "original": data.get("original_max_position_embeddings"),
        "partial_rotary_factor": data.get("partial_rotary_factor"),
    }
    merged: dict[str, Any] = {}
    for source in (old, new, top):
        for key, value in source.items():
            if value is None:
                continue
            if key == "kind" and {value, merged.get(key, value)} <= set(ROPE_TYPES):
                merged.setdefault(key, value)  # these names stand for one computation
            elif merged.setdefault(key, value) != value:
                raise ValueError(
                    f"config.json contradicts itself: {key} is {_short(merged[key])} in one place and "
                    f"{_short(value)} in another (rope_scaling, rope_parameters, or beside them); make them agree"
                )
    if merged.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {merged['partial_rotary_factor']}: this family rotates whole heads (1.0)"
        )
    fields: dict[str, Any] = {}
    if "rope_theta" in merged:
        fields["rope_theta"] = float(merged["rope_theta"])
    longest = values.get("max_position_embeddings", 4096)
    if merged.get("kind", "default") == "default":
        return fields | {"original_max_position_embeddings": merged.get("original", longest)}
    if "original" not in merged and model_type in ("phimoe", "phi3small"):
        published = 4096 if model_type == "phimoe" else 8192
        raise ValueError(
            f"config.json has LongRoPE factors but no original_max_position_embeddings ({published} published)"
        )
    original = merged.get("original", 4096)
    missing = [name for name in ("short_factor", "long_factor") if name not in merged]
    if missing:
        raise ValueError(f"rotary type {merged['kind']!r} needs {missing} in config.json")
    short, long = merged.get("short_mscale"), merged.get("long_mscale")
    if "attention_factor" in merged and short is None and long is None:
        short = long = merged["attention_factor"]
    elif "factor" in merged and short is None and long is None and merged["factor"] != longest / original:
        short = long = math.sqrt(1 + math.log(merged["factor"]) / math.log(original)) if merged["factor"] > 1 else 1.0
    scaling = RopeScaling(
        short_factor=merged["short_factor"],
        long_factor=merged["long_factor"],
        short_mscale=short,
        long_mscale=long,
        type=merged["kind"],
    )
    return fields | {"original_max_position_embeddings": original, "rope_scaling": scaling}


def _read_rope(rope: Any, key: str) -> dict[str, Any]:
    """One spelling's dict under common names; an empty one for null."""
    if rope is None:
        return {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{key} in config.json must be an object or null, got {rope!r}")
    # transformers 5 keeps the older "type" beside its own "rope_type"; "su" and "longrope" name one computation.
    kinds = [rope[name] for name in ("type", "rope_type") if rope.get(name) is not None]
    unknown = [kind for kind in kinds if kind not in (*ROPE_TYPES, "default")]
    if unknown:
        raise ValueError(f"{key} has type {unknown[0]!r}: expected one of {ROPE_TYPES} or 'default'")
    if len({kind == "default" for kind in kinds}) > 1:
        raise ValueError(f"{key} contradicts itself: type {kinds[0]!r}, rope_type {kinds[1]!r}")
    names = "rope_theta partial_rotary_factor short_mscale long_mscale attention_factor factor".split()
    result = {name: rope.get(name) for name in names}
    result["original"] = rope.get("original_max_position_embeddings")
    for name in ("short_factor", "long_factor"):
        result[name] = None if rope.get(name) is None else tuple(rope[name])
    result["kind"] = kinds[0] if kinds else ("longrope" if result["long_factor"] else None)
    return result


def _write_rope(config: ModelConfig, model_type: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """``rope_scaling`` as published and ``rope_parameters`` as transformers 5 writes it."""
    scaling = config.rope_scaling
    if scaling is None:
        return None, {"rope_type": "default", "rope_theta": config.rope_theta}
    old: dict[str, Any] = {
        "long_factor": list(scaling.long_factor),
        "short_factor": list(scaling.short_factor),
        # transformers 5 reads "su" and then misses a field that older versions refuse to see in a dense config.
        "type": "longrope" if model_type == "phi3" else scaling.type,
    }
    if model_type in ("phimoe", "phi3small"):
        # These classes ask for these three by name; the formula's value stands where the config has none.
        old["short_mscale"], old["long_mscale"] = config.rope_attention_scaling
        old["original_max_position_embeddings"] = config.original_max_position_embeddings
    else:
        old |= {
            name: getattr(scaling, name)
            for name in ("short_mscale", "long_mscale")
            if getattr(scaling, name) is not None
        }
    new = {key: value for key, value in old.items() if key != "type"}
    new |= {
        "rope_type": "longrope",
        "rope_theta": config.rope_theta,
        "original_max_position_embeddings": config.original_max_position_embeddings,
    }
    return old, new


def _stop_ids(
    data: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    ends: list[int],
    vocab_size: int,
    usual: tuple[int, ...],
) -> tuple[int, ...]:
    """Ids that stop generation: the folder's own list where it says more than the config's single end."""
    listed = (generation or {}).get("eos_token_id")
    listed = list(listed) if isinstance(listed, list | tuple) else [] if listed is None else [listed]
    for candidate in (listed, data.get("stop_token_ids") or [], ends):
        if set(candidate) - {UNUSED_EOS, *ends[:1]}:
            return tuple(candidate)
    if vocab_size > max(usual):
        return usual
    return tuple(listed or ends)


def _read_vision(data: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> VisionConfig:
    """The image path from ``img_processor``, ``embd_layer`` and the preprocessor's file."""
    tower, embedding = data.get("img_processor") or {}, data.get("embd_layer") or {}
    for key, value in (("img_processor", tower), ("embd_layer", embedding)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} in config.json must be an object, got {value!r}")
    for key, expected in _EMBEDDING_LAYER.items():
        if embedding.get(key, expected) != expected:
            raise ValueError(f"embd_layer.{key} is {embedding[key]!r}: only {expected!r} is supported")
    if tower.get("name", "clip_vision_model") != "clip_vision_model":
        raise ValueError(f"img_processor.name is {tower['name']!r}: only 'clip_vision_model' is supported")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(VisionConfig):
        for source in (preprocessor, tower):
            value = source.get(_VISION_KEYS.get(field.name, field.name))
            if value is not None and field.name not in values:
                values[field.name] = value
    vision = VisionConfig(**values)
    tokens = tower.get("num_img_tokens", vision.merged_grid_size**2)
    if tokens != vision.merged_grid_size**2:
        raise ValueError(
            f"img_processor.num_img_tokens is {tokens}, but crops of {vision.image_size} pixels and patches of "
            f"{vision.patch_size} give {vision.merged_grid_size**2}"
        )
    return vision


def _write_vision(vision: VisionConfig) -> dict[str, Any]:
    published = VisionConfig()
    tower = {
        "image_dim_out": vision.hidden_size,
        "model_name": vision.model_name,
        "name": "clip_vision_model",
        "num_img_tokens": vision.merged_grid_size**2,
    }
    for field in dataclasses.fields(VisionConfig):
        value = getattr(vision, field.name)
        if field.name not in _VISION_KEYS and value != getattr(published, field.name):
            tower[field.name] = list(value) if isinstance(value, tuple) else value
    return {"embd_layer": dict(_EMBEDDING_LAYER), "img_processor": tower}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
