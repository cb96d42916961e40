"""Models without memory: built on the meta device, where tensors have shapes and no values."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from phi35.config import ModelConfig
from phi35.model import CausalLM


def meta_model(config: ModelConfig) -> CausalLM:
    """The model of a config on the meta device; nothing is allocated and nothing is drawn."""
    with torch.device("meta"), _NoDrawing():
        return CausalLM(config)


class _NoDrawing(TorchFunctionMode):
    """Skips the random initialisation of modules.

    On the meta device it changes nothing, but torch runs it in Python and imports its compiler for that: 2.6 s of
    processor time in torch 2.14, at the first model of every process.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = getattr(func, "__module__", None) == "torch.nn.init" or func in (
            torch.Tensor.normal_,
            torch.Tensor.uniform_,
        )
        tensor = args[0] if args else kwargs.get("tensor")
        if drawn and isinstance(tensor, torch.Tensor):
            return tensor
        return func(*args, **kwargs)
