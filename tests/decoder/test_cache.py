"""Cached passes equal uncached ones: steps, chunks, padding on both sides, both factor sets, both kinds of cache."""

import pytest
import torch
from tiny_configs import longrope_config

from phi35.cache import KVCache
from phi35.model import CausalLM

TOLERANCE = 5e-6  # measured: 1.2e-6 at a logit standard deviation of 0.8


def model_of(original: int = 32, **changes: object) -> CausalLM:
    model = CausalLM(longrope_config(original, **changes)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 150, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("chunks", [[41], [1] * 41, [13, 1, 1, 20, 6], [32, 9]])
@torch.no_grad()
def test_chunks_equal_one_pass(chunks: list[int], max_length: int | None, window: int | None) -> None:
    model, ids = model_of(sliding_window=window), random_ids(3, 41)
    expected = model(ids).logits
    cache, pieces = model.new_cache(3, max_length), []
    for piece in ids.split(chunks, dim=1):
        pieces.append(model(piece, past_key_values=cache, rope_lengths=torch.full((3,), 41)).logits)
    assert (torch.cat(pieces, dim=1) - expected).abs().max() <= TOLERANCE
    assert cache.lengths.tolist() == [41] * 3 and cache.rope_long.all()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_on_both_sides_of_the_switch(side: str, window: int | None) -> None:
    """Rows of 5, 28 and 40 tokens then 3 steps: only the last stands under the long factors."""
    model = model_of(sliding_window=window)
    rows = [random_ids(1, length + 3, seed=length) for length in (5, 28, 40)]
    ids, mask = torch.full((3, 40), 150), torch.zeros(3, 40, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        prompt = tokens[0, :-3]
        where = slice(40 - len(prompt), 40) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    cache = model.new_cache(3)
    got = model(ids, attention_mask=mask, past_key_values=cache).logits
    steps = torch.cat([row[:, -3:] for row in rows])
    later = [model(steps[:, i : i + 1], past_key_values=cache).logits[:, 0] for i in range(3)]
    assert cache.rope_long.tolist() == [False, False, True]
    for row, tokens in enumerate(rows):
        expected = model(tokens).logits[0]
        assert (got[row][mask[row].bool()] - expected[:-3]).abs().max() <= TOLERANCE
        assert (torch.stack([logits[row] for logits in later]) - expected[-3:]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_true_boundary_in_one_batch() -> None:
    """4095, 4096, 4097 and 4200 tokens side by side equal each row alone; so does one more step."""
    model = model_of(4096)
    lengths = [4095, 4096, 4097, 4200]
    ids = random_ids(4, 4200)
    mask = (torch.arange(4200) < torch.tensor(lengths)[:, None]).long()
    cache = model.new_cache(4)
    got = model(ids, attention_mask=mask, past_key_values=cache).logits
    assert cache.rope_long.tolist() == [False, False, True, True]
    for row, length in enumerate(lengths):
        expected = model(ids[row : row + 1, :length]).logits[0]
        assert (got[row, :length] - expected).abs().max() <= TOLERANCE
    tail = cache.select_rows(torch.tensor([2, 3]))
    step = random_ids(2, 1, seed=1)
    stepped = model(step, past_key_values=tail).logits[:, 0]
    for row, length in enumerate(lengths[2:]):
        whole = torch.cat((ids[row + 2 : row + 3, :length], step[row : row + 1]), dim=1)
        assert (stepped[row] - model(whole).logits[0, -1]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_unannounced_crossing_is_an_error_and_recomputation_mends_it() -> None:
    model, ids = model_of(), random_ids(2, 33)
    cache = model.new_cache(2)
    model(ids[:, :32], past_key_values=cache)
    with pytest.raises(ValueError, match=r"rows \[0, 1\] pass 32 tokens.*rope_lengths"):
        model(ids[:, 32:], past_key_values=cache)
    assert cache.lengths.tolist() == [32, 32]
    row = torch.tensor([1])
    cache.reset_rows(row)
    alone = cache.select_rows(row)
    logits = model(ids[1:], past_key_values=alone).logits
    cache.write_rows(row, alone)
    assert (logits - model(ids[1:]).logits).abs().max() <= TOLERANCE
    assert cache.lengths.tolist() == [32, 33] and cache.rope_long.tolist() == [False, True]


@torch.no_grad()
def test_pinned_row_keeps_the_long_factors_from_the_start() -> None:
    model, ids = model_of(), random_ids(1, 10)
    pinned = model(ids, rope_lengths=torch.tensor([33])).logits
    assert (pinned - model(ids).logits).abs().max() > 1e-2
    model.model.rope.original_length = 0
    assert (pinned - model(ids).logits).abs().max() <= TOLERANCE


@torch.no_grad()
def test_rows_can_be_selected_cropped_and_continued() -> None:
    model, ids = model_of(), random_ids(3, 12)
    cache = model.new_cache(3)
    model(ids, past_key_values=cache)
    chosen = cache.select_rows(torch.tensor([True, False, True]))
    chosen.crop(torch.tensor([0, 1]), 9)
    logits = model(ids[[0, 2], 9:], past_key_values=chosen).logits
    assert (logits - model(ids[[0, 2]]).logits[:, 9:]).abs().max() <= TOLERANCE
    assert cache.lengths.tolist() == [12, 12, 12]


def test_bad_arguments_are_named() -> None:
    config = longrope_config()
    with pytest.raises(ValueError, match="batch_size"):
        KVCache(config, 0)
    with pytest.raises(ValueError, match="max_length"):
        KVCache(config, 1, max_length=0)
    model = model_of()
    with pytest.raises(ValueError, match="holds 4 tokens a row and 5 are needed"):
        model(random_ids(1, 5), past_key_values=model.new_cache(1, 4))
    with pytest.raises(ValueError, match="cache has 1 rows and the batch 2"):
        model(random_ids(2, 5), past_key_values=model.new_cache(1))
    with pytest.raises(ValueError, match="attention_mask"):
        model(random_ids(2, 5), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"input_ids": torch.ones(1, 3)},
            "input_ids must be a tensor .B, T. of whole numbers, got one of torch.float32",
        ),
        ({"input_ids": [[1, 2]]}, "input_ids must be a tensor .* got list"),
        ({"inputs_embeds": [[1.0]]}, "inputs_embeds must be a tensor"),
        ({"inputs_embeds": torch.ones(1, 3, 5)}, "wide, got .1, 3, 5."),
        ({"input_ids": torch.ones(1, 3).long(), "labels": torch.ones(1, 3)}, "labels must be a tensor"),
        (
            {"input_ids": torch.ones(1, 1).long(), "past_key_values": ((1,),)},
            "past_key_values must come from new_cache",
        ),
    ],
)
def test_inputs_of_the_wrong_kind_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of()(**given)
