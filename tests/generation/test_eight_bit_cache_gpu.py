"""Caches of codes on a CUDA device: captured steps and the batcher against the plain loop, in float32."""

import pytest
import torch

import phi35
from phi35.generation.batcher import Batcher
from phi35.generation.captured_steps import CapturedSteps
from phi35.generation.decoding import Decoding
from phi35.kernels.operands import LayerCache

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_graphs_and_the_batcher_give_the_plain_loops_text(name: str, rows: int, kind: str) -> None:
    """Rows of 5 to 40 tokens around an original length of 32; few tokens, as a code may fall to its neighbour."""
    changes = {"original_max_position_embeddings": 32}
    model = phi35.create(name, seed=0, initializer_range=0.15, device="cuda", dtype="float32", **changes)
    lengths = torch.tensor((5, 20, 31, 40)[-rows:])
    ids = torch.randint(3, 1000, (rows, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) >= 40 - lengths[:, None]
    options = {"max_new_tokens": 8, "stop_token_ids": (), "kv_cache_dtype": kind, "return_logprobs": True}
    found = {}
    for fast in (False, None):
        decoding = Decoding(model, ids, mask, fast=fast, **options)
        while not decoding.done:
            decoding.step()
        found[fast] = decoding
    if rows == 1 or name == "tiny-phi-3.5-mini":  # a sparse batch in float32 has no graph
        assert type(found[None]._steps) is CapturedSteps
    batcher = Batcher(model, max_rows=rows, max_tokens=1024, chunk_size=16, kv_cache_dtype=kind)
    for row, real in zip(ids, mask, strict=True):
        batcher.submit(row[real], max_new_tokens=8, stop_token_ids=())
    served: dict[int, list[int]] = {}
    for emitted in batcher.run():
        served.setdefault(emitted.request, []).append(emitted.token_id)
    for row in range(rows):
        expected = found[False]
        assert found[None].new_ids(row) == served[row] == expected.new_ids(row)
        errors = [abs(a - b) for a, b in zip(found[None].logprobs(row), expected.logprobs(row), strict=True)]
        assert max(errors) < 2e-2  # exact codes give 1e-5; one that fell to its neighbour, with random weights, 1e-2


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
