"""Recomputation replays the routing: under both kinds of activation checkpointing, and under torch.compile."""

import shutil

import pytest
import torch

from moe.losses import load_balancing_loss, router_z_loss
from phi35.loading import create
from phi35.outputs import CausalLMOutput

ROUTERS = ("sparsemixer", "sparsemixer-paper", "topk")


def model_of(router_type, **changes):
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}
    settings = {"router_type": router_type, "router_jitter_noise": 0.2, "initializer_range": 0.2}
    model = create("tiny-phi-3.5-moe", device="cpu", dtype="float32", seed=0, **settings, **dropout, **changes)
    return model.train()


def batch_of(seed=1):
    ids = torch.randint(3, 1000, (2, 13), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def losses_and_gradients(model, seed=7):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output: CausalLMOutput = model(**batch_of())
    routing = output.router_outputs
    total = output.loss + 0.1 * load_balancing_loss(routing) + 0.1 * router_z_loss(routing)
    total.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    after = torch.rand(1)  # the random state that a step leaves behind
    return total.detach(), [one.expert_indices for one in routing], gradients, after


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("router_type", ROUTERS)
@pytest.mark.parametrize("kind", [True, "reentrant", "selective"])
def test_gradients_equal_those_without_checkpointing_to_the_bit(deterministic, router_type, kind):
    model = model_of(router_type)
    loss, experts, gradients, after = losses_and_gradients(model)
    model.gradient_checkpointing = kind
    again = losses_and_gradients(model)
    assert torch.equal(again[0], loss)
    assert all(torch.equal(a, b) for a, b in zip(again[1], experts, strict=True))
    assert again[2].keys() == gradients.keys() == dict(model.named_parameters()).keys()
    different = [name for name in gradients if not torch.equal(gradients[name], again[2][name])]
    assert not different
    assert torch.equal(again[3], after), "recomputing must not move the random state"
    if router_type != "topk":
        other = losses_and_gradients(model, seed=8)
        assert any(not torch.equal(a, b) for a, b in zip(other[1], experts, strict=True)), "noise must matter here"


@pytest.mark.parametrize("kind", [True, "reentrant"])
def test_a_selection_bias_is_replayed_too(deterministic, kind):
    model = model_of("sparsemixer")
    for index, layer in enumerate(model.model.layers):
        layer.mlp.router.selection_bias = 0.05 * torch.randn(4, generator=torch.Generator().manual_seed(index))
    _, experts, gradients, _ = losses_and_gradients(model)
    model.gradient_checkpointing = kind
    again = losses_and_gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(again[1], experts, strict=True))
    assert all(torch.equal(gradients[name], again[2][name]) for name in gradients)


def test_reentrant_form_reaches_the_layers_when_the_embedding_is_frozen(deterministic):
    model = model_of("sparsemixer")
    model.model.embed_tokens.weight.requires_grad_(False)
    _, _, gradients, _ = losses_and_gradients(model)
    model.gradient_checkpointing = "reentrant"
    again = losses_and_gradients(model)[2]
    assert gradients.keys() == again.keys() and "model.layers.0.mlp.router.weight" in again
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_reentrant_form_serves_dense_models_and_unknown_forms_are_refused(deterministic):
    model = create("tiny-phi-3.5-mini", device="cpu", dtype="float32", seed=0, resid_pdrop=0.1).train()
    results = []
    for kind in (False, True, "reentrant"):
        model.gradient_checkpointing = kind
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        model(**batch_of()).loss.backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    with pytest.raises(ValueError, match="must be False, True, 'selective' or 'reentrant', got 'full'"):
        model.gradient_checkpointing = "full"


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++) on a CPU"
)


def compare_with_eager(run, layer, **options):
    """Runs a function of (B, T, D) that returns (value, routing...) in eager mode and compiled; same noise."""
    import torch._inductor.config as inductor

    torch.compiler.reset()
    results = []
    with inductor.patch(fallback_random=True):  # the compiler's own generator draws other numbers than torch's
        for function in (run, torch.compile(run, dynamic=False, **options)):
            layer.zero_grad(set_to_none=True)
            hidden_states = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
            torch.manual_seed(5)
            value, logits, indices, weights = function(hidden_states)
            (value.square().sum() + logits.square().sum()).backward()
            gradients = [hidden_states.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
            results.append((indices, [value.detach(), weights.detach()], gradients))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)  # measured 1.5e-8
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-5)  # measured 3.8e-6


def test_a_layer_routes_the_same_under_compile():
    layer = model_of("sparsemixer").model.layers[0].mlp

    def run(hidden_states):
        output, routing = layer(hidden_states)
        return output, routing.logits, routing.expert_indices, routing.expert_weights

    # The whole layer is traced; generating C++ for it too takes a minute and is left to the test below.
    compare_with_eager(run, layer, backend="aot_eager")


@NEEDS_COMPILER
def test_compiled_recomputation_replays_the_routing():
    """One graph without a break, so that the compiler itself decides what to recompute."""
    router = model_of("sparsemixer").model.layers[0].mlp.router

    def route(hidden_states):
        routing = router(hidden_states.reshape(-1, 64))
        # A stand-in for experts that depends on which were chosen, and whose gradient needs them again.
        value = (routing.expert_weights * torch.sin(routing.expert_indices + 1.0)).sum(dim=1).exp()
        return value, routing.logits, routing.expert_indices, routing.expert_weights

    def run(hidden_states):
        return torch.utils.checkpoint.checkpoint(route, hidden_states, use_reentrant=False)

    compare_with_eager(run, router, fullgraph=True)
