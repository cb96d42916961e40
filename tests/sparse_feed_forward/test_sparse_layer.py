"""The layer as a whole: transformers' block, jitter, replay, construction."""

import pytest
import torch

from moe.layer import SparseMoE
from phi35 import presets

CONFIG = presets.get("tiny-phi-3.5-moe").replace(initializer_range=0.3)


def layer_and_tokens(seed=0, **changes):
    torch.manual_seed(seed)
    return SparseMoE(CONFIG.replace(**changes)), torch.randn(2, 9, CONFIG.hidden_size)


@pytest.mark.parametrize("training", [False, True])
def test_block_equals_transformers(training):
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    from transformers import PhimoeConfig

    layer, tokens = layer_and_tokens(input_jitter_noise=0.0, router_jitter_noise=0.3)
    block = phimoe.PhimoeSparseMoeBlock(
        PhimoeConfig(
            hidden_size=64,
            intermediate_size=96,
            num_local_experts=4,
            router_jitter_noise=0.3,
            experts_implementation="eager",
        )
    )
    block.load_state_dict(layer.state_dict())
    layer.train(training)
    block.train(training)
    torch.manual_seed(1)
    output, _ = layer(tokens)
    torch.manual_seed(1)
    expected = block(tokens.clone())
    torch.testing.assert_close(
        output, expected, rtol=1e-5, atol=1e-5
    )  # measured LAYER_ERR on outputs of size LAYER_SIZE


def test_input_jitter_happens_once_and_on_a_copy():
    layer, tokens = layer_and_tokens(input_jitter_noise=0.01, router_type="topk")
    before = tokens.clone()
    layer.train()
    torch.manual_seed(1)
    output, routing = layer(tokens)
    assert torch.equal(tokens, before), "the caller's tensor must not change"
    torch.manual_seed(1)
    jittered = tokens * torch.empty_like(tokens).uniform_(0.99, 1.01)
    layer.eval()
    expected, expected_routing = layer(jittered)
    assert torch.equal(routing.logits, expected_routing.logits)
    assert torch.equal(output, expected)
    assert not torch.equal(output, layer(tokens)[0])


def test_every_token_is_treated_alone():
    layer, tokens = layer_and_tokens()
    layer.eval()
    whole, _ = layer(tokens)
    for row in range(2):
        for position in range(9):
            one, routing = layer(tokens[row : row + 1, position : position + 1])
            assert routing.expert_indices.shape == (1, 2)
            # measured 2.3e-5 on outputs up to 66
            torch.testing.assert_close(one[0, 0], whole[row, position], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("router_type", ["sparsemixer", "topk"])
def test_replay_gives_the_same_output_and_gradients(router_type):
    layer, tokens = layer_and_tokens(router_type=router_type, router_jitter_noise=0.3, input_jitter_noise=0.0)
    layer.train()
    results, routing = [], None
    for _ in range(2):
        layer.zero_grad()
        output, routing = layer(tokens, routing)
        output.square().sum().backward()
        results.append((output.detach(), *[parameter.grad.clone() for parameter in layer.parameters()]))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_two_training_passes_sample_differently():
    layer, tokens = layer_and_tokens(router_jitter_noise=0.3)
    layer.train()
    first, second = layer(tokens)[1], layer(tokens)[1]
    assert not torch.equal(first.expert_indices, second.expert_indices)


def test_builds_on_meta_and_counts_the_published_parameters():
    full = presets.get("phi-3.5-moe")
    with torch.device("meta"):
        layer = SparseMoE(full)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "router.weight": (16, 4096),
        "experts.gate_up_proj": (16, 12800, 4096),
        "experts.down_proj": (16, 4096, 6400),
    }


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="SparseMoE needs num_local_experts > 0"):
        SparseMoE(presets.get("tiny-phi-3.5-mini"))
    with pytest.raises(ValueError, match="experts_backend must be one of"):
        SparseMoE(CONFIG.replace(experts_backend="fastest"))
    layer, tokens = layer_and_tokens()
    with pytest.raises(ValueError, match="replay a routing only on the tokens it was recorded on"):
        layer(tokens[:1], layer(tokens)[1])
