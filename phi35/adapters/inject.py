"""Adapters put into a model in place, switched off and on, and merged.

PEFT does most of it (``inject_adapter_in_model``), told of this package's layers by
``phi35.adapters.layers.register``; experts in few bits, which have no parameters for it to find, are wrapped here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from phi35.adapters.config import (
    EXPERT_PARAMETERS,
    ROUTER_PARAMETER,
    AdapterConfig,
    expert_names,
    is_targeted,
    linear_names,
)
from phi35.config import ModelConfig
from phi35.training.parameter_groups import part_of

ADAPTER = "default"
"""PEFT's name of an adapter where nobody gives another."""


def add_adapter(model: Any, config: AdapterConfig, seed: int | None = None) -> Any:
    """Puts a fresh adapter into a model, in place, and freezes everything else.

    A starts random, B at zero, so that the model computes what it did. The adapter's tensors are float32 beside
    bfloat16 weights.

    Args:
        model: a ``CausalLM`` with its weights, plain or in few bits, or a model that wraps one.
        config: the adapter.
        seed: of A, which is drawn on the CPU; None draws from torch's global generator.

    Returns:
        The ``peft.LoraConfig`` that describes it.

    Raises:
        ValueError: if the model lacks a place that is asked for, or has an adapter already.
    """
    with _seeded(seed):
        return inject(model, lora_config_of(config, model))


def lora_config_of(config: AdapterConfig, model: Any) -> Any:
    """The ``peft.LoraConfig`` of an adapter for a model, which may be on the meta device.

    Raises:
        ValueError: if the model lacks a place that is asked for.
    """
    from peft import LoraConfig

    inner = getattr(model, "causal_lm", model)
    places = config.resolve(inner.config)
    alpha = float(config.alpha)
    return LoraConfig(
        r=config.rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]  # PEFT computes with it
        lora_dropout=config.dropout,
        use_dora=config.dora,
        use_rslora=config.rslora,
        target_modules=linear_names(inner, places),
        target_parameters=_parameters(places),
        task_type="CAUSAL_LM",
    )


def inject(model: Any, lora_config: Any, adapter_name: str = ADAPTER) -> Any:
    """Puts the adapter that a ``peft.LoraConfig`` describes into a model, in place; returns the config.

    Raises:
        ValueError: as PEFT, or if the model has an adapter of that name.
    """
    from peft import inject_adapter_in_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from phi35.adapters.layers import register

    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"the model has an adapter {adapter_name!r} already: merge it or load the model anew")
    wanted, modules = list(lora_config.target_parameters or ()), lora_config.target_modules
    # Experts in few bits have no parameters for PEFT to find.
    apart: dict[str, list[str]] = {}
    for name in expert_names(model):
        if hasattr(model.get_submodule(name), "held"):
            apart[name] = [one for one in EXPERT_PARAMETERS if is_targeted(f"{name}.{one}", wanted)]
    left = [one for one in wanted if not (apart and one.rpartition(".")[2] in EXPERT_PARAMETERS)]
    lora_config.target_parameters = left or None
    if not left and not modules:
        lora_config.target_modules = DUMMY_TARGET_MODULES
    inject_adapter_in_model(register(lora_config), model, adapter_name)
    for name, parameters in apart.items():
        _wrap_few_bits(model, name, parameters, lora_config, adapter_name)
    if lora_config.target_modules == DUMMY_TARGET_MODULES:
        lora_config.target_modules = modules
    lora_config.target_parameters = wanted or None
    model.train(model.training)  # new layers begin in training mode
    return lora_config


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    return ".lora_" in name


def active_parameters(model: nn.Module, config: ModelConfig) -> dict[str, int]:
    """Parameters of the adapters that one token passes through, by part of the model: of the experts the chosen."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            part, count = part_of(name), int(getattr(parameter, "ds_numel", parameter.numel()))
            if part == "experts":
                count = count * config.num_experts_per_tok // config.num_local_experts
            found[part] = found.get(part, 0) + count
    return found


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model computes what it does without its adapters.

    Nothing but a flag changes: PEFT's own switch takes the adapters' ``requires_grad`` away, too, which an engine in
    training relies on.
    """
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [module._disable_adapters for module in layers]
    try:
        for module in layers:
            module._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for module, value in zip(layers, before, strict=True):
            module._disable_adapters = value


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds the active adapters to the weights and takes their layers out, in place.

    Raises:
        ValueError: without adapters, or for weights in few bits, before anything changes.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from phi35.adapters.layers import NO_MERGE

    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in layers)  # experts' wrappers lie in one another
        if isinstance(module, BaseTunerLayer) and not inside:
            layers[name] = module
    if not layers:
        raise ValueError("the model has no adapter to merge")
    for layer in layers.values():
        if hasattr(layer.get_base_layer(), "held"):
            raise ValueError(NO_MERGE)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        if hasattr(layer, "unload_and_optionally_merge_module"):
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            layer.merge()
            plain = layer.get_base_layer()
        setattr(model.get_submodule(parent), child, plain)
    del model.peft_config
    return model


def _parameters(places: tuple[str, ...]) -> list[str] | None:
    """Parameters at some places, as PEFT takes them."""
    found = [f"mlp.experts.{name}" for name in EXPERT_PARAMETERS] if "experts" in places else []
    return found + ([ROUTER_PARAMETER] if "router" in places else []) or None


def _wrap_few_bits(model: nn.Module, name: str, parameters: list[str], lora_config: Any, adapter_name: str) -> None:
    """Wraps experts in few bits as PEFT wraps plain ones: the first parameter innermost."""
    from phi35.adapters.layers import ParamWrapper

    parent, _, child = name.rpartition(".")
    experts: Any = model.get_submodule(name)
    for parameter in parameters:
        options = {"r": lora_config.r, "lora_alpha": lora_config.lora_alpha, "parameter_name": parameter}
        experts = ParamWrapper(experts, adapter_name, config=lora_config, **options)
    setattr(model.get_submodule(parent), child, experts)


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
