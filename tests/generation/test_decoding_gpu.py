"""Captured steps and the batcher on a CUDA device, in float32, against the plain loop."""

import copy

import pytest
import torch
from every_other import EveryOther

import phi35
from phi35.generation import captured_feed, captured_steps, step_pool
from phi35.generation.batcher import Batcher
from phi35.generation.captured_feed import CapturedFeed
from phi35.generation.captured_steps import CapturedSteps
from phi35.generation.decoding import Decoding, generate
from phi35.generation.speculation import SpeculativeSteps
from phi35.model import CausalLM

pytestmark = pytest.mark.gpu

LENGTHS = (5, 20, 31, 40)


def tiny(name: str, **changes: object) -> CausalLM:
    """A tiny model that crosses at 32 tokens."""
    return phi35.create(name, seed=0, initializer_range=0.15, original_max_position_embeddings=32, **changes)


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    """Left-padded random prompts."""
    ids = torch.randint(3, 1000, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_a_cuda_batch_gives_the_cpus_greedy_and_sampled_tokens(name: str) -> None:
    """float32, rows of 5, 20 and 40 tokens around an original length of 32, two of them crossing or beyond it."""
    model = tiny(name)
    ids = torch.randint(3, 1000, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) >= torch.tensor([[35], [20], [0]])
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}):
        expected = generate(model.cpu(), ids, mask, max_new_tokens=16, **options)
        found = generate(model.cuda(), ids.cuda(), mask.cuda(), max_new_tokens=16, **options)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe", "tiny-phi-3-mini-4k"])
def test_graphs_give_the_plain_loops_text(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crossings, a growing cache, a halved batch, sampling; a sparse batch in float32 has no graph, one row has."""
    monkeypatch.setattr(captured_steps, "FIRST_TOKENS", 4)
    monkeypatch.setattr(captured_steps, "WORTH_A_CAPTURE", 0)
    model = (
        tiny(name).cuda() if name != "tiny-phi-3-mini-4k" else phi35.create(name, seed=0, device="cuda", dtype="fp32")
    )
    batch = batch_of(*LENGTHS[-rows:])
    plain = Decoding(model, **batch, max_new_tokens=24, stop_token_ids=(), fast=False)
    while not plain.done:
        plain.step()
    stops = [plain.new_ids(row)[3 + 5 * row] for row in range(rows)]
    for options in ({}, {"stop_token_ids": stops}, {"temperature": 0.9, "top_k": 20, "seed": 4}):
        options = {"max_new_tokens": 24, "stop_token_ids": (), "return_logprobs": True, **options}
        ways = [Decoding(model, **batch, fast=fast, **options) for fast in (None, False)]
        for way in ways:
            while not way.done:
                way.step()
        assert isinstance(ways[0]._steps, CapturedSteps) or (rows > 1 and "moe" in name)
        for row in range(rows):
            assert ways[0].new_ids(row) == ways[1].new_ids(row)
            pairs = zip(ways[0].logprobs(row), ways[1].logprobs(row), strict=True)
            assert max(abs(a - b) for a, b in pairs) < 1e-4


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3-mini-4k"])
def test_drafts_through_graphs_give_the_plain_loops_text(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crossings, growing pages, a smaller batch, sampling and a penalty; drafts looked up, and of a noisy twin."""
    monkeypatch.setattr(captured_feed, "FIRST_TOKENS", 4)
    monkeypatch.setattr(captured_feed, "WORTH_A_CAPTURE", 0)
    changes = {"initializer_range": 0.06, "vocab_size": 40, "eos_token_id": 39, "pad_token_id": 39}
    if name != "tiny-phi-3-mini-4k":
        changes["original_max_position_embeddings"] = 64
    model = phi35.create(name, seed=0, stop_token_ids=(39,), device="cuda", dtype="fp32", **changes)
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += torch.randn_like(parameter) * 0.1 * parameter.std()
    lengths = (20, 50, 61, 70)[-rows:]
    batch = batch_of(*lengths)
    batch["input_ids"] %= 36
    plain = Decoding(model, **batch, max_new_tokens=100, stop_token_ids=(), fast=False)
    while not plain.done:
        plain.step()
    stops = [plain.new_ids(row)[3 + 20 * row] for row in range(rows - 1)]
    for options in ({}, {"stop_token_ids": stops}, {"temperature": 0.9, "seed": 4}, {"repetition_penalty": 1.3}):
        options = {"max_new_tokens": 100, "stop_token_ids": (), "return_logprobs": True, **options}
        expected = Decoding(model, **batch, fast=False, **options)
        ways = [
            Decoding(model, **batch, fast=True, **drafts, **options)
            for drafts in ({"speculation": "prompt_lookup"}, {"draft_model": twin})
        ]
        for way in (expected, *ways):
            while not way.done:
                way.step()
        for way in ways:
            assert isinstance(way._steps, SpeculativeSteps) and isinstance(way._steps.feed, CapturedFeed)
            for row in range(rows):
                assert way.new_ids(row) == expected.new_ids(row)
                pairs = zip(way.logprobs(row), expected.logprobs(row), strict=True)
                assert max(abs(a - b) for a, b in pairs) < 1e-4
        if not options["stop_token_ids"]:  # a text that ends at once may take no draft
            assert ways[1].speculation.accepted > 0
    step_pool.drop(model)


def test_the_first_token_does_not_wait_for_the_capture() -> None:
    """The step is captured for the second token, and a sparse batch in float32, which cannot be, goes on without."""
    model, batch = tiny("tiny-phi-3.5-mini").cuda(), batch_of(12, 20)
    decoding = Decoding(model, **batch, max_new_tokens=6, stop_token_ids=())
    decoding.step()
    assert isinstance(decoding._steps, CapturedSteps) and not decoding._steps.step.is_captured
    decoding.step()
    assert decoding._steps.step.is_captured
    while not decoding.done:
        decoding.step()
    assert torch.equal(decoding.output(), generate(model, **batch, max_new_tokens=6, stop_token_ids=(), fast=False))
    kept = model.__dict__[step_pool.ATTRIBUTE].step
    again = Decoding(model, **batch, max_new_tokens=6, stop_token_ids=())
    again.step()
    assert again._steps.step is kept and kept.is_captured
    sparse = tiny("tiny-phi-3.5-moe").cuda()
    found = Decoding(sparse, **batch, max_new_tokens=6, stop_token_ids=())
    while not found.done:
        found.step()
    assert isinstance(found._steps, CapturedSteps) and not found._steps.step.is_captured
    assert torch.equal(found.output(), generate(sparse, **batch, max_new_tokens=6, stop_token_ids=(), fast=False))
    with pytest.raises(ValueError, match="fast=True, but"):
        Decoding(sparse, **batch, max_new_tokens=6, fast=True).step()
    step_pool.drop(model)
    step_pool.drop(sparse)


def test_a_kept_step_serves_the_next_call() -> None:
    model = tiny("tiny-phi-3.5-mini").cuda()
    batch = batch_of(12)
    first = generate(model, **batch, max_new_tokens=8)
    step = model.__dict__[step_pool.ATTRIBUTE].step
    second = generate(model, **batch, max_new_tokens=8)
    assert torch.equal(first, second)
    assert model.__dict__[step_pool.ATTRIBUTE].step is step
    other = generate(model, **batch_of(30), max_new_tokens=8)
    assert torch.equal(other, generate(model, **batch_of(30), max_new_tokens=8, fast=False))
    with torch.no_grad():
        model.lm_head.weight.neg_()  # in place: the graph reads the new values
    assert torch.equal(
        generate(model, **batch, max_new_tokens=8), generate(model, **batch, max_new_tokens=8, fast=False)
    )
    step_pool.drop(model)
    assert step_pool.ATTRIBUTE not in model.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_requests_get_their_own_text(dtype: torch.dtype) -> None:
    """Graphs over pages; in bfloat16, where rounding tells the ways apart, greedy tokens are near the best.

    Half a standard deviation of the logits is about four times what rounding does to them (6 % of their norm).
    """
    model = tiny("tiny-phi-3.5-mini").to("cuda", dtype)
    batcher = Batcher(model, max_rows=4, max_tokens=1024, chunk_size=32)
    assert batcher.mode == "graphs"
    lengths, count = (5, 28, 40, 70, 12, 90), 24
    prompts = [batch_of(length)["input_ids"] for length in lengths]
    exact = dtype == torch.float32
    options = [{"temperature": 0.9, "seed": n} if n % 2 and exact else {} for n in range(len(lengths))]
    for ids, one in zip(prompts, options, strict=True):
        batcher.submit(ids, max_new_tokens=count, stop_token_ids=(), **one)
    found: dict[int, list[int]] = {}
    for emitted in batcher.run():
        found.setdefault(emitted.request, []).append(emitted.token_id)
    for number, (ids, one) in enumerate(zip(prompts, options, strict=True)):
        if exact:
            out = generate(model, ids, max_new_tokens=count, stop_token_ids=(), fast=False, **one)
            assert found[number] == out[0, ids.shape[1] :].tolist()
            continue
        for step in range(count):
            text = torch.cat((ids, torch.tensor([found[number][:step]], dtype=torch.int64)), dim=1)
            with torch.no_grad():
                logits = model(text.cuda(), logits_to_keep=1).logits[0, -1].float()
            assert logits[found[number][step]] > logits.max() - 0.5 * logits.std()
    assert batcher.cache.num_free == batcher.cache.num_pages


def test_constrained_requests_choose_alike_from_graphs_and_on_the_host() -> None:
    """Masks of captured steps, with alternatives, beside the plain batcher: greedy and sampled, among free requests."""
    model = tiny("tiny-phi-3.5-mini").to("cuda")
    found = []
    for mode in ("graphs", "plain"):
        batcher = Batcher(model, max_rows=4, max_tokens=1024, chunk_size=32, mode=mode)
        for number, length in enumerate((5, 28, 40, 90)):
            batcher.submit(
                batch_of(length)["input_ids"],
                constraint=EveryOther(model.config.vocab_size) if number % 2 else None,
                num_alternatives=3 * (number % 2),
                max_new_tokens=24,
                stop_token_ids=(),
                temperature=0.8 if number == 3 else 0.0,
                seed=number,
            )
        tokens: dict[int, list[int]] = {}
        others: dict[int, list[int]] = {}
        for emitted in batcher.run():
            tokens.setdefault(emitted.request, []).append(emitted.token_id)
            others.setdefault(emitted.request, []).extend(token for token, _ in emitted.alternatives)
        found.append((tokens, others))
    assert found[0] == found[1]
    assert [token % 2 for token in found[0][0][1]] == [0, 1] * 12
