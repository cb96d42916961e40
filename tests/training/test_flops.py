"""The operations that MFU counts, against torch's own counter on tiny models."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import phi35
from phi35 import presets
from phi35.adapters.config import AdapterConfig
from phi35.adapters.inject import active_parameters, add_adapter
from phi35.meta_model import meta_model
from phi35.training.config import TrainingConfig
from phi35.training.flops import TrainingFlops, Work, batch_work, peak_flops, visible_pairs
from phi35.training.parameter_groups import freeze_parameters


def counted(model, batch):
    """Operations of a training pass by torch's counter, with attention as full products."""
    model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


def text_batch(model, rows=2, length=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 900, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize(
    ("preset", "freeze"),
    [
        ("tiny-phi-3.5-mini", ()),
        ("tiny-phi-3.5-mini", ("embeddings",)),
        ("tiny-phi-3-medium-4k", ()),
        ("tiny-phi-3.5-moe", ()),
        ("tiny-phi-3.5-moe", ("embeddings",)),
        ("tiny-phi-3.5-moe", ("experts",)),
        ("tiny-phi-3.5-moe", ("decoder", "router", "experts")),
    ],
)
def test_text_models_match_the_counter_exactly(preset, freeze):
    config = presets.get(preset)
    model = phi35.create(preset, device="cpu", dtype="float32", experts_backend="loop" if config.is_sparse else "auto")
    freeze_parameters(model, TrainingConfig(freeze=freeze))
    batch = text_batch(model)
    rows, length = batch["input_ids"].shape
    full = Work(tokens=rows * length, attention_pairs=rows * length * length)
    assert counted(model, batch) == TrainingFlops(config, freeze)(full)


@pytest.mark.parametrize("freeze", [(), ("tower",), ("decoder", "embeddings"), ("tower", "decoder", "embeddings")])
def test_vision_models_match_the_counter_exactly(freeze):
    config = presets.get("tiny-phi-3.5-vision")
    model = phi35.create("tiny-phi-3.5-vision", device="cpu", dtype="float32")
    freeze_parameters(model, TrainingConfig(freeze=freeze))
    side = config.vision.image_size
    sizes = torch.tensor([[side, 2 * side], [side, side]])
    tokens = [batch_work({"input_ids": torch.zeros(1, 1), "image_sizes": size[None]}, config) for size in sizes]
    length = 12 + sum(work.image_tokens for work in tokens)
    ids = torch.arange(length)[None] % 900
    first = tokens[0].image_tokens
    ids[0, 4 : 4 + first], ids[0, 6 + first : 6 + first + tokens[1].image_tokens] = -1, -2
    batch = {"input_ids": ids, "labels": ids.clamp(min=-1), "image_sizes": sizes}
    batch["pixel_values"] = torch.randn(5, 3, side, side)
    work = batch_work(batch, config)
    assert (work.crops, work.tokens) == (5, length)
    full = Work(work.tokens, length * length, work.crops, work.image_tokens)
    assert counted(model, batch) == TrainingFlops(config, freeze)(full)


def test_active_parameters_times_six():
    flops = TrainingFlops(presets.get("phi-3.5-mini"))
    # 32 layers of qkv (3 x 3072^2), o (3072^2), gate and up (2 x 8192 x 3072), down; and the head (32064 x 3072)
    matrices = 32 * (4 * 3072**2 + 3 * 8192 * 3072) + 32064 * 3072
    assert flops.per_token == 6 * matrices
    assert flops.per_pair == 12 * 32 * 32 * 96
    moe = TrainingFlops(presets.get("phi-3.5-moe"))
    layer = 4096 * (4096 + 2 * 1024) + 4096**2 + 2 * 3 * 6400 * 4096 + 16 * 4096
    assert moe.per_token == 6 * (32 * layer + 32064 * 4096)


def documented(name):
    """A formula of the manual as Python."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    formula = re.search(rf"^    {name} = (.*)$", text, re.MULTILINE)[1]
    for word in ("FLOPs of the step", "active parameters", "head width", "visible pairs"):
        formula = formula.replace(word, word.replace(" ", "_"))
    return formula.replace(" x ", " * ")


@pytest.mark.parametrize("preset", ["phi-3.5-mini", "phi-3-medium-4k", "phi-3.5-moe"])
def test_the_manual_s_formula_gives_the_reported_share(preset):
    config, length, rows, devices, seconds, peak = presets.get(preset), 512, 3, 8, 0.25, 989.4e12
    used = config.num_experts_per_tok / max(1, config.num_local_experts)
    active = sum(
        parameter.numel() * (used if ".experts." in name else 1)
        for name, parameter in meta_model(config).named_parameters()
        if parameter.dim() > 1 and "embed_tokens" not in name
    )
    values = {
        "active_parameters": active,
        "tokens": rows * length,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "head_width": config.attention_head_dim,
        "visible_pairs": rows * length * (length + 1) / 2,
    }
    flops = eval(documented("FLOPs"), {}, values)
    assert flops == TrainingFlops(config)(Work(rows * length, rows * visible_pairs(length, config.sliding_window)))
    share = eval(
        documented("MFU"), {}, {"FLOPs_of_the_step": flops, "seconds": seconds, "devices": devices, "peak": peak}
    )
    assert share == flops / (seconds * devices * peak) and peak == peak_flops("NVIDIA H200", "bfloat16")


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 7), (9, 4), (9, 1)])
def test_visible_pairs_count_the_mask(length, window):
    index = torch.arange(length)
    mask = index <= index[:, None]
    if window is not None:
        mask &= index > index[:, None] - window
    assert visible_pairs(length, window) == int(mask.sum())


def test_padding_counts_nothing_and_packed_samples_do_not_see_each_other():
    config = presets.get("tiny-phi-3.5-mini")
    ids = torch.zeros(2, 10, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    assert batch_work({"input_ids": ids}, config) == Work(20, 2 * 55)
    assert batch_work({"input_ids": ids, "attention_mask": mask}, config) == Work(16, 55 + 21)
    packed = {"input_ids": ids, "sequence_lengths": torch.tensor([[4, 6, 0], [2, 3, 1]])}
    assert batch_work(packed, config) == Work(16, 10 + 21 + 3 + 6 + 1)
    assert batch_work({**packed, "attention_mask": mask}, config) == Work(16, 10 + 21 + 3 + 6 + 1)


def test_peaks_are_found_by_name():
    assert peak_flops("NVIDIA H200", "bfloat16") == peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA GH200 480GB", "bfloat16") == 989.4e12
    assert peak_flops("some other device", "bfloat16") is None


@pytest.mark.parametrize("preset", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_adapters_cost_no_gradient_of_the_weights_beside_them(preset):
    """torch's counter lacks what nobody needs: the gradient of the first projection's input."""
    config = presets.get(preset)
    model = phi35.create(preset, device="cpu", dtype="float32", experts_backend="loop" if config.is_sparse else "auto")
    add_adapter(model, AdapterConfig(rank=8))
    model.double()  # in which experts run one by one: the counter does not know grouped products
    batch = text_batch(model)
    rows, length = batch["input_ids"].shape
    full = Work(tokens=rows * length, attention_pairs=rows * length * length)
    flops = TrainingFlops(config, adapters=active_parameters(model, config))(full)
    first = model.model.layers[0].self_attn.qkv_proj
    unneeded = 2 * rows * length * (first.base_layer.weight.numel() + first.lora_A["default"].weight.numel())
    assert counted(model, batch) == flops - unneeded
    assert flops < TrainingFlops(config)(full)
