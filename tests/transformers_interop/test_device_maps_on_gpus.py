"""Models spread by a device map on real GPUs: beside the host and the disk, mixed with the CPU, and over two GPUs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from wrapped_models import IDS, PRESETS, picture_batch, wrapped

from phi35.adapters.layers import register
from phi35.interop import dispatch
from phi35.interop.placement import PlacementMap
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.convert import quantize

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer.json")

CLOSE = 2e-3
"""Of logits in float32 whose sums ran in another order."""


@pytest.fixture(scope="module", params=PRESETS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    wrapped(PRESETS[request.param], scale=2.0).save_pretrained(path)
    return path


def batch_of(folder: Path, device: str = "cuda:0") -> dict[str, torch.Tensor]:
    batch = picture_batch() if "phi3_v" in folder.name else {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return {name: value.to(device) for name, value in batch.items()}


def parts(folder: Path, first: Any, second: Any, pictures: Any) -> dict[str, Any]:
    """The embedding and the first layer in one place, the rest in another."""
    tower = {"model.vision_embed_tokens": pictures} if "phi3_v" in folder.name else {}
    halves = {"embed_tokens": first, "layers.0": first, "layers.1": second, "norm": second}
    return tower | {f"model.{name}": place for name, place in halves.items()} | {"lm_head": second}


def check_like(model: Any, single: Any, batch: dict[str, torch.Tensor]) -> None:
    """The same logits and the same texts as a model on one device."""
    with torch.no_grad():
        got, expected = model(**batch), single(**batch)
    assert got.logits.device == batch["input_ids"].device
    assert (got.logits - expected.logits).abs().max() < CLOSE
    for options in ({}, {"num_beams": 3}):
        text = model.generate(**batch, max_new_tokens=12, **options)
        assert torch.equal(text, single.generate(**batch, max_new_tokens=12, **options))
        assert torch.equal(text, model.generate(**batch, max_new_tokens=12, use_cache=False, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("waiting", ["cpu", "disk"])
@pytest.mark.parametrize("first_waits", [False, True])
def test_a_gpu_computes_what_waits_elsewhere(folder: Path, waiting: str, first_waits: bool, tmp_path: Path) -> None:
    single = AutoModelForCausalLM.from_pretrained(folder, device_map=0, dtype=torch.float32)
    places = parts(folder, waiting, 0, waiting) if first_waits else parts(folder, 0, waiting, waiting)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "waiting")
    assert set(model.hf_device_map.values()) == {0, waiting} and model.device == torch.device("cuda:0")
    assert any(one.is_meta for one in model.parameters()) and any(one.is_cuda for one in model.parameters())
    check_like(model, single, batch_of(folder))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], one.cpu()) for name, one in single.state_dict().items())


@pytest.mark.gpu
def test_layers_on_the_gpu_and_on_the_cpu_take_turns(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    places = {f"causal_lm.{name}": place for name, place in parts(folder, "cpu", 0, 0).items()}
    dispatch.spread(model, PlacementMap(places, "cpu"))
    batch = batch_of(folder, "cpu")
    cache = model.new_cache()
    with torch.no_grad():
        got = model(**batch, past_key_values=cache).logits
        assert (got - plain(**batch).logits).abs().max() < CLOSE
    assert [keys.device.type for keys in cache.rows.keys] == ["cpu", "cuda"]
    for options in ({}, {"num_beams": 3}):
        text = model.generate(**batch, max_new_tokens=12, **options)
        assert torch.equal(text, model.generate(**batch, max_new_tokens=12, use_cache=False, **options))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for one in (plain, model):
        one(**batch, labels=labels, output_router_logits="phimoe" in folder.name).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(other.grad.cpu(), one.grad, atol=1e-3 * float(one.grad.abs().max()) + 1e-6), name


@pytest.mark.gpu
def test_codes_wait_on_the_host(folder: Path, tmp_path: Path) -> None:
    quantize(folder, tmp_path / "few", QuantizationConfig(linear=WeightFormat(bits=4, group_size=32)))
    load = AutoModelForCausalLM.from_pretrained
    single = load(tmp_path / "few", device_map=0, dtype=torch.bfloat16)
    model = load(tmp_path / "few", device_map=parts(folder, 0, "cpu", "cpu"), dtype=torch.bfloat16)
    assert any(one.is_meta for one in model.buffers()) and any(one.is_cuda for one in model.buffers())
    batch = batch_of(folder)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, single(**batch).logits)


@pytest.mark.multigpu
@pytest.mark.parametrize("device_map", ["balanced", "apart", "crossed"])
def test_two_gpus_compute_as_one(folder: Path, device_map: str) -> None:
    single = AutoModelForCausalLM.from_pretrained(folder, device_map=0, dtype=torch.float32)
    places: Any = {"apart": parts(folder, 0, 1, 1), "crossed": parts(folder, 1, 0, 0)}.get(device_map, device_map)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, dtype=torch.float32)
    assert {one.device.index for one in model.parameters()} == {0, 1}
    batch = batch_of(folder)
    check_like(model, single, batch)
    cache = model.new_cache()
    with torch.no_grad():
        model(**batch, past_key_values=cache)
    on = [one.input_layernorm.weight.device for one in model.causal_lm.model.layers]
    assert [keys.device for keys in cache.rows.keys] == on


@pytest.mark.multigpu
def test_adapters_train_over_two_gpus(folder: Path) -> None:
    losses = []
    for places in (0, parts(folder, 0, 1, 1)):
        base = AutoModelForCausalLM.from_pretrained(folder, device_map=places, dtype=torch.float32)
        torch.manual_seed(0)
        model = get_peft_model(base, register(LoraConfig(r=4, target_modules=["qkv_proj", "o_proj"])))
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
        batch = batch_of(folder)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for _ in range(4):
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        assert {one.grad is None for one in model.parameters()} == {True}
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
