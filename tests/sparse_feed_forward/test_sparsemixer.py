"""SparseMixer-v2 against a reference written token by token in plain Python, and its gradient against the formula."""

import math

import pytest
import torch

from moe import router
from moe.router import SparseMixerRouter, TopKSoftmaxRouter, sparsemixer
from phi35.outputs import RouterOutput

EPS = 0.01


def naive_choice(scores, candidates, noise=None, coin=None):
    """One choice for one token, from the formulas: (expert, p, c, g)."""
    best = max(candidates)
    kept = [
        m if (best - s) / max(abs(s), best) <= 2 * EPS else -math.inf for s, m in zip(scores, candidates, strict=True)
    ]
    total = sum(math.exp(m - best) for m in kept)
    gates = [math.exp(m - best) / total for m in kept]
    if noise is None:
        return candidates.index(best), gates[candidates.index(best)], 1.0, gates
    perturbed = [m - math.log(e) for m, e in zip(kept, noise, strict=True)]
    expert = perturbed.index(max(perturbed))
    lucky = expert == gates.index(max(gates)) or coin > 0.75
    return expert, gates[expert], 0.3333 + 0.6667 * lucky, gates


def naive_sparsemixer(scores, draws=None):
    """Both choices for one token: a list of (expert, p, c, g)."""
    first = naive_choice(scores, scores, *(draws[0] if draws else ()))
    candidates = [-math.inf if i == first[0] else s for i, s in enumerate(scores)]
    return [first, naive_choice(scores, candidates, *(draws[1] if draws else ()))]


def close_scores(num_tokens, num_experts, seed, dtype=torch.float64):
    """Scores near enough to each other that some experts survive the threshold, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(num_tokens, 1, generator=generator, dtype=dtype)
    return base * (1 + 0.02 * torch.randn(num_tokens, num_experts, generator=generator, dtype=dtype))


def recorded_draws(num_tokens, num_experts, seed, dtype=torch.float64):
    """The noise that sparsemixer draws in training, in its order: per choice exponentials, then the coin."""
    torch.manual_seed(seed)
    like = torch.empty(num_tokens, num_experts, dtype=dtype)
    first = (torch.empty_like(like).exponential_(), torch.rand(num_tokens, 1, dtype=dtype))
    second_noise = torch.empty_like(like).exponential_()
    torch.rand(num_tokens, 1, dtype=dtype)  # drawn and not used, as in the published code
    second = (second_noise, torch.rand(num_tokens, 1, dtype=dtype))
    return [[(noise[row].tolist(), coin[row].item()) for noise, coin in (first, second)] for row in range(num_tokens)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_experts", [2, 4, 16])
def test_choices_and_weights_equal_a_per_token_reference(training, num_experts):
    scores = close_scores(200, num_experts, seed=num_experts)
    draws = recorded_draws(200, num_experts, seed=5)
    torch.manual_seed(5)
    indices, weights = sparsemixer(scores, EPS, training)
    survivors = 0
    for row, token in enumerate(scores.tolist()):
        expected = naive_sparsemixer(token, draws[row] if training else None)
        assert indices[row].tolist() == [choice[0] for choice in expected]
        # measured 3e-9: the factor c is rounded to float32
        assert weights[row].tolist() == pytest.approx([p * c for _, p, c, _ in expected], abs=1e-7)
        survivors += sum(gate > 0 for gate in expected[0][3])
    assert survivors > 210, "the scores must leave more than one expert to some tokens"


def test_training_samples_experts_in_proportion_to_their_gates():
    scores = torch.tensor([[1.0, 1.01, 0.99, 0.5]]).repeat(20000, 1)
    torch.manual_seed(0)
    indices, weights = sparsemixer(scores, EPS, training=True)
    expected = naive_sparsemixer(scores[0].tolist())[0][3]
    observed = torch.bincount(indices[:, 0], minlength=4) / 20000
    # standard deviation of a share: 0.0033
    assert observed.tolist() == pytest.approx(expected, abs=0.015)
    assert observed[3] == 0, "dropped experts are never sampled"
    ratios = weights[:, 0] / torch.tensor(expected)[indices[:, 0]]
    assert set(ratios.mul(1e4).round().tolist()) == {3333.0, 10000.0}
    unlikely = indices[:, 0] != 1
    # the coin keeps one in four; standard deviation 0.0038
    assert (ratios[unlikely] > 0.5).float().mean().item() == pytest.approx(0.25, abs=0.015)


def test_the_two_weights_are_not_renormalised():
    scores = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    _, weights = sparsemixer(scores, EPS, training=False)
    assert 1.9 < weights.sum(dim=1).mean() < 2.0  # measured 1.95
    assert weights.max() <= 1.0


def test_gradient_follows_the_formula_in_training():
    scores = close_scores(64, 8, seed=1).requires_grad_()
    draws = recorded_draws(64, 8, seed=9)
    upstream = torch.randn(64, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.manual_seed(9)
    _, weights = sparsemixer(scores, EPS, training=True)
    weights.backward(upstream)
    for row, token in enumerate(scores.detach().tolist()):
        expected = [0.0] * 8
        for grad, (expert, p, _, gates) in zip(
            upstream[row].tolist(), naive_sparsemixer(token, draws[row]), strict=True
        ):
            for i, gate in enumerate(gates):
                expected[i] += grad * p * ((i == expert) - gate)
        assert scores.grad[row].tolist() == pytest.approx(expected, abs=1e-12)  # measured 1e-16


def test_inference_gradient_is_that_of_the_softmax():
    scores = close_scores(16, 4, seed=3).requires_grad_()
    _, weights = sparsemixer(scores, EPS, training=False)
    weights.sum().backward()
    for row, token in enumerate(scores.detach().tolist()):
        expected = [0.0] * 4
        for expert, p, _, gates in naive_sparsemixer(token):
            for i, gate in enumerate(gates):
                expected[i] += p * ((i == expert) - gate)
        assert scores.grad[row].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_replay_repeats_experts_weights_and_gradient_without_noise(training):
    torch.manual_seed(0)
    router = SparseMixerRouter(32, 6, jitter_eps=0.2).train(training)
    tokens = torch.randn(50, 32, requires_grad=True)
    recorded = router(tokens)
    upstream = torch.randn(50, 2)
    (recorded.expert_weights * upstream).sum().backward()
    grads = [router.weight.grad.clone(), tokens.grad.clone()]
    router.weight.grad = tokens.grad = None
    state = torch.get_rng_state()
    replayed = router(tokens, recorded)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(replayed.expert_indices, recorded.expert_indices)
    assert torch.equal(replayed.expert_weights, recorded.expert_weights)
    (replayed.expert_weights * upstream).sum().backward()
    # measured 0 in training, 2e-7 at inference (the softmax's own backward against the formula)
    torch.testing.assert_close([router.weight.grad, tokens.grad], grads, rtol=0, atol=1e-6)
    if training:
        assert (recorded.expert_weights < 0.34).any(), "some weights must carry the low midpoint factor"


def test_replay_keeps_an_expert_that_new_scores_would_drop():
    router = SparseMixerRouter(4, 4, jitter_eps=0.01).eval()
    with torch.no_grad():
        router.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    tokens = torch.ones(2, 4)
    recorded = RouterOutput(
        logits=torch.tensor([[9.0, 1.0, 1.0, 8.9], [8.9, 1.0, 1.0, 9.0]]),
        expert_indices=torch.tensor([[0, 3], [3, 0]]),
        expert_weights=torch.ones(2, 2),
    )
    replayed = router(tokens, recorded)
    expected = torch.tensor(
        [
            [1 / (1 + math.exp(3.0)), 1.0],  # of experts 0 (score 1, kept by force) and 3 (score 4); then 3 alone
            [1.0, 1 / (1 + math.exp(2.0))],  # 3 alone; then experts 0 (kept by force) and 2 (score 3)
        ]
    )
    torch.testing.assert_close(replayed.expert_weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_topk_router_takes_the_largest_probabilities(top_k, renormalize):
    torch.manual_seed(0)
    router = TopKSoftmaxRouter(8, 5, top_k=top_k, renormalize=renormalize, initializer_range=1.0)
    tokens = torch.randn(20, 8)
    output = router(tokens)
    for row, token in enumerate((tokens @ router.weight.T).tolist()):
        exponentials = [math.exp(score) for score in token]
        experts = sorted(range(5), key=lambda i: -exponentials[i])[:top_k]
        probabilities = [exponentials[i] / sum(exponentials) for i in experts]
        scale = sum(probabilities) if renormalize else 1.0
        assert output.expert_indices[row].tolist() == experts
        assert output.expert_weights[row].tolist() == pytest.approx([p / scale for p in probabilities], abs=1e-6)
    replayed = router(tokens, output)
    assert torch.equal(replayed.expert_weights, output.expert_weights)


def test_scores_are_float32_for_bfloat16_tokens():
    torch.manual_seed(0)
    router = SparseMixerRouter(64, 4).bfloat16().eval()
    tokens = torch.randn(10, 64).bfloat16()
    output = router(tokens)
    assert output.logits.dtype == output.expert_weights.dtype == torch.float32
    torch.testing.assert_close(output.logits, tokens.float() @ router.weight.float().T, rtol=0, atol=1e-6)


def test_routing_that_does_not_fit_is_refused():
    router = SparseMixerRouter(8, 4).eval()
    recorded = router(torch.randn(6, 8))
    with pytest.raises(ValueError, match=r"routing.logits must have shape \(5, 4\)"):
        router(torch.randn(5, 8), recorded)
    bad = RouterOutput(recorded.logits, recorded.expert_indices + 4, recorded.expert_weights)
    with pytest.raises(ValueError, match=r"must lie in \[0, 4\)"):
        router(torch.randn(6, 8), bad)
    with pytest.raises(ValueError, match="top_k must lie between 1 and num_experts"):
        TopKSoftmaxRouter(8, 4, top_k=5)


def test_scores_of_bfloat16_tokens_equal_those_of_float32_copies():
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(300, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(16, 64, generator=generator).bfloat16().requires_grad_()
    upstream = torch.randn(300, 16, generator=generator)
    scores = router._Bfloat16Scores.apply(tokens, weight)
    scores.backward(upstream)
    wide_tokens, wide_weight = (value.detach().double().requires_grad_() for value in (tokens, weight))
    wanted = wide_tokens @ wide_weight.T
    wanted.backward(upstream.double())
    assert scores.dtype == torch.float32
    assert float((scores - wanted).norm() / wanted.norm()) < 1e-6  # measured: 1e-7
    for one, other in ((tokens, wide_tokens), (weight, wide_weight)):
        # The result is bfloat16, half of whose spacing is 2e-3; the float32 path has the same. Measured: 1.7e-3.
        assert float((one.grad.double() - other.grad).norm() / other.grad.norm()) < 3e-3
