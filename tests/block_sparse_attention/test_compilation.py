"""FlexAttention's kernels are compiled once for each way of calling them, and never left out in silence."""

import dataclasses
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from phi35 import flex_kernels
from phi35.block_sparse import BlockPattern, attend_block_sparse, flex_blocks, plan_sequence

CPU = torch.device("cpu")
HEADS = 4


@pytest.fixture
def count(monkeypatch):
    """Compilations from here on; torch's own kernels for CPUs take seconds each, so that its plain operators serve."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    flex_kernels.compiled.cache_clear()
    yield counter
    flex_kernels.compiled.cache_clear()


def draw(batch, length, num_keys, layout):
    generator = torch.Generator().manual_seed(length)
    normal = functools.partial(torch.randn, generator=generator)
    if layout == "contiguous":
        return normal(batch, HEADS, length, 16), normal(batch, 2, num_keys, 16), normal(batch, 2, num_keys, 16)
    queries = normal(batch, length, HEADS, 16).transpose(1, 2)
    if layout == "projected":  # keys and values as parts of one projection
        return queries, *normal(batch, num_keys, 8, 16).transpose(1, 2).split((2, 2, 4), dim=1)[:2]
    return queries, *(normal(batch, 2, num_keys + 77, 16)[:, :, :num_keys] for _ in range(2))


def attend(first, length, layout="contiguous", batch=1):
    """Attention by a compiled kernel, compared with the exact mask's."""
    # Made anew each time, as each pass of a model makes it.
    pattern = BlockPattern(block_size=16, num_local_blocks=2, vert_stride=4, head_step=1)
    num_keys = first + length
    tensors = draw(batch, length, num_keys, layout)
    blocks = flex_blocks(pattern, (0, HEADS), first, length, num_keys, CPU, gradients=False)
    found = flex_kernels.attend_flex(*tensors, blocks, 0.3)
    plan = plan_sequence(pattern, (0, HEADS), first, length, num_keys, CPU)
    # 1e-6 measured.
    torch.testing.assert_close(found, attend_block_sparse(*tensors, plan, 0.3), atol=5e-6, rtol=0)


@pytest.mark.parametrize("layout", ["contiguous", "projected", "cached"])
def test_many_lengths_share_a_kernel(count, layout):
    for length in (130, 200, 256, 300, 512, 999, 1280):
        attend(0, length, layout)
    assert count.frame_count == 1
    for first, length in ((70, 200), (64, 256), (1000, 129), (300, 300), (4, 640)):
        attend(first, length, layout)
    assert count.frame_count == 2
    # One block of queries.
    for first in (0, 16, 700):
        attend(first, 128, layout)
    assert count.frame_count == 4
    for batch in (2, 5, 4):
        attend(0, 300 + batch, layout, batch)
    assert count.frame_count == 5


def test_modes_and_patterns_have_kernels_of_their_own(count):
    for _ in range(3):
        attend(0, 200)
        with torch.no_grad():
            attend(0, 200)
        with torch.inference_mode():
            attend(0, 300)
    assert count.frame_count == 3
    blocks = {}
    for stride in (2, 3, 4, 5, 6, 8, 10, 12, 14, 16):  # more than torch compiles for one function
        pattern = BlockPattern(block_size=16, num_local_blocks=2, vert_stride=stride, head_step=1)
        blocks[stride] = flex_blocks(pattern, (0, HEADS), 0, 400, 400, CPU, gradients=False)
        tensors = draw(1, 400, 400, "contiguous")
        found = flex_kernels.attend_flex(*tensors, blocks[stride], 0.3)
        plan = plan_sequence(pattern, (0, HEADS), 0, 400, 400, CPU)
        torch.testing.assert_close(found, attend_block_sparse(*tensors, plan, 0.3), atol=5e-6, rtol=0)
    assert count.frame_count == 3 + 9  # stride 4 had its own


def test_kernels_for_one_length(count):
    pattern = BlockPattern(block_size=16, num_local_blocks=2, vert_stride=4, head_step=1)
    for length in (200, 300, 200, 300):
        blocks = flex_blocks(pattern, (0, HEADS), 0, length, length, CPU, gradients=False)
        blocks = dataclasses.replace(blocks, fixed_lengths=True)
        flex_kernels.attend_flex(*draw(1, length, length, "contiguous"), blocks, 0.3)
    assert count.frame_count == 2


def test_within_a_model_that_is_compiled_as_a_whole(count):
    pattern = BlockPattern(block_size=16, num_local_blocks=2, vert_stride=4, head_step=1)
    blocks = flex_blocks(pattern, (0, HEADS), 70, 200, 270, CPU, gradients=False)
    tensors = draw(1, 200, 270, "projected")

    def layer(queries, keys, values):
        return flex_kernels.attend_flex(queries * 2, keys, values, blocks, 0.3) + 1

    found = torch.compile(layer, fullgraph=True, dynamic=False)(*tensors)
    plan = plan_sequence(pattern, (0, HEADS), 70, 200, 270, CPU)
    expected = attend_block_sparse(tensors[0] * 2, *tensors[1:], plan, 0.3) + 1
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)
    assert count.frame_count == 1 and flex_kernels.compiled.cache_info().currsize == 0


def test_running_uncompiled_is_an_error(count):
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="uncompiled"):
        attend(0, 200)
    attend(0, 200)


def test_a_recompilation_that_is_not_allowed_is_an_error(count):
    attend(0, 200)
    with torch._dynamo.config.patch(recompile_limit=1):
        attend(0, 300)
        torch.use_deterministic_algorithms(True)  # torch compiles anew for that
        try:
            with pytest.raises(RuntimeError, match="recompile_limit"):
                attend(0, 200)
        finally:
            torch.use_deterministic_algorithms(False)


def test_torchs_own_kernel_for_cpus():
    flex_kernels.compiled.cache_clear()
    for first, length in ((0, 200), (0, 300)):
        attend(first, length)
    assert flex_kernels.compiled.cache_info().currsize == 1
    flex_kernels.compiled.cache_clear()
