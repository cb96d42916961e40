"""Adapters on disk: PEFT's form, read by PEFT and by transformers' own models, and the other forms of their names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import EVERYWHERE, IDS, adapted, draw_second_factors, inputs
from safetensors.torch import save_file

import phi35
from phi35.adapters.config import AdapterConfig
from phi35.adapters.files import load_adapter, read_adapter, save_adapter
from phi35.adapters.inject import add_adapter, is_adapter
from phi35.adapters.names import FORMS, convert, convert_folder
from phi35.checkpoint.rules import to_disk, to_memory

VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def saved(folder: Path, model: Any, **options: Any) -> Path:
    """The model's adapter, of the settings that ``adapted`` gave it."""
    places = options.pop("places", None) or EVERYWHERE_OF[model.config.model_type]
    config = AdapterConfig(rank=4, alpha=8, targets=places, **options)
    tensors = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    return save_adapter(folder, tensors, config, model.config, base="somewhere")


EVERYWHERE_OF = {phi35.create(name, device="meta").config.model_type: places for name, places in EVERYWHERE.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_form_gives_the_same_logits_to_the_bit(name: str, variant: str, tmp_path: Path) -> None:
    if variant == "dora" and "moe" in name:
        pytest.skip("DoRA is for linear layers")
    model = adapted(name, **VARIANTS[variant])
    given = inputs(model)
    folder = saved(tmp_path / "own", model, **VARIANTS[variant])
    with torch.no_grad():
        expected = model(**given).logits
        for form in FORMS:
            convert_folder(folder, tmp_path / form, model.config, form)
            loaded = phi35.create(name, seed=0)
            load_adapter(loaded, tmp_path / form)
            assert torch.equal(loaded(**given).logits, expected), form
            assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("form", ["split", "published"])
def test_an_adapter_of_published_names_adds_to_published_weights(form: str) -> None:
    """Independent of the loader: every module's B A is added to the disk tensor of its name."""
    model = adapted("tiny-phi-3.5-moe", ("attention", "experts", "router") if form == "published" else ("attention",))
    places = ("attention", "experts", "router") if form == "published" else ("attention",)
    tensors = {name.replace(".default", ""): value for name, value in model.named_parameters() if is_adapter(name)}
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    if "experts" in places:
        described["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"]
    described, written = convert(described, tensors, model.config, form)
    plain = phi35.create("tiny-phi-3.5-moe", seed=0)
    disk = {name: tensor.clone() for name, tensor in to_disk(plain.config, plain.state_dict()).items()}
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in written}
    for module in modules:
        first, second = (written[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
        disk[f"{module}.weight"] += 2.0 * second @ first
    plain.load_state_dict(to_memory(plain.config, disk))
    assert not described["target_parameters"]
    assert (form == "published") == any(module.endswith("block_sparse_moe.experts.3.w2") for module in modules)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=2e-6, rtol=0)  # measured 3e-7


def test_parts_with_factors_of_their_own_are_joined(tmp_path: Path) -> None:
    """An adapter made elsewhere: q and v of one layer at other ranks and scalings, and some experts' matrices."""
    plain = phi35.create("tiny-phi-3.5-moe", seed=0)
    draw = torch.Generator().manual_seed(0)
    disk = {name: tensor.clone() for name, tensor in to_disk(plain.config, plain.state_dict()).items()}
    layer, experts = "model.layers.1.self_attn.", "model.layers.1.block_sparse_moe.experts."
    settings = {f"{layer}q_proj": (4, 1.0), f"{layer}v_proj": (2, 2.0), f"{experts}0.w1": (4, 1.0)}
    settings |= {f"{experts}0.w3": (4, 1.0), f"{experts}2.w3": (4, 1.0), f"{experts}2.w2": (4, 4.0)}
    described = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"w2": 16},
    }
    tensors = {}
    for module, (rank, scaling) in settings.items():
        weight = disk[f"{module}.weight"]
        first, second = (
            torch.randn(*shape, generator=draw) * 0.1 for shape in ((rank, weight.shape[1]), (len(weight), rank))
        )
        tensors[f"base_model.model.{module}.lora_A.weight"] = first
        tensors[f"base_model.model.{module}.lora_B.weight"] = second
        weight += scaling * second @ first
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    reference, base = phi35.create("tiny-phi-3.5-moe", seed=1), plain(IDS).logits.detach()
    reference.load_state_dict(to_memory(plain.config, disk))
    load_adapter(plain, tmp_path)
    with torch.no_grad():
        expected, got = reference(IDS).logits, plain(IDS).logits
    assert (base - expected).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)  # measured 3e-7


@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_peft_puts_it_on_the_models_of_transformers(name: str, tmp_path: Path) -> None:
    """Their classes, their weights, PEFT's own layers: the published checkpoint's names are enough."""
    from peft import PeftModel
    from phimoe_pair import phimoe_pair
    from transformers_models import phi3_pair, tolerance

    config = phi35.create(name, device="meta").config
    ours, theirs = (phimoe_pair if config.is_sparse else phi3_pair)(config)
    places = ("attention", "experts") if config.is_sparse else ("attention", "feed_forward")
    add_adapter(ours, AdapterConfig(rank=4, alpha=8, targets=places), seed=1)
    draw_second_factors(ours)
    saved(tmp_path / "own", ours, places=places)
    convert_folder(tmp_path / "own", tmp_path / "form", config, "split" if config.is_sparse else "fused")
    with torch.no_grad():
        base, expected = theirs(IDS).logits, ours(IDS).logits
        adapted_theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "form")).eval()
        got = adapted_theirs(IDS).logits
    assert (base - expected).abs().max() > 0.1
    torch.testing.assert_close(got, expected, atol=tolerance(expected), rtol=0)  # measured 3e-6


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = adapted("tiny-phi-3.5-mini", ("attention",))
    folder = saved(tmp_path / "one", model, places=("attention",))
    with pytest.raises(ValueError, match="model does not have.*model.layers.1.self_attn.o_proj.weight"):
        load_adapter(phi35.create("tiny-phi-3.5-mini", seed=0, num_hidden_layers=1), folder)
    with pytest.raises(ValueError, match="does not fit.*qkv_proj.lora_B.weight is .192, 4.*wants .128, 4"):
        load_adapter(phi35.create("tiny-phi-3.5-mini", seed=0, num_key_value_heads=2), folder)
    with pytest.raises(ValueError, match="no adapter_config.json and no adapter_model.safetensors"):
        read_adapter(tmp_path)
    described, tensors = read_adapter(folder)
    with pytest.raises(ValueError, match="no part of a LoRA"):
        convert(described, {**tensors, "base_model.model.lm_head.weight": torch.zeros(1)}, model.config, "split")
    with pytest.raises(ValueError, match="does not have.*layers.7"):
        renamed = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
        convert(described, renamed, model.config, "split")
    with pytest.raises(ValueError, match="form must be"):
        convert(described, tensors, model.config, "vllm")
