"""Caches of codes on a CUDA device: captured steps and the batcher against the plain path, in float32."""

import pytest
import torch

import phi35
from phi35.generation.batcher import Batcher
from phi35.generation.decoding import Decoding
from phi35.generation.fast_step import DecodeStep
from phi35.kernels.operands import LayerCache

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
@torch.no_grad()
def test_captured_steps_give_the_plain_paths_logits(name: str, rows: int, kind: str) -> None:
    """The same tokens for both, rows of 5 to 40 under both factor sets.

    Kernels and torch round sines otherwise, so that here and there a code falls to its neighbour: 1e-3 of the logits,
    where a wrong scale or code gives 1.
    """
    changes = {"original_max_position_embeddings": 32}
    model = phi35.create(name, seed=0, initializer_range=0.15, device="cuda", dtype="float32", **changes)
    lengths = torch.tensor((5, 20, 31, 40)[-rows:])
    ids = torch.randint(3, 1000, (rows, 48), generator=torch.Generator().manual_seed(0)).cuda()
    inputs = {"attention_mask": torch.arange(40) >= 40 - lengths[:, None], "rope_lengths": lengths + 8}
    caches = [model.new_cache(rows, 64, kind) for _ in range(2)]
    for cache in caches:
        model(ids[:, :40], past_key_values=cache, **inputs)
    step = DecodeStep(model, caches[0])
    if rows == 1 or name == "tiny-phi-3.5-mini":  # a sparse batch in float32 waits for the device
        step.capture()
    for place in range(40, 48):
        step.state.tokens.copy_(ids[:, place])
        step.run()
        expected = model(ids[:, place : place + 1], past_key_values=caches[1]).logits[:, 0]
        assert (step.logits - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_batcher_serves_requests_from_such_a_cache(kind: str) -> None:
    """Log-probabilities of the first tokens, which come from prompts read in chunks by the kernels."""
    changes = {"original_max_position_embeddings": 32}
    model = phi35.create("tiny-phi-3.5-mini", seed=0, initializer_range=0.15, device="cuda", dtype="float32", **changes)
    ids = torch.randint(3, 1000, (3, 40), generator=torch.Generator().manual_seed(0))
    batcher = Batcher(model, max_rows=2, max_tokens=1024, chunk_size=16, kv_cache_dtype=kind)
    numbers = [batcher.submit(row, max_new_tokens=6, stop_token_ids=()) for row in ids]
    served: dict[int, list[float]] = {}
    for emitted in batcher.run():
        served.setdefault(emitted.request, []).append(emitted.logprob)
    for number, row in zip(numbers, ids, strict=True):
        alone = Decoding(
            model, row[None], fast=False, max_new_tokens=6, stop_token_ids=(), kv_cache_dtype=kind, return_logprobs=True
        )
        while not alone.done:
            alone.step()
        assert len(served[number]) == 6
        assert abs(served[number][0] - alone.logprobs(0)[0]) < 5e-2


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("num_kv", "group", "head_dim"), [(32, 1, 96), (8, 4, 128)])
def test_attention_over_codes_of_full_size_equals_the_plain_form(
    num_kv: int, group: int, head_dim: int, kind: str
) -> None:
    """bfloat16 queries over 3,000 keys; the plain form restores keys in bfloat16, which rounds once more."""
    from phi35.cache_codes import CODE_DTYPE, SCALE_DTYPE
    from phi35.kernels import attention, reference
    from phi35.kernels.attention import AttentionScratch
    from phi35.kernels.tuning import DEFAULT

    torch.manual_seed(0)
    shape = (2, num_kv, 3073, head_dim)
    codes = [torch.zeros(shape, dtype=CODE_DTYPE, device="cuda") for _ in range(2)]
    scales = [torch.zeros(shape[:-1], dtype=SCALE_DTYPE, device="cuda") for _ in range(2)]
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        cache = LayerCache(*codes, None, *scales, kind, dtype)
        keys, values = (torch.randn(3073, num_kv, head_dim, device="cuda") for _ in range(2))
        for row in range(2):
            places = torch.full((3073,), row, device="cuda"), torch.arange(3073, device="cuda")
            cache.store(*places, keys, values)
        query = torch.randn(2, num_kv * group * head_dim, device="cuda").to(dtype)
        lengths = torch.tensor([3000, 17], device="cuda")
        config = DEFAULT.attention(2, num_kv, group, cache.num_slots, coded=True)
        scratch = AttentionScratch(2, num_kv, group, head_dim, config.splits, query.device)
        found, expected = torch.empty_like(query), torch.empty_like(query, dtype=torch.float32)
        attention.attend(query, cache, lengths, found, scratch, None, config, False)
        wide = LayerCache(*codes, None, *scales, kind, torch.float32)
        reference.attend(query.float(), wide, lengths, expected, None)
        errors[dtype] = float((found.float() - expected).norm() / expected.norm())
    assert errors[torch.bfloat16] < 5e-3 and errors[torch.float32] < 1e-5, errors
