"""open_clip's weights in the tower: names, values, files, and what is refused."""

import dataclasses
import pickle

import pytest
import torch
from images import small_config
from safetensors.torch import save_file

from phi35.config import VisionConfig
from phi35.model import CausalLM
from vision.embedding import VisionEmbedding
from vision.open_clip_weights import OPEN_CLIP_MODEL, from_open_clip, import_tower, load_open_clip
from vision.tower import ClipVisionTower

SMALL = VisionConfig(image_size=56, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)


@pytest.fixture(scope="module")
def clip() -> dict[str, torch.Tensor]:
    """The state dict of a whole, small open_clip model with random weights."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 56, "patch_size": 14, "width": 128, "layers": 3, "head_width": 32}
    text = {"context_length": 4, "vocab_size": 9, "width": 32, "heads": 2, "layers": 1}
    return CLIP(32, vision, text, quick_gelu=True).state_dict()


def test_the_published_model_maps_onto_the_published_tower():
    from open_clip import get_model_config
    from open_clip.model import CLIP

    with torch.device("meta"):
        options = get_model_config(OPEN_CLIP_MODEL)
        peer = CLIP(options["embed_dim"], options["vision_cfg"], options["text_cfg"], options["quick_gelu"])
        tower = ClipVisionTower(VisionConfig())
    mapped = from_open_clip(peer.state_dict())
    assert {name: value.shape for name, value in mapped.items()} == {
        name: value.shape for name, value in tower.state_dict().items()
    }


def test_the_image_side_alone_maps_like_the_whole_model(clip):
    whole = from_open_clip(clip)
    visual = {name.removeprefix("visual."): value for name, value in clip.items() if name.startswith("visual.")}
    alone = from_open_clip(visual)
    assert whole.keys() == alone.keys() and all(torch.equal(whole[name], alone[name]) for name in whole)


@pytest.mark.parametrize("form", ["safetensors", "torch", "nested"])
def test_import_from_a_file_writes_every_tensor(tmp_path, clip, form):
    path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    if form == "safetensors":
        save_file(clip, path)
    elif form == "torch":
        torch.save(clip, path)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in clip.items()}}, path)
    tower = ClipVisionTower(SMALL)
    assert import_tower(tower, path) == list(tower.state_dict())
    expected = from_open_clip(clip)
    assert all(torch.equal(value, expected[name]) for name, value in tower.state_dict().items())


def test_import_finds_the_tower_of_a_model_and_keeps_its_dtype(clip):
    config = small_config()
    config = config.replace(vision=dataclasses.replace(SMALL, image_token_id=1044))
    model, embedding = CausalLM(config).bfloat16(), VisionEmbedding(config)
    for target in (model, embedding):
        import_tower(target, clip)
    expected = from_open_clip(clip)
    for name, value in model.model.vision_embed_tokens.img_processor.state_dict().items():
        assert torch.equal(value, expected[name].bfloat16())
    assert torch.equal(embedding.img_processor.cls_token, expected["cls_token"])


def test_weights_that_do_not_fit_are_listed_and_nothing_is_written(clip):
    tower = ClipVisionTower(dataclasses.replace(SMALL, image_size=84, num_hidden_layers=4))
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing blocks\.3.*") as error:
        import_tower(tower, clip)
    assert "13 problems" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 17, 128\) in the file and \(1, 37, 128\) in the model"):
        import_tower(ClipVisionTower(dataclasses.replace(SMALL, image_size=84)), clip)
    with pytest.raises(ValueError, match="1 tensors are not those.*attn_pool"):
        from_open_clip({**clip, "visual.attn_pool.query": torch.zeros(1)})
    with pytest.raises(ValueError, match="no vision tower"):
        import_tower(torch.nn.Linear(2, 2), clip)


class Payload:
    """Would run on unpickling."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_pickled_objects_are_not_executed(tmp_path):
    for number, content in enumerate([Payload(), {"state_dict": Payload()}]):
        torch.save(content, tmp_path / f"{number}.pt")
        (tmp_path / f"{number}.pkl").write_bytes(pickle.dumps(content))
        for suffix in ("pt", "pkl"):
            with pytest.raises(ValueError, match="cannot read tensors from"):
                load_open_clip(tmp_path / f"{number}.{suffix}")


def test_unreadable_sources_say_what_to_give(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ValueError, match="cannot read tensors.*safetensors"):
        load_open_clip(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="do not exist"):
        load_open_clip(tmp_path / "absent.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, not a dict of tensors"):
        load_open_clip(tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"tags are \['openai'\]"):
        load_open_clip("laion2b")


def test_without_a_network_the_message_says_how_to_point_at_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="could not be fetched.*give its path"):
        load_open_clip("openai")
