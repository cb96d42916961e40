"""The named routers: the paper's and the published gradient of the experts, softmax top-k, and the selection bias."""

import pytest
import torch
from distributed import run_distributed

from moe.expert_parallel import shard
from moe.layer import SparseMoE
from moe.router import TopKSoftmaxRouter, sparsemixer
from phi35 import presets
from phi35.config import ModelConfig
from phi35.config_io import from_hf_dict, to_hf_dict

EPS = 0.3


def layer_of(router_type, seed=0, **changes):
    settings = {"router_type": router_type, "router_jitter_noise": EPS, "input_jitter_noise": 0.0}
    config = presets.get("tiny-phi-3.5-moe").replace(**settings, **changes)
    torch.manual_seed(seed)
    layer = SparseMoE(config).double().train()
    with torch.no_grad():
        layer.router.weight.normal_(0, 0.3)
        for parameter in layer.experts.parameters():
            parameter.normal_(0, 0.2)
    return layer


def single_outputs(layer, tokens, indices):
    """(N, k, D) outputs of each token's experts, one product at a time."""
    rows = []
    for token, experts in zip(tokens, indices.tolist(), strict=True):
        outputs = []
        for expert in experts:
            gate, up = (layer.experts.gate_up_proj[expert] @ token).chunk(2)
            outputs.append(layer.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def gradients(loss, layer, hidden_states):
    parameters = [layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj]
    return torch.autograd.grad(loss, [hidden_states, *parameters])


@pytest.mark.parametrize("router_type", ["sparsemixer", "sparsemixer-paper"])
def test_gradients_follow_the_formulas(router_type):
    layer = layer_of(router_type)
    hidden_states = torch.randn(2, 9, 64, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 9, 64, dtype=torch.float64)
    torch.manual_seed(4)
    output, routing = layer(hidden_states)
    got = gradients((output * upstream).sum(), layer, hidden_states)
    assert (routing.expert_gradient_weights is None) == (router_type == "sparsemixer")

    tokens = hidden_states.view(-1, 64)
    experts = single_outputs(layer, tokens, routing.expert_indices)
    weights = routing.expert_weights.detach()
    scores = tokens @ layer.router.weight.T
    chances = []
    for choice in range(2):  # p and g of both choices, from the definition
        masked = scores if choice == 0 else scores.scatter(1, routing.expert_indices[:, :1], -torch.inf)
        best = masked.amax(dim=1, keepdim=True)
        gates = masked.masked_fill((best - scores) / scores.abs().clamp(min=best) > 2 * EPS, -torch.inf).softmax(dim=1)
        chances.append(gates.gather(1, routing.expert_indices[:, choice : choice + 1]))
    p = torch.cat(chances, dim=1)
    c = weights / p.detach()
    assert set(c.mul(1e3).round().flatten().tolist()) == {333.0, 1000.0}
    scale = weights if router_type == "sparsemixer" else p.detach()
    # A surrogate whose gradient is, by the formulas, that of the layer: an expert's own scaled by p c or p, and
    # d p_k = p (onehot - g) through the softmax, with <upstream, expert output> as its upstream and without c.
    dots = (experts.detach() * upstream.view(-1, 1, 64)).sum(dim=-1)
    surrogate = (experts * scale.unsqueeze(-1) * upstream.view(-1, 1, 64)).sum() + (p * dots).sum()
    expected = gradients(surrogate, layer, hidden_states)
    value = (experts * weights.unsqueeze(-1)).sum(dim=1).view_as(output)
    torch.testing.assert_close(output, value, rtol=0, atol=1e-12)  # measured 1e-14
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)  # measured 4e-14


def test_both_forms_give_the_same_output_and_router_gradient_and_differ_in_the_experts():
    results = []
    for router_type in ("sparsemixer", "sparsemixer-paper"):
        layer = layer_of(router_type).float()
        generator = torch.Generator().manual_seed(1)
        hidden_states = torch.randn(2, 9, 64, generator=generator).requires_grad_()
        torch.manual_seed(4)
        output, routing = layer(hidden_states)
        loss = (output * torch.randn(2, 9, 64, generator=generator)).sum()
        results.append((output.detach(), *gradients(loss, layer, hidden_states)))
        assert layer.eval()(hidden_states)[1].expert_gradient_weights is None
    published, paper = results
    assert torch.equal(published[0], paper[0])
    torch.testing.assert_close(published[2], paper[2], rtol=1e-5, atol=1e-5)  # measured 0
    assert (published[4] - paper[4]).abs().max() > 1e-2, "low midpoint factors must show in the experts' gradient"


def test_replay_keeps_the_papers_gradient():
    layer = layer_of("sparsemixer-paper")
    hidden_states = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    output, routing = layer(hidden_states)
    first = gradients(output.square().sum(), layer, hidden_states)
    output, _ = layer(hidden_states, routing)
    second = gradients(output.square().sum(), layer, hidden_states)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)  # measured 0


def papers_form_spread(rank, world_size):
    results = []
    for ep_size in (1, 2):
        layer = layer_of("sparsemixer-paper")
        shard(layer, ep_size)
        hidden_states = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(rank)).double().requires_grad_()
        torch.manual_seed(rank)
        output, routing = layer(hidden_states)
        output.square().sum().backward()
        results.append((output.detach(), hidden_states.grad, layer.router.weight.grad))
        assert (routing.expert_weights < 0.5 * routing.expert_gradient_weights).any()
    return results


def test_the_papers_form_is_the_same_with_experts_spread_over_two_ranks():
    for whole, spread in run_distributed(papers_form_spread, 2):
        torch.testing.assert_close(spread, whole, rtol=0, atol=1e-10)  # measured 3.4e-13


@pytest.mark.parametrize("shape", [(2, 3), (1, 1)])
def test_topk_layer_passes_a_numerical_gradient_check(shape):
    layer = layer_of(
        "topk", hidden_size=8, intermediate_size=4, head_dim=16, num_attention_heads=2, num_key_value_heads=2
    )
    hidden_states = torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.parameters())

    def run(states, *values):
        named = dict(zip([name for name, _ in layer.named_parameters()], values, strict=True))
        return torch.func.functional_call(layer, named, (states,))[0]

    assert torch.autograd.gradcheck(run, (hidden_states, *parameters), eps=1e-6, atol=1e-6)


def test_a_bias_moves_the_choice_and_enters_no_weight():
    torch.manual_seed(0)
    scores = torch.randn(200, 6, dtype=torch.float64)
    bias = torch.tensor([9.0, 0, 0, 0, 0, -9.0], dtype=torch.float64)
    for training in (False, True):
        indices, weights = sparsemixer(scores, EPS, training, bias)
        assert (indices[:, 0] == 0).all() and (indices != 5).all()
        kept = (scores.amax(dim=1, keepdim=True) - scores) / scores.abs().clamp(min=scores.amax(dim=1, keepdim=True))
        gates = scores.masked_fill((kept > 2 * EPS).scatter(1, indices[:, :1], False), -torch.inf).softmax(dim=1)
        # the crowded expert is the likeliest under the bias, so that c is 1; measured 0
        torch.testing.assert_close(weights[:, 0], gates[:, 0], rtol=0, atol=1e-12)
    router = TopKSoftmaxRouter(8, 6, initializer_range=1.0).double()
    router.selection_bias = torch.tensor([2.0, 0, 0, 0, 0, -2.0])
    output = router(torch.randn(50, 8, dtype=torch.float64))
    assert (output.expert_indices[:, 0] == 0).all() and (output.expert_indices != 5).all()
    chosen = output.logits.softmax(dim=-1).gather(1, output.expert_indices)
    torch.testing.assert_close(output.expert_weights, chosen / chosen.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("training", [False, True])
def test_a_bias_of_zero_changes_nothing(training):
    scores = torch.randn(100, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for bias in (None, torch.zeros(6)):
        torch.manual_seed(3)
        results.append(sparsemixer(scores, EPS, training, bias))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_names_are_kept_in_the_config_file_and_unknown_ones_refused():
    for router_type in ("sparsemixer", "sparsemixer-paper", "topk"):
        config = presets.get("tiny-phi-3.5-moe").replace(router_type=router_type)
        assert from_hf_dict(to_hf_dict(config)).router_type == router_type
    with pytest.raises(ValueError, match="router_type must be one of .*'sparsemixer-paper'.*got 'softmax'"):
        ModelConfig(num_local_experts=4, router_type="softmax")
    with pytest.raises(ValueError, match="exactly 2 experts"):
        ModelConfig(num_local_experts=4, router_type="sparsemixer-paper", num_experts_per_tok=1)
