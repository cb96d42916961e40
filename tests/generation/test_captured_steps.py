"""The captured steps' bookkeeping, with torch's operations in place of graph and kernels, against the plain loop.

Queueing ahead, crossings in the middle of a batch, growing caches, halved batches, prompts in packed chunks.
"""

import copy
import functools
import pickle

import pytest
import torch

import phi35
from phi35.generation import captured_steps, step_pool
from phi35.generation.captured_steps import CapturedSteps
from phi35.generation.decoding import Decoding, generate
from phi35.generation.fast_prefill import segments
from phi35.generation.fast_step import DecodeStep, limit, model_limit
from phi35.model import CausalLM


@functools.cache
def tiny(name: str = "tiny-phi-3.5-mini", **changes: object) -> CausalLM:
    """A tiny model with peaked logits that crosses at 32 tokens."""
    if name != "tiny-phi-3-mini-4k":
        changes = {"original_max_position_embeddings": 32, **changes}
    return phi35.create(name, seed=0, initializer_range=0.15, **changes)


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    """Left-padded random prompts."""
    ids = torch.randint(3, 1000, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "attention_mask": torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None],
    }


def run(model: CausalLM, batch: dict[str, torch.Tensor], captured: bool, **options: object) -> Decoding:
    """A whole generation."""
    decoding = Decoding(model, **batch, **options)
    if captured:
        decoding._steps = CapturedSteps(model, decoding.options, decoding._active, plain=True)
    while not decoding.done:
        decoding.step()
    return decoding


def assert_same(model: CausalLM, batch: dict[str, torch.Tensor], **options: object) -> list[list[int]]:
    """Both ways give the same ids, and log-probabilities as near as float32 comes (measured: 5.1e-6)."""
    options = {"return_logprobs": True, **options}
    mine, plain = (run(model, batch, captured, **options) for captured in (True, False))
    ids = [plain.new_ids(row) for row in range(len(batch["input_ids"]))]
    assert [mine.new_ids(row) for row in range(len(ids))] == ids
    for row in range(len(ids)):
        found, expected = mine.logprobs(row), plain.logprobs(row)
        assert len(found) == len(ids[row])
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 3e-5
    return ids


@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe", "tiny-phi-3-mini-4k"])
@pytest.mark.parametrize("rope_mode", ["reference", "pinned"])
def test_rows_around_the_switch_give_the_plain_loops_text(name: str, rope_mode: str) -> None:
    """Rows of 1 to 45 tokens: three cross in the course of the text, one begins beyond."""
    batch = batch_of(1, 20, 31, 32, 33, 45)
    assert_same(tiny(name), batch, max_new_tokens=24, rope_mode=rope_mode, stop_token_ids=())


def test_two_rows_that_cross_in_one_step_and_a_row_alone() -> None:
    assert_same(tiny(), batch_of(28, 28, 5), max_new_tokens=12, stop_token_ids=())
    assert_same(tiny(), batch_of(30), max_new_tokens=12, stop_token_ids=())


def test_a_growing_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 4 tokens at first: it grows three times, also right before and after a crossing."""
    monkeypatch.setattr(captured_steps, "FIRST_TOKENS", 4)
    monkeypatch.setattr(CapturedSteps, "_capacity", exact_capacity)
    grown: list[int] = []
    resize = phi35.cache.KVCache.resize  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "phi35.cache.KVCache.resize", lambda cache, capacity: (grown.append(capacity), resize(cache, capacity))[1]
    )
    assert_same(tiny(), batch_of(3, 9), max_new_tokens=60, stop_token_ids=())
    assert len(grown) >= 2 and grown == sorted(set(grown))


def exact_capacity(steps: CapturedSteps, new_tokens: int) -> int:
    """As the steps' own, without rounding."""
    end = max(row.prompt_length for row in steps._rows) + steps.options.max_new_tokens
    return min(end, max(len(row.ids) for row in steps._rows) + new_tokens)


@pytest.mark.parametrize("ahead", [0, 1, 4, 20])
def test_rows_that_end_leave_the_others_as_they_were(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop ids end rows at different steps; the batch is halved twice, and rows cross before and after."""
    monkeypatch.setattr(captured_steps, "AHEAD", ahead)
    monkeypatch.setattr(captured_steps, "WORTH_A_CAPTURE", 0)
    batch = batch_of(3, 18, 25, 31, 40)
    whole = assert_same(tiny(), batch, max_new_tokens=24, stop_token_ids=())
    stops = [whole[0][2], whole[2][9], whole[4][15], whole[1][12]]
    found = assert_same(tiny(), batch, max_new_tokens=24, stop_token_ids=stops)
    assert len(set(map(len, found))) >= 3


def test_the_last_position_ends_a_row() -> None:
    model = tiny("tiny-phi-3-mini-4k", max_position_embeddings=12, original_max_position_embeddings=12)
    found = assert_same(model, batch_of(8, 3), max_new_tokens=100, stop_token_ids=())
    assert [len(ids) for ids in found] == [4, 9]


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_prompts_in_packed_chunks_give_the_same_text(chunk: int, name: str) -> None:
    model = tiny(name, **({"sliding_window": 9} if chunk == 7 else {}))
    batch = batch_of(5, 30, 1, 40)
    options = {"max_new_tokens": 8, "stop_token_ids": (), "return_logprobs": True}
    mine = run(model, batch, True, prefill_chunk_size=chunk, **options)
    plain = run(model, batch, False, **options)
    assert [mine.new_ids(row) for row in range(4)] == [plain.new_ids(row) for row in range(4)]


def test_prompts_with_pictures_run_packed() -> None:
    from PIL import Image

    from phi35.api import SMALL_MODEL
    from phi35.processor import Processor
    from phi35.tokenizer import Tokenizer

    model = phi35.create("tiny-phi-3.5-vision", seed=2, initializer_range=0.3, original_max_position_embeddings=100)
    processor = Processor(Tokenizer.from_folder(SMALL_MODEL), model.config)
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    prompts = ["<|image_2|> or <|image_1|>", "<|image_1|> and " + "what is this? " * 4, "what is this? " * 20]
    batch = processor(prompts, images=[[red, blue], [blue], []], num_crops=1)
    assert_same(model, batch, max_new_tokens=40, stop_token_ids=(), prefill_chunk_size=16)


def test_segments_fill_chunks_in_order() -> None:
    chunks = [[(part.prompt, part.start, part.length, part.last) for part in chunk] for chunk in segments([3, 9, 2], 4)]
    assert chunks == [
        [(0, 0, 3, True), (1, 0, 1, False)],
        [(1, 1, 4, False)],
        [(1, 5, 4, True)],
        [(2, 0, 2, True)],
    ]


def test_uniform_numbers_drawn_at_once_are_those_drawn_one_by_one() -> None:
    """The captured steps draw ahead; a seed must mean the same text."""
    one, many = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    single = [torch.rand((), generator=one, dtype=torch.float64).item() for _ in range(300)]
    assert torch.cat([torch.rand(n, generator=many, dtype=torch.float64) for n in (128, 128, 44)]).tolist() == single


def test_asking_for_a_graph_where_there_is_none_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    with pytest.raises(ValueError, match="fast=True.*run on CUDA"):
        generate(tiny(), **batch_of(4), max_new_tokens=2, fast=True)
    reason = limit(tiny())
    assert reason is not None and "cpu" in reason


def test_a_kept_step_is_no_part_of_copies() -> None:
    model = phi35.create("tiny-phi-3.5-mini", seed=0)
    step = DecodeStep(model, model.new_cache(1, 8), plain=True)
    model.__dict__[step_pool.ATTRIBUTE] = step_pool.KeptStep(step)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.__dict__[step_pool.ATTRIBUTE].step is None
    assert step.is_current
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert not step.is_current


def test_log_probabilities_need_to_be_asked_for() -> None:
    decoding = run(tiny(), batch_of(4), False, max_new_tokens=2)
    with pytest.raises(ValueError, match="return_logprobs"):
        decoding.logprobs(0)


@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe", "tiny-phi-3.5-vision"])
def test_the_familys_own_modules_can_all_be_captured(name: str) -> None:
    assert model_limit(phi35.create(name, device="meta", dtype="bfloat16")) is None


def test_a_norm_of_another_kind_is_named() -> None:
    model = phi35.create("tiny-phi-3.5-mini")
    model.model.norm = torch.nn.RMSNorm(model.config.hidden_size)
    assert "RMSNorm" in str(model_limit(model))
