"""The decoding loop against the uncached forward pass, on both sides of the LongRoPE switch."""

import functools
from pathlib import Path

import pytest
import torch
from PIL import Image

import phi35
from phi35.api import SMALL_MODEL
from phi35.generation.decoding import Decoding, generate
from phi35.generation.fast_prefill import Prompt, prefill
from phi35.generation.plain_steps import prefill as plain_prefill
from phi35.model import CausalLM
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer


@functools.cache
def tiny(name: str = "tiny-phi-3.5-mini", original: int | None = 32) -> CausalLM:
    """A tiny model with peaked logits (random weights of the usual size give almost equal ones)."""
    changes = {} if original is None else {"original_max_position_embeddings": original}
    return phi35.create(name, seed=0, initializer_range=0.15, **changes)


def prompts_of(*lengths: int, vocab: int = 1000, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        ids.append([0] * gap + row if side == "left" else row + [0] * gap)
        mask.append([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def uncached(model: CausalLM, row: list[int], steps: int) -> list[int]:
    """Greedy continuation by a full forward pass at every step."""
    ids = list(row)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in model.config.stop_token_ids:
            break
    return ids[len(row) :]


def new_tokens(model: CausalLM, batch: dict[str, torch.Tensor], **options: object) -> list[list[int]]:
    decoding = Decoding(model, **batch, **options)
    while not decoding.done:
        decoding.step()
    return [decoding.new_ids(row) for row in range(len(batch["input_ids"]))]


@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe", "tiny-phi-3-mini-4k"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cached_batch_equals_each_row_uncached_on_both_sides_of_the_switch(name: str, side: str) -> None:
    """Rows below, at and beyond the original length of 32, two of them crossing in the course of the text."""
    model = tiny(name, None if name == "tiny-phi-3-mini-4k" else 32)
    rows = prompts_of(1, 20, 31, 32, 33, 45)
    found = new_tokens(model, padded(rows, side), max_new_tokens=20)
    assert found == [uncached(model, row, 20) for row in rows]
    assert len({tuple(row) for row in found}) == len(rows)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 7}, {"prefill_chunk_size": 1}, {"preallocate": True}])
def test_chunked_prefill_and_a_preallocated_cache_change_nothing(options: dict[str, object]) -> None:
    model = tiny()
    batch = padded(prompts_of(5, 30, 40))
    assert new_tokens(model, batch, max_new_tokens=8, **options) == new_tokens(model, batch, max_new_tokens=8)


def test_the_crossing_is_seen() -> None:
    """The two modes differ before the crossing, so the tests above would notice a wrong factor set."""
    model = tiny()
    batch = padded(prompts_of(20, 25))
    reference = new_tokens(model, batch, max_new_tokens=20)
    pinned = new_tokens(model, batch, max_new_tokens=20, rope_mode="pinned")
    assert reference != pinned


@torch.no_grad()
def test_pinned_rows_stand_under_one_factor_set_from_the_start() -> None:
    model = tiny()
    (row,) = prompts_of(20)
    ids = list(row)
    for _ in range(20):
        logits = model(torch.tensor([ids]), rope_lengths=torch.tensor([40])).logits
        ids.append(int(logits[0, -1].argmax()))
    assert new_tokens(model, padded([row]), max_new_tokens=20, rope_mode="pinned") == [ids[20:]]


def test_the_true_boundary_of_4096() -> None:
    """Rows that start at 4,094 and 4,097 tokens and at 3: the first crosses at its third new token."""
    model = tiny(original=4096)
    rows = prompts_of(4094, 4097, 3)
    found = new_tokens(model, padded(rows), max_new_tokens=5, stop_token_ids=())
    assert found == [uncached(model, row, 5) for row in rows]


@torch.no_grad()
def test_image_rows_cross_with_their_features() -> None:
    """Rows with two pictures, one and none, prefilled in chunks that cut the pictures; all pass 100 tokens."""
    model = phi35.create("tiny-phi-3.5-vision", seed=2, initializer_range=0.3, original_max_position_embeddings=100)
    processor = Processor(Tokenizer.from_folder(SMALL_MODEL), model.config)
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    prompts = ["<|image_2|> or <|image_1|>", "<|image_1|> and " + "what is this? " * 4, "what is this? " * 20]
    images = [[red, blue], [blue], []]
    batch = processor(prompts, images=images, num_crops=1)
    found = new_tokens(model, batch, max_new_tokens=40, stop_token_ids=(), prefill_chunk_size=16)
    for prompt, row, new in zip(prompts, images, found, strict=True):
        single = processor(prompt, images=row, num_crops=1)
        ids = single.pop("input_ids")
        del single["attention_mask"]
        start = ids.shape[1]
        assert start <= 100 < start + 40, "the row must cross"
        for _ in range(40):
            ids = torch.cat((ids, model(ids, **single).logits[:, -1:].argmax(dim=-1)), dim=1)
        assert new == ids[0, start:].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_text_is_that_of_transformers(penalty: float, tmp_path: Path) -> None:
    """A left-padded batch below the switch, with and without the repetition penalty."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = tiny(original=None)
    phi35.save(model, None, tmp_path)
    theirs = transformers.Phi3ForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    rows = prompts_of(4, 11, 19)
    options = {"max_new_tokens": 20, "repetition_penalty": penalty}
    ours = new_tokens(model, padded(rows), **options)
    batch = padded(rows)
    pad_id = model.config.pad_token_id
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad_id)
    out = theirs.generate(**batch, do_sample=False, **options)
    for new, row in zip(ours, out[:, 19:].tolist(), strict=True):
        assert row[: len(new)] == new
        assert set(row[len(new) :]) <= {pad_id}


def test_output_keeps_the_inputs_and_pads_ended_rows() -> None:
    model = tiny()
    batch = padded(prompts_of(4, 9))
    first, second = new_tokens(model, batch, max_new_tokens=6, stop_token_ids=())
    stop = first[2]
    assert stop not in second
    out = generate(model, **batch, max_new_tokens=6, stop_token_ids=[stop])
    assert out.dtype == torch.int64 and out.shape == (2, 15)
    assert torch.equal(out[:, :9], batch["input_ids"])
    assert out[0, 9:].tolist() == first[: first.index(stop) + 1] + [model.config.pad_token_id] * (5 - first.index(stop))
    assert out[1, 9:].tolist() == second


def test_rows_that_end_early_leave_the_others_as_they_were() -> None:
    """Three stop ids end three of five rows at different steps, before and after crossings of the rest."""
    model = tiny()
    batch = padded(prompts_of(3, 18, 25, 31, 40))
    whole = new_tokens(model, batch, max_new_tokens=24, stop_token_ids=())
    stops = [whole[0][2], whole[2][9], whole[4][15]]
    expected = []
    for row in whole:
        ends = [row.index(stop) + 1 for stop in stops if stop in row]
        expected.append(row[: min(ends, default=24)])
    assert len({len(row) for row in expected}) >= 3
    assert new_tokens(model, batch, max_new_tokens=24, stop_token_ids=stops) == expected


def test_model_generate_is_the_same_and_reports_tokens() -> None:
    model = tiny()
    batch = padded(prompts_of(4, 9))
    seen: list[tuple[int, int]] = []
    out = model.generate(**batch, max_new_tokens=3, on_token=lambda row, token: seen.append((row, token)))
    assert [token for row, token in seen if row == 1] == out[1, 9:].tolist()


def test_a_text_ends_at_the_last_position() -> None:
    model = phi35.create("tiny-phi-3-mini-4k", seed=0, max_position_embeddings=12, original_max_position_embeddings=12)
    (new,) = new_tokens(model, padded(prompts_of(8)), max_new_tokens=100, stop_token_ids=())
    assert len(new) == 4


def test_training_mode_is_left_as_it_was() -> None:
    model = phi35.create("tiny-phi-3.5-moe", seed=0)
    evaluated = new_tokens(model, padded(prompts_of(6)), max_new_tokens=5)
    model.train()
    assert new_tokens(model, padded(prompts_of(6)), max_new_tokens=5) == evaluated
    assert model.training


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_sampled_row_does_not_depend_on_its_neighbours(penalty: float) -> None:
    model = tiny()
    rows = prompts_of(5, 12, 30)
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.95, "seed": 7, "repetition_penalty": penalty}
    together = new_tokens(model, padded(rows), **options)
    assert together == [new_tokens(model, padded([row]), **options)[0] for row in rows]
    assert together == new_tokens(model, padded(rows), **options)
    assert together != new_tokens(model, padded(rows), **{**options, "seed": 8})


def test_a_seed_for_each_row_gives_equal_prompts_different_texts() -> None:
    model = tiny()
    rows = prompts_of(6) * 2
    options = {"max_new_tokens": 10, "temperature": 1.5}
    first, second = new_tokens(model, padded(rows), seed=[1, 2], **options)
    assert first != second
    assert [first] == new_tokens(model, padded(rows[:1]), seed=1, **options)


def test_all_bad_arguments_are_named_at_once() -> None:
    batch = {"input_ids": torch.tensor([[1, 2], [0, 0]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])}
    with pytest.raises(ValueError) as error:
        generate(
            tiny(),
            **batch,
            temperature=-1,
            top_p=0,
            top_k=0,
            min_p=2,
            repetition_penalty=0,
            max_new_tokens=0,
            stop="",
            rope_mode="yarn",
            seed="x",
            stop_token_ids=[5000],
        )
    for name in (
        "temperature top_p top_k min_p repetition_penalty max_new_tokens stop rope_mode seed stop_token_ids"
    ).split():
        assert name in str(error.value)
    assert "prompt 1 is empty" in str(error.value)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, {}, "input_ids must be"),
        ({"input_ids": torch.tensor([[1, 2000]])}, {}, "2000"),
        ({"input_ids": torch.tensor([[1, -1]])}, {}, "text only"),
        ({"input_ids": torch.tensor([[1]])}, {"max_tokens": 3}, "max_tokens"),
        ({"input_ids": torch.tensor([[1]])}, {"stop": "x"}, "tokenizer"),
        ({"input_ids": torch.tensor([[1]])}, {"seed": [1, 2]}, "seed"),
        ({"input_ids": torch.ones(1, 200000, dtype=torch.int64)}, {}, "131072"),
    ],
)
def test_bad_inputs_are_named(batch: dict[str, torch.Tensor], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny(), **batch, **options)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        generate(phi35.create("tiny-phi-3.5-mini", device="meta"), torch.tensor([[5, 6]]))


def test_a_filter_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match="top_p have no effect"):
        generate(tiny(), torch.tensor([[5, 6]]), max_new_tokens=1, top_p=0.5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_a_long_prompt_in_chunks_equals_one_pass_on_both_sides_of_4096(name: str) -> None:
    """Prompts of 4,096 and 9,001 tokens in chunks of 1,000 and 2,048: logits of one uncached pass, by either way.

    Measured errors relative to the largest logit: at most 1.8e-6.
    """
    model = tiny(name, original=4096)
    for length in (4096, 9001):
        (row,) = prompts_of(length, seed=length)
        expected = model(torch.tensor([row]), logits_to_keep=1).logits[:, -1]
        cache = model.new_cache(1, length)
        packed = prefill(model, cache, [Prompt(row, None, 0, length > 4096)], 1000, plain=True)
        decoding = Decoding(model, torch.tensor([row]), max_new_tokens=1, prefill_chunk_size=2048)
        plain = plain_prefill(model, decoding.rows, decoding.options, length + 1)[1]
        for found in (packed, plain):
            assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5
