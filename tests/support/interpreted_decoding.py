"""Runs the decoding kernels on the CPU in Triton's interpreter and prints their errors as JSON.

A process of its own: TRITON_INTERPRET must stand before Triton is imported, and stays.
"""

import json
import os
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"

import torch
from every_other import EveryOther

import phi35
from moe.kernels import decode_step
from moe.layer import SparseMoE
from phi35 import presets
from phi35.generation.batcher import Batcher
from phi35.generation.captured_feed import CapturedFeed
from phi35.generation.constraints import as_mask
from phi35.generation.decoding import Decoding
from phi35.generation.fast_step import DecodeStep
from phi35.generation.sampling import Draws, SamplingOptions, next_tokens, row_generators
from phi35.generation.speculation import SpeculativeSteps
from phi35.kernels import attention, batched, reference, sampling, vector
from phi35.kernels.attention import AttentionScratch
from phi35.kernels.configs import AttentionConfig, VectorConfig
from phi35.kernels.operands import LayerCache, Norm, Rope, StepState
from phi35.kernels.operations import BatchOperations, VectorOperations
from phi35.kernels.tuning import StepTuning


def batcher_case(kind: str | None = None) -> dict[str, float]:
    """Four requests over two rows of a paged cache, kernels and device choice included: wrong tokens.

    One is constrained: to even ids, and told apart by its alternatives.
    """
    model = phi35.create("tiny-phi-3.5-mini", seed=0, initializer_range=0.15, **FEW_TOKENS)
    requests = [(63, {}), (5, {"temperature": 0.9, "top_p": 0.9, "seed": 3}), (9, {"repetition_penalty": 1.5})]
    batcher = Batcher(model, max_rows=2, max_tokens=512, mode="kernels", kv_cache_dtype=kind)
    found, wrong = {}, 0
    options_alone = {"max_new_tokens": 2, "stop_token_ids": (), "fast": False, "kv_cache_dtype": kind}
    prompts = [
        torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)) for length, _ in requests
    ]
    for ids, (_, options) in zip(prompts, requests, strict=True):
        batcher.submit(ids, max_new_tokens=2, stop_token_ids=(), **options)
    error = 0.0
    constrained = batcher.submit(
        prompts[0], max_new_tokens=2, stop_token_ids=(), constraint=EveryOther(100), num_alternatives=3
    )
    for one in batcher.run():
        found.setdefault(one.request, []).append(one)
    for number, (ids, (_, options)) in enumerate(zip(prompts, requests, strict=True)):
        alone = Decoding(model, ids[None], return_logprobs=True, **options_alone, **options)
        while not alone.done:
            alone.step()
        wrong += [one.token_id for one in found[number]] != alone.new_ids(0)
        error = max([error, *(abs(one.logprob - b) for one, b in zip(found[number], alone.logprobs(0), strict=True))])
    plain = Batcher(model, max_rows=2, max_tokens=512, mode="plain", kv_cache_dtype=kind)
    plain.submit(prompts[0], max_new_tokens=2, stop_token_ids=(), constraint=EveryOther(100), num_alternatives=3)
    for mine, theirs in zip(found[constrained], plain.run(), strict=True):
        wrong += mine.token_id != theirs.token_id
        wrong += [token for token, _ in mine.alternatives] != [token for token, _ in theirs.alternatives]
        error = max(error, *(abs(a - b) for (_, a), (_, b) in zip(mine.alternatives, theirs.alternatives, strict=True)))
    return {"wrong": float(wrong), "logits": error}


FEW_TOKENS = {"vocab_size": 100, "eos_token_id": 99, "pad_token_id": 99, "stop_token_ids": (99,)}
"""A small head, which the interpreter walks through row by row."""
NARROW = StepTuning(
    *[VectorConfig(8, 1)] * 7,
    one=AttentionConfig(block=16, num_warps=1),
    grouped=AttentionConfig(block=16, num_warps=1),
)
SAMPLING: dict[str, dict[str, float]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.5},
    "temperature": {"temperature": 0.8},
    "tiny_temperature": {"temperature": 1e-30},
    "top_k": {"temperature": 1.3, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "all": {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.02, "repetition_penalty": 1.2},
}


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """||value - expected|| / ||expected||."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def draw(seed: int, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    """A drawing function of normal tensors."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, scale=1.0: (torch.randn(*shape, generator=generator) * scale).to(dtype)


def norm_of(kind: str, new, width: int) -> Norm:  # type: ignore[no-untyped-def]
    """A norm with weights of its own."""
    return Norm(kind, 1 + new(width, scale=0.1), new(width, scale=0.1), 1e-5)


def products(kind: str, width: int, ffn: int, rows: int, dtype: torch.dtype) -> dict[str, float]:
    """The vector kernels beside their plain forms."""
    new = draw(1, dtype)
    config = VectorConfig(rows=rows, num_warps=1)
    norm, hidden, bias = norm_of(kind, new, width), new(1, width), kind == "layernorm"
    errors = {}
    weight = new(2 * ffn, width, scale=0.2)
    acted, expected = torch.empty(1, ffn, dtype=dtype), torch.empty(1, ffn, dtype=dtype)
    vector.project_gate_up(hidden, norm, weight, acted, "silu", config, False)
    reference.project_gate_up(hidden, norm, weight, expected, "silu")
    errors["gate_up"] = relative(acted, expected)
    vector.project_gate_up(hidden, norm, weight, acted, "gelu", config, False)
    reference.project_gate_up(hidden, norm, weight, expected, "gelu")
    errors["gelu"] = relative(acted, expected)
    down, added = new(width, ffn, scale=0.2), new(width) if bias else None
    mine, plain = hidden.clone(), hidden.clone()
    vector.project_add(acted, down, added, mine, config, False)
    reference.project_add(acted, down, added, plain)
    errors["down"] = relative(mine, plain)
    head, head_bias = new(37, width, scale=0.2), new(37) if bias else None
    logits, plain_logits = torch.empty(1, 37), torch.empty(1, 37)
    vector.project_logits(hidden, norm, head, head_bias, logits, config, False)
    reference.project_logits(hidden, norm, head, head_bias, plain_logits)
    errors["logits"] = relative(logits, plain_logits)
    return errors


def cache_of(new, rows: int, kv: int, slots: int, head_dim: int, page: int) -> tuple[LayerCache, LayerCache]:  # type: ignore[no-untyped-def]
    """A cache, in shuffled pages where ``page`` is not 0, and one of the same contents whose rows lie whole."""
    plain = LayerCache(new(rows, kv, slots, head_dim), new(rows, kv, slots, head_dim))
    if not page:
        return LayerCache(plain.keys.clone(), plain.values.clone()), plain
    table = torch.randperm(rows * slots // page + 1, generator=torch.Generator().manual_seed(9))[1:].int()
    shape = (len(table) + 1, kv, page, head_dim)
    paged = LayerCache(new(*shape), new(*shape), table.view(rows, slots // page))
    for row in range(rows):
        places = torch.full((slots,), row), torch.arange(slots)
        paged.store(*places, plain.keys[row].transpose(0, 1), plain.values[row].transpose(0, 1))
    return paged, plain


def cache_errors(mine: LayerCache, plain: LayerCache) -> dict[str, float]:
    """Errors of the keys and the values."""
    found = mine.read(slice(None), plain.num_slots)
    return {
        name: relative(a, b) for name, a, b in zip(("keys", "values"), found, (plain.keys, plain.values), strict=True)
    }


def row_of(cache: LayerCache, row: int) -> LayerCache:
    """One row of a cache."""
    one = slice(row, row + 1)
    if cache.table is None:
        scales = [None if tensor is None else tensor[one] for tensor in (cache.key_scales, cache.value_scales)]
        return LayerCache(cache.keys[one], cache.values[one], None, *scales, cache.kind, cache.number_dtype)
    scales = (cache.key_scales, cache.value_scales, cache.kind, cache.number_dtype)
    return LayerCache(cache.keys, cache.values, cache.table[one], *scales)


def attention_case(
    kv: int, group: int, head_dim: int, splits: int, window: int | None, dtype: torch.dtype, page: int = 0
) -> dict[str, float]:
    """Norm, projection, rotation, cache store and attention for rows of several lengths, the last beyond the cache."""
    new, width = draw(2, dtype), 48
    lengths, long = torch.tensor([0, 7, 33, 47, 60]), torch.tensor([False, True, False, True, False])
    batch, num_heads = len(lengths), kv * group
    cache, plain = cache_of(new, batch, kv, 48, head_dim, page)
    inv_freq = torch.rand(2, head_dim // 2, generator=torch.Generator().manual_seed(3))
    rope, norm = Rope(inv_freq, torch.tensor([1.0, 1.2])), norm_of("layernorm", new, width)
    hidden, weight = new(batch, width), new((num_heads + 2 * kv) * head_dim, width, scale=0.2)
    bias = new(weight.shape[0])
    queries, expected = new(batch, num_heads * head_dim), new(batch, num_heads * head_dim)
    for row in range(batch):
        one = slice(row, row + 1)
        ours = (lengths[one], long[one], queries[one], row_of(cache, row))
        vector.project_qkv(hidden[one], norm, weight, bias, rope, *ours, VectorConfig(4, 1), False)
    reference.project_qkv(hidden, norm, weight, bias, rope, lengths, long, expected, plain)
    errors = {"query": relative(queries, expected)} | cache_errors(cache, plain)
    outs = [torch.full((batch, num_heads * head_dim), float("nan"), dtype=dtype) for _ in range(2)]
    scratch = AttentionScratch(batch, kv, group, head_dim, splits, hidden.device)
    config = AttentionConfig(splits=splits, block=16, num_warps=1)
    attention.attend(queries, cache, lengths, outs[0], scratch, window, config, False)
    reference.attend(queries, plain, lengths, outs[1], window)
    errors["attention"] = relative(*outs)
    errors["arrived"] = float(scratch.arrived.abs().sum())
    return errors


def shared_keys_case(group: int, tokens: int, splits: int, window: int | None, page: int) -> dict[str, float]:
    """Tokens side by side over one row's keys, of three rows, beside each token over its own copy of the row."""
    new, kv, head_dim = draw(7), 2, 24
    shared, _ = cache_of(new, 3, kv, 48, head_dim, page)
    lengths = torch.tensor([0, 20, 44])[:, None] + torch.arange(tokens).clamp(max=2)
    assert shared.table is not None
    table = shared.table.repeat_interleave(tokens, dim=0)
    repeated = replace(shared, table=table, repeats=tokens)
    query = new(3 * tokens, kv * group * head_dim)
    outs = [torch.full_like(query, float("nan")) for _ in range(2)]
    scratch = AttentionScratch(3, kv, group * tokens, head_dim, splits, query.device)
    config = AttentionConfig(splits=splits, block=16, num_warps=1)
    attention.attend(query, repeated, lengths.flatten(), outs[0], scratch, window, config, False)
    reference.attend(query, replace(shared, table=table), lengths.flatten(), outs[1], window)
    return {"attention": relative(*outs), "arrived": float(scratch.arrived.abs().sum())}


def prompt_case(kv: int, group: int, head_dim: int, page: int = 0) -> dict[str, float]:
    """Rotation and cache store of packed prompts, two rows under different factors, one begun before."""
    new, heads = draw(6), kv * group
    places = torch.tensor([2] * 5 + [0] * 7, dtype=torch.int32)
    positions = torch.cat([torch.arange(14, 19), torch.arange(7)]).int()
    use_long = (places == 2).int()
    rope = Rope(torch.rand(2, head_dim // 2, generator=torch.Generator().manual_seed(3)), torch.tensor([1.0, 1.2]))
    cache, plain = cache_of(new, 3, kv, 32, head_dim, page)
    mine = new(12, (heads + 2 * kv) * head_dim)
    expected = mine.clone()
    batched.rotate_prompt(mine, rope, positions, places, use_long, cache, heads)
    reference.rotate_prompt(expected, rope, positions, places, use_long, plain, heads)
    return {"projected": relative(mine, expected)} | cache_errors(cache, plain)


def sampling_case(changes: dict[str, float], rounded: bool, masked: bool = False) -> dict[str, float]:
    """Wrong tokens, and the largest error of a log-probability, of three steps beside the host's sampling.

    ``masked`` allows every row but the first a third of the tokens.
    """
    options, batch, vocab, steps = SamplingOptions(**changes), 4, 90, 3
    generator = torch.Generator().manual_seed(4)
    state = StepState.new(batch, vocab, torch.device("cpu"), ring=2, draws=2)
    values = {"temperature": options.temperature, "penalty": options.repetition_penalty, "top_k": options.top_k}
    values |= {"top_p": options.top_p, "min_p": options.min_p}
    for name, value in values.items():
        if value is not None:
            getattr(state, name).fill_(value)
    seen = [set(torch.randint(0, vocab, (20,), generator=generator).tolist()) for _ in range(batch)]
    for row, ids in enumerate(seen):
        state.seen[row, list(ids)] = 1
    allowed = torch.rand(batch, vocab, generator=generator) < (0.33 if masked else 1)
    allowed[0] = True
    state.allowed.copy_(as_mask(allowed))
    state.masked[1:] = int(masked)
    ours, theirs = row_generators(7, batch), row_generators(7, batch)
    wrong, error = 0, 0.0
    for step in range(steps):
        logits = torch.randn(batch, vocab, generator=generator) * 3
        logits = logits.round() if rounded else logits
        state.draws[step % 2] = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in ours])
        expected = next_tokens(logits.masked_fill(~allowed, float("-inf")), options, seen, theirs)
        sampling.choose(logits, state, False)
        wrong += sum(a != b for a, b in zip(state.history[step % 2].tolist(), expected, strict=True))
        chances = logits.log_softmax(dim=-1)[range(batch), expected]
        error = max(error, float((state.logprobs[step % 2] - chances).abs().max()))
        for ids, token in zip(seen, expected, strict=True):
            ids.add(token)
        wrong += int((state.tokens != torch.tensor(expected)).sum())
        wrong += sum(set(state.seen[row].nonzero().flatten().tolist()) != ids for row, ids in enumerate(seen))
    wrong += state.lengths.tolist() != [steps] * batch
    return {"wrong": wrong, "logprobs": error}


def sparse_case(kind: str, biased: bool, norm_kind: str) -> dict[str, float]:
    """The sparse feed-forward of one token beside the layer's own router and the loop over experts."""
    top_k, experts, width, ffn = (2, 6, 96, 72) if kind == "sparsemixer" else (3, 5, 64, 40)
    new = draw(5)
    config = presets.get("tiny-phi-3.5-moe").replace(
        hidden_size=width,
        intermediate_size=ffn,
        head_dim=16,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        router_type=kind,
        router_jitter_noise=0.2,
        norm_topk_prob=kind != "topk" or not biased,
        experts_backend="loop",
    )
    mlp = SparseMoE(config).eval()
    for parameter in mlp.parameters():
        parameter.data.copy_(new(*parameter.shape, scale=0.3))
    if biased:
        mlp.router.selection_bias = new(experts, scale=0.3)
    norm, hidden, scratches = norm_of(norm_kind, new, width), new(1, width), {}
    token = reference.normed(hidden, norm)
    with torch.no_grad():
        mixed, routing = mlp(token[:, None])
        expected = hidden + mixed[:, 0]
        decode_step.add_sparse_feed_forward(mlp, hidden, norm, scratches, NARROW, False)
    (scratch,) = scratches.values()
    return {
        "indices": float(scratch.indices.tolist() != routing.expert_indices[0].tolist()),
        "weights": relative(scratch.weights, routing.expert_weights[0]),
        "hidden": relative(hidden, expected),
        "arrived": float(scratch.arrived.abs().sum()),
    }


@torch.no_grad()
def step_case(name: str, batch: int, kind: str | None = None, **changes: object) -> dict[str, float]:
    """Two whole steps beside the plain path: logits, tokens, and what the second step reads of the first."""
    model = phi35.create(
        name, seed=0, initializer_range=0.15, original_max_position_embeddings=32, **FEW_TOKENS, **changes
    )
    ids = torch.randint(3, 90, (batch, 40), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([40, 12, 31][:batch])
    inputs = {"attention_mask": torch.arange(40) >= 40 - lengths[:, None], "rope_lengths": lengths + 2}
    caches = [model.new_cache(batch, 64, kind) for _ in range(2)]
    tokens = [model(ids, past_key_values=cache, **inputs).logits[:, -1].argmax(dim=-1) for cache in caches][0]
    step = DecodeStep(model, caches[0], tuning=NARROW, plain=True)
    make = (model.config.hidden_act, model.config.sliding_window, caches[0].layer(0), model.config.num_attention_heads)
    step.operations = VectorOperations(*make, NARROW, False) if batch == 1 else BatchOperations(*make, NARROW)
    step.state.tokens.copy_(tokens)
    worst, wrong = 0.0, 0
    for turn in range(2):
        expected = model(tokens[:, None], past_key_values=caches[1]).logits[:, -1]
        step.run()
        worst = max(worst, relative(step.logits, expected))
        tokens = expected.argmax(dim=-1)
        wrong += int((tokens != step.state.tokens).sum()) + (step.state.history[turn].tolist() != tokens.tolist())
    return {"logits": worst, "wrong": float(wrong)}


def drafts_case() -> dict[str, float]:
    """Two rows with drafts through the steps over pages, kernels and device choice included, no graph.

    One row's drafts are right, the other's wrong.
    """
    changes = {"num_hidden_layers": 1, "initializer_range": 0.06}
    model = phi35.create("tiny-phi-3.5-mini", seed=0, **FEW_TOKENS, **changes)
    ids = torch.tensor([[7, 8, 9, 7, 8], [3, 4, 5, 6, 5]])
    options = {"max_new_tokens": 3, "stop_token_ids": (), "return_logprobs": True}
    options |= {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.5}
    ways = [
        Decoding(model, ids, speculation="prompt_lookup", num_draft_tokens=1, **options),
        Decoding(model, ids, fast=False, **options),
    ]
    steps = SpeculativeSteps(model, ways[0].options, ways[0]._active, [None, None], plain="forward")
    draws = [Draws(row.generator) for row in ways[0].rows]
    steps.feed = CapturedFeed(model, ways[0].options, ways[0].rows, draws, 2)
    ways[0]._steps = steps
    error, wrong = 0.0, 0
    for way in reversed(ways):
        text = ways[1].new_ids(0)
        steps._drafter.propose = lambda counts, t=text: [t[1:2] if n else [] for n in counts]  # type: ignore[method-assign]
        while not way.done:
            way.step()
    for row in range(2):
        wrong += ways[0].new_ids(row) != ways[1].new_ids(row)
        pairs = zip(ways[0].logprobs(row), ways[1].logprobs(row), strict=True)
        error = max([error, *(abs(a - b) for a, b in pairs)])
    return {"wrong": float(wrong), "logits": error, "taken": float(steps.statistics.accepted)}


if __name__ == "__main__":
    DecodeStep.capture = lambda step: None  # type: ignore[method-assign]  # the interpreter has no graphs
    torch.set_num_threads(1)
    half, single = torch.float16, torch.float32
    report = {
        "rmsnorm": products("rmsnorm", 96, 72, 4, single),
        "layernorm": products("layernorm", 200, 40, 2, single),
        "half": products("rmsnorm", 64, 32, 4, half),
        "one": attention_case(2, 1, 24, 3, None, single),
        "one_whole": attention_case(2, 1, 16, 1, 9, single),
        "grouped": attention_case(2, 4, 16, 4, None, single),
        "grouped_window": attention_case(1, 3, 24, 2, 20, single),
        "one_paged": attention_case(2, 1, 24, 3, None, single, page=16),
        "grouped_paged": attention_case(1, 2, 16, 2, 20, single, page=16),
        "grouped_half": attention_case(2, 2, 16, 2, None, half),
        "shared_keys": shared_keys_case(1, 5, 3, None, 16),
        "shared_keys_grouped": shared_keys_case(3, 4, 1, None, 16),
        "shared_keys_window": shared_keys_case(2, 3, 2, 20, 16),
        "prompt": prompt_case(2, 1, 24),
        "prompt_grouped": prompt_case(2, 3, 16),
        "prompt_paged": prompt_case(2, 2, 16, page=16),
        "sparsemixer": sparse_case("sparsemixer", False, "layernorm"),
        "sparsemixer_biased": sparse_case("sparsemixer", True, "rmsnorm"),
        "topk": sparse_case("topk", False, "layernorm"),
        "topk_biased": sparse_case("topk", True, "layernorm"),
        "step": step_case("tiny-phi-3.5-mini", 1),
        "sparse_step": step_case(
            "tiny-phi-3.5-moe", 1, shared_expert_intermediate_size=32, decoder_sparse_step=2, dense_intermediate_size=48
        ),
        "batched_step": step_case("tiny-phi-3.5-mini", 3),
        "batcher": batcher_case(),
        "drafts": drafts_case(),
    }
    report |= {f"choose {name}": sampling_case(changes, name in ("all", "top_p")) for name, changes in SAMPLING.items()}
    report |= {
        "choose masked": sampling_case({}, False, True),
        "choose masked all": sampling_case(SAMPLING["all"], True, True),
    }
    json.dump(report, sys.stdout, indent=1)
