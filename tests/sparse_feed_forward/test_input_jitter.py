"""The noise of a sparse layer's input, made by the fused norm before it."""

import pytest
import torch

import phi35
from phi35.fused import add_norm
from phi35.jitter import Jitter
from phi35.training.acceleration import fuse


def a_model(**changes):
    changes = {"input_jitter_noise": 0.05, "router_type": "topk", "initializer_range": 0.1} | changes
    model = phi35.create("tiny-phi-3.5-moe", dtype="float32", seed=0, **changes).train()
    fuse(model)
    return model


def ids(rows=2, length=9):
    return torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_noise_is_uniform_and_hangs_on_seed_and_place():
    like = torch.empty(200, 500)
    noise = Jitter(0.01, torch.tensor([7], dtype=torch.int32)).noise(like)
    assert noise.min() >= 0.99 and noise.max() <= 1.01
    # Of 100,000 uniform numbers: mean within 4 standard errors, and each of ten parts holds a tenth within 4 of its.
    assert abs(float(noise.double().mean()) - 1.0) < 4 * 0.02 / 12**0.5 / 1e5**0.5
    counts = torch.histc(noise, 10, 0.99, 1.01)
    assert (counts - 1e4).abs().max() < 4 * (1e5 * 0.1 * 0.9) ** 0.5
    pairs = torch.stack((noise[:, :-1].flatten(), noise[:, 1:].flatten()))
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / 1e5**0.5
    other = Jitter(0.01, torch.tensor([8], dtype=torch.int32)).noise(like)
    assert abs(float(torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1])) < 4 / 1e5**0.5
    assert torch.equal(noise, Jitter(0.01, torch.tensor([7], dtype=torch.int32)).noise(like))


def test_a_fused_layer_multiplies_the_normed_tokens_once():
    model = a_model(num_hidden_layers=1)
    layer = model.model.layers[0]
    seen = []
    hook = layer.mlp.router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(3)
    model(input_ids=ids())
    fuse(model, False)
    layer.mlp.input_jitter_noise = 0.0
    model(input_ids=ids())
    hook.remove()
    torch.manual_seed(3)
    noise = Jitter.draw(0.05, torch.device("cpu")).noise(seen[1])
    torch.testing.assert_close(seen[0], seen[1] * noise, rtol=1e-6, atol=1e-6)
    assert (noise - 1).abs().max() > 0.04


def test_evaluation_has_no_noise():
    model = a_model().eval()
    with torch.no_grad():
        first = model(input_ids=ids()).logits
        assert torch.equal(first, model(input_ids=ids()).logits)


def test_recomputed_layers_see_the_same_noise():
    wanted = loss_and_gradients(a_model(), seed=5)
    assert not torch.equal(wanted[0], loss_and_gradients(a_model(), seed=6)[0])
    for form in (True, "selective"):
        model = a_model()
        model.gradient_checkpointing = form
        for found, one in zip(loss_and_gradients(model, seed=5), wanted, strict=True):
            assert torch.equal(found, one), form


@pytest.mark.gpu
@pytest.mark.parametrize("subtract_mean", [False, True])
def test_the_kernels_make_the_same_noise(subtract_mean):
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(300, 4096, device="cuda", generator=generator) for _ in range(2)]
    inputs += [torch.randn(4096, device="cuda", generator=generator) for _ in range(2)]
    upstream = torch.randn(2, 300, 4096, device="cuda", generator=generator)
    jitter = Jitter.draw(0.3, torch.device("cuda"))
    results = []
    for kernels in (True, False):
        own = [value.clone().requires_grad_() for value in inputs]
        bias = own[3] if subtract_mean else None
        if kernels:
            total, normed = add_norm(*own[:3], bias, 1e-5, subtract_mean, jitter)
        else:
            total = own[0] + own[1]
            centred = total - total.mean(-1, keepdim=True) if subtract_mean else total
            normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * own[2]
            normed = (normed if bias is None else normed + bias) * jitter.noise(normed)
        torch.autograd.backward((total, normed), tuple(upstream))
        results.append([total, normed, *(value.grad for value in own[: 3 + subtract_mean])])
    for one, other in zip(*results, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5
