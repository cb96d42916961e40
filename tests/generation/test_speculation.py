"""Drafted tokens change how fast a text comes and nothing of the text: greedy, sampled, in batches, over the switch."""

import copy
import functools

import pytest
import torch
from PIL import Image

import phi35
from phi35.api import SMALL_MODEL
from phi35.generation import captured_feed
from phi35.generation.batcher import Batcher
from phi35.generation.decoding import Decoding
from phi35.generation.drafting import PromptLookup
from phi35.generation.rows import Row
from phi35.generation.speculation import SpeculativeSteps
from phi35.model import CausalLM
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer


@functools.cache
def repetitive(name: str = "tiny-phi-3.5-mini") -> CausalLM:
    """A tiny model of 40 tokens whose greedy text often repeats itself; it crosses at 64 tokens."""
    ends = {"vocab_size": 40, "eos_token_id": 39, "pad_token_id": 39, "stop_token_ids": (39,)}
    return phi35.create(name, seed=0, initializer_range=0.06, original_max_position_embeddings=64, **ends)


@functools.cache
def peaked(name: str = "tiny-phi-3.5-mini") -> CausalLM:
    """A tiny model of the usual vocabulary with peaked logits; it crosses at 64 tokens."""
    return phi35.create(name, seed=0, initializer_range=0.15, original_max_position_embeddings=64)


@functools.cache
def alike(target: CausalLM, original: int | None = 64) -> CausalLM:
    """A model that often, not always, agrees with another: its weights and a little noise."""
    twin, generator = copy.deepcopy(target), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() > 1:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.08 * parameter.std()
    if original != twin.config.original_max_position_embeddings:
        twin.config = twin.config.replace(original_max_position_embeddings=original)
        twin.model.config = twin.config
        twin.model.rope = type(twin.model.rope)(twin.config)
    return twin


def batch_of(*lengths: int, vocab: int = 36) -> dict[str, torch.Tensor]:
    """Left-padded random prompts."""
    ids = torch.randint(3, vocab, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask}


def run(model: CausalLM, batch: dict[str, torch.Tensor], plain: str | None = None, **options: object) -> Decoding:
    """A whole generation; with ``plain`` drafts run so."""
    decoding = Decoding(model, **batch, **options)
    if plain is not None:
        steps = SpeculativeSteps(model, decoding.options, decoding._active, decoding._draft_embeds, plain)
        decoding._steps = steps
    while not decoding.done:
        decoding.step()
    return decoding


def assert_same(
    model: CausalLM, batch: dict[str, torch.Tensor], ways: dict[str, object], low: float, **options: object
) -> list[list[int]]:
    """With drafts by either feed the ids are those without, and log-probabilities as near as float32 comes.

    ``low``: at least so many tokens come of a step and row. Measured error of log-probabilities: 1.3e-5.
    """
    options = {"stop_token_ids": (), "return_logprobs": True, **options}
    expected = run(model, batch, **options)
    rows = range(len(batch["input_ids"]))
    for plain in ("forward", "steps"):
        found = run(model, batch, plain, **ways, **options)
        assert [found.new_ids(row) for row in rows] == [expected.new_ids(row) for row in rows], plain
        for row in rows:
            pairs = list(zip(found.logprobs(row), expected.logprobs(row), strict=True))
            assert max(abs(a - b) for a, b in pairs) < 6e-5
        statistics = found.speculation
        assert statistics is not None and statistics.tokens >= low * statistics.steps
        assert statistics.accepted < statistics.drafted, "the test must see drafts that are not taken"
    return [expected.new_ids(row) for row in rows]


@pytest.mark.parametrize("rope_mode", ["reference", "pinned"])
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_looked_up_drafts_change_nothing(name: str, rope_mode: str) -> None:
    """Rows from 1 to 70 tokens around the switch at 64, most of which cross in the course of the text."""
    low = 3.0 if "mini" in name else 0.0
    options = {"max_new_tokens": 50, "rope_mode": rope_mode}
    assert_same(repetitive(name), batch_of(1, 20, 40, 63, 64, 70), {"speculation": "prompt_lookup"}, low, **options)


@pytest.mark.parametrize("rows", [(28,), (1, 40, 63, 70)])
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_drafts_of_a_model_change_nothing(name: str, rows: tuple[int, ...]) -> None:
    model = peaked(name)
    batch = batch_of(*rows, vocab=1000)
    # One row: 2.2 tokens a step; in a batch each row goes on by itself.
    assert_same(model, batch, {"draft_model": alike(model)}, 1.5, max_new_tokens=40)
    assert_same(model, batch, {"draft_model": alike(model), "num_draft_tokens": 1}, 1.2, max_new_tokens=40)


def test_a_draft_model_may_cross_elsewhere() -> None:
    """The draft model crosses at 50 tokens, the other at 64."""
    draft = alike(peaked(), 50)
    assert_same(peaked(), batch_of(30, 45, vocab=1000), {"draft_model": draft}, 1.5, max_new_tokens=40)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.9, "seed": 1},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": [3, 4, 5]},
        {"repetition_penalty": 1.3},
        {"temperature": 0.8, "repetition_penalty": 1.2, "min_p": 0.02, "seed": 2},
        {"kv_cache_dtype": "int8"},
    ],
)
def test_sampled_penalised_and_eight_bit_text_is_that_of_the_seed(options: dict[str, object]) -> None:
    batch = batch_of(5, 45, 60)
    assert_same(repetitive(), batch, {"speculation": "prompt_lookup"}, 1.0, max_new_tokens=40, **options)
    draft = {"draft_model": alike(repetitive())}
    assert_same(repetitive(), batch, draft, 1.0, max_new_tokens=40, **options)


def test_a_stop_in_the_middle_of_taken_tokens_ends_the_text_there() -> None:
    """Every token of a text is made the stop id in turn; the other row goes on."""
    model, batch = repetitive(), batch_of(9, 30)
    whole = assert_same(model, batch, {"speculation": "prompt_lookup"}, 2.0, max_new_tokens=30)
    for stop in sorted(set(whole[0])):
        plain = run(model, batch, max_new_tokens=30, stop_token_ids=[stop])
        for way in ("forward", "steps"):
            options = {"max_new_tokens": 30, "stop_token_ids": [stop], "return_logprobs": True}
            found = run(model, batch, way, speculation="prompt_lookup", **options)
            for row in range(2):
                assert found.new_ids(row) == plain.new_ids(row)
                assert len(found.logprobs(row)) == len(plain.new_ids(row))


def test_stop_strings_and_streams_end_where_they_did() -> None:
    model, tokenizer = peaked(), Tokenizer.from_folder(SMALL_MODEL)
    batch = batch_of(20, vocab=1000)
    whole = run(model, batch, max_new_tokens=30, stop_token_ids=()).new_ids(0)
    text = tokenizer.decode(whole)
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    options = {"max_new_tokens": 30, "stop_token_ids": (), "stop": middle, "tokenizer": tokenizer}
    found = run(model, batch, draft_model=alike(model), **options)
    assert found.new_ids(0) == run(model, batch, **options).new_ids(0) != whole


def test_the_last_position_and_the_last_token_are_never_passed() -> None:
    ends = {"vocab_size": 40, "eos_token_id": 39, "pad_token_id": 39, "stop_token_ids": (39,)}
    model = phi35.create(
        "tiny-phi-3-mini-4k",
        seed=0,
        initializer_range=0.06,
        max_position_embeddings=40,
        original_max_position_embeddings=40,
        **ends,
    )
    for plain in ("forward", "steps"):
        for count in (1, 2, 7, 100):
            options = {"max_new_tokens": count, "stop_token_ids": ()}
            found = run(model, batch_of(8, 20), plain, speculation="prompt_lookup", **options)
            expected = run(model, batch_of(8, 20), **options)
            assert [found.new_ids(row) for row in range(2)] == [expected.new_ids(row) for row in range(2)]


def test_growing_pages_and_smaller_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 4 tokens at first, and steps made anew as soon as half of the rows have ended."""
    monkeypatch.setattr(captured_feed, "FIRST_TOKENS", 4)
    monkeypatch.setattr(captured_feed, "WORTH_A_CAPTURE", 0)
    grown, selected = [], []
    grow, select = captured_feed.PagedCache.add_pages, captured_feed.PagedCache.select_rows
    monkeypatch.setattr(
        captured_feed.PagedCache, "add_pages", lambda cache, count: (grown.append(count), grow(cache, count))[1]
    )
    monkeypatch.setattr(
        captured_feed.PagedCache, "select_rows", lambda cache, rows: (selected.append(rows), select(cache, rows))[1]
    )
    model, batch = repetitive(), batch_of(5, 20, 30, 50, 61)
    whole = assert_same(model, batch, {"speculation": "prompt_lookup"}, 2.0, max_new_tokens=150)
    assert grown
    stops = [whole[0][2], whole[1][5], whole[2][9], whole[4][30]]
    options = {"max_new_tokens": 150, "stop_token_ids": stops}
    expected = run(model, batch, **options)
    found = run(model, batch, "steps", speculation="prompt_lookup", **options)
    assert [found.new_ids(row) for row in range(5)] == [expected.new_ids(row) for row in range(5)]
    assert selected and len({len(expected.new_ids(row)) for row in range(5)}) >= 3


def test_prompts_with_pictures_are_drafted_by_either_way() -> None:
    model = phi35.create("tiny-phi-3.5-vision", seed=2, initializer_range=0.1, original_max_position_embeddings=100)
    processor = Processor(Tokenizer.from_folder(SMALL_MODEL), model.config)
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    prompts = ["<|image_2|> or <|image_1|>", "<|image_1|> and " + "what is this? " * 4, "what is this? " * 20]
    batch = processor(prompts, images=[[red, blue], [blue], []], num_crops=1)
    options = {"max_new_tokens": 40, "stop_token_ids": (), "prefill_chunk_size": 16}
    expected = run(model, batch, **options)
    for plain in ("forward", "steps"):
        for ways in ({"speculation": "prompt_lookup"}, {"draft_model": alike(model, 100)}):
            found = run(model, batch, plain, **ways, **options)
            assert [found.new_ids(row) for row in range(3)] == [expected.new_ids(row) for row in range(3)]
    assert found.speculation is not None and found.speculation.accepted


def test_the_trained_model_answers_alike() -> None:
    """Through ``phi35.generate``, with a picture and a stream."""
    picture = Image.new("RGB", (64, 64), "red")
    question = {"prompt": "what color is the shape? " * 3, "images": [picture], "max_new_tokens": 24}
    expected = phi35.generate(**question)
    assert phi35.generate(speculation="prompt_lookup", num_draft_tokens=3, **question) == expected
    assert "".join(phi35.generate(speculation="prompt_lookup", stream=True, **question)) == expected
    twin = phi35.load(SMALL_MODEL)
    assert phi35.generate(draft_model=twin, **question) == expected


def test_lookups_find_the_longest_and_latest_and_go_on_with_themselves() -> None:
    def drafted(ids: list[int], count: int = 5, unlike_text: frozenset[int] = frozenset()) -> list[int]:
        row = Row(0, ids, len(ids), None, torch.Generator(), None, set())
        return PromptLookup([row], unlike_text).propose([count])[0]

    assert drafted([1, 2, 3, 4, 9, 1, 2, 3], 2) == [4, 9]
    assert drafted([1, 2, 5, 1, 2, 6, 8, 1, 2], 2) == [6, 8], "the latest place counts"
    assert drafted([7, 1, 2, 5, 8, 3, 1, 2, 6, 7, 1, 2], 1) == [5], "three tokens tell more than two"
    assert drafted([4, 4, 4]) == [4] * 5
    assert drafted([1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert drafted([1, 2, 3, 4]) == [] and drafted([1]) == [] and drafted([1, 1]) == []
    assert drafted([1, 2, 3, -1, 5, 1, 2], 4) == [3]
    assert drafted([1, 2, 3, 30, 5, 1, 2], 4, frozenset({30})) == [3]
    assert drafted([1, 2, 3, 1, 2], 0) == []


def test_bad_arguments_are_named() -> None:
    model, ids = peaked(), torch.tensor([[5, 6, 7]])
    for options, message in (
        ({"speculation": "lookup"}, "speculation must be None or one of"),
        ({"speculation": "draft_model"}, "needs draft_model="),
        ({"speculation": "prompt_lookup", "draft_model": repetitive()}, "came together"),
        ({"draft_model": repetitive()}, "vocabulary of 40 and the model one of"),
        ({"draft_model": model}, "the model itself"),
        ({"draft_model": "small"}, "must be a phi35.model.CausalLM, got str"),
        ({"num_draft_tokens": 3}, "needs speculation="),
        ({"speculation": "prompt_lookup", "num_draft_tokens": 0}, "num_draft_tokens must be a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(ids, **options)
    vision = phi35.create("tiny-phi-3.5-vision", seed=2)
    text = phi35.create("tiny-phi-3.5-mini", seed=0, vocab_size=vision.config.vocab_size)
    pixels = torch.zeros(2, 3, vision.config.vision.image_size, vision.config.vision.image_size)
    with pytest.raises(ValueError, match="reads text only and images were given"):
        vision.generate(ids, pixel_values=pixels, image_sizes=torch.tensor([[1, 1]]), draft_model=text)
    with pytest.raises(ValueError, match="batcher drafts no tokens"):
        Batcher(model, max_tokens=128).submit(ids, speculation="prompt_lookup")
