"""Experts in host memory beside a CUDA device: copies on a stream of their own, the same numbers as in place."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import phi35
from phi35.generation.batcher import Batcher
from phi35.generation.captured_steps import CapturedSteps
from phi35.generation.decoding import Decoding
from phi35.presets import get

pytestmark = pytest.mark.gpu

CONFIG = get("tiny-phi-3.5-moe").replace(
    initializer_range=0.1,
    num_local_experts=8,
    num_hidden_layers=6,
    hidden_size=512,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=1024,
)


@pytest.fixture(autouse=True)
def attention_that_repeats() -> Iterator[None]:
    """torch's attention of one token by cuDNN rounds otherwise from run to run (docs/inference.md)."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        yield


def budget(places: int) -> int:
    return places * CONFIG.num_hidden_layers * 3 * CONFIG.hidden_size * CONFIG.intermediate_size * 2


@pytest.mark.parametrize("places", [2, 3, 5])
@torch.no_grad()
def test_logits_are_the_same_and_weights_lie_in_locked_memory(places: int) -> None:
    """Prompts in rounds, steps and small batches, again and again: a race would show as another number."""
    plain = phi35.create(CONFIG, device="cuda", dtype="bfloat16", seed=0)
    model = phi35.create(CONFIG, device="cuda", dtype="bfloat16", seed=0, expert_memory=budget(places))
    experts = model.model.layers[2].mlp.experts
    assert experts.gate_up_proj.device.type == "cpu" and experts.gate_up_proj.is_pinned()
    assert experts._pool[0].gate_up_proj.shape[0] == places and experts._pool[0].gate_up_proj.is_cuda
    state, expected = model.state_dict(), plain.state_dict()
    assert all(torch.equal(state[name].cuda(), expected[name]) for name in state)
    for turn in range(4):
        ids = torch.randint(3, 1000, (1, 600), device="cuda", generator=torch.Generator("cuda").manual_seed(turn))
        caches = [one.new_cache(1) for one in (plain, model)]
        for start, stop in ((0, 580), *((step, step + 1) for step in range(580, 600))):
            both = [
                one(ids[:, start:stop], past_key_values=cache, logits_to_keep=1).logits
                for one, cache in zip((plain, model), caches, strict=True)
            ]
            assert torch.equal(*both)
    assert experts.statistics.guessed > 0
    del model, experts, state
    gc.collect()


@pytest.mark.parametrize("quantization", [None, "int4"])
@torch.no_grad()
def test_many_tokens_in_rounds_are_added_as_in_place(quantization: str | None) -> None:
    """With weights unlike one: a product fused with the sum differs from one apart in 20 of a million numbers."""
    config = CONFIG.replace(num_hidden_layers=2)
    few = {} if quantization is None else {"quantization": quantization}
    plain = phi35.create(config, device="cuda", dtype="bfloat16", seed=0, **few)
    held = sum(tensor[0].nbytes for tensor in plain.model.layers[0].mlp.experts.state_dict().values())
    model = phi35.create(config, device="cuda", dtype="bfloat16", seed=0, expert_memory=3 * 2 * held, **few)
    model.load_state_dict(plain.state_dict())  # codes are drawn expert by expert
    generator = torch.Generator("cuda").manual_seed(0)
    for layer, other in zip(plain.model.layers, model.model.layers, strict=True):
        assert other.mlp.experts.num_places == 3
        for tokens in (65, 500, 2000):
            inputs = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16, generator=generator)
            chosen = torch.rand(tokens, 8, device="cuda", generator=generator).topk(2, dim=1).indices
            weights = torch.rand(tokens, 2, device="cuda", generator=generator)
            expected, found = (one(inputs, chosen, weights) for one in (layer.mlp.experts, other.mlp.experts))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("places", [2, 3])
@torch.no_grad()
def test_copies_that_take_longer_than_the_computation(places: int) -> None:
    """Experts of 50 MB, a millisecond each on the bus, beside shorter steps: places change hands all the time.

    Every step guesses the next layer's experts, most of them wrongly, so that a place is overwritten while an older
    copy to it is still under way; in the end the places hold what the host holds.
    """
    sizes = {"hidden_size": 2048, "num_attention_heads": 128, "intermediate_size": 4096}
    config = CONFIG.replace(num_hidden_layers=3, initializer_range=0.02, **sizes)
    plain = phi35.create(config, device="cuda", dtype="bfloat16", seed=0)
    one = sum(tensor[0].nbytes for tensor in plain.model.layers[0].mlp.experts.parameters())
    model = phi35.create(config, device="cuda", dtype="bfloat16", seed=0, expert_memory=places * 3 * one)
    generator = torch.Generator("cuda").manual_seed(0)
    both = [[layer.mlp.experts for layer in whole.model.layers] for whole in (plain, model)]
    for turn in range(60):
        tokens = 1 if turn % 10 else 100
        found = []
        for expected, experts in zip(*both, strict=True):
            inputs = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16, generator=generator)
            chosen = torch.rand(tokens, 8, device="cuda", generator=generator).topk(2, dim=1).indices
            weights = torch.rand(tokens, 2, device="cuda", generator=generator)
            found.append((experts(inputs, chosen, weights), expected(inputs, chosen, weights)))
        assert all(torch.equal(*pair) for pair in found), turn
    assert both[1][0].statistics.guessed > 60
    torch.cuda.synchronize()
    for experts in both[1]:
        for place, expert in enumerate(experts._expert_in):
            assert torch.equal(experts._pool[0].down_proj[place].cpu(), experts.down_proj[expert])
            assert torch.equal(experts._pool[0].gate_up_proj[place].cpu(), experts.gate_up_proj[expert])


@pytest.mark.parametrize("rows", [5, 40])
@torch.no_grad()
def test_small_batches_whose_experts_do_not_fit_at_once(rows: int) -> None:
    """Groups of tokens; tiles of another height may add in another order, and bfloat16 rounds what is then stored."""
    plain = phi35.create(CONFIG, device="cuda", dtype="bfloat16", seed=0).model.layers[1].mlp.experts
    model = phi35.create(CONFIG, device="cuda", dtype="bfloat16", seed=0, expert_memory=budget(3))
    experts = model.model.layers[1].mlp.experts
    tokens = torch.randn(rows, CONFIG.hidden_size, device="cuda", dtype=torch.bfloat16)
    chosen = torch.rand(rows, 8, device="cuda").topk(2, dim=1).indices
    weights = torch.rand(rows, 2, device="cuda")
    found, expected = (one(tokens, chosen, weights).float() for one in (experts, plain))
    assert (found - expected).norm() < 2**-8 * expected.norm()


def test_kernels_without_a_graph_and_the_batcher_serve_it() -> None:
    plain = phi35.create(CONFIG, device="cuda", dtype="bfloat16", seed=0)
    model = phi35.create(CONFIG, device="cuda", dtype="bfloat16", seed=0, expert_memory=budget(3))
    ids = torch.randint(3, 1000, (1, 40), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 12, "stop_token_ids": (), "return_logprobs": True}
    decodings = [Decoding(one, ids, **options) for one in (plain, model)]
    for decoding in decodings:
        while not decoding.done:
            decoding.step()
    steps = decodings[1]._steps
    assert isinstance(steps, CapturedSteps) and steps.step._graph is None
    # Other kernels than the graph's: bfloat16's rounding. The first token comes from the same prompt pass.
    assert decodings[0].new_ids(0)[0] == decodings[1].new_ids(0)[0]
    assert abs(decodings[0].logprobs(0)[0] - decodings[1].logprobs(0)[0]) < 5e-2
    batcher = Batcher(model, max_rows=2, max_tokens=512)
    assert batcher.mode == "kernels"
    batcher.submit(ids[0], max_new_tokens=12, stop_token_ids=())
    assert len([emitted for emitted in batcher.run()]) == 12
