"""Rows spread over processes: logits and gradients are those of one process."""

import pytest
import torch
from distributed import run_distributed
from tiny_configs import longrope_config

from phi35.model import CausalLM
from phi35.sequence_parallel import kv_copies

LENGTH = 48
ROWS = ((5, 40), (48,), (17, 20))
"""The original length is 32: 40 and 48 take the long factors; the samples cross the border between processes."""

BLOCKS = {
    "blocksparse_block_size": 4,
    "blocksparse_num_local_blocks": 2,
    "blocksparse_vert_stride": 4,
    "mup_use_scaling": True,
}
"""Each head sees other blocks: a process must know which heads are its own."""


def built(**changes):
    model = CausalLM(longrope_config(32, **changes)).train()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def batch(rows=ROWS):
    ids = torch.randint(0, 150, (len(rows), LENGTH), generator=torch.Generator().manual_seed(1))
    lengths = torch.zeros(len(rows), 2, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        lengths[number, : len(row)] = torch.tensor(row)
        first = 0
        for size in row:
            targets[number, first : first + size - 1] = ids[number, first + 1 : first + size]
            first += size
    return ids, lengths, targets


def split_pass(rank, world_size, changes, rows, checkpointing):
    from phi35.sequence_parallel import SequenceParallel

    model = built(**changes)
    model.gradient_checkpointing = checkpointing
    ids, lengths, targets = batch(rows)
    shared = model.model.sequence_parallel = SequenceParallel(torch.distributed.group.WORLD)
    mine = shared.local(targets)
    output = model(shared.local(ids), sequence_lengths=lengths, targets=mine, return_logits=True)
    # Each process's share of the mean over all tokens: the sum of the processes' gradients is the whole's.
    (output.loss * (int((mine >= 0).sum()) / int((targets >= 0).sum()))).backward()
    return output.logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "size, changes, rows, checkpointing",
    [
        (2, {}, ROWS, False),
        (2, {}, ROWS, True),
        (2, {}, ((48,), (48,)), False),
        (4, {}, ROWS, False),
        (3, {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}, ROWS, False),
        (2, {"num_key_value_heads": 1, "sliding_window": 9}, ROWS, False),
        (2, BLOCKS, ROWS, False),
        (2, BLOCKS, ((48,), (48,)), True),
    ],
    ids=[
        "packed",
        "checkpointed",
        "plain",
        "4 processes, 2 key heads",
        "3 processes, 2 key heads",
        "window",
        "blocks",
        "blocks, plain",
    ],
)
def test_logits_and_gradients_equal_one_process(size, changes, rows, checkpointing):
    whole = built(**changes)
    ids, lengths, targets = batch(rows)
    expected = whole(ids, sequence_lengths=lengths, targets=targets, return_logits=True)
    expected.loss.backward()
    results = run_distributed(split_pass, size, changes, rows, checkpointing)
    # Measured: logits 1.4e-6 of up to 4.5, gradients 1.2e-7.
    torch.testing.assert_close(torch.cat([logits for logits, _ in results], dim=1), expected.logits, rtol=0, atol=5e-6)
    for name, parameter in whole.named_parameters():
        total = torch.stack([gradients[name] for _, gradients in results]).sum(dim=0)
        torch.testing.assert_close(total, parameter.grad, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "heads, kv_heads, size, copies", [(32, 32, 8, 1), (32, 8, 8, 1), (32, 8, 16, 2), (40, 10, 4, 2), (6, 2, 3, 3)]
)
def test_key_heads_are_repeated_as_little_as_possible(heads, kv_heads, size, copies):
    assert kv_copies(heads, kv_heads, size) == copies


def test_heads_that_cannot_be_spread_are_refused():
    with pytest.raises(ValueError, match="must divide the model's 32 attention heads"):
        kv_copies(32, 8, 3)


def refused(rank, world_size):
    from phi35.sequence_parallel import SequenceParallel

    model = built()
    ids, lengths, _ = batch()
    shared = model.model.sequence_parallel = SequenceParallel(torch.distributed.group.WORLD)
    messages = []
    for tokens, options in (
        (ids[:, :24], {"labels": ids[:, :24], "sequence_lengths": lengths}),
        (ids[:, :24], {}),
        (ids[:, :24], {"sequence_lengths": lengths, "use_cache": True}),
    ):
        try:
            model(tokens, **options)
        except ValueError as error:
            messages.append(str(error))
    try:
        shared.local(ids[:, :47])
    except ValueError as error:
        messages.append(str(error))
    return messages


def test_inputs_that_a_shared_row_cannot_take_are_refused():
    (messages, _) = run_distributed(refused, 2)
    assert len(messages) == 4
    for message, words in zip(messages, ("targets alone", "sequence_lengths", "nor a cache", "47 tokens"), strict=True):
        assert words in message.replace("\n", " ") or words in message
