"""PEFT around the classes of transformers: LoRA, DoRA and QLoRA everywhere, saved, reloaded and merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from wrapped_models import IDS, PRESETS, picture_batch, wrapped

from phi35.adapters.config import linear_names
from phi35.adapters.layers import register
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.convert import quantize

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer.json")

PLACES = {"phi3": ("attention", "feed_forward"), "phimoe": ("attention",), "phi3_v": ("attention", "projector")}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"]


def lora_config(model: Any, model_type: str, **options: Any) -> LoraConfig:
    """LoRA on attention, feed-forwards, experts, router and projector, as far as the model has them."""
    parameters = EXPERTS if model_type == "phimoe" else None
    names = linear_names(model, PLACES[model_type])
    return register(LoraConfig(r=4, lora_alpha=8, target_modules=names, target_parameters=parameters, **options))


def batch_of(model_type: str) -> dict[str, torch.Tensor]:
    return picture_batch() if model_type == "phi3_v" else {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def train(model: Any, batch: dict[str, torch.Tensor], steps: int = 12, rate: float = 1e-2) -> tuple[float, float]:
    """First and last loss of a few steps on one batch, in evaluation mode's routing."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels >= 1040, -100)
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("model_type", PRESETS)
def test_an_adapter_is_trained_saved_reloaded_and_merged(model_type: str, dora: bool, tmp_path: Path) -> None:
    base, batch = wrapped(PRESETS[model_type], scale=2.0), batch_of(model_type)
    with torch.no_grad():
        before = base(**batch).logits
    config = lora_config(base, model_type, use_dora=dora and model_type != "phimoe")
    if dora and model_type == "phimoe":
        config.use_dora, config.target_parameters = True, None
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, before, atol=2e-5)
    first, last = train(model, batch)
    assert last < 0.7 * first
    with torch.no_grad():
        adapted = model(**batch).logits
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, before)
    assert (adapted - before).abs().max() > 0.1

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        wrapped(PRESETS[model_type], scale=2.0),
        tmp_path / "adapter",
        config=register(LoraConfig.from_pretrained(tmp_path / "adapter")),
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, adapted)
        merged = again.merge_and_unload()
        got = merged(**batch).logits
    assert (got - adapted).abs().max() < 1e-5 * max(1.0, float(adapted.abs().max()))  # measured 4e-6 of 8
    merged.save_pretrained(tmp_path / "merged")
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(published(**batch).logits, got)


def test_peft_alone_reads_what_was_saved(tmp_path: Path) -> None:
    model = get_peft_model(wrapped(PRESETS["phimoe"]), lora_config(wrapped(PRESETS["phimoe"]), "phimoe"))
    train(model, batch_of("phimoe"), steps=2)
    model.save_pretrained(tmp_path)
    assert any("mlp.experts.base_layer.lora_A" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    plain = PeftModel.from_pretrained(wrapped(PRESETS["phimoe"]), tmp_path)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(IDS).logits, model.eval()(IDS).logits, atol=2e-5)  # measured 5e-6


def test_experts_can_be_named_as_modules_and_take_further_adapters() -> None:
    base = wrapped(PRESETS["phimoe"])
    model = get_peft_model(base, register(LoraConfig(r=2, target_modules=["qkv_proj", "experts"])))
    torch.manual_seed(1)
    model.add_adapter("other", register(LoraConfig(r=3, target_modules=["qkv_proj", "experts"])))
    ranks = {name: tuple(one.shape) for name, one in model.named_parameters() if "layers.1.mlp.experts" in name}
    assert sum("other" in name for name in ranks) == 4 == sum("default" in name for name in ranks)
    train(model, batch_of("phimoe"), steps=3)
    with torch.no_grad():
        first = model.eval()(IDS).logits
        model.set_adapter("other")
        second = model(IDS).logits
    assert not torch.allclose(first, second, atol=1e-4)
    model.set_adapter("other")
    train(model, batch_of("phimoe"), steps=3)
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, second, atol=1e-4)
        model.set_adapter("default")
        assert torch.equal(model(IDS).logits, first)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("model_type", PRESETS)
def test_adapters_are_trained_on_weights_in_few_bits(model_type: str, dora: bool, tmp_path: Path) -> None:
    original = wrapped(PRESETS[model_type], scale=2.0)
    original.save_pretrained(tmp_path / "plain")
    weights = WeightFormat(bits=4, group_size=32)
    quantize(tmp_path / "plain", tmp_path / "few", QuantizationConfig(linear=weights))
    base = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(tmp_path / "few"))
    batch = batch_of(model_type)
    sparse = model_type == "phimoe" and not dora  # PEFT has no DoRA of stacked experts
    modules = linear_names(base, (*PLACES[model_type], "feed_forward")) + (["experts"] if sparse else [])
    parameters = ["mlp.router.weight"] if sparse else None
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=parameters, use_dora=dora)
    with torch.no_grad():
        rounding = (base(**batch).logits - original(**batch).logits).square().mean().sqrt()
    model = get_peft_model(base, register(config))
    codes = {name: buffer.clone() for name, buffer in model.named_buffers() if "_packed" in name}
    first, last = train(model.train() if model_type == "phi3" else model, batch)
    assert last < 0.7 * first and codes
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers() if name in codes)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "few"),
        tmp_path / "adapter",
        config=register(LoraConfig.from_pretrained(tmp_path / "adapter")),
    )
    with torch.no_grad():
        assert torch.allclose(again.eval()(**batch).logits, model(**batch).logits, atol=1e-5)
    with pytest.raises(ValueError, match="few bits"):
        again.merge_and_unload()
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain"),
        tmp_path / "adapter",
        config=register(LoraConfig.from_pretrained(tmp_path / "adapter")),
    )
    with torch.no_grad():
        expected = plain.eval()(**batch).logits
        drift = (model(**batch).logits - expected).square().mean().sqrt()
        assert drift < 1.5 * rounding  # measured 0.5 to 1.0 times
        assert torch.allclose(plain.merge_and_unload()(**batch).logits, expected, atol=1e-4)


def test_dora_of_stacked_parameters_is_refused() -> None:
    for names in ({"target_modules": ["qkv_proj", "experts"]}, {"target_parameters": EXPERTS}):
        with pytest.raises(ValueError, match="DoRA is for linear layers"):
            get_peft_model(wrapped(PRESETS["phimoe"]), register(LoraConfig(r=2, use_dora=True, **names)))


def test_generation_and_checkpointing_under_an_adapter() -> None:
    model = get_peft_model(wrapped(PRESETS["phimoe"]), lora_config(wrapped(PRESETS["phimoe"]), "phimoe"))
    train(model, batch_of("phimoe"), steps=4)
    mask = torch.ones_like(IDS)
    cached = model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(cached, model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=6, use_cache=False))
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train().zero_grad()
        torch.manual_seed(3)
        model(IDS, labels=IDS).loss.backward()
        gradients.append([one.grad.clone() for one in model.parameters() if one.grad is not None])
    for other in gradients[1:]:
        assert len(other) == len(gradients[0])
        assert all(torch.allclose(one, two, atol=1e-7) for one, two in zip(gradients[0], other, strict=True))


def test_all_linear_layers_can_be_asked_for() -> None:
    model = get_peft_model(wrapped(PRESETS["phi3_v"]), register(LoraConfig(r=2, target_modules="all-linear")))
    names = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert not any("lm_head" in name for name in names) and any("img_projection" in name for name in names)
    first, last = train(model, picture_batch(), steps=4)
    assert last < first
