"""Fast training forms through the engine: compiled layers, fused kernels, own masters, stochastic rounding."""

import pytest
import torch

from phi35.jitter import noise_bits
from phi35.loading import create
from phi35.training.acceleration import compile_layers
from phi35.training.mixed_precision import MixedPrecisionAdamW, round_stochastically


def losses_and_gradients(preset, form, **changes):
    torch.compiler.reset()
    model = create(preset, dtype="float32", seed=0, initializer_range=0.1, **changes).train()
    for layer in model.model.layers if form is not None else ():
        layer.compile(dynamic=False, fullgraph=True, backend=form)
    ids = torch.randint(3, 1000, (2, 12), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("preset", ["tiny-phi-3.5-mini", "tiny-phi-3-medium-4k"])
def test_layers_are_whole_graphs_that_all_layers_share(preset):
    torch._dynamo.utils.counters.clear()
    loss, plain = losses_and_gradients(preset, None)
    again, traced = losses_and_gradients(preset, "aot_eager")
    counters = torch._dynamo.utils.counters["stats"]
    assert counters["unique_graphs"] == 1, "a second layer must not be traced anew"
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    for name in plain:
        torch.testing.assert_close(traced[name], plain[name], rtol=1e-5, atol=1e-7)  # measured: 0


def test_sparse_layers_are_whole_graphs():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = create("tiny-phi-3.5-moe", dtype="bfloat16", seed=0).train()
    for layer in model.model.layers:
        layer.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    ids = torch.randint(3, 1000, (2, 16), generator=torch.Generator().manual_seed(1))
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert len(output.router_outputs) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tower_blocks_compile_too():
    model = create("tiny-phi-3.5-vision", dtype="float32", seed=0)
    compile_layers(model)
    blocks = model.model.vision_embed_tokens.img_processor.blocks
    assert all(block._compiled_call_impl is not None for block in (*model.model.layers, *blocks))


def pair(state_dtype, dtype=torch.float32, seed=0):
    """The same parameter under our optimizer and under torch's."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(200, 50, generator=generator)
    mine, theirs = (torch.nn.Parameter(value.clone().to(one)) for one in (dtype, torch.float32))
    options = {"betas": (0.9, 0.95), "eps": 1e-8}
    ours = MixedPrecisionAdamW(
        [{"params": [mine], "lr": 1e-2, "weight_decay": 0.1}], state_dtype=state_dtype, **options
    )
    return mine, ours, theirs, torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, **options), generator


def test_masters_follow_torch_adamw():
    mine, ours, theirs, reference, generator = pair(torch.float32)
    for factor in (None, 0.25, 1.0, 0.5):
        gradient = torch.randn(200, 50, generator=generator)
        mine.grad, theirs.grad = gradient.bfloat16(), gradient.bfloat16().float() * (factor or 1.0)
        ours.gradient_factor = None if factor is None else torch.tensor(factor)
        ours.step()
        reference.step()
    assert mine.dtype == torch.bfloat16 and ours.value(mine).dtype == torch.float32
    torch.testing.assert_close(ours.value(mine), theirs.data, rtol=0, atol=1e-6)  # measured: 1.2e-7
    assert torch.equal(mine, ours.value(mine).bfloat16())


def test_masters_keep_what_float32_weights_held():
    mine, ours, theirs, *_ = pair(torch.float32)
    assert torch.equal(ours.value(mine), theirs.data)


def test_bfloat16_states_follow_torch_adamw_on_average():
    mine, ours, theirs, reference, generator = pair(torch.bfloat16)
    for group in (*ours.param_groups, *reference.param_groups):
        group["lr"] = 2e-4  # far below half of bfloat16's spacing at 1, which is 4e-3
    for _ in range(100):
        gradient = torch.randn(200, 50, generator=generator) + 0.5
        mine.grad, theirs.grad = gradient.bfloat16(), gradient.bfloat16().float()
        ours.step()
        reference.step()
    start = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    moved, wanted = (mine.detach().float() - start).mean(), (theirs.data - start).mean()
    assert float(wanted) < -5e-3
    assert float(moved) == pytest.approx(float(wanted), rel=0.1)  # measured: 2 %; rounding to nearest moves 0
    assert "master" not in ours.state[mine]


def test_stochastic_rounding_is_right_on_average():
    value = torch.full((200_000,), 1.0 + 0.3 * 2**-7)
    for sign in (1.0, -1.0):
        rounded = round_stochastically(sign * value, noise_bits(value.numel(), 12345, value.device) & 0xFFFF)
        assert set(rounded.abs().tolist()) == {1.0, 1.0 + 2**-7}
        up = float((rounded.abs() > 1).float().mean())
        assert up == pytest.approx(0.3, abs=0.005)  # five standard deviations; measured: 0.3010
    special = torch.tensor([0.0, float("inf"), float("-inf"), float("nan")])
    noise = torch.full((4,), 0xFFFF)
    assert round_stochastically(special, noise).isnan().tolist() == [False, False, False, True]
    assert round_stochastically(special, noise)[:3].bfloat16().tolist() == [0.0, float("inf"), float("-inf")]


def test_noise_differs_between_keys_and_places():
    one, other = (noise_bits(4096, key, torch.device("cpu")) for key in (7, 8))
    assert 0.98 < one.unique().numel() / 4096 and not torch.equal(one, other)
    assert abs(float(torch.corrcoef(torch.stack((one.double(), other.double())))[0, 1])) < 0.06  # 4 deviations


def test_other_state_dtypes_are_refused():
    with pytest.raises(ValueError, match="state_dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        MixedPrecisionAdamW([], betas=(0.9, 0.95), eps=1e-8, state_dtype=torch.float16)
