"""Experts in host memory beside the same experts in place: what differs first, where, and whether either repeats.

Part "check" of ``moe_on_80gb.py``. One and the same model runs twice in place and twice offloaded: a prompt, then steps
of one token. What enters and leaves the parts of every sparse layer is kept, so that a difference is told apart: the
first part that gives other numbers for the same ones. Of offloading, the experts alone may be that part, and must not.
Logits do not tell: one rounding can send a token to another expert, which moves them by as much as they vary. And
torch's attention of one token by cuDNN, its first choice on Hopper, rounds otherwise from run to run, so that all is
compared with each of its kernels; "flash" and "math" must show no difference.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

TOKENS = {1: 60, 40: 4, 500: 4}
"""Calls of each layer's experts on random tokens, by number of tokens."""


PARTS = {
    "arrived": "tokens arrived otherwise, though all layers before gave the same",
    "qkv_proj": "queries, keys and values of the same tokens",
    "attended": "attention over the same queries, keys and values",
    "o_proj": "the projection of the same attention",
    "normed": "the sum and norm of the same",
    "choice": "the router's choice or weights for the same tokens",
    "experts": "the experts' results for the same tokens, choices and weights",
}
"""Parts of a layer in order, and what it means that this is the first to differ."""
BACKENDS = {
    "any": (),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH),
    "flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "math": (SDPBackend.MATH,),
}
"""Kernels of attention that torch may take, "any" by its own order; MATH takes what the other does not."""
REPEATS, COPIES = 250, 4
"""Calls of attention over the same memory, and places in memory."""


@dataclass
class LayerPass:
    """One sparse layer in one pass: what each of ``PARTS`` gave (N, ...), the router's choices (N, k) and weights."""

    parts: dict[str, torch.Tensor]
    weights: torch.Tensor


@dataclass
class Pass:
    """A pass of the model: its name, its sparse layers and its last logits (V,) in float32."""

    name: str
    layers: list[LayerPass]
    logits: torch.Tensor


@torch.no_grad()
def check(
    plain: Any, model: Any, prompt: int, num_steps: int, new_tokens: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """All comparisons of a model in place and the same one offloaded, both on one device; ``say`` is told how far."""
    row = compare_experts(plain, model) | {"places_wrong": places_wrong(model)}
    if plain.device.type == "cuda":
        row |= repeat_attention(plain)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (1, prompt), generator=generator).to(plain.device)
    for name, allowed in BACKENDS.items():
        if name == "any" or plain.device.type == "cuda":
            say(f"attention by {name}")
            with sdpa_kernel(list(allowed)) if allowed else nullcontext():
                row |= {f"{name}_{key}": value for key, value in compare_passes(plain, model, ids, num_steps).items()}
    row["places_wrong_after"] = places_wrong(model)
    options = {"max_new_tokens": new_tokens, "stop_token_ids": ()}
    texts = [one.generate(ids, fast=False, **options)[0, ids.shape[1] :].tolist() for one in (plain, model)]
    row["same_greedy_tokens"] = sum(a == b for a, b in zip(*texts, strict=True)) / new_tokens
    row["distinct_greedy_tokens"] = len(set(texts[0]))
    return row


def compare_passes(plain: Any, model: Any, ids: torch.Tensor, num_steps: int) -> dict[str, Any]:
    """A prompt and steps in place and offloaded, each twice."""
    expected, again, found, found_again = (trace(one, ids, num_steps) for one in (plain, plain, model, model))
    return {
        "prompt_difference": logits_difference(expected[0], found[0]),
        "step_difference": max(logits_difference(*pair) for pair in zip(expected[1:], found[1:], strict=True)),
        "in_place_repeat_difference": max(logits_difference(*pair) for pair in zip(expected, again, strict=True)),
        "experts_differ": experts_differ(expected, found),
        "first_difference": first_difference(expected, found),
        "in_place_again": first_difference(expected, again),
        "offloaded_again": first_difference(found, found_again),
        "replay": replay(expected, model),
    }


def repeat_attention(plain: Any) -> dict[str, Any]:
    """torch's attention of one token over a cache's first 511 of 512 places, again and again.

    For each kernel: calls whose result was not that of the first over the same memory; copies of the same keys and
    values elsewhere, with other numbers in the last place, that gave another result than the first copy; errors over
    the exact result's deviation.
    """
    first = plain.model.layers[0].self_attn
    heads, num_kv, head_dim = first.num_heads, first.num_kv_heads, first.head_dim
    options: dict[str, Any] = {"device": plain.device, "generator": torch.Generator(plain.device).manual_seed(0)}
    query = torch.randn(1, heads, 1, head_dim, **options).to(plain.dtype)
    keys, values = (torch.randn(1, num_kv, 511, head_dim, **options).to(plain.dtype) for _ in range(2))
    exact = attend(query.double(), keys.double(), values.double())
    copies = []
    for _ in range(COPIES):
        pair = [torch.randn(1, num_kv, 512, head_dim, **options).to(plain.dtype) for _ in range(2)]
        for room, given in zip(pair, (keys, values), strict=True):
            room[:, :, :511] = given
        copies.append([room[:, :, :511] for room in pair])
    found: dict[str, Any] = {}
    for name, allowed in BACKENDS.items():
        with sdpa_kernel(list(allowed)) if allowed else nullcontext():
            chosen = torch._fused_sdp_choice(query, *copies[0], enable_gqa=heads != num_kv)
            results = torch.stack([torch.cat([attend(query, *one) for _ in range(REPEATS)]) for one in copies])
        errors = (results.double() - exact).abs().amax(dim=(2, 3, 4)) / exact.std()
        again = int((results != results[:, :1]).flatten(2).any(dim=2).sum())
        elsewhere = int((results[:, 0] != results[0, 0]).flatten(1).any(dim=1).sum())
        found[f"{name}_repeats"] = (
            f"{SDPBackend(chosen).name}: {again} of {COPIES * REPEATS} calls unlike the first, {elsewhere} of "
            f"{COPIES - 1} copies unlike the first, errors {float(errors.min()):.2g} to {float(errors.max()):.2g}"
        )
    return found


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention as a model's step asks for it."""
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=query.shape[1] != keys.shape[1])


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
                unlike = int((given != expected).sum())
                if unlike and not wrong:
                    example = f"call {call}, layer {number}: {described(drawn[1], given, expected)}"
                wrong, count = wrong + unlike, count + given.numel()
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


@torch.no_grad()
def trace(model: Any, ids: torch.Tensor, num_steps: int) -> list[Pass]:
    """Run a prompt, all but the last of (1, T) ids, and these as steps of one token over a growing cache."""
    layers: list[LayerPass] = []
    kept: dict[str, torch.Tensor] = {}

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, tensor.shape[-1])

    def entering(name: str) -> Any:
        return lambda _, arguments: kept.__setitem__(name, flat(arguments[0]))

    def leaving(name: str) -> Any:
        return lambda _, __, result: kept.__setitem__(name, flat(result))

    def layer_done(_: Any, __: Any, result: tuple[torch.Tensor, Any]) -> None:
        parts = kept | {"choice": result[1].expert_indices, "experts": flat(result[0])}
        layers.append(LayerPass({name: parts[name] for name in PARTS}, result[1].expert_weights))

    handles = []
    for layer in (one for one in model.model.layers if hasattr(one.mlp, "experts")):
        attention = layer.self_attn
        handles += [attention.register_forward_pre_hook(entering("arrived"))]
        handles += [attention.qkv_proj.register_forward_hook(leaving("qkv_proj"))]
        handles += [attention.o_proj.register_forward_pre_hook(entering("attended"))]
        handles += [attention.o_proj.register_forward_hook(leaving("o_proj"))]
        handles += [layer.mlp.register_forward_pre_hook(entering("normed"))]
        handles += [layer.mlp.register_forward_hook(layer_done)]
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
    """The first of ``PARTS`` that differs; "" where nothing does."""
    for name, tensor in expected.parts.items():
        same = torch.equal(tensor, found.parts[name])
        if not same or (name == "choice" and not torch.equal(expected.weights, found.weights)):
            return name
    return ""


def first_difference(expected: Sequence[Pass], found: Sequence[Pass]) -> str:
    """In words: the first pass, layer and part in which two traces differ, and how."""
    for one, other in zip(expected, found, strict=True):
        for number, (mine, theirs) in enumerate(zip(one.layers, other.layers, strict=True)):
            part = where(mine, theirs)
            if part:
                given, wanted = theirs.parts[part], mine.parts[part]
                told = differing(given, wanted)
                if part == "experts":
                    told = described(mine.parts["choice"], given, wanted)
                return f"{one.name}, layer {number}: {PARTS[part]}; {told}"
        if not torch.equal(one.logits, other.logits):
            return f"{one.name}: logits, though all layers gave the same"
    return "none"


def differing(found: torch.Tensor, expected: torch.Tensor) -> str:
    """How many numbers differ and by how much."""
    largest = (found.float() - expected.float()).abs().max() / expected.float().std()
    return f"{int((found != expected).sum())} of {found.numel()} numbers, at most {float(largest):.2g} deviations"


def described(indices: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> str:
    """Which tokens and experts differ, and by how much."""
    tokens = (found != expected).any(dim=1).nonzero().flatten()
    shared = (indices[tokens].flatten().bincount() == len(tokens)).nonzero().flatten().tolist()
    return (
        f"experts gave other numbers to {len(tokens)} of {len(found)} tokens, {differing(found, expected)}; first "
        f"tokens {tokens[:4].tolist()}, their experts {indices[tokens[:4]].tolist()}, experts that all of them chose "
        f"{shared}"
    )


def replay(expected: Sequence[Pass], model: Any) -> str:
    """Offloaded experts on every pass's tokens, choices and weights in place: how many layers differ, the first."""
    wrong, count, example = 0, 0, ""
    for one in expected:
        for number, (layer, kept) in enumerate(zip(sparse_layers(model), one.layers, strict=True)):
            indices, wanted = kept.parts["choice"], kept.parts["experts"]
            found = layer.experts(kept.parts["normed"], indices, kept.weights)
            count += 1
            if not torch.equal(found, wanted):
                wrong += 1
                example = example or f": {one.name}, layer {number}: {described(indices, found, wanted)}"
    return f"{wrong} of {count} differ{example}"


def sparse_layers(model: Any) -> list[Any]:
    """The feed-forwards with experts, in order."""
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
