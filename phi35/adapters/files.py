"""Adapters on disk in PEFT's form: ``adapter_config.json`` and ``adapter_model.safetensors``, under PEFT's names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from phi35.adapters.config import AdapterConfig
from phi35.adapters.inject import ADAPTER, inject, is_adapter, lora_config_of
from phi35.checkpoint.writer import write_safetensors
from phi35.config import ModelConfig
from phi35.meta_model import meta_model

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that an adapter belongs to."""


def save_adapter(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: AdapterConfig,
    model_config: ModelConfig,
    base: str | None = None,
) -> Path:
    """Writes an adapter as ``peft.PeftModel.from_pretrained`` and ``load_adapter`` read it.

    Args:
        folder: made where it is missing.
        tensors: by their names in the model, with PEFT's adapter name or without it.
        config: of the adapter.
        model_config: of the model that it belongs to.
        base: where that model is, for ``base_model_name_or_path``.

    Returns:
        The folder.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    described = lora_config_of(config, meta_model(model_config))
    described.base_model_name_or_path = base
    described.inference_mode = True
    if described.target_parameters:
        described.lora_dropout = 0.0  # PEFT refuses it beside parameters; nothing is dropped any more
    described.save_pretrained(str(target))
    write_weights(target, {PREFIX + without_adapter_name(name): tensor for name, tensor in tensors.items()})
    return target


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes ``adapter_model.safetensors``."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_safetensors(folder / WEIGHTS_FILE, whole)


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The contents of both files.

    Raises:
        ValueError: if one is missing or cannot be read, or the adapter is no LoRA.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = Path(folder)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (source / name).is_file()]
    if missing:
        raise ValueError(f"{str(source)!r} is no adapter in PEFT's form: it has no {' and no '.join(missing)}")
    try:
        described = json.loads((source / CONFIG_FILE).read_text())
        tensors = load_file(source / WEIGHTS_FILE)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"the adapter in {str(source)!r} cannot be read: {error}") from error
    if described.get("peft_type") != "LORA":
        raise ValueError(f"{str(source)!r} holds an adapter of type {described.get('peft_type')!r}; LORA is supported")
    return described, tensors


def load_adapter(model: Any, folder: str | Path, adapter_name: str = ADAPTER, trainable: bool = False) -> Any:
    """Puts the adapter of a folder on a model, in place.

    Adapters under split or published names are converted on the way (``phi35.adapters.names``).

    Args:
        model: a ``CausalLM``, or a model that wraps one.
        folder: in PEFT's form.
        adapter_name: PEFT's name for it.
        trainable: whether the adapter's tensors take gradients.

    Returns:
        The ``peft.LoraConfig``.

    Raises:
        ValueError: if the files cannot be used, or do not fit the model: all that is missing, unknown or misshapen.
    """
    from peft import LoraConfig

    from phi35.adapters.names import to_fused

    inner = getattr(model, "causal_lm", model)
    described, tensors = to_fused(*read_adapter(folder), inner.config)
    known = {name: value for name, value in described.items() if name in LoraConfig.__dataclass_fields__}
    config = inject(inner, LoraConfig(**known), adapter_name)
    _fill(inner, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, adapter_name, str(folder))
    for name, parameter in inner.named_parameters():
        if is_adapter(name):
            parameter.requires_grad_(trainable)
    if inner is not model:
        model.peft_config = inner.peft_config
    return config


def without_adapter_name(name: str, adapter_name: str = ADAPTER) -> str:
    """The name of an adapter's tensor as PEFT saves it: "...lora_A.weight" of "...lora_A.default.weight"."""
    magnitude = ".lora_magnitude_vector"
    return name.replace(f"{magnitude}.{adapter_name}.weight", magnitude).replace(f".{adapter_name}.weight", ".weight")


def _fill(model: Any, tensors: dict[str, torch.Tensor], adapter_name: str, source: str) -> None:
    wanted = {
        without_adapter_name(name, adapter_name): parameter
        for name, parameter in model.named_parameters()
        if is_adapter(name) and f".{adapter_name}" in name
    }
    problems = [f"missing {name}" for name in sorted(set(wanted) - set(tensors))]
    problems += [f"unknown {name}" for name in sorted(set(tensors) - set(wanted))]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the model wants {tuple(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(tensors))
        if tensors[name].shape != wanted[name].shape
    ]
    if problems:
        raise ValueError(f"the adapter in {source!r} does not fit the model: " + "; ".join(problems[:40]))
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
