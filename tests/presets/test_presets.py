"""Presets say what the published files say, and their twins run."""

import json

import pytest
import torch
from published import published_file

import phi35
from phi35 import presets
from phi35.config_io import from_hf_dict, to_hf_dict
from phi35.parameter_count import cache_bytes_per_token, count_parameters

FAMILY = [
    "phi-3-mini-4k",
    "phi-3-mini-128k",
    "phi-3-small-8k",
    "phi-3-small-128k",
    "phi-3-medium-4k",
    "phi-3-medium-128k",
    "phi-3.5-mini",
    "phi-3.5-moe",
    "phi-3-vision-128k",
    "phi-3.5-vision",
    "phi-3.5-vision-moe",
]
PUBLISHED = {
    "phi-3-mini-4k": "phi-3-mini-4k-instruct",
    "phi-3-medium-4k": "phi-3-medium-4k-instruct",
    "phi-3.5-mini": "phi-3.5-mini-instruct",
    "phi-3.5-moe": "phi-3.5-moe-instruct",
    "phi-3.5-vision": "phi-3.5-vision-instruct",
}
NOT_WRITTEN = {"_name_or_path", "auto_map", "transformers_version", "_attn_implementation"}
# Published values that are left out on purpose: id 2 never ends an answer of the vision model.
CORRECTED = {"phi-3.5-vision": {"eos_token_id": 32000}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_of_the_published_config(name):
    published = json.loads(published_file(f"configs/{PUBLISHED[name]}.json").read_text())
    written = to_hf_dict(presets.get(name))
    expected = {key: value for key, value in published.items() if key not in NOT_WRITTEN} | CORRECTED.get(name, {})
    assert {key: written.get(key) for key in expected} == expected
    assert set(written) - set(expected) <= {"rope_parameters", "pad_token_id"}
    assert from_hf_dict(published) == presets.get(name)


def test_every_value_of_phi_3_smalls_published_config():
    """The 8k model's own file, without the names of its classes."""
    published = {
        "architectures": ["Phi3SmallForCausalLM"],
        "attention_bias": False,
        "attention_dropout_prob": 0.0,
        "blocksparse_block_size": 64,
        "blocksparse_homo_head_pattern": False,
        "blocksparse_num_local_blocks": 16,
        "blocksparse_triton_kernel_block_size": 64,
        "blocksparse_vert_stride": 8,
        "bos_token_id": 100257,
        "dense_attention_every_n_layers": 2,
        "embedding_dropout_prob": 0.1,
        "eos_token_id": 100257,
        "ff_dim_multiplier": None,
        "ff_intermediate_size": 14336,
        "ffn_dropout_prob": 0.1,
        "gegelu_limit": 20.0,
        "gegelu_pad_to_256": True,
        "hidden_act": "gegelu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 8192,
        "model_type": "phi3small",
        "mup_attn_multiplier": 1.0,
        "mup_embedding_multiplier": 10.0,
        "mup_use_scaling": True,
        "mup_width_multiplier": 8.0,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pad_sequence_to_multiple_of_64": True,
        "reorder_and_upcast_attn": False,
        "rope_embedding_base": 1000000,
        "rope_position_scale": 1.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 100352,
    }
    written = to_hf_dict(presets.get("phi-3-small-8k"))
    assert {key: written.get(key) for key in published} == published
    assert set(written) - set(published) == {"rope_scaling", "rope_parameters", "pad_token_id", "tie_word_embeddings"}
    assert from_hf_dict(published) == presets.get("phi-3-small-8k")


@pytest.mark.parametrize(
    ("name", "total", "active", "cache_bytes"),
    [
        ("phi-3-mini-4k", 3_821_079_552, 3_821_079_552, 393_216),
        ("phi-3-small-8k", 7_392_272_384, 7_392_272_384, 131_072),
        ("phi-3-small-128k", 7_392_272_384, 7_392_272_384, 131_072),
        ("phi-3-medium-4k", 13_960_238_080, 13_960_238_080, 204_800),
        ("phi-3-medium-128k", 13_960_238_080, 13_960_238_080, 204_800),
        ("phi-3.5-mini", 3_821_079_552, 3_821_079_552, 393_216),
        ("phi-3.5-moe", 41_873_153_344, 6_640_999_744, 131_072),
        ("phi-3-vision-128k", 4_146_621_440, 4_146_621_440, 393_216),
        ("phi-3.5-vision", 4_146_621_440, 4_146_621_440, 393_216),
    ],
)
def test_published_numbers_of_parameters(name, total, active, cache_bytes):
    config = presets.get(name)
    count = count_parameters(config)
    assert (count.total, count.active) == (total, active)
    assert cache_bytes_per_token(config) == cache_bytes


def test_counts_of_a_model_in_hand():
    model = phi35.create("tiny-phi-3.5-mini", tie_word_embeddings=True)
    count = count_parameters(model)
    assert count.total == count.trainable == sum(p.numel() for p in model.parameters())
    assert count.total == count_parameters(presets.get("tiny-phi-3.5-mini")).total - 1088 * 64
    model.model.embed_tokens.weight.requires_grad_(False)
    assert count_parameters(model).trainable == count.total - 1088 * 64


def test_meta_models_count_without_memory():
    model = phi35.create("phi-3.5-moe", device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 41_873_153_344
    assert all(parameter.is_meta for parameter in model.parameters())


def test_all_names_and_their_twins_are_there():
    names = presets.names()
    assert set(FAMILY) | {f"tiny-{name}" for name in FAMILY} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", FAMILY)
def test_a_twin_keeps_what_makes_its_model_special(name):
    full, tiny = presets.get(name), presets.get(f"tiny-{name}")
    kept = (
        "norm_type attention_bias lm_head_bias sliding_window max_position_embeddings model_type hidden_act mlp_bias "
        "gegelu_limit ffn_pdrop mup_embedding_multiplier mup_use_scaling mup_width_multiplier tie_word_embeddings "
        "blocksparse_vert_stride dense_attention_every_n_layers"
    )
    for field in kept.split():
        assert getattr(tiny, field) == getattr(full, field)
    assert bool(tiny.blocksparse_block_size) == bool(full.blocksparse_block_size)
    assert bool(tiny.dummy_token_indices) == bool(full.dummy_token_indices)
    assert tiny.is_sparse == full.is_sparse and (tiny.vision is None) == (full.vision is None)
    assert (tiny.num_key_value_heads < tiny.num_attention_heads) == (
        full.num_key_value_heads < full.num_attention_heads
    )
    assert tiny.rope_attention_scaling == full.rope_attention_scaling
    if full.rope_scaling is not None:
        assert len(tiny.rope_scaling.long_factor) == 8
        assert set(tiny.rope_scaling.long_factor) <= set(full.rope_scaling.long_factor)


@pytest.mark.parametrize("name", [f"tiny-{name}" for name in FAMILY])
def test_a_twin_runs(name):
    model = phi35.create(name, seed=0)
    ids = torch.randint(3, 1000, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
        single = model(ids[1:, :1]).logits
    assert logits.shape == (2, 5, 1088) and torch.isfinite(logits).all() and logits[..., :1064].std() > 0.01
    # 6e-8 measured: another batch size, another order of summation.
    torch.testing.assert_close(single[0, 0], logits[1, 0], atol=1e-6, rtol=0)


def test_long_rope_attention_scaling_is_the_papers():
    assert presets.get("phi-3.5-mini").rope_attention_scaling == pytest.approx((1.190238, 1.190238), abs=1e-6)
    assert presets.get("phi-3.5-moe").rope_attention_scaling == (1.243163121016122, 1.243163121016122)
    assert presets.get("phi-3-mini-4k").rope_attention_scaling == (1.0, 1.0)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'phi-3.5-moe'"):
        presets.get("phi-3.5-mo")
    with pytest.raises(ValueError, match="Known presets are .*tiny-phi-3.5-vision"):
        presets.get("gpt-2")


def test_create_draws_the_same_weights_for_one_seed():
    first, again = (phi35.create("tiny-phi-3.5-moe", seed=5).state_dict() for _ in range(2))
    other = phi35.create("tiny-phi-3.5-moe", seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = "model.layers.1.mlp.experts.down_proj"
    assert not torch.equal(first[drawn], other[drawn])
    assert first[drawn].std().item() == pytest.approx(0.02, rel=0.05)  # 24,576 draws: 0.5 % expected
    assert torch.equal(first["model.norm.weight"], torch.ones(64))


def test_create_changes_fields_and_casts():
    model = phi35.create("tiny-phi-3.5-mini", num_hidden_layers=1, dtype="bfloat16")
    assert len(model.model.layers) == 1 and model.dtype == torch.bfloat16 and not model.training
    assert phi35.create(model.config).config == model.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 3}, "unknown config fields .'num_layers'"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "xpu"}, "'xpu' is not supported"),
        ({"device": "cuda:99"}, "sees . CUDA devices"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"dtype": torch.int32}, "unknown dtype torch.int32"),
    ],
)
def test_create_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        phi35.create("tiny-phi-3.5-mini", **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size must be int, got '64'"),
        ({"num_hidden_layers": 2.5, "tie_word_embeddings": 1}, "num_hidden_layers must be int.*tie_word_embeddings"),
        ({"num_attention_heads": True}, "num_attention_heads must be int"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be float"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids must be tuple of ids"),
        ({"stop_token_ids": 3}, "stop_token_ids must be tuple"),
        ({"vision": {"crops": 2}}, "unknown vision fields .'crops'"),
        ({"vision": {"num_crops": "4"}}, "num_crops must be int"),
        ({"vision": {"image_mean": (0.5, 0.5)}}, "image_mean must hold 3"),
        ({"vision": {"image_std": 0.5}}, "image_std must be a list of numbers"),
        ({"rope_scaling": {"factor": 2}}, "unknown rope_scaling fields .'factor'"),
        ({"rope_scaling": {"short_factor": ["a"], "long_factor": [1]}}, "short_factor must be a list of numbers"),
    ],
)
def test_values_of_the_wrong_type_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        phi35.create("tiny-phi-3.5-vision", **changes)
    assert presets.get("tiny-phi-3.5-mini").replace(rms_norm_eps=1).rms_norm_eps == 1


def test_create_wants_a_name_or_a_config():
    with pytest.raises(ValueError, match="expected a preset's name or a ModelConfig, got dict"):
        phi35.create({"hidden_size": 64})


def test_the_table_of_presets(capsys):
    from phi35.cli.presets import presets as command

    command()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("phi-3")}
    assert set(rows) == set(FAMILY)
    assert "41,873,153,344" in rows["phi-3.5-moe"] and "6,640,999,744" in rows["phi-3.5-moe"]
    assert "2 of 16" in rows["phi-3.5-moe"] and "131,072" in rows["phi-3.5-moe"]
    assert "3,821,079,552" in rows["phi-3.5-mini"] and "393,216" in rows["phi-3.5-mini"]
    assert "4,146,621,440" in rows["phi-3.5-vision"]
    assert "13,960,238,080" in rows["phi-3-medium-4k"]
    assert "7,392,272,384" in rows["phi-3-small-8k"] and "131,072" in rows["phi-3-small-128k"]
