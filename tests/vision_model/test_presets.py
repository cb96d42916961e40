"""The vision presets against the published config and its counts."""

import json

import torch
from published import published_file

from phi35.model import CausalLM
from vision.presets import FULL_SIZE, PRESETS


def test_phi_35_vision_equals_the_published_config():
    published = json.loads(published_file("configs/phi-3.5-vision-instruct.json").read_text())
    config = PRESETS["phi-3.5-vision"]
    text_fields = """
        attention_dropout bos_token_id embd_pdrop hidden_act hidden_size initializer_range intermediate_size
        max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads
        original_max_position_embeddings pad_token_id resid_pdrop rms_norm_eps rope_theta sliding_window
        tie_word_embeddings vocab_size""".split()
    assert {name: getattr(config, name) for name in text_fields} == {name: published[name] for name in text_fields}
    for name in ("long_factor", "short_factor"):
        assert list(getattr(config.rope_scaling, name)) == published["rope_scaling"][name]
    assert config.rope_scaling.type == published["rope_scaling"]["type"]
    assert config.vision.hidden_size == published["img_processor"]["image_dim_out"]
    assert config.vision.model_name == published["img_processor"]["model_name"]
    assert config.vision.merged_grid_size**2 == published["img_processor"]["num_img_tokens"]
    # the published eos_token_id 2 is never written by the model
    assert config.stop_token_ids == (32007, 32001, 32000)


def test_phi_3_vision_differs_in_factors_window_and_crops_alone():
    newer, older = PRESETS["phi-3.5-vision"], PRESETS["phi-3-vision-128k"]
    assert older.vision.num_crops == 16 and older.sliding_window == 131072
    assert older.rope_scaling.long_factor[:4] == (
        1.0299999713897705,
        1.0499999523162842,
        1.0499999523162842,
        1.0799999237060547,
    )
    assert older.rope_scaling.short_factor[-1] == 3.049999999999997
    same = {"rope_scaling": newer.rope_scaling, "sliding_window": newer.sliding_window, "vision": newer.vision}
    assert older.replace(**same) == newer


def test_parameter_counts_of_the_published_models():
    for config in FULL_SIZE.values():
        with torch.device("meta"):
            model = CausalLM(config)
        embedding = model.model.vision_embed_tokens
        assert sum(parameter.numel() for parameter in model.parameters()) == 4_146_621_440
        assert sum(parameter.numel() for parameter in embedding.img_processor.parameters()) == 303_507_456
        assert sum(parameter.numel() for parameter in embedding.img_projection.parameters()) == 22_026_240
        assert embedding.glb_GN.shape == (1, 1, 4096) and embedding.sub_GN.shape == (1, 1, 1, 4096)
        unused = sum(embedding.get_parameter(name).numel() for name in embedding.unused_parameter_names)
        assert 303_507_456 - unused == 290_909_184


def test_tiny_twins_keep_the_shape_of_the_family():
    for name, full in FULL_SIZE.items():
        tiny = PRESETS[f"tiny-{name}"]
        assert tiny.vocab_size == 1088 and tiny.stop_token_ids == (1007, 1001, 1000)
        assert (tiny.bos_token_id, tiny.eos_token_id, tiny.pad_token_id) == (1, 1000, 1000)
        assert tiny.vision.image_token_id == 1044 and tiny.vision.num_crops == full.vision.num_crops
        assert (tiny.vision.image_size, tiny.vision.patch_size, tiny.vision.merged_grid_size) == (64, 8, 4)
        assert sum(parameter.numel() for parameter in CausalLM(tiny).parameters()) < 500_000
