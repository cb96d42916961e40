"""Adapters under other names: fused and split projections, and the published names of every expert.

An adapter belongs to the tensors of a checkpoint, so that the checkpoint's table of names (``phi35.checkpoint.rules``)
says what becomes of it: where a memory tensor is cut in pieces on disk, each piece takes the rows of B that are its
own, and A whole. The other way pieces that share A are joined as they were; pieces with an A of their own stand beside
one another, with blocks of B, at the sum of their ranks. Either way every weight gets the same addition.

- "fused": ``qkv_proj``, ``gate_up_proj``, stacked experts: this package, transformers' phi3 and phimoe under PEFT.
- "split": ``q_proj``, ``k_proj``, ``v_proj``, ``gate_proj``, ``up_proj``; experts stay stacked.
- "published": the names of the published checkpoints, an adapter for each expert's ``w1``, ``w2``, ``w3``, which vLLM
  reads for Phi-3.5-MoE; the published dense models are fused.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi35.adapters.config import EXPERT_PARAMETERS, is_targeted
from phi35.checkpoint.rules import SAME_NAME, CheckpointPlan, Ignore, Placement, Rule, rules_for
from phi35.config import ModelConfig

FORMS = ("fused", "split", "published")
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+?)\.(?P<kind>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")


@dataclass
class Addition:
    """What an adapter adds to one weight: scaling * second @ first, and DoRA's lengths.

    Attributes:
        first: (r, in), or (E, r, in) for stacked experts.
        second: (out, r), or (E, out, r).
        scaling: alpha / r, or alpha / sqrt(r).
        magnitude: (out,) or None.
    """

    first: torch.Tensor
    second: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.first.shape[-2]

    def part(self, placement: Placement) -> "Addition":
        """The addition to the part of the weight that a placement names."""
        first, second = (
            (self.first, self.second)
            if placement.index is None
            else (
                self.first[placement.index],
                self.second[placement.index],
            )
        )
        magnitude = self.magnitude
        if placement.groups is not None:  # the rows stand in another order on disk
            second = placement.take(second)
            magnitude = None if magnitude is None else placement.take(magnitude[:, None])[:, 0]
        if placement.window is not None:
            second = second.narrow(*placement.window)
            magnitude = None if magnitude is None else magnitude.narrow(*placement.window)
        return Addition(first, second, self.scaling, magnitude)


def convert(
    described: dict[str, Any], tensors: Mapping[str, torch.Tensor], config: ModelConfig, form: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An adapter in another form.

    Args:
        described: contents of ``adapter_config.json``.
        tensors: of ``adapter_model.safetensors``, in any form.
        config: of the model.
        form: one of ``FORMS``.

    Returns:
        Both in that form; every weight's addition is what it was.

    Raises:
        ValueError: for an unknown form, or tensors that belong to no weight of the model.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    additions = additions_of(described, tensors, config)
    plan = _plan(config, form)
    placed: dict[str, Addition] = {}
    for name, addition in additions.items():
        for placement in plan.spellings[name][0]:
            if placement.transpose or placement.leading_ones:
                raise ValueError(f"{name} lies otherwise in published checkpoints; keep the adapter's form")
            placed[placement.disk_name] = addition.part(placement)
    names = [placement.disk_name for spellings in plan.spellings.values() for placement in spellings[0]]
    return _written(described, placed, names)


def convert_folder(source: str | Path, target: str | Path, config: ModelConfig, form: str) -> None:
    """``convert``, from folder to folder.

    Raises:
        ValueError: as ``convert``, and for files that cannot be used.
    """
    import json

    from phi35.adapters.files import CONFIG_FILE, read_adapter, write_weights

    described, tensors = convert(*read_adapter(source), config, form)
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    write_weights(folder, tensors)


def to_fused(
    described: dict[str, Any], tensors: Mapping[str, torch.Tensor], config: ModelConfig
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The form that this package's modules take; an adapter that has it already comes back as it is."""
    if set(_read(described, tensors)) <= set(_plan(config, "fused").shapes):
        return described, dict(tensors)
    return convert(described, tensors, config, "fused")


def additions_of(
    described: dict[str, Any], tensors: Mapping[str, torch.Tensor], config: ModelConfig
) -> dict[str, Addition]:
    """What an adapter in any form adds to the weights of a model, by the weights' memory names.

    Raises:
        ValueError: for tensors that belong to no weight of the model, or do not fit it; all of them named.
    """
    found = _read(described, tensors)
    plan = {form: _plan(config, form) for form in FORMS}
    shapes = plan["fused"].shapes
    joined: dict[str, Addition] = {}
    left = set(found)
    for name, shape in shapes.items():
        for form in FORMS:
            spelling = plan[form].spellings[name][0]
            given = [placement for placement in spelling if placement.disk_name in found]
            # One name may mean a half under one form and the whole under another (phi-3-small's up_proj).
            sizes = [(found[one.disk_name].second.shape[-2], plan[form].disk_shape(one)[-2]) for one in given]
            if given and (all(size == wanted for size, wanted in sizes) or form == FORMS[-1]):
                left -= {placement.disk_name for placement in given}
                joined[name] = _joined(name, shape, spelling, found)
                break
    if left:
        raise ValueError(f"the adapter is for weights that the model does not have: {sorted(left)[:20]}")
    misshapen = [
        f"{name}: A {tuple(one.first.shape)} and B {tuple(one.second.shape)} for a weight of {shapes[name]}"
        for name, one in joined.items()
        if (*one.second.shape[:-1], one.first.shape[-1]) != tuple(shapes[name])
    ]
    if misshapen:
        raise ValueError("the adapter does not fit the model: " + "; ".join(misshapen[:20]))
    return joined


def _plan(config: ModelConfig, form: str) -> CheckpointPlan:
    plain = config.replace(quantization=None)
    rules: Iterable[Rule | Ignore] = (SAME_NAME,)
    if form == "published":
        rules = rules_for(plain)
    elif form == "split":
        layer = "model.layers.{layer}."
        rules = (
            Rule(
                memory=layer + "self_attn.qkv_proj.{kind}",
                disk=tuple(layer + f"self_attn.{name}_proj." + "{kind}" for name in "qkv"),
                sizes=_heads,
            ),
            Rule(
                memory=layer + "mlp.gate_up_proj.{kind}",
                disk=tuple(layer + f"mlp.{name}_proj." + "{kind}" for name in ("gate", "up")),
            ),
            SAME_NAME,
        )
    return CheckpointPlan(plain, rules=tuple(rules))


def _heads(config: ModelConfig) -> tuple[int, ...]:
    queries = config.num_attention_heads * config.attention_head_dim
    keys = config.num_key_value_heads * config.attention_head_dim
    return (queries, keys, keys)


def _read(described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Addition]:
    """Additions by the names of the weights that they belong to, as the adapter spells them."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise ValueError(f"the adapter holds {name!r}, which is no part of a LoRA")
        modules.setdefault(match["module"], {})[match["kind"]] = tensor
    found = {}
    for module, parts in modules.items():
        if not {"lora_A.weight", "lora_B.weight"} <= set(parts):
            raise ValueError(f"the adapter of {module!r} lacks a factor: it has {sorted(parts)}")
        weight = _weight_name(module, described)
        first, second = parts["lora_A.weight"], parts["lora_B.weight"]
        experts = weight.endswith(tuple(f".experts.{name}" for name in EXPERT_PARAMETERS))
        key = weight if experts else module
        rank = int(_pattern(described.get("rank_pattern"), key, described["r"]))
        alpha = float(_pattern(described.get("alpha_pattern"), key, described["lora_alpha"]))
        if experts:
            count = first.shape[0] // rank
            first = first.reshape(count, rank, -1)
            second = second.reshape(second.shape[0], rank, count).permute(2, 0, 1)
        if first.shape[-2] != rank or second.shape[-1] != rank:
            raise ValueError(f"the adapter of {module!r} has factors of rank {first.shape[-2]}, its config says {rank}")
        scaling = alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)
        found[weight] = Addition(first, second, scaling, parts.get("lora_magnitude_vector"))
    return found


def _weight_name(module: str, described: Mapping[str, Any]) -> str:
    """The weight that a module of the adapter stands for; of experts' nested wrappers the first is innermost."""
    plain = module.replace(".base_layer", "")
    if not plain.endswith(".mlp.experts"):
        return f"{plain}.weight"
    targets = described.get("target_parameters") or ()
    wrapped = [name for name in EXPERT_PARAMETERS if is_targeted(f"{plain}.{name}", targets)]
    depth = module.count(".base_layer")
    if depth >= len(wrapped):
        raise ValueError(f"target_parameters {list(targets)} of the adapter do not explain {module!r}")
    return f"{plain}.{wrapped[len(wrapped) - 1 - depth]}"


def _pattern(patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def _joined(name: str, shape: tuple[int, ...], spelling: list[Placement], found: Mapping[str, Addition]) -> Addition:
    """The addition to a whole weight from those to its parts; a part without one gets nothing."""
    scaling = next(found[one.disk_name].scaling for one in spelling if one.disk_name in found)
    indices = sorted({one.index for one in spelling}, key=lambda index: -1 if index is None else index)
    pairs = []
    for index in indices:
        parts = [(one, found.get(one.disk_name)) for one in spelling if one.index == index]
        pairs.append(_joined_rows(parts, shape, scaling))
    if indices == [None]:
        magnitudes = [(one, found[one.disk_name].magnitude) for one in spelling if one.disk_name in found]
        given = [_in_memory_order(one, lengths) for one, lengths in magnitudes if lengths is not None]
        if given and len(given) != len(spelling):
            raise ValueError(f"the adapter has DoRA's lengths for a part of {name} alone: they cannot be joined")
        return Addition(*pairs[0], scaling, torch.cat(given) if given else None)
    rank = max(first.shape[0] for first, _ in pairs)
    padded = [
        (torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])), torch.nn.functional.pad(b, (0, rank - b.shape[1])))
        for a, b in pairs
    ]
    return Addition(torch.stack([a for a, _ in padded]), torch.stack([b for _, b in padded]), scaling)


def _in_memory_order(placement: Placement, lengths: torch.Tensor) -> torch.Tensor:
    if placement.groups is None:
        return lengths
    ordered = torch.empty_like(lengths)[:, None]
    placement.put(ordered, lengths[:, None])
    return ordered[:, 0]


def _joined_rows(
    parts: list[tuple[Placement, Addition | None]], shape: tuple[int, ...], scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    given = [one for _, one in parts if one is not None]
    if not given:
        return torch.zeros(0, shape[-1]), torch.zeros(shape[-2], 0)
    if parts[0][0].groups is not None:
        second = torch.empty_like(given[0].second)
        parts[0][0].put(second, given[0].second)
        return given[0].first, second
    if len(parts) == 1 and given[0].scaling == scaling and given[0].first.dim() == 2:
        return given[0].first, given[0].second
    if len(parts) == 1:
        return given[0].first, given[0].second * (given[0].scaling / scaling)
    shared = all(torch.equal(one.first, given[0].first) for one in given)
    rank = given[0].rank if shared else sum(one.rank for one in given)
    second = given[0].second.new_zeros(shape[-2], rank)
    column = 0
    for placement, one in parts:
        if one is None:
            continue
        assert placement.window is not None
        if one.second.shape[0] != placement.window[2] or one.first.shape[1] != shape[-1]:
            raise ValueError(
                f"the adapter does not fit the model: {placement.disk_name} has A {tuple(one.first.shape)} and B "
                f"{tuple(one.second.shape)} for a weight of {(placement.window[2], shape[-1])}"
            )
        block = second.narrow(*placement.window)[:, column : column + one.rank]
        block.copy_(one.second * (one.scaling / scaling))
        column += 0 if shared else one.rank
    return given[0].first if shared else torch.cat([one.first for one in given]), second


def _written(
    described: Mapping[str, Any], additions: Mapping[str, Addition], names: list[str]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of additions under the names of their weights, of all ``names`` that the model has."""
    ranks = [one.rank for one in additions.values()]
    usual = max(set(ranks), key=ranks.count)
    power = 0.5 if described.get("use_rslora") else 1.0
    alphas = {name: one.scaling * one.rank**power for name, one in additions.items()}
    usual_alpha = next(alphas[name] for name, one in additions.items() if one.rank == usual)
    tensors, modules, parameters = {}, [], []
    rank_pattern, alpha_pattern = {}, {}
    for name, one in additions.items():
        module = name.rpartition(".")[0]
        at, key, first, second = module, module, one.first, one.second
        if first.dim() == 3:
            key, others = name, f"{module}.{EXPERT_PARAMETERS[1]}"
            at = f"{module}.base_layer" if name != others and others in additions else module
            first = first.reshape(-1, first.shape[-1])
            second = second.permute(1, 2, 0).reshape(second.shape[1], -1)
            parameters.append(name)
        elif module.endswith(".mlp.router"):
            parameters.append(name)
        else:
            modules.append(module)
        tensors[f"{_PREFIX}{at}.lora_A.weight"], tensors[f"{_PREFIX}{at}.lora_B.weight"] = first, second
        if one.magnitude is not None:
            tensors[f"{_PREFIX}{at}.lora_magnitude_vector"] = one.magnitude
        if one.rank != usual:
            rank_pattern[key] = one.rank
        if not math.isclose(alphas[name], usual_alpha):
            alpha_pattern[key] = _whole(alphas[name])
    every_module = [name.removesuffix(".weight") for name in names]
    changed = {
        "r": usual,
        "lora_alpha": _whole(usual_alpha),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": _shortened(modules, every_module),
        "target_parameters": _shortened(parameters, names, components=3) or None,
    }
    return {**described, **changed}, tensors


def _shortened(chosen: list[str], every: list[str], components: int = 1) -> list[str]:
    """Ends of names where all that end so are chosen, whole names elsewhere."""
    found: dict[str, None] = {}
    for name in chosen:
        end = ".".join(name.split(".")[-components:])
        alike = [one for one in every if one.endswith(f".{end}")]
        short = ".vision_embed_tokens." not in name and set(alike) <= set(chosen)
        found[end if short else name] = None
    return list(found)


def _whole(value: float) -> float | int:
    return round(value) if math.isclose(value, round(value)) else value
