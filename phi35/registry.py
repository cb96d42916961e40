"""Slots filled by name: the base decoder reaches ``moe`` and ``vision`` through these strings alone.

``phi35`` never imports the packages above it; a slot's class, a family's checkpoint rules and the presets
are looked up here as "module:attribute" when first needed.
"""

import importlib
from typing import Any

SLOTS = {
    "feed_forward.dense": "phi35.feed_forward:GatedMLP",
    "feed_forward.sparse": "moe.layer:SparseMoE",
    "embedding.vision": "vision.embedding:VisionEmbedding",
    "processor.images": "vision.image_transform:ImageTransform",
    "images.open": "vision.decode:open_image",
    "images.cache": "vision.crop_cache:CropCache",
    "images.limits": "vision.decode:DecodingLimits",
    "images.too_large": "vision.decode:ImageTooLargeError",
    "checkpoint_rules.sparse": "moe.checkpoint_rules:RULES",
    "checkpoint_rules.vision": "vision.checkpoint_rules:RULES",
    "presets.sparse": "moe.presets:PRESETS",
    "presets.vision": "vision.presets:PRESETS",
    "experts.backend_report": "moe.experts:backend_report",
    "experts.offload": "moe.offloaded_experts:offload_experts",
    "decoding.sparse": "moe.kernels.decode_step:add_sparse_feed_forward",
    "decoding.few_bit_sparse": "moe.kernels.quantized_step:add_sparse_feed_forward",
    "decoding.few_bit_sparse_limit": "moe.kernels.quantized_step:limit",
    "decoding.sparse_limit": "moe.kernels.decode_step:limit",
    "losses.load_balancing": "moe.losses:load_balancing_loss",
    "upcycling.run": "moe.upcycling:upcycle",
    "upcycling.options": "moe.upcycling:UpcyclingOptions",
    "tower.open_clip": "vision.open_clip_weights:import_tower",
}


def resolve(slot: str) -> Any:
    """The object that fills a slot.

    Args:
        slot: a key of ``SLOTS`` or a "module:attribute" string.

    Raises:
        ValueError: if the slot is unknown or its module lacks the attribute.
    """
    target = SLOTS.get(slot, slot)
    module_name, separator, attribute = target.partition(":")
    if not separator:
        raise ValueError(f"unknown slot {slot!r}; expected one of {sorted(SLOTS)} or 'module:attribute'")
    module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise ValueError(f"module {module_name!r} has no {attribute!r} (slot {slot!r})")
    return getattr(module, attribute)
