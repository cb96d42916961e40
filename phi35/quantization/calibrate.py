"""A checkpoint quantized with GPTQ, layer by layer: one layer's weights in memory at a time.

Calibration inputs run through a layer with its own weights, which gives the statistics of every weight's inputs (an
expert's: of the tokens that the router sends to it), then through its quantized form, which gives the next layer's
inputs. An expert that few tokens reach is rounded to the nearest codes instead, and so are embedding and image tower;
the report says which, and how many tokens each expert has seen.
"""

import dataclasses
import functools
import logging
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from phi35.attention import plan_attention
from phi35.checkpoint.rules import CheckpointPlan, Placement
from phi35.checkpoint.streaming import StoredWeights, check_space
from phi35.checkpoint.writer import DeferredTensor, Writable, parse_size, write_json, write_safetensors
from phi35.config import ModelConfig
from phi35.device import pick_device, pick_dtype
from phi35.meta_model import meta_model
from phi35.model import CausalLM
from phi35.quantization.codes import QuantizedTensor, dequantize, round_to_nearest
from phi35.quantization.config import QuantizationConfig
from phi35.quantization.convert import open_source, stored_bytes, write_checkpoint
from phi35.quantization.gptq import Hessian, gptq, relative_loss
from phi35.quantization.modules import format_of
from phi35.quantization.names import packed_shapes

logger = logging.getLogger(__name__)

MIN_TOKENS = 128
"""Tokens that an expert must have seen for its statistics to be used."""
REPORT_FILE = "quantization_report.json"


@dataclass
class CalibrationReport:
    """What calibration did.

    Attributes:
        num_tokens: calibration tokens.
        expert_tokens: layer -> tokens that each expert has seen.
        rounded: weights, or experts of weights, that were rounded to nearest for want of tokens.
        losses: weight -> (relative loss of rounding to nearest, of GPTQ) over the calibration inputs.
    """

    num_tokens: int = 0
    expert_tokens: dict[int, list[int]] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)

    def summary(self) -> str:
        """Some lines for a terminal."""
        pairs = list(self.losses.values())
        lines = [f"{self.num_tokens:,} calibration tokens, {len(pairs)} weights calibrated"]
        if pairs:
            nearest, best = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            lines[0] += f"; mean relative loss {best:.4f}, rounded to nearest {nearest:.4f}"
        if self.expert_tokens:
            counts = [count for row in self.expert_tokens.values() for count in row]
            lines.append(f"tokens per expert: least {min(counts):,}, mean {sum(counts) / len(counts):,.0f}")
        if self.rounded:
            shown = ", ".join(self.rounded[:8]) + (" …" if len(self.rounded) > 8 else "")
            lines.append(f"rounded to nearest, having seen under the least number of tokens: {shown}")
        return "\n".join(lines)


def quantize_calibrated(
    source: str | Path,
    target: str | Path,
    quantization: QuantizationConfig,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    min_tokens: int = MIN_TOKENS,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    max_shard_size: int | str = "5GB",
) -> CalibrationReport:
    """Write a checkpoint quantized with GPTQ.

    Args:
        source: folder or hub id of a checkpoint.
        target: folder to write, with a report (``quantization_report.json``).
        quantization: what to quantize; ``method`` "gptq".
        batches: model inputs: ``input_ids`` (B, T), and where there are some ``attention_mask``, ``pixel_values`` and
            ``image_sizes``, as a processor makes them.
        min_tokens: an expert (or any weight) that saw fewer is rounded to nearest.
        device: where layers run.
        dtype: in which they run.
        max_shard_size: bytes per weight file.

    Raises:
        ValueError: as ``phi35.quantization.convert.quantize``, or where there is nothing to calibrate with.
    """
    if quantization.method != "gptq":
        raise ValueError(f"calibration is for method 'gptq', got {quantization.method!r}")
    if min_tokens < 1:
        raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
    shard_bytes, target = parse_size(max_shard_size), Path(target).expanduser()
    given = [dict(batch) for batch in batches]
    if not given or not all("input_ids" in batch for batch in given):
        raise ValueError("calibration needs batches with input_ids (B, T), at least one")
    folder, config = open_source(source, target, quantization)
    weights = StoredWeights(folder, config.replace(quantization=None))
    plan = CheckpointPlan(config)
    check_space(target, 2 * _stored_size(config))
    target.mkdir(parents=True, exist_ok=True)
    spool = Path(tempfile.mkdtemp(prefix=".quantizing-", dir=target))
    try:
        run = _Calibration(config, weights, spool, min_tokens, pick_device(device), dtype)
        run.all_layers(given)
        tensors: dict[str, Writable] = {}
        for placement in plan.written():
            name, shape = placement.memory_name, plan.disk_shape(placement)
            tensors[placement.disk_name] = DeferredTensor(
                shape, run.dtype_of(name), functools.partial(run.part, placement)
            )
        write_checkpoint(folder, target, config, weights.main_dtype, tensors | packed_shapes(plan), shard_bytes)
    finally:
        shutil.rmtree(spool)
    write_json(target / REPORT_FILE, dataclasses.asdict(run.report))
    return run.report


def _stored_size(config: ModelConfig) -> int:
    return stored_bytes(meta_model(config).to(torch.bfloat16).state_dict())


class _Calibration:
    """The run through the layers; quantized tensors go to a folder, one file a layer."""

    def __init__(
        self,
        config: ModelConfig,
        weights: StoredWeights,
        spool: Path,
        min_tokens: int,
        device: torch.device,
        dtype: str | torch.dtype,
    ) -> None:
        assert config.quantization is not None
        self.quantization, self.weights, self.spool, self.min_tokens = config.quantization, weights, spool, min_tokens
        self.device, self.dtype = device, pick_dtype(dtype, device)
        self.scale_dtype = getattr(torch, config.quantization.scale_dtype)
        self.model: CausalLM = meta_model(config.replace(quantization=None)).eval()
        self.report = CalibrationReport()
        self._places: dict[str, Path] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._kept: tuple[str, torch.Tensor] | None = None

    @torch.no_grad()
    def all_layers(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Quantize everything."""
        decoder, config = self.model.model, self.model.config
        hidden, masks = self._embedded(batches)
        self.report.num_tokens = sum(int(mask.sum()) for mask in masks)
        for number, layer in enumerate(decoder.layers):
            prefix = f"model.layers.{number}."
            self._fill(layer, prefix)
            statistics = _Statistics(layer, prefix, self.quantization, self.device)
            self._through(layer, hidden, masks, statistics)
            self._quantize(prefix, layer, statistics)
            if config.is_sparse_layer(number):
                self.report.expert_tokens[number] = statistics.expert_tokens(config.num_local_experts)
            hidden = self._through(layer, hidden, masks, None)
            layer.to("meta")
            logger.info("layer %d of %d quantized", number + 1, config.num_hidden_layers)
        self._fill(decoder.norm, "model.norm.")
        self._head(hidden, masks)

    def _embedded(self, batches: list[dict[str, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Embeddings (B, T, D) with image features, and masks (B, T); embedding and tower are rounded to nearest."""
        decoder, hidden, masks = self.model.model, [], []
        outer: dict[str, nn.Module] = {"model.embed_tokens.": decoder.embed_tokens}
        if decoder.vision_embed_tokens is not None:
            outer["model.vision_embed_tokens."] = decoder.vision_embed_tokens
        for prefix, module in outer.items():
            self._fill(module, prefix)
        for batch in batches:
            ids = batch["input_ids"].to(self.device)
            pixels, sizes = batch.get("pixel_values"), batch.get("image_sizes")
            pixels = None if pixels is None or len(pixels) == 0 else pixels.to(self.device, self.dtype)
            hidden.append(decoder._embed(ids, pixels, None if pixels is None else sizes, cached=False))
            mask = batch.get("attention_mask")
            masks.append((torch.ones_like(ids) if mask is None else mask.to(self.device)).bool())
        for prefix, module in outer.items():
            self._quantize(prefix, module, None)
            module.to("meta")
        return hidden, masks

    def _through(
        self, layer: nn.Module, hidden: list[torch.Tensor], masks: list[torch.Tensor], statistics: "_Statistics | None"
    ) -> list[torch.Tensor]:
        """What a layer makes of all inputs; with ``statistics`` those are taken from them."""
        outputs, decoder = [], self.model.model
        with statistics if statistics is not None else torch.no_grad():
            for states, mask in zip(hidden, masks, strict=True):
                plan = plan_attention(self.model.config, decoder.rope, states, mask, None, None, None)
                if statistics is not None:
                    statistics.mask = mask
                outputs.append(layer(states, plan, None)[0])
        return outputs

    def _head(self, hidden: list[torch.Tensor], masks: list[torch.Tensor]) -> None:
        head, statistics = self.model.lm_head, None
        if self.quantization.head is not None:
            self._fill(head, "lm_head.")
            statistics = _Statistics(head, "lm_head.", self.quantization, self.device)
            for states, mask in zip(hidden, masks, strict=True):
                statistics.add("weight", None, self.model.model.norm(states)[mask])
            self._quantize("lm_head.", head, statistics)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module on the meta device its weights."""
        state = {name: self.weights.tensor(prefix + name).to(self.device, self.dtype) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)

    def _quantize(self, prefix: str, module: nn.Module, statistics: "_Statistics | None") -> None:
        """Quantize the weights of a module in place, and keep their codes."""
        kept: dict[str, torch.Tensor] = {}
        for child, part in module.named_modules():
            base = (prefix + child).rstrip(".")
            one = format_of(base, part, self.quantization)
            for name, parameter in part.named_parameters(recurse=False) if one is not None else ():
                if parameter.dim() < 2:
                    continue
                full = f"{base}.{name}"
                original = self.weights.tensor(full)
                quantized = self._quantized(full, original, statistics)
                parameter.copy_(dequantize(quantized, self.dtype))
                kept |= {full + suffix: tensor.cpu() for suffix, tensor in quantized.tensors().items()}
        if kept:
            file = self.spool / f"{len(self._places)}.safetensors"
            write_safetensors(file, kept)
            self._places |= dict.fromkeys(kept, file)
            self._dtypes |= {name: tensor.dtype for name, tensor in kept.items()}

    def _quantized(self, name: str, weight: torch.Tensor, statistics: "_Statistics | None") -> QuantizedTensor:
        """One weight, or a stack of experts' weights."""
        one = self.quantization.format_of(name)
        assert one is not None
        if weight.dim() == 2:
            return self._one(name, weight, None if statistics is None else statistics.hessians.get((name, None)))
        assert statistics is not None, "stacks of weights are experts, and stand in layers"
        parts = [
            self._one(f"{name}[{expert}]", part, statistics.hessians.get((name, expert)))
            for expert, part in enumerate(weight)
        ]
        stacked = {key: torch.stack([part.tensors()[key] for part in parts]) for key in parts[0].tensors()}
        return QuantizedTensor.of(one, stacked)

    def _one(self, name: str, weight: torch.Tensor, hessian: Hessian | None) -> QuantizedTensor:
        one = self.quantization.format_of(name)
        assert one is not None
        weight = weight.to(self.device)
        nearest = round_to_nearest(weight, one, self.scale_dtype)
        if hessian is None or hessian.num_tokens < self.min_tokens:
            if name.startswith(("model.layers.", "lm_head.")):
                self.report.rounded.append(name)
            return nearest
        best = gptq(weight, one, self.scale_dtype, hessian)
        losses = [relative_loss(weight, dequantize(found, torch.float32), hessian) for found in (nearest, best)]
        self.report.losses[name] = (losses[0], losses[1])
        return best if losses[1] <= losses[0] else nearest

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a memory tensor of the quantized model."""
        return self._dtypes.get(name) or self.weights.dtypes[name]

    def part(self, placement: Placement) -> torch.Tensor:
        """What a published tensor holds."""
        return placement.take(self.tensor(placement.memory_name))

    def tensor(self, name: str) -> torch.Tensor:
        """A memory tensor of the quantized model; the last one stays at hand, for an expert follows another."""
        if self._kept is None or self._kept[0] != name:
            self._kept = None
            if name in self._places:
                with safe_open(str(self._places[name]), framework="pt", device="cpu") as file:
                    self._kept = (name, file.get_tensor(name))
            else:
                self._kept = (name, self.weights.tensor(name))
        return self._kept[1]


class _Statistics:
    """Hessians of a module's weights by (name, expert), taken while inputs run through it."""

    def __init__(self, module: nn.Module, prefix: str, quantization: QuantizationConfig, device: torch.device) -> None:
        self.hessians: dict[tuple[str, int | None], Hessian] = {}
        self.mask: torch.Tensor | None = None
        self._module, self._prefix, self._quantization, self._device = module, prefix, quantization, device
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Statistics":
        for child, part in self._module.named_modules():
            if format_of(self._prefix + child, part, self._quantization) is not None:
                self._hooks.append(part.register_forward_pre_hook(self._hook(child)))
        return self

    def __exit__(self, *unused: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def add(self, name: str, expert: int | None, inputs: torch.Tensor) -> None:
        """Add inputs (n, columns) of the weight ``name`` of the module."""
        key = (self._prefix + name, expert)
        if key not in self.hessians:
            self.hessians[key] = Hessian.new(inputs.shape[-1], self._device)
        self.hessians[key].add(inputs)

    def expert_tokens(self, num_experts: int) -> list[int]:
        """Tokens that each expert has seen."""
        counts = [0] * num_experts
        for (_, expert), hessian in self.hessians.items():
            if expert is not None:
                counts[expert] = hessian.num_tokens
        return counts

    def _hook(self, child: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            real = None if self.mask is None else self.mask.flatten()
            if callable(of := getattr(module, "calibration_inputs", None)):
                for base, expert, values in of(*(part if real is None else part[real] for part in inputs[:2])):
                    self.add(f"{child}.{base}", expert, values)
            else:
                flat = inputs[0].reshape(-1, inputs[0].shape[-1])
                self.add(f"{child}.weight", None, flat if real is None else flat[real])

        return hook
