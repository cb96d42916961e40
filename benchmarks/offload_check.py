"""Experts in host memory beside the same experts in place: what differs first, where, and whether either repeats.

Part "check" of ``moe_on_80gb.py``. One and the same model runs twice in place and twice offloaded: a prompt, then steps
of one token. What enters and leaves every sparse layer is kept, so that a difference is told apart: numbers that
arrived otherwise (attention, or an earlier layer), another choice of experts, or other numbers from the same experts
for the same tokens. The last is the offloading's own error, and there must be none. Logits alone do not tell: one
rounding can send a token to another expert, which moves them by as much as they vary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

TOKENS = {1: 60, 40: 4, 500: 4}
"""Calls of each layer's experts on random tokens, by number of tokens."""


@dataclass
class LayerPass:
    """One sparse layer in one pass: tokens (N, D), choices (N, k), weights (N, k), what the experts gave (N, D)."""

    inputs: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    outputs: torch.Tensor


@dataclass
class Pass:
    """A pass of the model: its name, its sparse layers and its last logits (V,) in float32."""

    name: str
    layers: list[LayerPass]
    logits: torch.Tensor


@torch.no_grad()
def check(plain: Any, model: Any, prompt: int, num_steps: int, new_tokens: int) -> dict[str, Any]:
    """All comparisons of a model in place and the same one offloaded, both on one device."""
    row = compare_experts(plain, model) | {"places_wrong": places_wrong(model)}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (1, prompt), generator=generator).to(plain.device)
    traces = {}
    for name, one in (("plain", plain), ("plain_again", plain), ("offloaded", model), ("offloaded_again", model)):
        traces[name] = trace(one, ids, num_steps)
    first, *steps = traces["plain"]
    found = traces["offloaded"]
    row |= {
        "prompt_difference": logits_difference(first, found[0]),
        "step_difference": max(logits_difference(*pair) for pair in zip(steps, found[1:], strict=True)),
        "experts_differ": experts_differ(traces["plain"], found),
        "first_difference": first_difference(traces["plain"], found),
        "plain_again": first_difference(traces["plain"], traces["plain_again"]),
        "offloaded_again": first_difference(found, traces["offloaded_again"]),
        "replay": replay(traces["plain"], model),
        "places_wrong_after": places_wrong(model),
    }
    options = {"max_new_tokens": new_tokens, "stop_token_ids": ()}
    texts = [one.generate(ids, fast=False, **options)[0, ids.shape[1] :].tolist() for one in (plain, model)]
    row["same_greedy_tokens"] = sum(a == b for a, b in zip(*texts, strict=True)) / new_tokens
    row["distinct_greedy_tokens"] = len(set(texts[0]))
    return row


def compare_experts(plain: Any, model: Any) -> dict[str, Any]:
    """Each layer's experts on the same random tokens and choices: share of numbers that differ, and where.

    Layer after layer, so that what one guesses of the next is being copied while it runs.
    """
    generator = torch.Generator(plain.device).manual_seed(0)
    both = [sparse_layers(one) for one in (plain, model)]
    found: dict[str, Any] = {}
    for tokens, calls in TOKENS.items():
        wrong, count, worst, example = 0, 0, 0.0, "none"
        for call in range(calls):
            for number, (layer, other) in enumerate(zip(*both, strict=True)):
                drawn = random_call(layer.experts, tokens, generator)
                expected, given = (one(*drawn) for one in (layer.experts, other.experts))
                differing = int((given != expected).sum())
                if differing and not wrong:
                    example = f"call {call}, layer {number}: {described(drawn[1], given, expected)}"
                wrong, count = wrong + differing, count + given.numel()
                worst = max(worst, float((given.float() - expected.float()).abs().max() / expected.float().std()))
        found[f"layers_differ_{tokens}"] = wrong / count
        if wrong:
            found[f"layers_differ_{tokens}_where"] = f"{example}; at most {worst:.2g} standard deviations"
    return found


def random_call(
    experts: Any, tokens: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens, choices of two experts each and weights below one."""
    weight = experts.down_proj
    options: dict[str, Any] = {"device": generator.device, "generator": generator}
    inputs = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, **options)
    chosen = torch.rand(tokens, experts.num_experts, **options).topk(2, dim=1).indices
    return inputs, chosen, torch.rand(tokens, 2, **options)


def places_wrong(model: Any) -> str:
    """Places on the device that do not hold what the host holds for their expert; "none" is right."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    wrong = []
    for number, layer in enumerate(sparse_layers(model)):
        held = dict(layer.experts._pool[0].named_parameters())
        for place, expert in enumerate(layer.experts._expert_in):
            if expert >= 0:
                for name, tensor in layer.experts.named_parameters():
                    if not torch.equal(held[name][place], tensor[expert].to(held[name].device)):
                        wrong.append(f"layer {number} place {place} {name} of expert {expert}")
    return f"{len(wrong)}: {', '.join(wrong[:4])}" if wrong else "none"


def trace(model: Any, ids: torch.Tensor, num_steps: int) -> list[Pass]:
    """Run a prompt, all but the last of (1, T) ids, and these as steps of one token over a growing cache."""
    layers: list[LayerPass] = []

    def keep(_: Any, arguments: tuple[torch.Tensor, ...], result: tuple[torch.Tensor, Any]) -> None:
        routing, width = result[1], result[0].shape[-1]
        inputs, outputs = (tensor.reshape(-1, width) for tensor in (arguments[0], result[0]))
        layers.append(LayerPass(inputs, routing.expert_indices, routing.expert_weights, outputs))

    handles = [layer.register_forward_hook(keep) for layer in sparse_layers(model)]
    cache, passes, first = model.new_cache(1), [], ids.shape[1] - num_steps
    parts = [(f"prompt of {first} tokens", 0, first)]
    parts += [(f"step at {place}", place, place + 1) for place in range(first, ids.shape[1])]
    for name, start, stop in parts:
        layers.clear()
        logits = model(ids[:, start:stop], past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
        passes.append(Pass(name, list(layers), logits))
    for handle in handles:
        handle.remove()
    return passes


def logits_difference(one: Pass, other: Pass) -> float:
    """Largest difference over the standard deviation."""
    return float((one.logits - other.logits).abs().max() / one.logits.std())


def experts_differ(expected: Sequence[Pass], found: Sequence[Pass]) -> int:
    """Layers, of all passes, that gave other numbers for the same tokens, choices and weights."""
    return sum(
        where(*pair) == "experts"
        for one, other in zip(expected, found, strict=True)
        for pair in zip(one.layers, other.layers, strict=True)
    )


def where(expected: LayerPass, found: LayerPass) -> str:
    """What of a layer differs first: "arrived", "choice" or "experts"; "" where nothing does."""
    if not torch.equal(expected.inputs, found.inputs):
        return "arrived"
    if not (torch.equal(expected.indices, found.indices) and torch.equal(expected.weights, found.weights)):
        return "choice"
    return "" if torch.equal(expected.outputs, found.outputs) else "experts"


def first_difference(expected: Sequence[Pass], found: Sequence[Pass]) -> str:
    """In words: the first pass and layer in which two traces differ, and how."""
    told = {
        "arrived": "tokens arrived otherwise while all layers before gave the same (attention, or its cache)",
        "choice": "the router chose or weighted otherwise for the same tokens",
    }
    for one, other in zip(expected, found, strict=True):
        for number, pair in enumerate(zip(one.layers, other.layers, strict=True)):
            kind = where(*pair)
            if kind:
                text = told.get(kind) or described(pair[0].indices, pair[1].outputs, pair[0].outputs)
                return f"{one.name}, layer {number}: {text}"
        if not torch.equal(one.logits, other.logits):
            return f"{one.name}: logits, while all layers gave the same"
    return "none"


def described(indices: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> str:
    """Which tokens and experts differ, and by how much."""
    differing = (found != expected).any(dim=1).nonzero().flatten()
    largest = float((found.float() - expected.float()).abs().max() / expected.float().std())
    common = indices[differing].flatten().bincount()
    shared = (common == len(differing)).nonzero().flatten().tolist()
    return (
        f"experts gave other numbers to {len(differing)} of {len(found)} tokens, {int((found != expected).sum())} "
        f"numbers, at most {largest:.2g} standard deviations; first tokens {differing[:4].tolist()}, their experts "
        f"{indices[differing[:4]].tolist()}, experts that all of them chose {shared}"
    )


def replay(expected: Sequence[Pass], model: Any) -> str:
    """Offloaded experts on every pass's tokens, choices and weights in place: how many layers differ, the first."""
    wrong, count, example = 0, 0, ""
    for one in expected:
        for number, (layer, kept) in enumerate(zip(sparse_layers(model), one.layers, strict=True)):
            found = layer.experts(kept.inputs, kept.indices, kept.weights)
            count += 1
            if not torch.equal(found, kept.outputs):
                wrong += 1
                example = example or f": {one.name}, layer {number}: {described(kept.indices, found, kept.outputs)}"
    return f"{wrong} of {count} differ{example}"


def sparse_layers(model: Any) -> list[Any]:
    """The feed-forwards with experts, in order."""
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
