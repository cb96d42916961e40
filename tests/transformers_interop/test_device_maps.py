"""Models spread by a device map: weights that wait on the host or on disk, and layers on two GPUs, of which only the
devices are real here (torch's fake tensors refuse what mixes them)."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_configs import longrope_config
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from wrapped_models import IDS, PRESETS, picture_batch, wrapped

import phi35
from phi35.adapters.layers import register
from phi35.attention import plan_attention
from phi35.generation.batcher import Batcher
from phi35.generation.fast_step import model_limit
from phi35.interop import dispatch
from phi35.interop.modeling import CLASSES
from phi35.interop.placement import PlacementMap, check_together, device_of
from phi35.meta_model import meta_model
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.convert import quantize

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer.json")

APART = {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "norm": "disk"}


@pytest.fixture(scope="module", params=PRESETS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    wrapped(PRESETS[request.param], scale=2.0).save_pretrained(path)
    return path


def batch_of(folder: Path) -> dict[str, torch.Tensor]:
    return picture_batch() if "phi3_v" in folder.name else {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def map_of(folder: Path, head: str = "disk") -> dict[str, Any]:
    pictures = {"model.vision_embed_tokens": "disk"} if "phi3_v" in folder.name else {}
    return {f"model.{name}": place for name, place in APART.items()} | pictures | {"lm_head": head}


def equal_weights(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("kind", ["apart", "disk"])
def test_weights_on_disk_give_the_same_logits_text_and_files(folder: Path, kind: str, tmp_path: Path) -> None:
    plain, batch = AutoModelForCausalLM.from_pretrained(folder), batch_of(folder)
    device_map = map_of(folder) if kind == "apart" else "disk"
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "waiting")
    places = set(model.hf_device_map.values())
    assert places == {"cpu", "disk"} if kind == "apart" else model.hf_device_map == {"": "disk"}
    waiting = [name for name, one in model.named_parameters() if one.is_meta]
    assert any("layers.0" in name for name in waiting) and model.device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        expected = plain.generate(**batch, max_new_tokens=8, **options)
        assert torch.equal(model.generate(**batch, max_new_tokens=8, **options), expected)
    ours = plain.causal_lm.generate(**native(batch), max_new_tokens=4)
    assert torch.equal(model.causal_lm.generate(**native(batch), max_new_tokens=4), ours)
    assert waiting == [name for name, one in model.named_parameters() if one.is_meta]
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert equal_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), plain)


def native(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch as ``phi35``'s own generation takes it: crops packed."""
    if "pixel_values" not in batch:
        return batch
    counts = 1 + (batch["image_sizes"] // 64).prod(dim=1)
    crops = [image[:count] for image, count in zip(batch["pixel_values"], counts, strict=True)]
    return {**batch, "pixel_values": torch.cat(crops)}


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_what_memory_does_not_hold_waits_on_disk(folder: Path, device_map: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("would place layers on the GPU")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    room = sum(one.nbytes for one in plain.parameters()) * 3 // 4
    options = {"device_map": device_map, "max_memory": {"cpu": room}, "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    here = sum(one.nbytes for one in model.parameters() if not one.is_meta)
    assert 0 < here <= room
    batch = batch_of(folder)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    whole = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert whole.hf_device_map == {"": "cpu"} and not hasattr(whole, "_hf_hook")


def test_weights_as_stored_are_read_from_the_checkpoint_itself(folder: Path, tmp_path: Path) -> None:
    plain, waiting = AutoModelForCausalLM.from_pretrained(folder), tmp_path / "waiting"
    if folder.name.startswith("phi30"):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="disk")
        with pytest.raises(ValueError, match="reads weights from"):
            model.save_pretrained(folder)
    else:  # joined attention and stacked experts are stored apart
        with pytest.raises(ValueError, match="offload_folder"):
            AutoModelForCausalLM.from_pretrained(folder, device_map="disk")
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="disk", offload_folder=waiting)
        written = sum(file.stat().st_size for file in waiting.iterdir())
        assert 0 < written < 1.05 * sum(one.nbytes for one in plain.parameters())
    half = AutoModelForCausalLM.from_pretrained(
        folder, device_map=map_of(folder), dtype=torch.bfloat16, offload_folder=waiting
    )
    assert half.dtype == torch.bfloat16
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        batch = batch_of(folder)
        assert torch.equal(half(**batch).logits, expected(**batch).logits)
    with pytest.raises(ValueError, match="cannot be replaced"):
        model.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="resized on one device"):
        model.resize_token_embeddings(1100)


def test_a_tied_head_waits_with_its_embedding(tmp_path: Path) -> None:
    wrapped(PRESETS["phi3"], tie_word_embeddings=True).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    for device_map in ("disk", {"": "disk", "model.layers": "cpu"}, {"": "cpu", "model.layers.1.mlp": "disk"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        model.tie_weights()
        assert torch.equal(model.generate(IDS, max_new_tokens=5), plain.generate(IDS, max_new_tokens=5))
        model.save_pretrained(tmp_path / "saved")
        assert equal_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), plain)
    with pytest.raises(ValueError, match="one tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("bits", ["int4", "fp8"])
def test_codes_wait_on_disk_too(folder: Path, bits: str, tmp_path: Path) -> None:
    one = WeightFormat(bits=4, group_size=32) if bits == "int4" else WeightFormat(bits=8, type="float", group_size=None)
    quantize(folder, tmp_path / "few", QuantizationConfig(linear=one))
    plain, batch = AutoModelForCausalLM.from_pretrained(tmp_path / "few"), batch_of(folder)
    options = {"device_map": map_of(folder), "offload_folder": tmp_path / "waiting"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "few", **options)
    assert any(one.is_meta and one.dtype != torch.float32 for one in model.buffers())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=5), plain.generate(**batch, max_new_tokens=5))
    model.save_pretrained(tmp_path / "saved")
    assert equal_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), plain)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "few", **options, offload_buffers=False)
    assert not any(one.is_meta for one in kept.buffers()) and any(one.is_meta for one in kept.parameters())


def test_a_row_that_crosses_is_computed_anew_on_a_spread_model(tmp_path: Path) -> None:
    wrapped(longrope_config(12), scale=1.5).save_pretrained(tmp_path)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu", "model.layers.1": "disk"})
    for options in ({}, {"num_beams": 2}):
        expected = plain.generate(IDS, attention_mask=mask, max_new_tokens=14, **options)
        assert torch.equal(model.generate(IDS, attention_mask=mask, max_new_tokens=14, **options), expected)


def test_maps_that_do_not_fit_are_refused(folder: Path) -> None:
    for device_map, message in (
        ({"model.layers": "cpu", "other": "disk"}, "lacks.*other"),
        ({"model": "cpu"}, "no place to 'causal_lm.lm_head'"),
        ({"": "cpu", "lm_head": "meta"}, "'meta'"),
        ({"": "cpu", "lm_head": 77}, "cuda:77"),
        ("cuda:77", "cuda:77"),
        ("everywhere", "everywhere"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    model = AutoModelForCausalLM.from_pretrained(folder)
    places = {"causal_lm.model.layers.0.self_attn": 1, "": 0}
    with pytest.raises(ValueError, match=r"layers\.0 compute on \['cuda:0', 'cuda:1'\]"):
        check_together(model, PlacementMap(places, 0))
    check_together(model, PlacementMap({"causal_lm.model.layers.0.self_attn": "disk", "": 0}, 0))


def test_a_spread_model_is_not_captured_or_batched(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=map_of(folder), offload_folder=tmp_path).causal_lm
    assert model_limit(model) == "its parts are spread over devices"
    with pytest.raises(ValueError, match="cannot be captured"):
        model.generate(**native(batch_of(folder)), max_new_tokens=2, fast=True)
    with pytest.raises(ValueError, match="on one device"):
        Batcher(model, max_rows=1, max_tokens=512)
    if model.model.vision_embed_tokens is not None:
        with pytest.raises(ValueError, match="on one device"):
            model.image_features(torch.zeros(2, 3, 64, 64), torch.tensor([[64, 64]]))


def test_adapters_that_peft_loses_are_found(tmp_path: Path) -> None:
    wrapped(PRESETS["phi3"]).save_pretrained(tmp_path)
    config = LoraConfig(r=2, target_modules=["qkv_proj"], init_lora_weights="gaussian")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    for place in ("model.layers.1", "model.layers.1.mlp"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu", place: "disk"})
        adapted = get_peft_model(model, register(copy.copy(config)))
        if place == "model.layers.1":
            with pytest.raises(ValueError, match="2 tensors without values"):
                adapted(input_ids=IDS)
        else:  # what has an adapter does not wait
            with torch.no_grad():
                assert torch.equal(adapted(input_ids=IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3-small-8k"])
def test_every_tensor_of_two_gpus_meets_its_like(name: str, head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_compute_on", lambda *_: None)  # needs a CUDA build of torch
    causal_lm = meta_model(phi35.presets.get(name)).eval()
    config_class, model_class = CLASSES[causal_lm.config.model_type]
    model = model_class(config_class.of(causal_lm.config), causal_lm)
    prefix = "causal_lm.model."
    layers = {f"{prefix}layers.{layer}": int(layer > 0) for layer in range(len(causal_lm.model.layers))}
    places = {f"{prefix}embed_tokens": 0, **layers, f"{prefix}norm": 1, "causal_lm.lm_head": head}
    found = PlacementMap(places, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for tensor, value in causal_lm.state_dict().items():
            device = device_of(found.place(f"causal_lm.{tensor}"))
            dispatch.install(causal_lm, tensor, torch.empty(value.shape, dtype=value.dtype, device=device))
        dispatch.spread(model, found)
        ids = torch.empty(2, 70, dtype=torch.int64, device="cuda:0")
        cache = model.new_cache()
        for chunk in (ids, ids[:, :1]):
            output = model(chunk, past_key_values=cache, output_hidden_states=True)
            assert output.logits.device == torch.device("cuda:0") == cache.rows.lengths.device
            assert [keys.device.index for keys in cache.rows.keys] == list(layers.values())
        cache.batch_select_indices(torch.empty(2, dtype=torch.int64, device="cuda:0"))
        assert [keys.device.index for keys in cache.rows.values] == list(layers.values())
        assert model(ids, labels=ids).loss.device == torch.device("cuda:0")
        chunked = causal_lm.train()(ids, labels=ids)  # the head's own loss, which never holds the logits
        assert chunked.logits is None and chunked.loss.device.index == head


@pytest.mark.parametrize("packed", [False, True])
def test_the_plan_of_a_pass_is_copied_once_for_each_device(packed: bool) -> None:
    model = phi35.create("tiny-phi-3-small-8k").model
    hidden_states, mask = torch.zeros(1, 200, 64), torch.ones(1, 200)
    mask[:, :3] = 0
    kind = {"sequence_lengths": torch.tensor([[150, 50]])} if packed else {"attention_mask": mask}
    given = {"attention_mask": None, "position_ids": None, "cache": None, "rope_lengths": None} | kind
    plan = plan_attention(model.config, model.rope, hidden_states, **given)
    there = plan.to("meta")
    assert plan.to("cpu") is plan and plan.to(torch.device("meta"), non_blocking=True) is there
    places = [there.cos_sin[0], there.cos_sin[1], there.mask, there.packed, there.block_sparse]
    if packed:
        rows, sparse = there.packed, next(iter(there.block_sparse.plans.values()))
        places = [*there.cos_sin, rows.all_offsets, there.block_sparse.rows.all_offsets, sparse.queries, sparse.mask]
        assert rows.samples == plan.packed.samples
    else:
        places = [*there.cos_sin, there.mask, there.block_sparse.queries, there.block_sparse.mask]
    assert all(one.is_meta for one in places)
