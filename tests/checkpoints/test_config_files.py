"""config.json in every spelling, read and written."""

import copy
import json
import math

import pytest
import torch

from phi35 import presets
from phi35.config_io import from_hf_dict, to_generation_dict, to_hf_dict

TINY = "tiny-phi-3.5-mini"


def written(name=TINY, **changes):
    """config.json of a preset, as it stands on disk."""
    return json.loads(json.dumps(to_hf_dict(presets.get(name).replace(**changes))))


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_comes_back(name):
    config = presets.get(name)
    assert from_hf_dict(written(name)) == config


def test_what_no_published_type_can_say_comes_back():
    vision = presets.get("tiny-phi-3.5-vision").vision
    config = presets.get("tiny-phi-3.5-moe").replace(
        router_type="topk", num_experts_per_tok=1, router_aux_loss_coef=0.02, head_dim=16, hidden_size=96
    )
    assert from_hf_dict(json.loads(json.dumps(to_hf_dict(config)))) == config
    both = config.replace(vision=vision, model_type="phi3_v")
    assert from_hf_dict(json.loads(json.dumps(to_hf_dict(both)))) == both
    plain = presets.get(TINY).replace(norm_type="layernorm", attention_bias=True, lm_head_bias=True, resid_pdrop=0.1)
    assert from_hf_dict(json.loads(json.dumps(to_hf_dict(plain)))) == plain


@pytest.mark.parametrize(
    ("name", "model_type", "architecture"),
    [
        ("phi-3.5-mini", "phi3", "Phi3ForCausalLM"),
        ("phi-3.5-moe", "phimoe", "PhiMoEForCausalLM"),
        ("phi-3.5-vision", "phi3_v", "Phi3VForCausalLM"),
    ],
)
def test_published_class_names_and_both_rotary_forms_are_written(name, model_type, architecture):
    config = presets.get(name)
    data = to_hf_dict(config, torch.float32)
    assert (data["model_type"], data["architectures"], data["torch_dtype"]) == (model_type, [architecture], "float32")
    assert "auto_map" not in data
    old, new = data["rope_scaling"], data["rope_parameters"]
    assert data["rope_theta"] == new["rope_theta"] == 10000.0
    assert new["rope_type"] == "longrope" and old["type"] == config.rope_scaling.type
    assert new["original_max_position_embeddings"] == data["original_max_position_embeddings"] == 4096
    assert old["long_factor"] == new["long_factor"] == list(config.rope_scaling.long_factor)
    for key in ("rope_scaling", "rope_parameters"):
        alone = {name: value for name, value in data.items() if name not in ("rope_scaling", "rope_parameters")}
        read = from_hf_dict(alone | {key: data[key]})
        assert read.rope_scaling.long_factor == config.rope_scaling.long_factor
        assert read.rope_attention_scaling == config.rope_attention_scaling
    if model_type == "phi3":
        # transformers 4 accepts exactly these three.
        assert set(old) == {"type", "short_factor", "long_factor"}


def test_a_file_of_transformers_5():
    data = written()
    del data["rope_scaling"], data["rope_theta"]
    data["rope_parameters"] |= {"rope_theta": 5000.0, "type": "longrope", "partial_rotary_factor": 1.0}
    config = from_hf_dict(data)
    assert config.rope_theta == 5000.0
    assert config.rope_scaling.short_factor == presets.get(TINY).rope_scaling.short_factor


def test_plain_rotary_embeddings_in_both_forms():
    data = written("tiny-phi-3-mini-4k")
    assert data["rope_scaling"] is None
    assert data["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    for key in ("rope_scaling", "rope_parameters"):
        assert from_hf_dict({name: value for name, value in data.items() if name != key}).rope_scaling is None


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_older_names_of_longrope(kind):
    data = written()
    data["rope_scaling"]["type"] = kind
    config = from_hf_dict(data)
    assert config.rope_scaling.type == kind
    assert config == presets.get(TINY)
    # "su" in a dense config makes transformers 5.23 refuse it; the published vision code knows no other name
    assert to_hf_dict(config)["rope_scaling"]["type"] == "longrope"
    assert to_hf_dict(presets.get("phi-3.5-vision"))["rope_scaling"]["type"] == "su"
    assert to_hf_dict(config)["rope_parameters"]["rope_type"] == "longrope"
    assert config.rope_attention_scaling == presets.get(TINY).rope_attention_scaling


def test_attention_factor_and_factor_of_transformers_5():
    data = written()
    del data["rope_scaling"]
    given = copy.deepcopy(data)
    given["rope_parameters"]["attention_factor"] = 1.5
    assert from_hf_dict(given).rope_attention_scaling == (1.5, 1.5)
    given = copy.deepcopy(data)
    given["rope_parameters"]["factor"] = 4.0
    expected = math.sqrt(1 + math.log(4.0) / math.log(4096))
    assert from_hf_dict(given).rope_attention_scaling == pytest.approx((expected, expected), rel=1e-12)
    given["rope_parameters"]["factor"] = 32.0  # the same as 131072 / 4096
    assert from_hf_dict(given) == presets.get(TINY)


def test_missing_fields_take_the_published_classes_defaults():
    dense = from_hf_dict({"model_type": "phi3"})
    assert dense == presets.get("phi-3-mini-4k").replace(sliding_window=None)
    grouped = from_hf_dict({"model_type": "phi3", "num_attention_heads": 16, "num_key_value_heads": None})
    assert grouped.num_key_value_heads == 16
    sparse = from_hf_dict({"architectures": ["PhimoeForCausalLM"], "max_position_embeddings": 4096})
    assert (sparse.num_local_experts, sparse.intermediate_size, sparse.norm_type) == (16, 6400, "layernorm")
    assert sparse.rope_theta == 1e6 and not sparse.attention_bias
    assert from_hf_dict({"architectures": ["Phi3SmallForCausalLM"]}) == presets.get("phi-3-small-8k")
    other_vocabulary = from_hf_dict({"model_type": "phi3small", "vocab_size": 200})
    assert other_vocabulary.dummy_token_indices == () and other_vocabulary.stop_token_ids == (100257,)


@pytest.mark.parametrize(
    "changes",
    [
        {"mup_use_scaling": True},
        {"mlp_bias": True, "attention_bias": True},
        {"blocksparse_block_size": 32, "sliding_window": None, "blocksparse_homo_head_pattern": True},
        {"hidden_act": "gegelu", "gegelu_limit": 7.0, "ffn_pdrop": 0.2, "tie_word_embeddings": True},
    ],
)
def test_a_dense_model_with_parts_of_phi_3_small_comes_back(changes):
    config = presets.get("tiny-phi-3-mini-4k").replace(**changes, model_type="phi3small")
    assert from_hf_dict(to_hf_dict(config), to_generation_dict(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'.*expected one of .'phi3', 'phi3_v', 'phi3small', 'phimoe'"),
        ({"model_type": "phi3small", "ff_dim_multiplier": 4}, "ff_dim_multiplier is 4: give ff_intermediate_size"),
        ({"model_type": "phi3small", "rope_position_scale": 2.0}, "rope_position_scale is 2.0"),
        ({"model_type": None, "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_theta": 20000.0}, "contradicts itself: rope_theta"),
        ({"original_max_position_embeddings": 8192}, "contradicts itself: original"),
        ({"rope_parameters": {"rope_type": "default"}}, "contradicts itself: kind"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has type 'linear'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": None},
            "needs .'short_factor', 'long_fac",
        ),
        ({"rope_scaling": {"type": "default", "rope_type": "longrope"}}, "rope_scaling contradicts itself"),
        ({"rope_scaling": "longrope"}, "must be an object or null"),
        ({"rope_scaling": None, "rope_parameters": None}, "without rope_scaling"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf_dict(written() | change)


def test_factors_of_the_wrong_length():
    data = written()
    for key in ("rope_scaling", "rope_parameters"):
        data[key]["long_factor"] = data[key]["long_factor"][:-1]
    with pytest.raises(ValueError, match="long_factor must hold head_dim / 2 = 8 numbers, got 7"):
        from_hf_dict(data)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("embd_layer", "hd_transform_order", "glb_sub", "only 'sub_glb' is supported"),
        ("embd_layer", "use_hd_transform", False, "use_hd_transform"),
        ("img_processor", "name", "siglip", "only 'clip_vision_model'"),
        ("img_processor", "num_img_tokens", 144, "give 16"),
    ],
)
def test_other_image_paths_are_refused(part, key, value, message):
    data = written("tiny-phi-3.5-vision")
    data[part][key] = value
    with pytest.raises(ValueError, match=message):
        from_hf_dict(data)


def test_image_settings_come_from_the_preprocessor():
    preprocessor = {"num_crops": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]}
    vision = from_hf_dict(written("tiny-phi-3.5-vision"), preprocessor=preprocessor).vision
    assert (vision.num_crops, vision.image_mean, vision.image_std) == (16, (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert vision.patch_size == 8


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (32007, 32001, 32000)),
        ({"eos_token_id": [32007, 32001, 32000]}, (32007, 32001, 32000)),
        ({"eos_token_id": [32000, 32007]}, (32000, 32007)),
        ({"eos_token_id": 32007}, (32007,)),
        # A single end that only repeats config.json, or the </s> that is never written, says nothing.
        ({"eos_token_id": 32000, "_from_model_config": True}, (32007, 32001, 32000)),
        ({"eos_token_id": 2}, (32007, 32001, 32000)),
    ],
)
def test_ids_that_stop_generation(generation, expected):
    data = {"model_type": "phi3", "eos_token_id": 32000}
    assert from_hf_dict(data, generation).stop_token_ids == expected


def test_the_vision_config_ends_on_the_familys_ids():
    data = written("phi-3.5-vision") | {"eos_token_id": 2}
    config = from_hf_dict(data, {"_from_model_config": True, "eos_token_id": 2, "pad_token_id": 32000})
    assert config.stop_token_ids == (32007, 32001, 32000) and config.eos_token_id == 32000


def test_generation_config_lists_the_real_stop_ids():
    assert to_generation_dict(presets.get("phi-3.5-vision")) == {
        "bos_token_id": 1,
        "eos_token_id": [32007, 32001, 32000],
        "pad_token_id": 32000,
    }
    assert to_generation_dict(presets.get(TINY))["eos_token_id"] == [1007, 1001, 1000]
