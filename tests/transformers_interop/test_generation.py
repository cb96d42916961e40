"""``generate`` of transformers with the rows' own cache: equal to no cache, and to this package's generation."""

import pytest
import torch
from tiny_configs import longrope_config
from transformers import DynamicCache
from wrapped_models import IDS, PRESETS, picture_batch, wrapped

from phi35.interop.cache import RowCache

MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module", params=PRESETS)
def model(request: pytest.FixtureRequest):
    return wrapped(PRESETS[request.param])


@pytest.mark.parametrize("padded", [False, True])
def test_cached_logits_equal_a_whole_pass(model, padded: bool) -> None:
    mask = MASK if padded else torch.ones_like(MASK)
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask, use_cache=False).logits
        first = model(IDS[:, :4], attention_mask=mask[:, :4], use_cache=True)
        cache = getattr(first, "cache", None) or first.past_key_values
        assert isinstance(cache, RowCache) and cache.get_seq_length() == 4
        second = model(IDS[:, 4:], attention_mask=mask, past_key_values=cache).logits
    got = torch.cat((first.logits, second), dim=1)
    # measured at most 4e-6 at a standard deviation of 2
    assert (got - whole)[mask.bool()].abs().max() < 2e-5
    assert cache.get_seq_length() == IDS.shape[1]


def test_beams_with_a_cache_equal_those_without(model) -> None:
    options = {"attention_mask": MASK, "max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2}
    cached = model.generate(IDS, **options)
    assert cached.shape[0] == 4
    assert torch.equal(cached, model.generate(IDS, **options, use_cache=False))
    greedy = model.generate(IDS, attention_mask=MASK, max_new_tokens=8)
    assert not torch.equal(cached[::2, : greedy.shape[1]], greedy)


def test_sampling_draws_the_same_with_a_cache_and_in_training_mode(model) -> None:
    options = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": True, "top_k": 20}
    answers = []
    for training, use_cache in ((False, True), (False, False), (True, True)):
        model.train(training)
        torch.manual_seed(11)
        answers.append(model.generate(IDS, **options, use_cache=use_cache))
        assert model.training == training
    model.eval()
    torch.manual_seed(12)
    other = model.generate(IDS, **options)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], other)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("original", [10, 12, 15])
def test_a_row_that_passes_the_original_length_is_computed_anew(original: int, beams: int) -> None:
    model = wrapped(longrope_config(original), scale=1.5)
    options = {"attention_mask": MASK, "max_new_tokens": 14, "num_beams": beams}
    cached = model.generate(IDS, **options)
    assert torch.equal(cached, model.generate(IDS, **options, use_cache=False))
    if beams == 1:
        ours = model.causal_lm.generate(IDS, attention_mask=MASK, max_new_tokens=14)
        assert torch.equal(cached, ours)
    short = wrapped(longrope_config(1000), scale=1.5).generate(IDS, **options)
    assert not torch.equal(cached, short)


def test_chunks_cropping_and_hidden_columns_across_the_original_length() -> None:
    model = wrapped(longrope_config(10), scale=1.0)
    ids = torch.randint(0, 160, (2, 16), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        cache = model.new_cache()
        for start, stop in ((0, 8), (8, 13), (13, 16)):
            chunk = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        assert (chunk.logits - whole[:, 13:]).abs().max() < 1e-5  # measured 6e-7
        cache.crop(-8)  # back under the short factors
        assert cache.get_seq_length() == 8
        short = model(ids[:, 8:9], attention_mask=mask[:, :9], past_key_values=cache).logits
        expected = model(ids[:, :9], attention_mask=mask[:, :9]).logits[:, 8:]
    assert (short - expected).abs().max() < 1e-5  # measured 5e-7


def test_own_positions_are_refused_where_a_row_must_be_computed_anew() -> None:
    model = wrapped(longrope_config(10), scale=1.0)
    cache = model.new_cache()
    with torch.no_grad():
        model(torch.ones(1, 9, dtype=torch.int64), position_ids=torch.arange(9)[None] + 1, past_key_values=cache)
        with pytest.raises(ValueError, match="leave out position_ids"):
            model(torch.ones(1, 2, dtype=torch.int64), position_ids=torch.tensor([[10, 11]]), past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_pictures_keep_to_their_rows(options: dict) -> None:
    model = wrapped(PRESETS["phi3_v"])
    batch = picture_batch()
    together = model.generate(**batch, max_new_tokens=6, **options)
    owned = [[0, 1], [2], []]
    for row, images in enumerate(owned):
        keep = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row : row + 1, keep]}
        if images:
            alone |= {"pixel_values": batch["pixel_values"][images], "image_sizes": batch["image_sizes"][images]}
        expected = model.generate(
            **alone, attention_mask=torch.ones_like(alone["input_ids"]), max_new_tokens=6, **options
        )
        new = expected.shape[1] - int(keep.sum())
        assert torch.equal(together[row, len(keep) : len(keep) + new], expected[0, -new:])
    several = model.generate(**batch, max_new_tokens=6, num_return_sequences=2, num_beams=2)
    assert torch.equal(several[::2], model.generate(**batch, max_new_tokens=6, num_beams=2))


def test_pictures_of_a_row_that_passes_the_original_length() -> None:
    batch = picture_batch()
    longest = batch["input_ids"].shape[1]
    model = wrapped(PRESETS["phi3_v"], original_max_position_embeddings=longest + 2, sliding_window=None)
    with_cache = model.generate(**batch, max_new_tokens=8)
    assert torch.equal(with_cache, model.generate(**batch, max_new_tokens=8, use_cache=False))
    ours = model.causal_lm.generate(
        **{**batch, "pixel_values": batch["pixel_values"].flatten(0, 1)[_real_crops(batch)]}, max_new_tokens=8
    )
    assert torch.equal(with_cache, ours)


def test_a_chat_goes_on_with_its_cache() -> None:
    model = wrapped(PRESETS["phi3"])
    cache = model.new_cache()
    first = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, past_key_values=cache)
    longer = torch.cat((first, IDS[:, :3]), dim=1)
    mask = torch.ones_like(longer)
    second = model.generate(longer, attention_mask=mask, max_new_tokens=5, past_key_values=cache)
    assert torch.equal(second, model.generate(longer, attention_mask=mask, max_new_tokens=5))


def test_prompt_lookup_gives_the_greedy_answer() -> None:
    model = wrapped(PRESETS["phi3"])
    ids = IDS[:1].repeat(1, 3)
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=12, prompt_lookup_num_tokens=3), expected
    )


def test_other_caches_are_refused() -> None:
    model = wrapped(PRESETS["phi3"])
    with pytest.raises(ValueError, match="new_cache"):
        model(IDS, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(IDS, cache_implementation="static", max_new_tokens=2)


def _real_crops(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    counts = 1 + (batch["image_sizes"] // 64).prod(dim=1)
    return (torch.arange(batch["pixel_values"].shape[1]) < counts[:, None]).flatten()
