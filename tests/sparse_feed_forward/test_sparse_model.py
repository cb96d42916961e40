"""The sparse model as a whole: size, recomputation of layers, cached steps, greedy continuation."""

import pytest
import torch

from moe.losses import load_balancing_loss, router_z_loss
from phi35 import presets
from phi35.model import CausalLM

CONFIG = presets.get("tiny-phi-3.5-moe").replace(initializer_range=0.1, router_jitter_noise=0.1)


def tiny_model(seed=0):
    model = CausalLM(CONFIG)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def random_ids(batch_size, length, seed=0):
    return torch.randint(CONFIG.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def test_full_size_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = CausalLM(presets.get("phi-3.5-moe"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 41_873_153_344
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert 41_873_153_344 - experts + experts * 2 // 16 == 6_640_999_744


def test_recomputed_layers_route_as_they_did_and_carry_the_router_losses():
    input_ids = random_ids(2, 30)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :10] = 0
    results = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        output = model(
            input_ids, attention_mask=attention_mask, labels=input_ids.masked_fill(attention_mask == 0, -100)
        )
        balance = load_balancing_loss(output.router_outputs, attention_mask)
        loss = output.loss + 0.1 * balance + 0.1 * router_z_loss(output.router_outputs, attention_mask)
        loss.backward()
        results.append((loss.detach(), *[parameter.grad for parameter in model.parameters()]))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@torch.no_grad()
def test_cached_steps_equal_one_pass():
    model = tiny_model().eval()
    input_ids = random_ids(2, 24)
    whole = model(input_ids).logits
    cache = model.new_cache(2)
    pieces = [model(input_ids[:, :10], past_key_values=cache).logits]
    pieces += [model(input_ids[:, i : i + 1], past_key_values=cache).logits for i in range(10, 24)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5)  # measured 3.3e-6


@torch.no_grad()
def test_each_row_of_a_batch_gets_what_it_gets_alone():
    model = tiny_model().eval()
    input_ids = random_ids(3, 20)
    together = model(input_ids).logits
    for row in range(3):
        alone = model(input_ids[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)  # measured 1.1e-6


def test_greedy_continuation_equals_transformers_token_for_token():
    pytest.importorskip("transformers")
    from phimoe_pair import phimoe_pair

    ours, theirs = phimoe_pair(CONFIG, seed=1)
    input_ids = random_ids(2, 12, seed=3)
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=CONFIG.pad_token_id)
    expected = theirs.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    continued = input_ids
    cache = ours.new_cache(2)
    chunk = input_ids
    with torch.no_grad():
        for _ in range(24):
            chunk = ours(chunk, past_key_values=cache, logits_to_keep=1).logits.argmax(dim=-1)
            continued = torch.cat((continued, chunk), dim=1)
    assert torch.equal(continued, expected)
    assert len(expected[:, 12:].unique()) > 10
