"""Fused operations and selective recomputation as torch operations: gradients, whole models, what is kept."""

import functools

import pytest
import torch

from phi35 import fused, fused_head
from phi35.feed_forward import gegelu
from phi35.loading import create
from phi35.recompute import given_again
from phi35.training.acceleration import fuse


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("subtract_mean", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_gradients_are_those_of_its_values(subtract_mean, has_residual):
    inputs = [draw(2, 3, 8), draw(2, 3, 8, seed=1) if has_residual else None, draw(8, seed=2)]
    inputs.append(draw(8, seed=3) if subtract_mean else None)
    assert torch.autograd.gradcheck(lambda *values: fused.add_norm(*values, 1e-5, subtract_mean), inputs)


def test_an_unused_sum_or_norm_gives_no_gradient():
    hidden_states, residual, weight = draw(3, 8), draw(3, 8, seed=1), draw(8, seed=2)
    total, normed = fused.add_norm(hidden_states, residual, weight, None, 1e-5, False)
    torch.testing.assert_close(
        torch.autograd.grad(total.sum(), residual, retain_graph=True)[0], torch.ones(3, 8).double()
    )
    torch.testing.assert_close(
        torch.autograd.grad(normed.square().sum(), hidden_states)[0],
        torch.autograd.grad(
            torch.nn.functional.rms_norm(hidden_states + residual, (8,), weight, 1e-5).square().sum(), hidden_states
        )[0],
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "quick_gelu"])
def test_activation_gradients_are_those_of_their_values(activation):
    assert torch.autograd.gradcheck(lambda values: fused.activate(values, activation), [draw(4, 6)])
    if activation != "quick_gelu":
        assert torch.autograd.gradcheck(lambda values: fused.gated_activation(values, activation), [draw(4, 6)])


def test_a_clamped_gate_and_its_gradient():
    values = 3.0 * draw(6, 8)
    limited = functools.partial(fused.gated_activation, activation="gegelu", limit=1.5)
    assert (values.abs() > 1.5).sum() > 10
    assert torch.autograd.gradcheck(limited, [values.detach().requires_grad_()])
    torch.testing.assert_close(limited(values), gegelu(*values.chunk(2, dim=-1), limit=1.5))


def test_rotation_gradients_are_those_of_its_values():
    cos, sin = draw(2, 1, 3, 4, seed=1).detach(), draw(2, 1, 3, 4, seed=2).detach()
    assert torch.autograd.gradcheck(
        lambda values: fused.rotate_heads(values * 1.0, cos, sin, 2, 1), [draw(2, 3, 4 * 4)]
    )


@pytest.mark.parametrize("limit", [2**28, 300])
def test_head_gradients_are_those_of_its_loss(monkeypatch, limit):
    monkeypatch.setattr(fused_head, "LOGITS_PER_CHUNK", limit)
    monkeypatch.setattr(fused_head, "ROWS_PER_TILE", 2)
    labels = torch.tensor([1, -100, 4, 0, 2, -1])
    states, weight, bias = draw(6, 4), draw(5, 4, seed=1), draw(5, seed=2)
    loss = fused_head.head_loss(states, weight, bias, labels) * 2.5
    wanted = 2.5 * torch.nn.functional.cross_entropy((states @ weight.T + bias)[labels >= 0], labels[labels >= 0])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    got = torch.autograd.grad(loss, [states, weight, bias])
    for one, other in zip(got, torch.autograd.grad(wanted, [states, weight, bias]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # measured: 6e-8; the factor is float32


def test_a_head_without_labels_that_count_gives_zero():
    states, weight = draw(3, 4), draw(5, 4, seed=1)
    loss = fused_head.head_loss(states, weight, None, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0 and not states.grad.any() and not weight.grad.any()


def gradients(preset, kernels, checkpointing=False, **changes):
    settings = {"initializer_range": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    model = create(preset, dtype="float32", seed=0, **{**settings, **changes}).train()
    fuse(model, kernels == "fused")
    model.gradient_checkpointing = checkpointing
    ids = torch.randint(3, 1000, (2, 13), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return output.loss.detach(), named


@pytest.mark.parametrize(
    "preset", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe", "tiny-phi-3-medium-4k", "tiny-phi-3-small-8k"]
)
def test_a_fused_model_equals_the_plain_one(preset):
    # The plain form draws the input's noise from the generator itself, the fused one from a seed.
    loss, plain = gradients(preset, "torch", input_jitter_noise=0.0)
    again, fast = gradients(preset, "fused", input_jitter_noise=0.0)
    assert plain.keys() == fast.keys()
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    for name in plain:  # measured: at most 1.2e-6 of the gradient's norm
        assert float((plain[name] - fast[name]).norm()) <= 1e-5 * float(plain[name].norm()), name


@pytest.mark.parametrize("preset", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe", "tiny-phi-3-small-8k"])
@pytest.mark.parametrize("checkpointing", ["selective", True, "reentrant"])
def test_recomputation_of_a_fused_model_changes_no_bit(preset, checkpointing):
    torch.use_deterministic_algorithms(True)
    try:
        loss, kept = gradients(preset, "fused")
        again, computed = gradients(preset, "fused", checkpointing)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, again)
    assert kept.keys() == computed.keys() and all(torch.equal(kept[name], computed[name]) for name in kept)


def test_a_recipe_stands_in_for_the_tensor():
    source, weight = draw(3, 4), draw(5, 4, seed=1)
    calls = []

    def recipe():
        calls.append(torch.is_grad_enabled())
        return source.detach() * 2

    doubled = source * 2
    with given_again(doubled, recipe):
        result = torch.nn.functional.linear(doubled, weight)
    expected = torch.nn.functional.linear(source * 2, weight)
    doubled.data.zero_()  # what is kept must not be this
    got = torch.autograd.grad(result.square().sum(), [source, weight])
    assert calls == [False]
    for one, other in zip(got, torch.autograd.grad(expected.square().sum(), [source, weight]), strict=True):
        assert torch.equal(one, other)
