"""Experts in host memory give what experts in place give, to the bit, however few have a place on the device."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import phi35
from moe.offloaded_experts import ExpertStatistics, OffloadedExperts
from phi35.config import ModelConfig
from phi35.generation.batcher import Batcher
from phi35.generation.captured_steps import CapturedSteps
from phi35.generation.decoding import Decoding
from phi35.model import CausalLM
from phi35.presets import get
from phi35.quantization.config import QuantizationConfig, WeightFormat

NUM_EXPERTS, NUM_LAYERS = 8, 3
INT4 = QuantizationConfig(linear=WeightFormat(group_size=32))


def config(**changes: object) -> ModelConfig:
    shape = {"num_local_experts": NUM_EXPERTS, "num_hidden_layers": NUM_LAYERS, "original_max_position_embeddings": 32}
    return get("tiny-phi-3.5-moe").replace(initializer_range=0.15, **shape, **changes)


@functools.cache
def in_place(**changes: object) -> CausalLM:
    return phi35.create(config(**changes), seed=0)


def expert_bytes(model: CausalLM) -> int:
    experts = model.model.layers[0].mlp.experts
    return sum(tensor[0].nbytes for tensor in experts.state_dict().values())


def offloaded(places: float, **changes: object) -> CausalLM:
    """The same weights with so many places a layer."""
    plain = in_place(**changes)
    budget = int(places * NUM_LAYERS) * expert_bytes(plain)
    model = phi35.create(config(**changes), seed=0, expert_memory=budget)
    model.load_state_dict(plain.state_dict())
    return model


def containers(model: CausalLM) -> list[OffloadedExperts]:
    return [layer.mlp.experts for layer in model.model.layers]


def statistics(model: CausalLM) -> ExpertStatistics:
    return containers(model)[0].statistics


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 1000, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("places", [2, 3, 5, 8])
@pytest.mark.parametrize(
    "changes",
    [
        {"experts_backend": "loop"},
        {"experts_backend": "grouped_mm"},
        {"router_type": "topk", "num_experts_per_tok": 2},
        {"quantization": INT4},
    ],
    ids=lambda changes: next(iter(str(value)[:9] for value in changes.values())),
)
@torch.no_grad()
def test_logits_are_the_same_to_the_bit(changes: dict[str, object], places: int) -> None:
    """A prompt that wants all experts, then steps that want two, then a batch of steps."""
    plain, model = in_place(**changes), offloaded(places, **changes)
    assert [one.num_places for one in containers(model)] == [places] * NUM_LAYERS
    ids = random_ids(3, 20)
    caches = [one.new_cache(3) for one in (plain, model)]
    for start, stop in ((0, 12), *((step, step + 1) for step in range(12, 20))):
        expected, found = (
            one(ids[:, start:stop], past_key_values=cache).logits
            for one, cache in zip((plain, model), caches, strict=True)
        )
        assert torch.equal(found, expected)
    assert torch.equal(model(ids[:1]).logits, plain(ids[:1]).logits)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_kernels_give_the_same_bits_in_rounds_and_groups() -> None:
    """The kernels for few and for many tokens, in Triton's interpreter, with weights unlike one."""
    script = Path(__file__).parents[1] / "support" / "interpreted_offload.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout) == dict.fromkeys(("rounds", "four_choices", "few_tokens", "one_token"), 0)


@torch.no_grad()
def test_tokens_in_groups_get_what_experts_in_place_give() -> None:
    """What few tokens on a GPU take; on a CPU products of other numbers of rows are rounded otherwise (6.0e-8)."""
    experts, expected = containers(offloaded(3))[1], in_place().model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(30, 64, generator=generator)
    chosen = torch.rand(30, NUM_EXPERTS, generator=generator).topk(2, dim=1).indices
    weights = torch.rand(30, 2, generator=generator)
    found = experts._run_token_by_token(chosen.unique().tolist(), tokens, chosen, weights)
    wanted = expected(tokens, chosen, weights)
    assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_create_draws_the_same_weights_and_places_are_spread() -> None:
    plain = in_place()
    model = phi35.create(config(), seed=0, expert_memory=int(4.5 * NUM_LAYERS) * expert_bytes(plain))
    assert [one.num_places for one in containers(model)] == [5, 4, 4]
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    # A seed of its own: layers drawn without one are random, not all alike.
    fresh = phi35.create(config(), expert_memory="1GB")
    assert fresh.model.layers[0].mlp.experts.gate_up_proj.std() > 0.1


def test_few_bits_are_drawn_for_every_expert() -> None:
    model = phi35.create(config(quantization=INT4), seed=0, expert_memory="1GB")
    codes = model.model.layers[1].mlp.experts.gate_up_proj_packed
    assert len({tuple(expert.flatten()[:50].tolist()) for expert in codes}) == NUM_EXPERTS


@pytest.mark.parametrize("rope_mode", ["reference", "pinned"])
def test_every_way_of_decoding_gives_the_text_of_experts_in_place(rope_mode: str) -> None:
    """Rows that cross to the long factors; plain steps, the bookkeeping of captured ones without a graph, a batcher."""
    lengths = (3, 28, 33)
    mask = torch.arange(33) >= 33 - torch.tensor(lengths)[:, None]
    batch = {"input_ids": random_ids(3, 33), "attention_mask": mask}
    options = {"max_new_tokens": 10, "stop_token_ids": (), "rope_mode": rope_mode}
    expected = in_place().generate(**batch, **options)
    model = offloaded(3)
    assert torch.equal(model.generate(**batch, **options), expected)
    decoding = Decoding(model, **batch, **options)
    decoding._steps = CapturedSteps(model, decoding.options, decoding._active, plain=True, graph=False)
    while not decoding.done:
        decoding.step()
    assert torch.equal(decoding.output(), expected)
    batcher = Batcher(model, max_rows=2, max_tokens=512, chunk_size=16)
    for row, real in zip(batch["input_ids"], mask, strict=True):
        batcher.submit(row[real], **options)
    found: dict[int, list[int]] = {}
    for emitted in batcher.run():
        found.setdefault(emitted.request, []).append(emitted.token_id)
    assert [found[number] for number in range(3)] == expected[:, 33:].tolist()


@torch.no_grad()
def test_an_expert_that_has_a_place_is_not_copied_again() -> None:
    model = offloaded(NUM_EXPERTS)
    ids = random_ids(1, 60)
    model(ids)
    counts = statistics(model)
    assert counts.copied == sum(len(set(one._expert_in) - {-1}) for one in containers(model)) and counts.guessed == 0
    assert counts.num_bytes == counts.copied * expert_bytes(in_place())
    copied, used = counts.copied, counts.used
    model(ids)
    assert counts.copied == copied and counts.used == 2 * used


@torch.no_grad()
def test_the_place_used_longest_ago_is_taken() -> None:
    experts, tokens = containers(offloaded(3))[0], torch.randn(1, 64)
    expected = containers_in_place()[0]
    for pair, held in (
        ([0, 1], {0, 1}),
        ([2, 0], {0, 1, 2}),
        ([5, 0], {0, 2, 5}),
        ([5, 2], {0, 2, 5}),
        ([7, 1], {1, 2, 7}),
    ):
        indices, weights = torch.tensor([pair]), torch.tensor([[0.7, 0.2]])
        assert torch.equal(experts(tokens, indices, weights), expected(tokens, indices, weights))
        assert set(experts._expert_in) - {-1} == held


def containers_in_place() -> list[torch.nn.Module]:
    return [layer.mlp.experts for layer in in_place().model.layers]


@torch.no_grad()
def test_the_next_layers_experts_are_copied_ahead_where_its_router_would_choose_them() -> None:
    """With routers that choose alike for all layers' tokens, no expert past the first layer is copied when needed."""
    model = offloaded(4)
    weight = torch.randn(NUM_EXPERTS, 64)
    for layer in model.model.layers:
        layer.mlp.router.weight.copy_(weight)
        layer.self_attn.o_proj.weight.zero_()  # each layer's tokens are the embeddings, nearly
        layer.mlp.experts.down_proj.mul_(1e-4)
    cache = model.new_cache(1)
    for token in random_ids(1, 24)[0]:
        model(token[None, None], past_key_values=cache)
    counts = statistics(model)
    assert counts.guessed > 20
    assert counts.used == 24 * 2 * NUM_LAYERS
    # What the first layer lacks is copied when it is needed; nobody guesses for it.
    assert counts.copied < counts.used / NUM_LAYERS


def test_folders_load_into_host_memory_and_save_as_they_were(tmp_path: Path) -> None:
    plain = in_place()
    with pytest.warns(UserWarning, match="tokenizer"):
        phi35.save(plain, None, tmp_path / "plain")
        model, _ = phi35.load(tmp_path / "plain", device="cpu", expert_memory=9 * expert_bytes(plain))
    assert isinstance(containers(model)[0], OffloadedExperts)
    assert torch.equal(*(one.generate(random_ids(2, 9), max_new_tokens=12) for one in (model, plain)))
    phi35.save(model, None, tmp_path / "again")
    files = [folder / "model.safetensors" for folder in (tmp_path / "plain", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_dtypes_follow_and_copies_of_a_model_begin_empty() -> None:
    model = offloaded(3)
    model(random_ids(1, 5))
    half = model.to(torch.bfloat16)
    assert half.dtype == half.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    expected = phi35.create(config(), seed=0).to(torch.bfloat16)
    assert torch.equal(half(random_ids(1, 5)).logits, expected(random_ids(1, 5)).logits)


def test_new_weights_take_the_place_of_those_on_the_device() -> None:
    model, ids = offloaded(NUM_EXPERTS), random_ids(2, 9)
    old = model(ids).logits
    other = phi35.create(config(), seed=1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(ids).logits, other(ids).logits) and not torch.equal(model(ids).logits, old)


def test_what_cannot_be_had_is_refused() -> None:
    one = expert_bytes(in_place())
    with pytest.raises(ValueError, match=r"room for 5 experts, and each of 3 layers needs 2 .* at least"):
        phi35.create(config(), expert_memory=5 * one)
    with pytest.raises(ValueError, match="this one is dense"):
        phi35.create("tiny-phi-3.5-mini", expert_memory="1GB")
    with pytest.raises(ValueError, match="expert_memory 'lots' is not a size"):
        phi35.create(config(), expert_memory="lots")
    model = offloaded(3)
    with pytest.raises(ValueError, match="for inference"):
        model.train()(random_ids(1, 4))
    model.eval()
    with pytest.raises(ValueError, match="cannot be captured"):
        model.generate(random_ids(1, 4), fast=True)
