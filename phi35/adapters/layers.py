"""PEFT's LoRA layers for the modules that PEFT does not know: stacked experts, and linear layers in few bits.

``register(lora_config)`` tells a ``peft.LoraConfig`` about them, so that ``peft.get_peft_model`` and
``inject_adapter_in_model`` take them for a model of this package, bare or behind the classes of transformers:

    config = LoraConfig(target_modules=["qkv_proj", "o_proj"],
                        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"])
    model = get_peft_model(model, register(config))

Experts can be named as modules too, both their parameters at once: ``target_modules=["qkv_proj", "experts"]``. That is
how PEFT finds experts in few bits, which hold codes and no parameters.

Names and shapes of the adapter's tensors are those of PEFT's own ``ParamWrapper``, so that PEFT alone reads what is
saved. PEFT adds B A to the whole stack of experts' weights at every pass; here the low-rank path runs beside the
products (``moe.low_rank``). Merging, unmerging, switching and disabling are PEFT's own.
"""

import copy
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layers
from torch import nn

from phi35.adapters.dora import Magnitude, RowSquares, row_lengths
from phi35.quantization.linear import quantized_linear
from phi35.quantization.modules import QuantizedLinear
from phi35.registry import resolve

NO_MERGE = (
    "an adapter cannot be merged into weights in few bits: load the original weights, put the adapter on them, merge, "
    "and quantize again"
)


def register(config: LoraConfig) -> LoraConfig:
    """Makes PEFT use this module's layers for the experts, the router and quantized layers of this package.

    Args:
        config: changed in place; what is registered is not saved with it.

    Returns:
        The same config.
    """
    routers = ("moe.router:SparseMixerRouter", "moe.router:TopKSoftmaxRouter")
    experts = ("moe.experts:Experts", "moe.quantized_experts:QuantizedExperts")
    layers: dict[Any, Any] = {resolve(name): ParamWrapper for name in routers}  # PEFT calls what it finds
    layers |= {resolve(name): _experts_layer for name in experts}
    config._register_custom_module(layers | {QuantizedLinear: LoraQuantizedLinear})
    return config


def _experts_layer(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **options: Any
) -> "ParamWrapper":
    """The wrapper of one parameter of experts, or where PEFT names the module, of both."""
    if parameter_name is not None:
        return ParamWrapper(target, adapter_name, config=config, parameter_name=parameter_name, **options)
    inner = ParamWrapper(target, adapter_name, config=config, parameter_name="gate_up_proj", **options)
    outer = ParamWrapper(inner, adapter_name, config=config, parameter_name="down_proj", **options)
    outer.leads_inner = True
    return outer


class ParamWrapper(peft_layers.ParamWrapper):
    """PEFT's LoRA of a parameter, its low-rank path computed beside the experts' products.

    It has PEFT's class name because PEFT looks for that. As in PEFT, a wrapper of ``gate_up_proj`` lies inside that of
    ``down_proj``; the outer one runs both. The router's small matrix goes PEFT's way.

    ``lora_A.weight`` is (E r, in), expert after expert; ``lora_B.weight`` is (out, r E), the expert changing fastest.

    PEFT refuses dropout here, for it adds to the weight; the low-rank path of experts has inputs to drop. On a router
    there is none.

    Raises:
        ValueError: for DoRA, which PEFT does not have for parameters either.
    """

    leads_inner = False
    """Whether a further adapter of this parameter is one of the parameter wrapped inside as well."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        config = options.pop("config")
        if config.use_dora:
            raise ValueError("DoRA is for linear layers: leave experts and router out, or set use_dora=False")
        super().__init__(base_layer, adapter_name, config=_changed(config, lora_dropout=0.0), **options)
        self._drop(adapter_name, config.lora_dropout)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        """See PEFT."""
        super().update_layer(adapter_name, r, lora_alpha, _changed(config, lora_dropout=0.0), **options)
        self._drop(adapter_name, config.lora_dropout)
        if self.leads_inner:
            inner: Any = self.base_layer
            inner.update_layer(adapter_name, r, lora_alpha, config, **options)

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """The base module's result under the active adapters."""
        experts: Any = self.get_base_layer()
        if not hasattr(experts, "hidden_act") or len(arguments) != 2 or options:
            return super().forward(x, *arguments, **options)
        wrappers = {one.parameter_name: one for one in self._chain()}
        additions = {name: one._additions() for name, one in wrappers.items()}
        if not any(additions.values()):
            return experts(x, *arguments)
        return resolve("moe.low_rank:adapted_experts")(
            x,
            *arguments,
            _weight(experts, "gate_up_proj"),
            _weight(experts, "down_proj"),
            experts.hidden_act,
            additions.get("gate_up_proj", ()),
            additions.get("down_proj", ()),
        )

    def get_param(self) -> torch.Tensor:
        """The parameter; of experts in few bits, which have none, its shape alone."""
        experts: Any = self.get_base_layer()
        if not hasattr(experts, "held"):
            return super().get_param()
        return torch.empty(experts.held(self.parameter_name).shape, device="meta")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """See PEFT.

        Raises:
            ValueError: for experts in few bits.
        """
        if hasattr(self.get_base_layer(), "held"):
            raise ValueError(NO_MERGE)
        super().merge(safe_merge, adapter_names)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        experts: Any = self.get_base_layer()
        if not hasattr(experts, "held"):
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            return
        for part in (self.lora_A, self.lora_B):
            if adapter_name in part and not part[adapter_name].weight.is_meta:
                part[adapter_name].to(device or experts.held(self.parameter_name).codes.device)

    def _chain(self) -> list["ParamWrapper"]:
        found: list[ParamWrapper] = []
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            found.append(layer)
            layer = layer.base_layer
        return found

    def _additions(self) -> list[Any]:
        """What the active adapters add to this parameter; nothing where they are disabled or merged into it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        low_rank = resolve("moe.low_rank:LowRank")
        found = []
        for name in self.active_adapters:
            if name in self.lora_A:
                stacked, spread = (part[name].get_parameter("weight") for part in (self.lora_A, self.lora_B))
                first = stacked.reshape(self.num_experts, -1, stacked.shape[-1])
                second = spread.reshape(spread.shape[0], -1, self.num_experts).permute(2, 0, 1)
                dropout = self.lora_dropout[name]
                active = dropout if isinstance(dropout, nn.Dropout) and self.training else None
                found.append(low_rank(first, second, self.scaling[name], active))
        return found

    def _drop(self, adapter_name: str, chance: float) -> None:
        if chance and hasattr(self.get_base_layer(), "hidden_act"):
            self.lora_dropout[adapter_name] = nn.Dropout(chance)


class LoraQuantizedLinear(nn.Module, peft_layers.LoraLayer):
    """LoRA of a ``QuantizedLinear`` (QLoRA, arXiv 2305.14314), or DoRA: the codes stay, adapters train beside them.

    Raises:
        ValueError: for LoRA's other variants.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        peft_layers.LoraLayer.__init__(self, base_layer)
        self._active_adapter, self._squares = adapter_name, RowSquares()
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        """See PEFT."""
        # PEFT's own DoRA would look for a weight; the rest of the adapter is the same.
        super().update_layer(adapter_name, r, lora_alpha, _changed(config, use_dora=False), **options)
        if config.use_dora:
            self.use_dora[adapter_name] = True
            self.lora_magnitude_vector[adapter_name] = Magnitude(self._lengths(adapter_name))
            self.adapter_layer_names = tuple(dict.fromkeys((*self.adapter_layer_names, "lora_magnitude_vector")))
            self.set_adapter(self.active_adapters, inference_mode=options.get("inference_mode", False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., out_features) from (..., in_features)."""
        result = self.base_layer(x)
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.lora_A:
                first, second = self.lora_A[name], self.lora_B[name]
                inputs = self.lora_dropout[name](x)
                added = second(first(inputs.to(first.weight.dtype))) * self.scaling[name]
                if name in self.lora_magnitude_vector:
                    added = self._turned(name, inputs, added, result)
                result = result + added.to(result.dtype)
        return result

    def _turned(self, name: str, inputs: torch.Tensor, added: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """What DoRA adds to the result so far; where inputs were dropped, its base product is theirs, as in PEFT."""
        factor = self.lora_magnitude_vector[name](self._lengths(name))
        layer: Any = self.get_base_layer()
        if self.training and isinstance(self.lora_dropout[name], nn.Dropout):
            product = quantized_linear(inputs, layer.held())
        else:
            product = result if layer.bias is None else result - layer.bias
        return (factor - 1) * product + factor * added

    def _lengths(self, name: str) -> torch.Tensor:
        layer: Any = self.get_base_layer()
        weight = layer.held()
        return row_lengths(weight, self._squares(weight), self.lora_A[name], self.lora_B[name], self.scaling[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing: it is never merged."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        layer: Any = self.get_base_layer()
        codes = layer.held().codes
        for part in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            if adapter_name in part and not part[adapter_name].weight.is_meta:
                part[adapter_name].to(device or codes.device)


def _weight(experts: Any, name: str) -> Any:
    held = getattr(experts, "held", None)
    return getattr(experts, name) if held is None else held(name)


def _changed(config: LoraConfig, **fields: Any) -> LoraConfig:
    """A copy with other fields, which PEFT does not check anew."""
    changed = copy.copy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
