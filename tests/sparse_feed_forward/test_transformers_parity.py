"""The whole sparse model against transformers' PhimoeForCausalLM with the same random weights.

Tolerance: 1e-5 times the logits' standard deviation where that exceeds 1, float32, maximum over all logits. Every
test prints what it measured (pytest -s); injected faults must exceed the tolerance a thousandfold.
"""

import copy

import pytest
import torch
from phimoe_pair import phimoe_pair
from transformers_models import tolerance

from moe.router import TopKSoftmaxRouter
from phi35 import presets
from phi35.outputs import RouterOutput

CONFIG = presets.get("tiny-phi-3.5-moe")


def report(what, error, allowed):
    print(f"{what}: maximum error {error:.1e}, allowed {allowed:.1e}")


@pytest.fixture(scope="module")
def pair():
    return phimoe_pair(CONFIG)


def random_ids(batch_size, length, seed=0):
    return torch.randint(CONFIG.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 7, 300, 4095, 4096])
@torch.no_grad()
def test_logits_up_to_the_original_length(pair, length):
    ours, theirs = pair
    input_ids = random_ids(2, length)
    expected = theirs(input_ids, output_router_logits=True)
    output = ours(input_ids)
    error = float((output.logits - expected.logits).abs().max())
    report(f"length {length}", error, tolerance(expected.logits))
    assert error <= tolerance(expected.logits)  # measured 0 (torch 2.14, transformers 5.23, one thread)
    assert len(output.router_logits) == len(expected.router_logits) == CONFIG.num_hidden_layers
    for mine, other in zip(output.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [4097, 4200])
@torch.no_grad()
def test_logits_beyond_the_original_length_follow_the_formula(pair, length):
    _, short_theirs = pair
    ours, theirs = phimoe_pair(CONFIG, factors="long")
    input_ids = random_ids(2, length)
    expected = theirs(input_ids, logits_to_keep=64).logits
    error = float((ours(input_ids, logits_to_keep=64).logits - expected).abs().max())
    report(f"length {length}", error, tolerance(expected))
    assert error <= tolerance(expected)  # measured 0
    wrong = short_theirs(input_ids, logits_to_keep=64).logits
    assert float((wrong - expected).abs().max()) > 1000 * tolerance(expected), "long and short factors must differ"


@torch.no_grad()
def test_rows_on_both_sides_of_the_original_length_in_one_batch(pair):
    ours, short_theirs = pair
    _, long_theirs = phimoe_pair(CONFIG, factors="long")
    input_ids = random_ids(2, 4100)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :1000] = 0
    logits = ours(input_ids, attention_mask=attention_mask, logits_to_keep=64).logits
    expected = torch.cat(
        (
            short_theirs(input_ids[:1, 1000:], logits_to_keep=64).logits,
            long_theirs(input_ids[1:], logits_to_keep=64).logits,
        )
    )
    error = float((logits - expected).abs().max())
    report("mixed batch", error, tolerance(expected))
    assert error <= tolerance(expected)  # measured 2.4e-6


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches(pair, side):
    ours, theirs = pair
    input_ids = random_ids(3, 40)
    attention_mask = torch.ones_like(input_ids)
    for row, padding in enumerate((0, 13, 39)):
        if padding:
            attention_mask[row, slice(None, padding) if side == "left" else slice(-padding, None)] = 0
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = theirs(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
    logits = ours(input_ids, attention_mask=attention_mask).logits
    real = attention_mask.bool()
    error = float((logits - expected)[real].abs().max())
    report(f"padding on the {side}", error, tolerance(expected))
    assert error <= tolerance(expected)  # measured 0


class Renormalised(torch.nn.Module):
    """A router with a common mistake: its two weights divided by their sum."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, hidden_states, routing=None):
        output = self.router(hidden_states, routing)
        weights = output.expert_weights / output.expert_weights.sum(dim=1, keepdim=True)
        return RouterOutput(output.logits, output.expert_indices, weights)


@pytest.mark.parametrize("fault", ["renormalised weights", "softmax top-2"])
@torch.no_grad()
def test_an_injected_fault_exceeds_the_tolerance_a_thousandfold(pair, fault):
    ours, theirs = pair
    broken = copy.deepcopy(ours)
    mlp = broken.model.layers[1].mlp
    if fault == "renormalised weights":
        mlp.router = Renormalised(mlp.router)
    else:
        mlp.router = TopKSoftmaxRouter(CONFIG.hidden_size, CONFIG.num_local_experts, renormalize=False)
        mlp.router.weight = ours.model.layers[1].mlp.router.weight
    input_ids = random_ids(2, 64)
    expected = theirs(input_ids).logits
    error = float((broken(input_ids).logits - expected).abs().max())
    report(f"fault: {fault}", error, tolerance(expected))
    assert error > 1000 * tolerance(expected)


@pytest.mark.parametrize("input_jitter_noise", [0.0, 0.01])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step_under_one_seed(input_jitter_noise, checkpointing):
    ours, theirs = phimoe_pair(CONFIG.replace(input_jitter_noise=input_jitter_noise, router_jitter_noise=0.1))
    for layer in theirs.model.layers:
        layer.mlp.router.input_jitter_noise = 0.0  # transformers jitters a second time here; once is published
    ours.train()
    theirs.train()
    ours.gradient_checkpointing = checkpointing
    input_ids = random_ids(2, 50)
    torch.manual_seed(3)
    output = ours(input_ids, labels=input_ids)
    output.loss.backward()
    torch.manual_seed(3)
    expected = theirs(input_ids, labels=input_ids)
    expected.loss.backward()
    loss_error = abs(output.loss.item() - expected.loss.item())
    report("training loss", loss_error, 1e-5)
    assert loss_error <= 1e-5  # measured 4.8e-7
    gradients = dict(theirs.named_parameters())
    worst = 0.0
    for name, parameter in ours.named_parameters():
        if "qkv_proj" in name:
            reference = torch.cat([gradients[name.replace("qkv", letter)].grad for letter in "qkv"])
        else:
            reference = gradients[name].grad
        worst = max(worst, float((parameter.grad - reference).abs().max() / reference.abs().max()))
    report("gradients, relative to each tensor's largest", worst, 1e-5)
    assert worst <= 1e-5  # measured 7.3e-7
    indices = torch.cat([routing.expert_indices for routing in output.router_outputs])
    ours.eval()
    with torch.no_grad():
        greedy = torch.cat([routing.expert_indices for routing in ours(input_ids).router_outputs])
    assert (indices != greedy).any(), "training must have sampled experts that inference would not take"
