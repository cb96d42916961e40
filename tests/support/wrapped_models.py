"""Tiny models in the classes of transformers."""

from typing import Any

import torch

import phi35
from phi35.config import ModelConfig

PRESETS = {"phi3": "tiny-phi-3.5-mini", "phimoe": "tiny-phi-3.5-moe", "phi3_v": "tiny-phi-3.5-vision"}
IDS = torch.tensor([[5, 9, 4, 17, 3, 8, 30], [7, 1, 6, 2, 11, 12, 13]])


def wrapped(model: str | ModelConfig, scale: float = 3.0, seed: int = 3, **changes: Any) -> Any:
    """A model with random weights in its class of transformers.

    Args:
        model: a preset's name or a config.
        scale: multiplies the weights, so that the likeliest next token differs from step to step.
        seed: of the weights.
        **changes: fields of the config to change.
    """
    from phi35.interop.modeling import CLASSES

    causal_lm = phi35.create(model, seed=seed, **changes)
    with torch.no_grad():
        for parameter in causal_lm.parameters():
            parameter.mul_(scale)
    config_class, model_class = CLASSES[causal_lm.config.model_type]
    return model_class(config_class.of(causal_lm.config), causal_lm).eval()


def picture_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of the vision twin with two, one and no pictures, left-padded, as the processor of transformers gives.

    Ids are made by hand, since a twin has no tokenizer of its own.
    """
    from phi35.interop.processing import Phi3VImageProcessor
    from phi35.processor import Processor

    generator = torch.Generator().manual_seed(seed)
    config = phi35.presets.get(PRESETS["phi3_v"])
    family = Processor.__new__(Processor)
    family.config, family.num_crops = config, 4
    family.image_transform = phi35.registry.resolve("processor.images")(config.vision)
    shapes = [[(64, 64), (50, 130)], [(90, 64)], []]
    pictures = [
        [torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8).numpy() for shape in row]
        for row in shapes
    ]
    images = Phi3VImageProcessor(family)([image for row in pictures for image in row])
    counts = iter(images.pop("num_img_tokens"))
    rows = [
        [9, *(token for _ in row for token in ([config.vision.image_token_id] * next(counts) + [13])), 21, 30 + index]
        for index, row in enumerate(pictures)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[1000] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **images}
