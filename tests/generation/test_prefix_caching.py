"""Pages that requests share: texts stay those of each request alone, and pages are found by all that made them."""

import functools

import pytest
import torch
from PIL import Image

import phi35
from phi35.api import SMALL_MODEL
from phi35.generation.batcher import Batcher
from phi35.generation.decoding import Decoding
from phi35.model import CausalLM
from phi35.paged_cache import PAGE_SIZE, PagedCache
from phi35.prefix_cache import PageKeys
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer


@functools.cache
def tiny(name: str = "tiny-phi-3.5-mini", original: int = 230) -> CausalLM:
    """A tiny model with peaked logits that crosses at 230 tokens, in the middle of a page."""
    return phi35.create(name, seed=0, initializer_range=0.15, original_max_position_embeddings=original)


def drawn(length: int, seed: int) -> list[int]:
    return torch.randint(3, 1000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: CausalLM, ids: list[int], **options: object) -> list[int]:
    decoding = Decoding(model, torch.tensor([ids]), **options)
    while not decoding.done:
        decoding.step()
    return decoding.new_ids(0)


def serve(batcher: Batcher, prompts: list[list[int]], **options: object) -> list[list[int]]:
    """New tokens of each prompt, all submitted at once."""
    numbers = [batcher.submit(torch.tensor(ids), **options) for ids in prompts]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    for emitted in batcher.run():
        found[emitted.request].append(emitted.token_id)
    return [found[number] for number in numbers]


@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_requests_that_begin_alike_share_pages_and_keep_their_texts(name: str) -> None:
    """A system prompt of 150 tokens, two full pages of which are found; one request is the prompt itself."""
    model = tiny(name)
    system = drawn(150, 0)
    prompts = [system + drawn(length, length) for length in (20, 33, 1)] + [system, system[:128], system[:129]]
    options = {"max_new_tokens": 12, "stop_token_ids": ()}
    batcher = Batcher(model, max_rows=4, max_tokens=2048, chunk_size=64)
    found = serve(batcher, prompts[:1], **options) + serve(batcher, prompts[1:], **options)
    assert found == [alone(model, ids, **options) for ids in prompts]
    statistics = batcher.prefix_statistics
    # 128 tokens for four, and 64 for the prompt of two whole pages, whose last token must be read.
    assert statistics.hit_tokens == 4 * 128 + 64
    assert statistics.prompt_tokens == sum(map(len, prompts))
    assert batcher.cache.num_free == batcher.cache.num_pages and not batcher.cache.table.any()


def test_the_next_turn_of_a_chat_finds_the_answer_before() -> None:
    model, options = tiny(), {"max_new_tokens": 70, "stop_token_ids": ()}
    batcher = Batcher(model, max_rows=2, max_tokens=1024)
    first = drawn(60, 1)
    (answer,) = serve(batcher, [first], **options)
    second = first + answer + drawn(10, 2)
    (found,) = serve(batcher, [second], max_new_tokens=12, stop_token_ids=())
    assert found == alone(model, second, max_new_tokens=12, stop_token_ids=())
    assert batcher.prefix_statistics.hit_tokens == 128, "both full pages, one of them made in decoding"


def test_pages_of_one_factor_set_never_serve_the_other() -> None:
    """The same 200 ids under short factors, in a longer prompt under long ones, and in a row that crosses."""
    model, options = tiny(), {"max_new_tokens": 24, "stop_token_ids": ()}
    short = drawn(200, 3)
    long = short + drawn(60, 4)
    crossing = short + drawn(20, 5)
    batcher = Batcher(model, max_rows=3, max_tokens=4096, chunk_size=96)
    assert serve(batcher, [short], **options) == [alone(model, short, **options)]
    before = batcher.prefix_statistics.hit_tokens
    assert serve(batcher, [long], **options) == [alone(model, long, **options)]
    assert batcher.prefix_statistics.hit_tokens == before, "the long row must not find short pages"
    assert serve(batcher, [crossing], **options) == [alone(model, crossing, **options)]
    # As a short row it finds the pages of the first request, as a long one those of the second.
    assert batcher.prefix_statistics.hit_tokens == before + 2 * 192
    for ids in (short, long, crossing):
        assert serve(batcher, [ids], **options) == [alone(model, ids, **options)]


def test_a_crossing_row_leaves_shared_pages_as_they_are() -> None:
    """Two rows share three short pages; one crosses while the other goes on reading them."""
    model = tiny()
    prompts = [drawn(220, 6), drawn(220, 6)[:200]]
    lengths = [30, 25]
    batcher = Batcher(model, max_rows=2, max_tokens=2048)
    serve(batcher, [drawn(200, 6)], max_new_tokens=1)
    numbers = [
        batcher.submit(torch.tensor(ids), max_new_tokens=count, stop_token_ids=())
        for ids, count in zip(prompts, lengths, strict=True)
    ]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    for emitted in batcher.run():
        found[emitted.request].append(emitted.token_id)
    for number, ids, count in zip(numbers, prompts, lengths, strict=True):
        assert found[number] == alone(model, ids, max_new_tokens=count, stop_token_ids=())
    assert batcher.prefix_statistics.hit_tokens >= 2 * 192


def test_pages_go_when_the_room_is_needed_the_longest_unused_first() -> None:
    """Eight pages: prompts of two full pages come and go; texts stay right and the latest is still found."""
    model, options = tiny(), {"max_new_tokens": 5, "stop_token_ids": ()}
    batcher = Batcher(model, max_rows=2, max_tokens=8 * PAGE_SIZE)
    prompts = [drawn(140, seed) for seed in range(10, 16)]
    for ids in prompts:
        assert serve(batcher, [ids], **options) == [alone(model, ids, **options)]
    assert batcher.prefix_statistics.hit_tokens == 0 and batcher.prefix_statistics.evicted_pages >= 4
    assert serve(batcher, [prompts[-1]], **options) == [alone(model, prompts[-1], **options)]
    assert batcher.prefix_statistics.hit_tokens == 128
    assert serve(batcher, [prompts[0]], **options) == [alone(model, prompts[0], **options)]
    assert batcher.prefix_statistics.hit_tokens == 128, "the first prompt's pages were given away"
    assert batcher.cache.num_free == 8


def test_changed_weights_need_the_pages_forgotten() -> None:
    model = phi35.create("tiny-phi-3.5-mini", seed=1, initializer_range=0.15)
    ids, options = drawn(140, 7), {"max_new_tokens": 8, "stop_token_ids": ()}
    batcher = Batcher(model, max_rows=2, max_tokens=1024)
    first = serve(batcher, [ids], **options)
    with torch.no_grad():
        model.model.layers[0].self_attn.qkv_proj.weight.neg_()
    batcher.cache.forget()
    second = serve(batcher, [ids], **options)
    assert second == [alone(model, ids, **options)] != first
    assert batcher.prefix_statistics.hit_tokens == 0 and batcher.cache.num_free == batcher.cache.num_pages


def test_without_prefix_caching_nothing_is_kept() -> None:
    batcher = Batcher(tiny(), max_tokens=1024, prefix_caching=False)
    ids = drawn(140, 8)
    assert serve(batcher, [ids], max_new_tokens=3) == serve(batcher, [ids], max_new_tokens=3)
    assert batcher.prefix_statistics.hit_tokens == 0 and batcher.cache.index.num_idle == 0


def test_pictures_count_by_content() -> None:
    """Equal ids with another picture give another text; the same picture again is found, and runs no tower."""
    model = phi35.create("tiny-phi-3.5-vision", seed=2, initializer_range=0.3, original_max_position_embeddings=300)
    processor = Processor(Tokenizer.from_folder(SMALL_MODEL), model.config)
    batcher = Batcher(model, max_rows=2, max_tokens=2048)

    def ask(*colours: str) -> tuple[list[int], list[int]]:
        pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
        batch = processor("<|image_1|> or <|image_2|> " + "what is this? " * 12, images=pictures, num_crops=1)
        assert batch["input_ids"].shape[1] > PAGE_SIZE
        number = batcher.submit(
            batch["input_ids"], batch["pixel_values"], batch["image_sizes"], max_new_tokens=12, stop_token_ids=()
        )
        new = [emitted.token_id for emitted in batcher.run() if emitted.request == number]
        kept, model.image_feature_cache = model.image_feature_cache, None
        decoding = Decoding(model, **batch, max_new_tokens=12, stop_token_ids=())
        while not decoding.done:
            decoding.step()
        model.image_feature_cache = kept
        return new, decoding.new_ids(0)

    for colours, hits in ((("red", "blue"), 0), (("blue", "red"), 0), (("red", "blue"), 128), (("red", "green"), 128)):
        new, expected = ask(*colours)
        assert new == expected
        assert batcher.prefix_statistics.hit_tokens == hits, colours
    assert (model.image_feature_cache.hits, model.image_feature_cache.misses) == (5, 3)
    # Without digests a picture's pages are nobody's: another picture in the same place must not find them.
    model.image_feature_cache = None
    for colours in (("red", "blue"), ("blue", "blue")):
        new, expected = ask(*colours)
        assert new == expected
    assert batcher.prefix_statistics.hit_tokens == 128


def test_keys_depend_on_tokens_order_pictures_and_factors() -> None:
    ids = drawn(8, 9)
    keys = PageKeys(4, False).first(ids, 2)
    assert PageKeys(4, False).first([*ids, 5], 2) == keys
    changed = [PageKeys(4, True).first(ids, 2), PageKeys(4, False).first(ids[4:] + ids[:4], 2)]
    changed.append(PageKeys(4, False).first([ids[0] + 1, *ids[1:]], 2))
    for other in changed:
        assert not set(other) & set(keys)
    shown = [-1, -1, 7, 8, 9, 10, 11, 12, -2, -2, -1, 3]
    one, two = (PageKeys(4, False, images).first(shown, 3) for images in ((b"a", b"b"), (b"a", b"c")))
    assert one[:2] == two[:2] and one[2] != two[2]
    in_order = [99, 99, 7, 8]
    one, two = (PageKeys(4, False, images, 99).first(in_order, 1) for images in ((b"a",), (b"b",)))
    assert one != two


def test_a_page_has_as_many_owners_as_rows_that_read_it() -> None:
    cache = PagedCache(tiny().config, 3, 6, 320)
    assert cache.reserve(0, 130)
    cache.register(0, [b"a", b"b"])
    assert cache.adopt(1, [b"a", b"b", b"c"]) == 2 and cache.adopt(2, [b"x", b"a"]) == 0
    assert torch.equal(cache.table[1, :2], cache.table[0, :2]) and cache.num_free == 2
    assert cache.num_shared([b"a", b"b"]) == 2
    cache.release(0)
    assert cache.num_free == 3 and cache.num_shared([b"a"]) == 1
    cache.release(1)
    assert cache.num_free == 5 and cache.num_shared([b"a"]) == 0
    assert cache.reserve(0, 256), "four pages, one of them given up: the last of the chain"
    assert cache.adopt(1, [b"a", b"b"]) == 1
