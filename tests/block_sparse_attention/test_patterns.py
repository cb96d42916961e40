"""Which keys block-sparse layers see: against a loop over the published rule, exact masks and FlexAttention's alike."""

import phi_3_small_reference as reference
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from phi35 import block_sparse, presets
from phi35.block_sparse import PADDED, BlockPattern, attend_block_sparse, block_pattern, plan_places, plan_sequence
from phi35.config_io import to_hf_dict
from phi35.training.flops import attention_pairs, visible_pairs

CPU = torch.device("cpu")
SMALL = BlockPattern(block_size=16, num_local_blocks=2, vert_stride=4, head_step=1)


def published(pattern, num_heads):
    """A config.json's entries with the pattern."""
    assert max(1, pattern.vert_stride // num_heads) == pattern.head_step or pattern.head_step == 0
    return {
        "blocksparse_block_size": pattern.block_size,
        "blocksparse_num_local_blocks": pattern.num_local_blocks,
        "blocksparse_vert_stride": pattern.vert_stride,
        "blocksparse_homo_head_pattern": pattern.head_step == 0,
        "num_attention_heads": num_heads,
    }


def naive(pattern, num_heads, length):
    config = published(pattern, num_heads)
    seen = [
        [[reference.visible(config, head, q, k) for k in range(length)] for q in range(length)]
        for head in range(num_heads)
    ]
    return torch.tensor(seen)


def test_phi_3_smalls_own_pattern_at_places_around_every_edge():
    config = presets.get("phi-3-small-8k")
    pattern, entries = block_pattern(config), to_hf_dict(config)
    assert pattern == BlockPattern(block_size=64, num_local_blocks=16, vert_stride=8, head_step=1)
    edges = [0, 63, 64, 447, 448, 511, 512, 1022, 1023, 1024, 1025, 1087, 1088, 1472, 4095, 4096, 8191]
    places = torch.tensor(edges)
    seen = pattern.sees(torch.arange(32)[:, None, None], places[:, None], places[None])
    for head in range(32):
        for row, query in enumerate(edges):
            for column, key in enumerate(edges):
                assert seen[head, row, column] == reference.visible(entries, head, query, key), (head, query, key)


def test_up_to_the_local_blocks_attention_is_dense_and_one_token_later_it_is_not():
    pattern = block_pattern(presets.get("phi-3-small-8k"))
    assert pattern.dense_length == 1024
    places, heads = torch.arange(1025), torch.arange(32)[:, None]
    assert torch.equal(pattern.sees(heads, torch.tensor(1023), places), (places < 1024).expand(32, -1))
    last = pattern.sees(heads, torch.tensor(1024), places)
    assert last[:, 64:].all() and not last[:, :64].all()
    # Block 0 is seen by the heads h with (h + 1) % 8 == 0.
    assert last[:, 0].nonzero().flatten().tolist() == [7, 15, 23, 31]


@pytest.mark.parametrize("head_step", [0, 1])
def test_exact_masks_are_the_naive_rule(head_step):
    pattern = BlockPattern(block_size=16, num_local_blocks=2, vert_stride=4, head_step=head_step)
    plan = plan_sequence(pattern, (0, 5), 0, 100, 100, CPU)
    assert torch.equal(plan.mask[0], naive(pattern, 5, 100))
    later = plan_sequence(pattern, (2, 5), 70, 30, 100, CPU)
    assert torch.equal(later.mask[0], naive(pattern, 5, 100)[2:, 70:])


def test_heads_that_differ_by_several_blocks():
    pattern = block_pattern(presets.get("tiny-phi-3-small-8k"))
    assert pattern.head_step == 2
    assert torch.equal(plan_sequence(pattern, (0, 4), 0, 150, 150, CPU).mask[0], naive(pattern, 4, 150))


def test_large_masks_are_made_for_a_few_queries_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, 100, 8, generator=generator)
    keys, values = torch.randn(2, 2, 2, 100, 8, generator=generator)
    whole = plan_sequence(SMALL, (0, 4), 0, 100, 100, CPU)
    expected = attend_block_sparse(queries, keys, values, whole, scale=0.2)
    monkeypatch.setattr(block_sparse, "MASK_ELEMENTS", 4 * 100 * 7)
    parts = plan_sequence(SMALL, (0, 4), 0, 100, 100, CPU)
    assert whole.mask is not None and parts.mask is None
    # 1.2e-7 measured: another order of summation.
    torch.testing.assert_close(
        attend_block_sparse(queries, keys, values, parts, scale=0.2), expected, atol=1e-6, rtol=0
    )
    scores = torch.einsum("bhqd,bhkd->bhqk", queries, keys.repeat_interleave(2, 1)) * 0.2
    slow = scores.masked_fill(~naive(SMALL, 4, 100), -torch.inf).softmax(-1) @ values.repeat_interleave(2, 1)
    torch.testing.assert_close(expected, slow, atol=1e-6, rtol=0)


def test_padding_is_seen_by_padding_alone():
    places = torch.tensor([[PADDED, PADDED, 0, 1, 2]])
    mask = plan_places(SMALL, (0, 1), places, places).mask[0, 0]
    assert mask[2:].tolist() == [
        [False, False, True, False, False],
        [False, False, True, True, False],
        [False] * 2 + [True] * 3,
    ]
    assert mask[:2, :2].all()


@pytest.mark.parametrize(
    ("first", "length", "num_keys"), [(0, 300, 300), (64, 200, 264), (37, 129, 166), (299, 128, 427), (0, 128, 128)]
)
@pytest.mark.parametrize("key_block", [16, 64])
def test_flex_attentions_blocks_hold_what_is_seen(first, length, num_keys, key_block):
    """Blocks called whole are seen by every query in them, blocks left out by none, and the rest asks the rule."""
    blocks = block_sparse.flex_blocks(
        SMALL, (0, 4), first, length, num_keys, CPU, gradients=True, key_block=key_block, options={}
    )
    mask = blocks.mask
    exact = plan_sequence(SMALL, (0, 4), first, length, num_keys, CPU).mask[0]
    assert mask.shape == (1, 4, length, num_keys)
    rows, columns = -(-length // 128), -(-num_keys // key_block)
    kinds = {}
    for kind, counts, order in (
        ("partial", mask.kv_num_blocks, mask.kv_indices),
        ("whole", mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        kinds[kind] = {
            (head, row, int(order[0, head, row, place]))
            for head in range(4)
            for row in range(rows)
            for place in range(int(counts[0, head, row]))
        }
    assert not kinds["partial"] & kinds["whole"]
    for head in range(4):
        for row in range(rows):
            for column in range(columns):
                part = exact[head, row * 128 : row * 128 + 128, column * key_block : (column + 1) * key_block]
                block = head, row, column
                if block in kinds["whole"]:
                    assert part.all() and part.shape[1] == key_block
                elif block not in kinds["partial"]:
                    assert not part.any()
                else:
                    assert part.any()
    heads, queries, keys = torch.arange(4)[:, None, None], torch.arange(length)[:, None], torch.arange(num_keys)
    assert torch.equal(mask.mask_mod(torch.tensor(0), heads, queries, keys), exact)
    # What gradients read: which queries take a block of keys. As torch turns it round.
    turned = BlockMask.from_kv_blocks(
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, mask.BLOCK_SIZE
    )
    for kind in ("q", "full_q"):
        counts, order = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
        assert torch.equal(counts, getattr(turned, f"{kind}_num_blocks"))
        assert torch.equal(order, getattr(turned, f"{kind}_indices"))
    if first == 0 and length > 128 and key_block == 16:
        assert kinds["whole"] and len(kinds["partial"]) + len(kinds["whole"]) < 4 * rows * columns * 0.6


def test_flex_attention_gives_what_the_exact_mask_gives():
    from torch.nn.attention.flex_attention import flex_attention

    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 4, 130, 16, generator=generator)
    keys, values = torch.randn(2, 1, 2, 200, 16, generator=generator)
    plan = plan_sequence(SMALL, (0, 4), 70, 130, 200, CPU)
    expected = attend_block_sparse(queries, keys, values, plan, scale=0.3)
    mask = block_sparse.flex_blocks(SMALL, (0, 4), 70, 130, 200, CPU, gradients=True, key_block=64, options={}).mask
    with pytest.warns(UserWarning, match="without torch.compile"):
        found = flex_attention(queries, keys, values, block_mask=mask, scale=0.3, enable_gqa=True)
    # 2e-7 measured.
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("length", [1, 64, 65, 150, 300])
def test_counted_pairs_are_the_masks(length):
    config = presets.get("tiny-phi-3-small-8k")
    seen = int(naive(block_pattern(config), 4, length).sum())
    dense = length * (length + 1) // 2
    assert attention_pairs(length, config) == round((seen / 4 + dense) / 2)
    assert attention_pairs(length, presets.get("tiny-phi-3-mini-4k")) == visible_pairs(length, 2047) == dense
