"""Tiny models with adapters that change their logits, and inputs for them."""

from typing import Any

import torch

import phi35
from phi35.adapters.config import AdapterConfig
from phi35.adapters.inject import add_adapter
from phi35.model import CausalLM
from phi35.processor import Processor
from phi35.quantization.codes import dequantize, round_to_nearest
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.training.build import SMALL_MODEL

IDS = torch.randint(0, 1000, (2, 17), generator=torch.Generator().manual_seed(3))
EVERYWHERE = {
    "tiny-phi-3.5-mini": ("attention", "feed_forward"),
    "tiny-phi-3.5-moe": ("attention", "experts", "router"),
    "tiny-phi-3.5-vision": ("attention", "feed_forward", "projector", "tower"),
}


def draw_second_factors(model: Any) -> None:
    """B starts at zero; here it is not."""
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0.0, 0.05, generator=draw)


def adapted(name: str, places: tuple[str, ...] | None = None, **options: Any) -> Any:
    """A model with an adapter that changes its logits."""
    model = phi35.create(name, seed=0)
    add_adapter(model, AdapterConfig(rank=4, alpha=8, targets=places or EVERYWHERE[name], **options), seed=1)
    draw_second_factors(model)
    return model


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Two rows of text; for a model that reads pictures, one of each."""
    if model.config.vision is None:
        return {"input_ids": IDS}
    processor = Processor.from_folder(SMALL_MODEL, model.config)
    picture = torch.randint(0, 255, (48, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4)).numpy()
    return processor(["<|image_1|> What is it?", "Nothing to see"], images=[[picture], []])


def in_few_bits_and_restored(name: str, one: WeightFormat) -> tuple[CausalLM, CausalLM]:
    """A model whose weights are rounded to few bits, and a plain one with the values that the codes stand for."""
    few_bits = phi35.create(name, seed=0, quantization=QuantizationConfig(linear=one))
    plain = phi35.create(name, seed=0)
    held = {}
    for module_name, module in few_bits.named_modules():
        for base, weight in getattr(module, "held_weights", tuple)():
            source = plain.get_submodule(module_name).get_parameter(base)
            for suffix, tensor in round_to_nearest(source.detach(), one, torch.bfloat16).tensors().items():
                getattr(module, base + suffix).copy_(tensor)
            held[f"{module_name}.{base}"] = dequantize(weight, torch.float32)
    for parameter_name, parameter in few_bits.named_parameters():
        parameter.data.copy_(plain.get_parameter(parameter_name))
    for weight_name, restored in held.items():
        plain.get_parameter(weight_name).data.copy_(restored)
    return few_bits, plain
