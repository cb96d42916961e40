"""Configs of transformers that hold this package's own."""

import dataclasses
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from phi35.config import ModelConfig
from phi35.config_io import ARCHITECTURES, from_hf_dict, to_hf_dict

_NOT_COPIED = {"model_type", "rope_scaling", "vision", "quantization"}
COPIED = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name not in _NOT_COPIED)
"""Fields of ``ModelConfig`` that stand on a wrapped config too, where libraries read and change them."""

OWN = ("use_cache", "output_router_logits", "router_sampling")
"""Fields of a wrapped config that are none of ``ModelConfig``."""


class WrappedConfig(PreTrainedConfig):
    """A config of transformers around one of this package.

    The plain fields (sizes, ids, rates, coefficients) are attributes too. A changed one is a changed model:
    ``current`` gives the config with the changes in it, which is what models are built from.

    Attributes:
        model_config: what the files said.
        output_router_logits: a sparse model returns its router's scores and adds the balancing loss, times
            ``router_aux_loss_coef``, to its loss.
        router_sampling: a sparse model samples its experts in training, as its router was made for, and jitters their
            inputs. False chooses them as in evaluation, so that log-probabilities of a policy carry no such noise.
    """

    attribute_map = {"num_experts": "num_local_experts"}
    auto_map: ClassVar[dict[str, str]] = {}
    """No remote code."""
    keys_to_ignore_at_inference = ["cache", "past_key_values", "router_logits"]
    model_config: Any = None
    output_router_logits: bool = False
    router_sampling: bool = True

    @classmethod
    def of(cls, model_config: ModelConfig) -> Any:
        """The config around one of this package."""
        # A name that transformers itself has would make trainers build its class, not ours.
        config = cls(architectures=[f"phi35.{ARCHITECTURES[cls.model_type]}"])
        config.hold(model_config)
        config.output_router_logits = False
        config.use_cache = True
        return config

    def hold(self, model_config: ModelConfig) -> None:
        """Take a config of this package, its fields included."""
        self.model_config = model_config
        for name in COPIED:
            setattr(self, name, getattr(model_config, name))
        if model_config.vision is not None:
            self.image_token_id = model_config.vision.image_token_id

    def current(self) -> ModelConfig:
        """The config of this package, with the fields that were set on this one since.

        Raises:
            ValueError: for values that do not fit together.
        """
        held: ModelConfig = self.model_config
        changed = {name: getattr(self, name) for name in COPIED if getattr(self, name) != getattr(held, name)}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name in changed and not isinstance(changed[name], int):
                del changed[name]  # a trainer writes its tokenizer's ids here; the model has one of each
        return held.replace(**changed) if changed else held

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The config of a ``config.json``.

        Options that name a field change it; with ``return_unused_kwargs`` the others come back. Without, they are not
        for the config (``AutoProcessor`` hands its own on to here) and stay without effect.

        Raises:
            ValueError: as ``phi35.config_io.from_hf_dict``, and for values that do not fit.
        """
        options.pop("_from_auto", None)
        unused = options.pop("return_unused_kwargs", False)
        name = options.pop("name_or_path", None)
        config = cls.of(from_hf_dict(config_dict))
        config.output_router_logits = bool(config_dict.get("output_router_logits", False))
        config.name_or_path = str(name or "")
        for key in [key for key in options if key in (*COPIED, *OWN)]:
            setattr(config, key, options.pop(key))
        config.current()
        return (config, options) if unused else config

    def to_dict(self) -> dict[str, Any]:
        """Contents of ``config.json`` in the published names."""
        if self.model_config is None:  # what transformers makes of the class, to know its defaults
            return super().to_dict()
        contents = to_hf_dict(self.current(), self.dtype or torch.float32)
        if "output_router_logits" in contents:
            contents["output_router_logits"] = self.output_router_logits
        return contents

    def to_diff_dict(self) -> dict[str, Any]:
        """As ``to_dict``: a published file names its defaults."""
        return self.to_dict()


def config_class(model_type: str) -> type[WrappedConfig]:
    """The config class of a model type, named as the published one."""
    name = ARCHITECTURES[model_type].removesuffix("ForCausalLM")
    return type(f"{name}Config", (WrappedConfig,), {"model_type": model_type, "__module__": __name__})
