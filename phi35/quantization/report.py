"""How many bytes a model takes, on disk and in memory, counted without making it."""

from dataclasses import dataclass

import torch

from phi35.checkpoint.rules import to_disk
from phi35.checkpoint.writer import checkpoint_bytes
from phi35.config import ModelConfig
from phi35.meta_model import meta_model

KINDS = ("linear", "experts", "embedding", "head", "tower", "other")


@dataclass(frozen=True)
class SizeReport:
    """Bytes of a model.

    Attributes:
        disk: weight files, headers included.
        memory: all tensors of the model.
        kinds: the same by kind of weight; "other" are norms, biases, routers and the like.
    """

    disk: int
    memory: int
    kinds: dict[str, int]


def size_report(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> SizeReport:
    """The size of a model whose plain tensors are stored and held in ``dtype``.

    Args:
        config: with or without ``quantization``.
        dtype: of everything that is not quantized.
    """
    model = meta_model(config).to(dtype)
    kinds = dict.fromkeys(KINDS, 0)
    for name, tensor in model.state_dict().items():
        kinds[_kind(name, tensor)] += tensor.numel() * tensor.element_size()
    return SizeReport(
        disk=checkpoint_bytes(to_disk(config, model.state_dict())),
        memory=sum(kinds.values()),
        kinds={kind: size for kind, size in kinds.items() if size},
    )


def _kind(name: str, tensor: torch.Tensor) -> str:
    if name.startswith("model.vision_embed_tokens."):
        return "tower"
    if name.startswith("model.embed_tokens."):
        return "embedding"
    if ".mlp.experts." in name:
        return "experts"
    if tensor.dim() < 2 or ".router." in name:
        return "other"
    return "head" if name.startswith("lm_head.") else "linear"
