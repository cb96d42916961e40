"""Load balance and z-loss against loops over tokens."""

import math

import pytest
import torch

from moe.losses import expert_counts, load_balancing_loss, router_z_loss
from phi35.outputs import RouterOutput

NUM_EXPERTS = 4


def routing(num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator).requires_grad_()
    # Not the largest scores: the loss must count what was used, as sampling does.
    indices = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:2] for _ in range(num_tokens)])
    return RouterOutput(logits, indices, torch.ones(num_tokens, 2))


def naive_balance(layers, mask):
    losses = []
    for layer in layers:
        shares, means, total = [0.0] * NUM_EXPERTS, [0.0] * NUM_EXPERTS, sum(mask)
        for row, real in enumerate(mask):
            scores = layer.logits[row].tolist()
            denominator = sum(math.exp(score) for score in scores)
            for expert in range(NUM_EXPERTS):
                means[expert] += real * math.exp(scores[expert]) / denominator / total
            for expert in layer.expert_indices[row].tolist():
                shares[expert] += real / total
        losses.append(NUM_EXPERTS * sum(share * mean for share, mean in zip(shares, means, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("masked", [False, True])
def test_losses_equal_loops_over_tokens(masked):
    layers = [routing(12, 0), routing(12, 1)]
    mask = [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1] if masked else [1] * 12
    attention_mask = torch.tensor(mask).view(2, 6) if masked else None
    # measured 8e-9
    assert load_balancing_loss(layers, attention_mask).item() == pytest.approx(naive_balance(layers, mask), abs=1e-6)
    squares = [
        math.log(sum(math.exp(score) for score in layer.logits[row].tolist())) ** 2
        for layer in layers
        for row in range(12)
        if mask[row]
    ]
    assert router_z_loss(layers, attention_mask).item() == pytest.approx(sum(squares) / len(squares), abs=1e-6)
    counts = expert_counts(layers, attention_mask)
    assert counts.sum(dim=1).tolist() == [2.0 * sum(mask)] * 2
    assert counts[0, 2] == sum(real * (2 in layers[0].expert_indices[row]) for row, real in enumerate(mask))


def test_balance_is_k_when_balanced_and_E_when_collapsed_on_k_experts():
    indices = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]])
    even = RouterOutput(torch.zeros(4, NUM_EXPERTS), indices, torch.ones(4, 2))
    assert load_balancing_loss([even]).item() == pytest.approx(2.0)
    collapsed = RouterOutput(torch.tensor([[30.0, 30.0, 0, 0]] * 4), torch.tensor([[0, 1]] * 4), torch.ones(4, 2))
    assert load_balancing_loss([collapsed]).item() == pytest.approx(4.0)


def test_gradient_pushes_scores_of_crowded_experts_down():
    layer = RouterOutput(torch.zeros(6, NUM_EXPERTS, requires_grad=True), torch.tensor([[0, 1]] * 6), torch.ones(6, 2))
    load_balancing_loss([layer]).backward()
    assert (layer.logits.grad[:, :2] > 0).all() and (layer.logits.grad[:, 2:] < 0).all()
    layer.logits.grad = None
    router_z_loss([layer]).backward()
    # d/ds of (log sum exp)^2 / N = 2 log(4) / (4 N)
    torch.testing.assert_close(layer.logits.grad, torch.full((6, 4), 2 * math.log(4) / 24), rtol=1e-6, atol=0)


def test_counts_the_sampled_experts_where_transformers_counts_a_softmax_top2():
    loss = pytest.importorskip("transformers.models.phimoe.modeling_phimoe").load_balancing_loss_func
    layers = [routing(12, seed) for seed in range(3)]
    greedy = [RouterOutput(layer.logits, layer.logits.topk(2, dim=1).indices, layer.expert_weights) for layer in layers]
    attention_mask = torch.ones(2, 6)
    attention_mask[1, :3] = 0
    for one in greedy:  # one layer at a time: transformers pools the layers before it multiplies
        theirs = float(loss((one.logits.detach(),), NUM_EXPERTS, 2, attention_mask))
        assert load_balancing_loss([one], attention_mask).item() == pytest.approx(theirs, abs=1e-6)
    assert abs(load_balancing_loss(layers).item() - load_balancing_loss(greedy).item()) > 0.1


def test_all_padding_gives_zero():
    layer = routing(4, 0)
    nothing = torch.zeros(1, 4)
    assert load_balancing_loss([layer], nothing).item() == router_z_loss([layer], nothing).item() == 0.0


def test_bad_input_is_refused():
    for loss in (load_balancing_loss, router_z_loss, expert_counts):
        with pytest.raises(ValueError, match="at least one sparse layer"):
            loss([])
        with pytest.raises(ValueError, match=r"attention_mask \(1, 5\) must cover the 4 tokens"):
            loss([routing(4, 0)], torch.ones(1, 5))
