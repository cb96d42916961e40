"""The harness that the distributed tests stand on: results, failures and hangs of single ranks."""

import time

import pytest
import torch
from distributed import RankError, run_distributed


def sum_over_ranks(rank, world_size, offset):
    value = torch.tensor([float(rank + offset)])
    torch.distributed.all_reduce(value)
    return rank, value


def fail_on_rank_one(rank, world_size):
    if rank == 1:
        raise KeyError("the message of rank one")
    torch.distributed.barrier()


def hang_on_rank_zero(rank, world_size):
    if rank == 0:
        time.sleep(60)


def test_results_come_back_in_rank_order():
    results = run_distributed(sum_over_ranks, 2, 5)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(value.item() == 11.0 for _, value in results)


def test_a_failing_rank_raises_with_its_traceback_and_ends_the_others():
    start = time.monotonic()
    with pytest.raises(RankError, match="the message of rank one"):
        run_distributed(fail_on_rank_one, 2)
    assert time.monotonic() - start < 20


def test_a_hanging_rank_is_named_with_its_stack():
    with pytest.raises(TimeoutError, match="(?s)ranks \\[0\\].*hang_on_rank_zero"):
        run_distributed(hang_on_rank_zero, 2, timeout=3)


def test_nested_functions_are_refused():
    with pytest.raises(ValueError, match="module-level"):
        run_distributed(lambda rank, world_size: None, 1)
