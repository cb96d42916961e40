"""Requests that join and leave a running batch get the text they would get alone (greedy and sampled, float32, CPU)."""

import functools
import random

import pytest
import torch
from every_other import EveryOther
from PIL import Image

import phi35
from phi35.api import SMALL_MODEL
from phi35.generation.batcher import Batcher, Emitted
from phi35.generation.decoding import Decoding
from phi35.model import CausalLM
from phi35.paged_cache import PAGE_SIZE, PagedCache
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer


@functools.cache
def tiny(name: str = "tiny-phi-3.5-mini", original: int = 90) -> CausalLM:
    """A tiny model with peaked logits that crosses at 90 tokens, in the middle of a page."""
    return phi35.create(name, seed=0, initializer_range=0.15, original_max_position_embeddings=original)


@functools.cache
def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 1000, (length,), generator=torch.Generator().manual_seed(1000 * seed + length))


def alone(model: CausalLM, ids: torch.Tensor, **options: object) -> tuple[list[int], list[float]]:
    """What the request gets by itself."""
    decoding = Decoding(model, ids[None], return_logprobs=True, **options)
    while not decoding.done:
        decoding.step()
    return decoding.new_ids(0), decoding.logprobs(0)


def gather(emitted: list[Emitted]) -> dict[int, tuple[list[int], list[float], str | None]]:
    """Tokens, log-probabilities and the reason of the end of every request."""
    found: dict[int, tuple[list[int], list[float], str | None]] = {}
    for one in emitted:
        ids, logprobs, reason = found.get(one.request, ([], [], None))
        assert reason is None, "a token after the end"
        if one.token_id >= 0:
            ids.append(one.token_id)
            logprobs.append(one.logprob)
        found[one.request] = (ids, logprobs, one.finish_reason)
    return found


def assert_alike(model: CausalLM, found: object, wanted: list[tuple[torch.Tensor, dict[str, object]]]) -> None:
    """Same ids; log-probabilities as near as float32 comes (measured: 6.0e-6)."""
    for number, (ids, options) in enumerate(wanted):
        tokens, logprobs, reason = found[number]  # type: ignore[index]
        expected, expected_logprobs = alone(model, ids, **options)
        assert tokens == expected, number
        assert max(abs(a - b) for a, b in zip(logprobs, expected_logprobs, strict=True)) < 5e-5
        assert reason in ("stop", "length")


@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_requests_that_join_at_any_time_get_their_own_text(name: str) -> None:
    """Twelve requests over four rows, joining while others run; prompts in chunks; several cross at 90 tokens."""
    model = tiny(name)
    batcher = Batcher(model, max_rows=4, max_tokens=2048, chunk_size=48)
    lengths = [5, 80, 60, 88, 1, 90, 91, 130, 20, 63, 64, 65]
    wanted: list[tuple[torch.Tensor, dict[str, object]]] = []
    for number, length in enumerate(lengths):
        options: dict[str, object] = {"max_new_tokens": 6 + 3 * (number % 5), "stop_token_ids": ()}
        if number % 3 == 1:
            options |= {"temperature": 0.9, "top_p": 0.9, "seed": number}
        if number % 4 == 2:
            options |= {"repetition_penalty": 1.3}
        wanted.append((prompt(length), options))
    emitted: list[Emitted] = []
    order = random.Random(0)
    for ids, options in wanted:
        batcher.submit(ids, **options)
        for _ in range(order.randrange(4)):
            emitted += batcher.step()
    emitted += list(batcher.run())
    assert_alike(model, gather(emitted), wanted)
    assert batcher.idle and batcher.cache.num_free == batcher.cache.num_pages
    assert not batcher.cache.table.any() and not batcher.cache.step_table.any()


def test_the_repetition_penalty_counts_the_last_tokens_too() -> None:
    """A penalty so strong that a token seen just before decides the next one."""
    model = tiny()
    batcher = Batcher(model, max_rows=4, max_tokens=2048)
    wanted: list[tuple[torch.Tensor, dict[str, object]]] = []
    for number in range(4):
        options: dict[str, object] = {"max_new_tokens": 30, "stop_token_ids": (), "repetition_penalty": 4.0}
        if number % 2:
            options |= {"temperature": 1.5, "seed": number}
        wanted.append((prompt(3 + number), options))
        batcher.submit(prompt(3 + number), **options)
    assert_alike(model, gather(list(batcher.run())), wanted)


def test_a_request_crosses_while_a_long_prompt_has_been_read_in_part() -> None:
    """The second prompt takes five chunks; the first request passes token 90 after the first of them."""
    model, batcher = tiny(), Batcher(tiny(), max_rows=2, max_tokens=1024, chunk_size=48)
    wanted: list[tuple[torch.Tensor, dict[str, object]]] = []
    emitted: list[Emitted] = []
    for length in (88, 200):
        wanted.append((prompt(length), {"max_new_tokens": 8, "stop_token_ids": ()}))
        batcher.submit(*wanted[-1][:1], **wanted[-1][1])
        while length == 88 and not batcher._running():
            emitted += batcher.step()
    assert_alike(model, gather(emitted + list(batcher.run())), wanted)


def test_prompts_whose_beginning_is_cached_are_read_in_one_chunk() -> None:
    """Three at once, 128 of whose tokens an earlier request has left in the cache, and one without a beginning."""
    model = tiny()
    batcher = Batcher(model, max_rows=4, max_tokens=2048)
    wanted: list[tuple[torch.Tensor, dict[str, object]]] = []
    emitted: list[Emitted] = []
    for endings in ((3,), (5, 9, 0, 20)):
        for length in endings:
            ids = torch.cat((prompt(150), prompt(length))) if length else prompt(30)
            wanted.append((ids, {"max_new_tokens": 6, "stop_token_ids": ()}))
            batcher.submit(ids, max_new_tokens=6, stop_token_ids=())
        emitted += list(batcher.run())
    assert_alike(model, gather(emitted), wanted)
    assert batcher.prefix_statistics.hit_tokens == 3 * 128


def test_requests_that_do_not_fit_together_wait_or_begin_again() -> None:
    """Six requests of up to 150 tokens in 5 pages of 64: the youngest lose their pages and get the same text."""
    model = tiny()
    batcher = Batcher(model, max_rows=6, max_tokens=5 * PAGE_SIZE, chunk_size=64)
    wanted = [(prompt(length, 1), {"max_new_tokens": 60, "stop_token_ids": ()}) for length in (50, 60, 90, 30, 62, 40)]
    sent_back: list[int] = []
    send = batcher._send_back
    batcher._send_back = lambda request: (sent_back.append(request.number), send(request))[1]  # type: ignore[method-assign]
    for ids, options in wanted:
        batcher.submit(ids, **options)
    assert_alike(model, gather(list(batcher.run())), wanted)
    assert sent_back, "the test must run out of pages"
    assert batcher.cache.num_free == 5


def test_stop_strings_and_stop_ids_end_requests() -> None:
    model, tokenizer = tiny(), Tokenizer.from_folder(SMALL_MODEL)
    whole, _ = alone(model, prompt(20), max_new_tokens=30, stop_token_ids=())
    text = tokenizer.decode(whole)
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    batcher = Batcher(model, max_tokens=1024, tokenizer=tokenizer)
    batcher.submit(prompt(20), max_new_tokens=30, stop_token_ids=(), stop=middle)
    batcher.submit(prompt(20), max_new_tokens=30, stop_token_ids=(whole[7],))
    found = gather(list(batcher.run()))
    assert found[0][2] == found[1][2] == "stop"
    assert found[1][0] == whole[: whole.index(whole[7]) + 1]
    assert found[0][0] == whole[: len(found[0][0])] and middle in tokenizer.decode(found[0][0])


def test_a_cancelled_request_gives_its_pages_back_and_the_others_go_on() -> None:
    model = tiny()
    batcher = Batcher(model, max_rows=2, max_tokens=1024)
    options = {"max_new_tokens": 20, "stop_token_ids": ()}
    numbers = [batcher.submit(prompt(length), **options) for length in (10, 70, 30)]
    emitted = batcher.step() + batcher.step()
    assert batcher.cancel(numbers[1]) and batcher.cancel(numbers[2]) and not batcher.cancel(99)
    emitted += list(batcher.run())
    found = gather(emitted)
    assert found[0][0] == alone(model, prompt(10), **options)[0]
    assert [found[number][2] for number in numbers] == ["length", "cancelled", "cancelled"]
    assert not batcher.cancel(numbers[0])
    assert batcher.cache.num_free == batcher.cache.num_pages


def test_requests_with_pictures() -> None:
    model = phi35.create("tiny-phi-3.5-vision", seed=2, initializer_range=0.3, original_max_position_embeddings=100)
    processor = Processor(Tokenizer.from_folder(SMALL_MODEL), model.config)
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    batcher = Batcher(model, max_rows=3, max_tokens=1024, chunk_size=16)
    batches = [
        processor("<|image_2|> or <|image_1|>", images=[red, blue], num_crops=1),
        processor("<|image_1|> and " + "what is this? " * 4, images=[blue], num_crops=1),
        processor("what is this? " * 20),
    ]
    for batch in batches:
        batcher.submit(
            batch["input_ids"],
            batch.get("pixel_values"),
            batch.get("image_sizes"),
            max_new_tokens=40,
            stop_token_ids=(),
        )
    found = gather(list(batcher.run()))
    for number, batch in enumerate(batches):
        decoding = Decoding(model, **batch, max_new_tokens=40, stop_token_ids=())
        while not decoding.done:
            decoding.step()
        assert found[number][0] == decoding.new_ids(0)


def constrained_alone(model: CausalLM, ids: torch.Tensor, count: int, temperature: float, seed: int) -> list[int]:
    """A constrained continuation by whole passes without a cache, one token at a time."""
    tokens = ids.tolist()
    generator = torch.Generator().manual_seed(seed)
    for made in range(count):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([tokens])).logits[0, -1].float()
        scores[torch.arange(len(scores)) % 2 != made % 2] = -torch.inf
        if temperature == 0:
            tokens.append(int(scores.argmax()))
        else:
            cumulative = (scores / temperature).softmax(dim=-1).double().cumsum(dim=-1)
            draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
            tokens.append(int((cumulative > draw).int().argmax()))
    return tokens[len(ids) :]


def test_constrained_requests_choose_among_allowed_tokens_beside_free_ones() -> None:
    """Four of six are constrained; two cross at 90 tokens, pages run out, and one ends with its constraint."""
    model = tiny()
    batcher = Batcher(model, max_rows=4, max_tokens=6 * PAGE_SIZE, chunk_size=48)
    lengths, ends = [20, 80, 60, 85, 33, 62], {4: 5}
    for number, length in enumerate(lengths):
        constraint = EveryOther(model.config.vocab_size, ends.get(number)) if number not in (0, 2) else None
        temperature = 0.8 if number == 3 else 0.0
        batcher.submit(
            prompt(length),
            constraint=constraint,
            max_new_tokens=14,
            stop_token_ids=(),
            temperature=temperature,
            seed=number,
        )
    found = gather(list(batcher.run()))
    for number, length in enumerate(lengths):
        tokens, _, reason = found[number]
        if number in (0, 2):
            expected = alone(model, prompt(length), max_new_tokens=14, stop_token_ids=())[0]
        else:
            temperature = 0.8 if number == 3 else 0.0
            expected = constrained_alone(model, prompt(length), ends.get(number, 14), temperature, number)
        assert tokens == expected, number
        assert reason == ("stop" if number in ends else "length")
    assert batcher.cache.num_free == batcher.cache.num_pages


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_constraint_that_cannot_go_on_ends_its_own_request(fails_at: int) -> None:
    model = tiny()
    batcher = Batcher(model, max_rows=2, max_tokens=1024)
    batcher.submit(prompt(9), constraint=EveryOther(model.config.vocab_size, fails_at=fails_at), stop_token_ids=())
    batcher.submit(prompt(9), max_new_tokens=8, stop_token_ids=())
    emitted = list(batcher.run())
    found = gather(emitted)
    assert len(found[0][0]) == fails_at and found[0][2] == "error"
    assert [one.error for one in emitted if one.finish_reason == "error"] == ["no way to go on"]
    assert found[1][0] == alone(model, prompt(9), max_new_tokens=8, stop_token_ids=())[0]


def test_alternatives_are_the_models_most_likely_tokens() -> None:
    """Log-probabilities as near as float32 comes (measured: 2.9e-6), under no mask and no temperature."""
    model, ids = tiny(), prompt(30)
    batcher = Batcher(model, max_rows=2, max_tokens=1024)
    constraint = EveryOther(model.config.vocab_size)
    batcher.submit(ids, constraint=constraint, num_alternatives=4, max_new_tokens=5, stop_token_ids=())
    batcher.submit(ids, max_new_tokens=5, stop_token_ids=())
    error = 0.0
    for one in batcher.run():
        if one.request == 1:
            assert one.alternatives == ()
            continue
        with torch.no_grad():
            logprobs = model(input_ids=ids[None]).logits[0, -1].log_softmax(dim=-1)
        values, tokens = logprobs.topk(4)
        assert [token for token, _ in one.alternatives] == tokens.tolist()
        error = max(error, *(abs(a - b) for (_, a), b in zip(one.alternatives, values.tolist(), strict=True)))
        error = max(error, abs(one.logprob - float(logprobs[one.token_id])))
        ids = torch.cat((ids, torch.tensor([one.token_id])))
    assert error < 2e-5, error
    print("alternatives", error)


def test_the_longest_request_ends_at_the_batchers_length() -> None:
    model = tiny()
    batcher = Batcher(model, max_rows=1, max_tokens=128, max_length=70)
    batcher.submit(prompt(60), max_new_tokens=100, stop_token_ids=())
    found = gather(list(batcher.run()))
    assert len(found[0][0]) == 10 and found[0][2] == "length"
    assert found[0][0] == alone(model, prompt(60), max_new_tokens=10, stop_token_ids=())[0]


def test_bad_arguments_are_named() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="max_rows"):
        Batcher(model, max_rows=0)
    with pytest.raises(ValueError, match="mode must be"):
        Batcher(model, mode="fast")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="run on CUDA"):
            Batcher(model, mode="graphs")
    batcher = Batcher(model, max_tokens=64)
    with pytest.raises(ValueError, match="at most 64"):
        batcher.submit(prompt(64))
    with pytest.raises(ValueError, match="temperature"):
        batcher.submit(prompt(4), temperature=-1)
    with pytest.raises(ValueError, match="num_alternatives"):
        batcher.submit(prompt(4), num_alternatives=21)
    with pytest.raises(ValueError, match="one prompt at a time"):
        batcher.submit(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 1 row"):
        PagedCache(model.config, 0, 4, 64)


def test_pages_are_handed_out_once_and_taken_back() -> None:
    cache = PagedCache(tiny().config, 2, 6, 256)
    assert cache.num_pages == cache.num_free == 5
    assert cache.reserve(0, 65) and cache.reserve(1, 128)
    assert not cache.reserve(1, 256) and cache.num_free == 1
    owned = cache.table[cache.table > 0].tolist()
    assert len(owned) == len(set(owned)) == 4
    cache.set_stepped(0, True)
    assert cache.reserve(0, 129)
    assert torch.equal(cache.step_table[0], cache.table[0]) and not cache.step_table[1].any()
    cache.release(0)
    assert cache.num_free == 3 and not cache.table[0].any() and not cache.step_table[0].any()
