"""The sparse presets against the published config file."""

import dataclasses
import json

from published import published_file

from phi35 import presets


def test_full_preset_equals_the_published_config():
    published = json.loads(published_file("configs/phi-3.5-moe-instruct.json").read_text())
    ours = dataclasses.asdict(presets.get("phi-3.5-moe"))
    scaling, ours_scaling = published.pop("rope_scaling"), ours.pop("rope_scaling")
    compared = set(published) & set(ours)
    assert {name: ours[name] for name in compared} == {name: published[name] for name in compared}
    # What the file has and a config of ours lacks: how it was saved and run, and a dropout that is zero.
    assert set(published) - compared == {
        "architectures",
        "hidden_dropout",
        "output_router_logits",
        "torch_dtype",
        "use_cache",
    }
    assert published["hidden_dropout"] == 0.0
    assert scaling.pop("original_max_position_embeddings") == ours["original_max_position_embeddings"]
    assert {name: list(value) if isinstance(value, tuple) else value for name, value in ours_scaling.items()} == scaling
    assert ours["norm_type"] == "layernorm" and ours["router_type"] == "sparsemixer" and ours["head_dim"] == 128


def test_tiny_twin_keeps_the_kinds_and_the_lengths():
    full, tiny = presets.get("phi-3.5-moe"), presets.get("tiny-phi-3.5-moe")
    kept = (
        "model_type norm_type attention_bias lm_head_bias tie_word_embeddings max_position_embeddings "
        "original_max_position_embeddings sliding_window num_experts_per_tok router_type router_jitter_noise "
        "input_jitter_noise rope_attention_scaling"
    )
    for name in kept.split():
        assert getattr(tiny, name) == getattr(full, name), name
    assert (tiny.vocab_size, tiny.hidden_size, tiny.intermediate_size, tiny.num_local_experts) == (1088, 64, 96, 4)
    assert (tiny.num_hidden_layers, tiny.num_attention_heads, tiny.num_key_value_heads) == (2, 4, 2)
    assert (tiny.bos_token_id, tiny.eos_token_id, tiny.pad_token_id) == (1, 1000, 1000)
    assert tiny.stop_token_ids == (1007, 1001, 1000)
    assert tiny.rope_scaling.long_factor == full.rope_scaling.long_factor[::8]
