"""Keys and values in eight bits: what is stored, how large it is, and the text that comes of it."""

import functools

import pytest
import torch

import phi35
from phi35.cache import KVCache
from phi35.cache_codes import KINDS, decode, encode
from phi35.generation.batcher import Batcher
from phi35.generation.captured_steps import CapturedSteps
from phi35.generation.decoding import Decoding
from phi35.model import CausalLM


@functools.cache
def tiny(name: str = "tiny-phi-3.5-mini", **changes: object) -> CausalLM:
    """A tiny model with peaked logits that crosses at 32 tokens."""
    changes = {"original_max_position_embeddings": 32, **changes}
    return phi35.create(name, seed=0, initializer_range=0.15, **changes)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 1000, shape, generator=torch.Generator().manual_seed(seed))


def text_of(model: CausalLM, batch: dict[str, torch.Tensor], captured: bool = False, **options: object) -> list:
    """New ids of every row."""
    decoding = Decoding(model, **batch, stop_token_ids=(), **options)
    if captured:
        decoding._steps = CapturedSteps(model, decoding.options, decoding._active, plain=True)
    while not decoding.done:
        decoding.step()
    return [decoding.new_ids(row) for row in range(len(batch["input_ids"]))]


def padded(*lengths: int) -> dict[str, torch.Tensor]:
    longest = max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return {"input_ids": random_ids(len(lengths), longest), "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
def test_each_value_becomes_the_nearest_number_of_its_grid(kind: str) -> None:
    """Against a search through all 255 numbers of the grid; a head of zeros stays zero."""
    values = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 5)[:, None]
    values[1, 2] = 0
    codes, scales = encode(values, kind)
    grid = torch.arange(-127.0, 128.0)
    if kind == "fp8":
        every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).float()
        grid = every[every.isfinite()]
    assert codes.shape == values.shape and codes.dtype == torch.uint8 and scales.shape == values.shape[:-1]
    steps = scales.float()[..., None]
    found = decode(codes, scales, kind, torch.float32)
    assert (found[1, 2] == 0).all() and scales[1, 2] == 0
    nearest = (values[..., None] - grid * steps[..., None]).abs().amin(dim=-1)
    assert ((values - found).abs() - nearest).abs().max() <= 1e-6 * values.abs().max()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(decode(codes, scales, kind, dtype), found.to(dtype))
    largest = values.abs().amax(dim=-1)
    # Half a step, or half of e4m3's spacing of 2^-3; scales are rounded by at most 2^-9.
    bound = largest * (0.505 / 127 if kind == "int8" else 0.505 / 14)
    assert ((values - found).abs().amax(dim=-1) <= bound).all()


def test_a_cache_of_128k_tokens_takes_half_the_memory() -> None:
    config = phi35.create("phi-3.5-mini", device="meta").config
    sizes = [KVCache(config, 1, 2**17 - 1, "meta", torch.bfloat16, kind).nbytes for kind in (None, "int8", "fp8")]
    assert sizes == [51_539_607_552, 26_306_674_688, 26_306_674_688]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [[1] * 41, [13, 1, 1, 20, 6]])
@torch.no_grad()
def test_logits_do_not_depend_on_how_a_prompt_is_cut(chunks: list[int], kind: str) -> None:
    """Attention sees stored numbers within a chunk, too. Measured: 1.0e-5; without it 1e-2."""
    model, ids = tiny(), random_ids(2, 41)
    lengths = torch.full((2,), 41)
    whole = model(ids, past_key_values=model.new_cache(2, None, kind), rope_lengths=lengths).logits
    cache = model.new_cache(2, 64, kind)
    pieces = [model(piece, past_key_values=cache, rope_lengths=lengths).logits for piece in ids.split(chunks, dim=1)]
    exact = model(ids).logits
    scale = exact.std()
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-4 * scale
    error = float((whole - exact).norm() / exact.norm())
    # Measured, with random weights and peaked logits: 0.026 and 0.13.
    assert 1e-3 < error < (0.05 if kind == "int8" else 0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_rows_around_the_switch_get_the_text_they_get_alone(name: str, kind: str) -> None:
    """Plain steps, the captured steps' bookkeeping and the batcher; rows cross to the long factors, caches grow."""
    model, lengths = tiny(name), (1, 20, 31, 33, 45)
    batch, options = padded(*lengths), {"max_new_tokens": 14, "kv_cache_dtype": kind}
    together = text_of(model, batch, **options)
    assert text_of(model, batch, captured=True, prefill_chunk_size=7, **options) == together
    batcher = Batcher(model, max_rows=3, max_tokens=256, chunk_size=10, mode="plain", kv_cache_dtype=kind)
    prompts = [row[row_mask] for row, row_mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    for number, ids in enumerate(prompts):
        assert text_of(model, {"input_ids": ids[None]}, **options) == [together[number]]
        batcher.submit(ids, max_new_tokens=14, stop_token_ids=())
    found: dict[int, list[int]] = {}
    for emitted in batcher.run():
        found.setdefault(emitted.request, []).append(emitted.token_id)
    assert [found[number] for number in range(len(lengths))] == together


@pytest.mark.parametrize("kind", KINDS)
def test_the_small_model_answers_as_with_a_cache_in_its_own_dtype(kind: str) -> None:
    prompts = ["What is the capital of France?", "Describe a red circle.", "Count to five."]
    plain = phi35.generate(prompts, max_new_tokens=24)
    assert phi35.generate(prompts, max_new_tokens=24, kv_cache_dtype=kind) == plain


def test_unknown_kinds_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype must be one of .*'int8'.*got 'int4'"):
        phi35.generate("hello", kv_cache_dtype="int4")
    with pytest.raises(ValueError, match="kv_cache_dtype must be"):
        KVCache(tiny().config, 1, 8, kv_cache_dtype="bfloat16")
    with pytest.raises(ValueError, match="belongs to the batcher"):
        Batcher(tiny(), max_rows=1, max_tokens=64).submit(random_ids(4), kv_cache_dtype="int8")
    caches = [tiny().new_cache(1, 8, kind) for kind in (None, "fp8")]
    with pytest.raises(ValueError, match="stores torch.float32 and the other fp8"):
        caches[0].write_rows(torch.tensor([0]), caches[1])
