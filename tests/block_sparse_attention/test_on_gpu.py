"""FlexAttention's kernels on a GPU against exact masks, and a captured step of a block-sparse model."""

import pytest
import torch

import phi35
from phi35 import presets
from phi35.block_sparse import BlockSparsePlan, attend_block_sparse, block_pattern, plan_sequence
from phi35.flex_kernels import compiled
from phi35.generation.fast_prefill import Prompt, prefill
from phi35.generation.fast_step import DecodeStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("first", "length"), [(0, 1500), (1061, 1024), (2048, 7)])
def test_kernels_see_what_exact_masks_see(first, length, gradients):
    pattern, device = block_pattern(presets.get("phi-3-small-8k")), torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    num_keys = first + length
    shapes = [(1, 32, length, 128), (1, 8, num_keys, 128), (1, 8, num_keys, 128)]
    # The last weighs the output in the loss. Drawn once: a running sum in bfloat16 stops at 256 on a GPU.
    *given, weights = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for shape in (*shapes, shapes[0])
    )
    with torch.set_grad_enabled(gradients):
        plan = plan_sequence(pattern, (0, 32), first, length, num_keys, device)
        assert (plan.flex is not None) == (length >= 128)
        exact = BlockSparsePlan(pattern=pattern, queries=plan.queries, keys=plan.keys, heads=(0, 32))
        results = []
        for use, dtype in ((plan, torch.bfloat16), (exact, torch.float32)):
            tensors = [tensor.to(dtype).requires_grad_(gradients) for tensor in given]
            out = attend_block_sparse(*tensors, use, 1 / 128)
            found = [out.detach().float()]
            if gradients:
                found += torch.autograd.grad(out, tensors, weights.to(dtype))
            results.append(found)
    for one, other in zip(*results, strict=True):
        assert (one.float() - other.float()).norm() / other.float().norm() < 1e-2


def test_evaluating_and_training_with_many_lengths_compiles_each_kernel_once(recwarn):
    from torch._dynamo.utils import counters

    model = phi35.create("phi-3-small-8k", num_hidden_layers=2, device="cuda", dtype="bfloat16", attention_dropout=0.0)
    ways, graphs = compiled.cache_info().currsize, counters["stats"]["unique_graphs"]
    for length in (1100, 1536, 2000, 2048, 1300, 3000):
        ids = torch.randint(3, 1000, (1, length), device="cuda")
        model.eval()
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
        with torch.inference_mode():
            model(ids)
        model.train()
        trained = model(ids, labels=ids).loss
        trained.backward()
        model.zero_grad(set_to_none=True)
        assert abs(float(trained) - float(loss)) < 1e-2
    # Without gradients, in inference mode, and with them.
    assert compiled.cache_info().currsize - ways == 3
    assert counters["stats"]["unique_graphs"] - graphs == 3
    assert not [warning for warning in recwarn if "unfused" in str(warning.message)]


def test_a_captured_step_gives_the_models_own_logits():
    model = phi35.create("phi-3-small-8k", num_hidden_layers=4, device="cuda", dtype="bfloat16", seed=0)
    ids = torch.randint(3, 1000, (1, 1500), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    cache = model.new_cache(1, 1600)
    prefill(model, cache, [Prompt(ids[0].tolist(), None, 0, False)])
    cache.lengths.fill_(1500)
    step = DecodeStep(model, cache)
    step.capture()
    for token in (7, 8):
        ids = torch.cat((ids, torch.tensor([[token]], device="cuda")), dim=1)
        step.state.tokens.fill_(token)
        step.run()
        with torch.no_grad():
            wanted = model(ids, logits_to_keep=1).logits[0, -1, :100000].float()
        assert (step.logits[0, :100000] - wanted).norm() / wanted.norm() < 3e-2
