"""An open framework for the Phi-3.5 series: dense, mixture-of-experts and vision models.

The public interface is small; each name is imported when first used, so that ``import phi35`` costs little
beyond ``import torch``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi35 import interop as interop
    from phi35.api import Answer as Answer
    from phi35.api import generate as generate
    from phi35.config import ModelConfig as ModelConfig
    from phi35.config import RopeScaling as RopeScaling
    from phi35.config import VisionConfig as VisionConfig
    from phi35.loading import create as create
    from phi35.loading import load as load
    from phi35.loading import save as save
    from phi35.model import CausalLM as CausalLM
    from phi35.scoring import Score as Score
    from phi35.scoring import score as score

__version__ = "0.1.0"

_EXPORTS = {
    "generate": "phi35.api",
    "Answer": "phi35.api",
    "score": "phi35.scoring",
    "Score": "phi35.scoring",
    "load": "phi35.loading",
    "save": "phi35.loading",
    "create": "phi35.loading",
    "CausalLM": "phi35.model",
    "ModelConfig": "phi35.config",
    "RopeScaling": "phi35.config",
    "VisionConfig": "phi35.config",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "interop":
        return importlib.import_module("phi35.interop")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'phi35' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
