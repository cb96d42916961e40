"""The classes of transformers on a GPU: placement, generation, adapters on plain weights and on weights in few bits."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM
from wrapped_models import IDS, PRESETS, picture_batch, wrapped

from phi35.adapters.layers import register
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.convert import quantize

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*no tokenizer.json")]


@pytest.fixture(scope="module", params=PRESETS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    path = tmp_path_factory.mktemp(request.param)
    wrapped(PRESETS[request.param], scale=2.0).save_pretrained(path)
    return path


def batch_of(folder: Path) -> dict[str, torch.Tensor]:
    batch = picture_batch() if "phi3_v" in folder.name else {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return {name: value.cuda() for name, value in batch.items()}


def test_generation_on_a_gpu(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", dtype=torch.float32)
    assert model.device.type == "cuda"
    batch = batch_of(folder)
    for options in ({}, {"num_beams": 3}):
        cached = model.generate(**batch, max_new_tokens=12, **options)
        assert torch.equal(cached, model.generate(**batch, max_new_tokens=12, use_cache=False, **options))
    on_cpu = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    there = {name: value.cpu() for name, value in batch.items()}
    with torch.no_grad():
        difference = (model(**batch).logits.cpu() - on_cpu(**there).logits).abs().max()
    assert difference < 2e-3  # float32 sums in another order


@pytest.mark.parametrize("few_bits", [False, True])
def test_adapters_on_a_gpu(folder: Path, few_bits: bool, tmp_path: Path) -> None:
    source = folder
    if few_bits:
        source = tmp_path / "few"
        quantize(folder, source, QuantizationConfig(linear=WeightFormat(bits=4, group_size=32)))
    base = AutoModelForCausalLM.from_pretrained(source, device_map={"": 0}, dtype=torch.bfloat16)
    if few_bits:
        base = prepare_model_for_kbit_training(base)
    sparse = "phimoe" in folder.name
    modules = ["qkv_proj", "o_proj", *(["experts"] if sparse else ["gate_up_proj", "down_proj"])]
    model = get_peft_model(base, register(LoraConfig(r=8, lora_alpha=16, target_modules=modules)))
    batch = batch_of(folder)
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] > 1040), -100)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    for _ in range(10):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.generate(**batch, max_new_tokens=4).shape[0] == len(batch["input_ids"])
