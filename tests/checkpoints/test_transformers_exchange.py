"""Exports that transformers loads, and its exports loaded here: the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file

import phi35

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no tokenizer.json"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
# Parity rule: 1e-5 x max(1, standard deviation of the logits). Measured: 0.0 in every case below, with logits of
# standard deviation 0.56 to 0.67.
SCALE = 4.0
LENGTH = 19


def batch(seed=0, vocab=1000, length=LENGTH):
    return torch.randint(3, vocab, (2, length), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(ours, theirs, ids):
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        found = ours(ids).logits
    difference, deviation = (found - expected).abs().max().item(), expected.std().item()
    print(f"difference {difference:.2e} at standard deviation {deviation:.2f}")
    assert deviation > 0.3, "logits too flat to tell models apart"
    assert difference <= 1e-5 * max(1.0, deviation)


def scaled(model):
    """Weights large enough that a wrong tensor shows in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(SCALE)
            elif "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "changes", "shard"),
    [
        ("tiny-phi-3-mini-4k", {}, "5GB"),
        ("tiny-phi-3-medium-4k", {}, "100KB"),
        ("tiny-phi-3-mini-128k", {}, "5GB"),
        ("tiny-phi-3-medium-128k", {}, "5GB"),
        ("tiny-phi-3.5-mini", {}, "5GB"),
        ("tiny-phi-3.5-mini", {"tie_word_embeddings": True}, "100KB"),
        ("tiny-phi-3.5-moe", {}, "200KB"),
    ],
)
def test_transformers_loads_our_export(name, changes, shard, tmp_path):
    torch.manual_seed(0)
    ours = scaled(phi35.create(name, seed=0, **changes))
    phi35.save(ours, None, tmp_path, max_shard_size=shard)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.generation_config.eos_token_id == [1007, 1001, 1000]
    assert_same_logits(ours, theirs.eval(), batch())


def longrope(head_dim, **extra):
    return {
        "type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(head_dim // 2)],
        "long_factor": [1.0 + 2.0 * i for i in range(head_dim // 2)],
        **extra,
    }


def their_config(kind):
    common = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    }
    if kind == "phi3":
        return transformers.Phi3Config(
            **common, original_max_position_embeddings=64, rope_scaling=longrope(12), sliding_window=8
        )
    if kind == "phi3-tied":
        return transformers.Phi3Config(**common, tie_word_embeddings=True)
    scaling = longrope(12, short_mscale=1.2, long_mscale=1.3, original_max_position_embeddings=64)
    return transformers.PhimoeConfig(
        **common,
        num_local_experts=4,
        attention_bias=True,
        lm_head_bias=True,
        rope_theta=10000.0,
        rope_scaling=scaling,
        original_max_position_embeddings=64,
    )


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("kind", ["phi3", "phi3-tied", "phimoe"])
def test_we_load_transformers_exports(kind, shard, tmp_path):
    torch.manual_seed(1)
    theirs = scaled(transformers.AutoModelForCausalLM.from_config(their_config(kind)))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard == "40KB")
    data = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in data and "rope_scaling" not in data
    ours, _ = phi35.load(tmp_path, device="cpu")
    assert ours.config.sliding_window == data["sliding_window"]
    assert_same_logits(ours, theirs, batch(1, 300))
    if kind == "phi3":
        # Past the original length: the long factors came through too. (transformers' phimoe never uses its own.)
        assert_same_logits(ours, theirs, batch(1, 300, length=80))

    # And back: what we write of it, transformers reads with the same logits.
    phi35.save(ours, None, tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert_same_logits(ours, again.eval(), batch(2, 300))


def test_a_swapped_pair_of_expert_matrices_shows(tmp_path):
    """The comparison above can fail: gate and up projections exchanged."""
    torch.manual_seed(0)
    ours = scaled(phi35.create("tiny-phi-3.5-moe", seed=0))
    phi35.save(ours, None, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        fused = ours.model.layers[1].mlp.experts.gate_up_proj
        fused.copy_(fused.roll(fused.shape[1] // 2, dims=1))
        difference = (ours(batch()).logits - theirs(input_ids=batch()).logits).abs().max().item()
    print(f"difference with gate and up exchanged: {difference:.2e}")
    assert difference > 1e-2


def test_transformers_clip_loads_the_tower_of_an_export(tmp_path):
    """The tower's published names, proven on transformers' own CLIP: its penultimate features are ours."""
    torch.manual_seed(0)
    ours = scaled(phi35.create("tiny-phi-3.5-vision", seed=0))
    phi35.save(ours, None, tmp_path)
    vision = ours.config.vision
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act="quick_gelu",
        )
    ).eval()
    prefix = "model.vision_embed_tokens.img_processor.vision_model."
    stored = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if name.startswith(prefix)
    }
    getattr(clip, "vision_model", clip).load_state_dict(stored, strict=True)
    pixel_values = torch.randn(3, 3, vision.image_size, vision.image_size)
    with torch.no_grad():
        expected = clip(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        found = ours.model.vision_embed_tokens.img_processor(pixel_values)
    difference = (found - expected).abs().max().item()
    print(f"tower: difference {difference:.2e} at standard deviation {expected.std().item():.2f}")
    assert difference <= 1e-5 * max(1.0, expected.std().item())  # measured: 0.0
