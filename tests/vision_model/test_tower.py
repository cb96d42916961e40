"""The tower against timm, open_clip and transformers' CLIP under the same random weights."""

import copy
import dataclasses

import pytest
import timm
import torch

from phi35.config import VisionConfig
from vision.open_clip_weights import from_open_clip
from vision.presets import PRESETS
from vision.tower import ClipVisionTower

PUBLISHED = VisionConfig()
SHALLOW = dataclasses.replace(
    PUBLISHED, image_size=56, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
)


@pytest.fixture(scope="module")
def tower() -> ClipVisionTower:
    torch.manual_seed(0)
    tower = ClipVisionTower(SHALLOW).eval()
    randomise(tower)
    return tower


@pytest.fixture(scope="module")
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def randomise(module: torch.nn.Module) -> None:
    """Weights away from their initial values, so that every norm, bias and embedding counts."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)


def test_the_published_tower_is_timms():
    with torch.device("meta"):
        peer = timm.create_model("vit_large_patch14_clip_quickgelu_336", pretrained=False, num_classes=0)
        ours = ClipVisionTower(PUBLISHED)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in peer.state_dict().items()
    }
    assert repr(ours).replace("ClipVisionTower", "VisionTransformer") == repr(peer)


def test_counts_of_the_published_tower():
    with torch.device("meta"):
        tower = ClipVisionTower(PRESETS["phi-3.5-vision"].vision)
    assert sum(parameter.numel() for parameter in tower.parameters()) == 303_507_456
    assert sum(parameter.numel() for parameter in tower.parameters() if parameter.requires_grad) == 290_909_184
    assert not list(tower.buffers())


def test_features_equal_timms_own_intermediates(tower, pixel_values):
    peer = timm.create_model(
        "vit_large_patch14_clip_quickgelu_336", num_classes=0, img_size=56, embed_dim=128, depth=4, num_heads=4
    ).eval()
    peer.load_state_dict(tower.state_dict())
    with torch.no_grad():
        expected = peer.forward_intermediates(pixel_values, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
        torch.testing.assert_close(tower(pixel_values), expected, atol=0, rtol=0)


def test_features_equal_those_of_open_clip(pixel_values):
    from open_clip.transformer import QuickGELU, VisionTransformer

    peer = VisionTransformer(
        image_size=56,
        patch_size=14,
        width=128,
        layers=4,
        heads=4,
        mlp_ratio=4,
        output_dim=32,
        act_layer=QuickGELU,
    ).eval()
    randomise(peer)
    ours = ClipVisionTower(SHALLOW).eval()
    ours.load_state_dict(from_open_clip(peer.state_dict()))
    with torch.no_grad():
        result = peer.forward_intermediates(
            pixel_values, indices=[2], normalize_intermediates=False, intermediates_only=True, output_fmt="NLC"
        )
        expected = result["image_intermediates"][0]
        error = (ours(pixel_values) - expected).abs().max().item()
    assert expected.std() > 0.5
    assert error < 2e-5 * expected.std(), error  # measured: 4.8e-7 at a deviation of 0.58


def test_features_equal_those_of_transformers_clip(pixel_values):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    peer = CLIPVisionModel(config).eval()
    randomise(peer)
    ours = ClipVisionTower(SHALLOW).eval()
    ours.load_state_dict(from_transformers(peer.state_dict()))
    with torch.no_grad():
        expected = peer(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        error = (ours(pixel_values) - expected).abs().max().item()
    assert expected.std() > 0.5
    assert error < 2e-5 * expected.std(), error  # measured: 0 at a deviation of 3.4


def from_transformers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names for the tensors of transformers' CLIP, written out step by step."""
    source = {name.removeprefix("vision_model."): value for name, value in state_dict.items()}
    result = {
        "cls_token": source["embeddings.class_embedding"].view(1, 1, -1),
        "pos_embed": source["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": source["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        result[f"norm_pre.{kind}"] = source[f"pre_layrnorm.{kind}"]
        result[f"norm.{kind}"] = source[f"post_layernorm.{kind}"]
        for layer in range(SHALLOW.num_hidden_layers):
            theirs, ours = f"encoder.layers.{layer}", f"blocks.{layer}"
            parts = [source[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            result[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
            result[f"{ours}.attn.proj.{kind}"] = source[f"{theirs}.self_attn.out_proj.{kind}"]
            for number in "12":
                result[f"{ours}.norm{number}.{kind}"] = source[f"{theirs}.layer_norm{number}.{kind}"]
                result[f"{ours}.mlp.fc{number}.{kind}"] = source[f"{theirs}.mlp.fc{number}.{kind}"]
    return result


def test_plain_gelu_is_told_apart(tower, pixel_values):
    other = copy.deepcopy(tower)
    for block in other.blocks:
        block.mlp.act = torch.nn.GELU()
    with torch.no_grad():
        assert (other(pixel_values) - tower(pixel_values)).abs().max() > 1e-2  # measured: 0.15


def test_the_last_block_and_the_final_norm_are_kept_frozen_and_unused(tower, pixel_values):
    unused = set(tower.unused_parameter_names)
    assert unused == {name for name, _ in tower.named_parameters() if name.startswith(("blocks.3.", "norm."))}
    assert unused and not any(tower.get_parameter(name).requires_grad for name in unused)
    tower.zero_grad()
    tower(pixel_values).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is None) == (name in unused), name
        assert name in unused or parameter.grad.abs().sum() > 0, name


def test_gradient_checkpointing_changes_no_gradient(tower, pixel_values):
    gradients = []
    for enabled in (False, True):
        tower.zero_grad()
        tower.gradient_checkpointing = enabled
        assert tower.gradient_checkpointing is enabled
        tower(pixel_values).square().sum().backward()
        gradients.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
    tower.gradient_checkpointing = False
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_tower_made_on_the_meta_device_needs_its_parameters_alone(tower, pixel_values):
    with torch.device("meta"):
        other = ClipVisionTower(SHALLOW)
    other.load_state_dict(tower.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(pixel_values), tower(pixel_values))


def test_pixels_are_cast_to_the_towers_dtype(tower, pixel_values):
    half = copy.deepcopy(tower).bfloat16()
    with torch.no_grad():
        features, expected = half(pixel_values), tower(pixel_values)
    assert features.dtype == torch.bfloat16
    assert (features.float() - expected).abs().mean() < 0.05 * expected.std()  # measured: 0.008 of it


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 100, "hidden_size": 96},
        {"patch_size": 7, "image_size": 28},
        {"num_hidden_layers": 2, "num_attention_heads": 1},
    ],
)
def test_other_sizes_build_as_configured(changes):
    config = dataclasses.replace(SHALLOW, **changes)
    tower = ClipVisionTower(config).eval()
    side, patches = config.image_size, config.grid_size**2
    assert tower.blocks[0].mlp.fc1.out_features == config.intermediate_size
    assert len(tower.blocks) == config.num_hidden_layers
    assert tower(torch.zeros(1, 3, side, side)).shape == (1, patches, config.hidden_size)


def test_crops_of_another_shape_are_refused(tower):
    for shape in ((3, 56, 56), (1, 3, 56, 64), (1, 1, 56, 56)):
        with pytest.raises(ValueError, match=r"\(C, 3, 56, 56\)"):
            tower(torch.zeros(shape))
