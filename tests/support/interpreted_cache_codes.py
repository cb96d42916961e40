"""Runs the decoding kernels over caches of codes, on the CPU in Triton's interpreter, and prints errors as JSON."""

import json
import sys

import interpreted_decoding as plain_cases  # sets TRITON_INTERPRET before Triton is imported
import torch
from interpreted_decoding import draw, norm_of, relative, row_of

from phi35.cache_codes import CODE_DTYPE, SCALE_DTYPE
from phi35.kernels import attention, batched, reference, vector
from phi35.kernels.attention import AttentionScratch
from phi35.kernels.configs import AttentionConfig, VectorConfig
from phi35.kernels.operands import LayerCache, Rope


def coded_cache(new, kind: str, rows: int, kv: int, slots: int, head_dim: int, page: int, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """A cache of codes, in shuffled pages where ``page`` is not 0, and one of the same contents, rows lying whole."""
    keys, values = new(rows, kv, slots, head_dim), new(rows, kv, slots, head_dim, scale=0.3)
    keys[0, 0, 3] = 0  # a head without a scale
    caches = []
    for size in (page, 0):
        table, shape = None, (rows, kv, slots, head_dim)
        if size:
            table = torch.randperm(rows * slots // size + 1, generator=torch.Generator().manual_seed(9))[1:].int()
            shape = (len(table) + 1, kv, size, head_dim)
            table = table.view(rows, slots // size)
        codes = [torch.zeros(shape, dtype=CODE_DTYPE) for _ in range(2)]
        scales = [torch.zeros(shape[:-1], dtype=SCALE_DTYPE) for _ in range(2)]
        cache = LayerCache(*codes, table, *scales, kind, dtype)
        for row in range(rows):
            places = torch.full((slots,), row), torch.arange(slots)
            cache.store(*places, keys[row].transpose(0, 1), values[row].transpose(0, 1))
        caches.append(cache)
    return caches


def differing(mine: LayerCache, plain: LayerCache) -> float:
    """Share of codes and scales that are not the same."""
    wrong, count = 0, 0
    for name in ("keys", "values", "key_scales", "value_scales"):
        mine_all, plain_all = (
            cache._gathered(getattr(cache, name), slice(None), plain.num_slots) for cache in (mine, plain)
        )
        wrong, count = wrong + int((mine_all != plain_all).sum()), count + plain_all.numel()
    return wrong / count


def attention_case(
    kind: str, kv: int, group: int, head_dim: int, splits: int, window: int | None, dtype: torch.dtype, page: int = 0
) -> dict[str, float]:
    """Norm, projection, rotation, codes and attention for rows of several lengths, the last beyond the cache."""
    new, width = draw(2, dtype), 48
    lengths, long = torch.tensor([0, 7, 33, 60]), torch.tensor([False, True, False, True])
    batch, num_heads = len(lengths), kv * group
    cache, plain = coded_cache(new, kind, batch, kv, 48, head_dim, page, dtype)
    rope = Rope(torch.rand(2, head_dim // 2, generator=torch.Generator().manual_seed(3)), torch.tensor([1.0, 1.2]))
    norm, hidden = norm_of("layernorm", new, width), new(batch, width)
    weight = new((num_heads + 2 * kv) * head_dim, width, scale=0.2)
    bias = new(weight.shape[0])
    projected, (queries, expected) = new(batch, weight.shape[0]), (new(batch, num_heads * head_dim) for _ in range(2))
    for row in range(batch):
        one = slice(row, row + 1)
        vector.project_logits(hidden[one], norm, weight, bias, projected[one], VectorConfig(4, 1), False)
    reference.project_qkv(hidden, norm, weight, bias, rope, lengths, long, expected, plain)
    batched.rotate_and_store(projected, rope, lengths, long, queries, cache)
    errors = {"query": relative(queries, expected), "codes": differing(cache, plain)}
    outs = [torch.full((batch, num_heads * head_dim), float("nan"), dtype=dtype) for _ in range(2)]
    scratch = AttentionScratch(batch, kv, group, head_dim, splits, hidden.device)
    config = AttentionConfig(splits=splits, block=16, num_warps=1)
    attention.attend(queries, cache, lengths, outs[0], scratch, window, config, False)
    reference.attend(queries, cache, lengths, outs[1], window)
    errors["attention"] = relative(*outs)
    return errors


def prompt_case(kind: str, kv: int, group: int, head_dim: int, page: int = 0) -> dict[str, float]:
    """Rotation and codes of packed prompts, and what their own chunk will attend to."""
    new, heads = draw(6), kv * group
    places = torch.tensor([2] * 5 + [0] * 7, dtype=torch.int32)
    positions = torch.cat([torch.arange(14, 19), torch.arange(7)]).int()
    use_long = (places == 2).int()
    rope = Rope(torch.rand(2, head_dim // 2, generator=torch.Generator().manual_seed(3)), torch.tensor([1.0, 1.2]))
    cache, plain = coded_cache(new, kind, 3, kv, 32, head_dim, page, torch.float32)
    mine = new(12, (heads + 2 * kv) * head_dim)
    expected = mine.clone()
    batched.rotate_prompt(mine, rope, positions, places, use_long, cache, heads)
    reference.rotate_prompt(expected, rope, positions, places, use_long, plain, heads)
    kept = mine.view(12, -1, head_dim)[:7, heads : heads + kv]
    read = row_of(cache, 2).read(0, 19)[0][0, :, 14:].transpose(0, 1)
    return {
        "projected": relative(mine, expected),
        "codes": differing(cache, plain),
        "as_read": relative(kept[:5], read),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    half, single = torch.float16, torch.float32
    report = {}
    for kind in ("int8", "fp8"):
        report |= {
            f"one {kind}": attention_case(kind, 2, 1, 48, 3, None, single),
            f"one window {kind}": attention_case(kind, 2, 1, 16, 1, 9, single, page=16),
            f"grouped {kind}": attention_case(kind, 2, 4, 16, 4, None, single, page=16),
            f"grouped half {kind}": attention_case(kind, 2, 2, 16, 2, 20, half),
            f"prompt {kind}": prompt_case(kind, 2, 3, 32),
            f"prompt paged {kind}": prompt_case(kind, 2, 1, 16, page=16),
        }
    report |= {
        "step": plain_cases.step_case("tiny-phi-3.5-mini", 1, "int8"),
        "batched_step": plain_cases.step_case("tiny-phi-3.5-moe", 3, "fp8"),
    }
    json.dump(report, sys.stdout, indent=1)
