"""The head's chunked loss, checkpointing and the parts of a config that transformers' phi3 does not have."""

import pytest
import torch
from tiny_configs import longrope_config
from torch.nn import functional as F

import phi35.language_model_head as head_module
from phi35.config import ModelConfig
from phi35.language_model_head import LanguageModelHead
from phi35.loading import create
from phi35.model import CausalLM


@pytest.mark.parametrize("logits_per_chunk", [1, 30, 10**6])
@pytest.mark.parametrize("bias", [False, True])
def test_head_loss_equals_cross_entropy(monkeypatch: pytest.MonkeyPatch, bias: bool, logits_per_chunk: int) -> None:
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", logits_per_chunk)
    torch.manual_seed(0)
    head = LanguageModelHead(6, 10, bias=bias).double()
    states = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 10, (2, 7))
    labels[0, :3], labels[1, 5] = -100, -2
    loss = head(states, labels)
    inputs = [states, *head.parameters()]
    grads = torch.autograd.grad(loss, inputs)
    logits = F.linear(states, head.weight, head.bias)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten().masked_fill(labels.flatten() < 0, -100))
    # The loss is float32 by contract: measured 3e-8 relative against float64.
    assert abs(float(loss.detach() - expected.detach())) <= 1e-6
    for got, reference in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
        assert (got - reference).abs().max() <= 1e-6


def test_no_label_that_counts_gives_zero_loss_and_zero_gradients() -> None:
    model = CausalLM(longrope_config()).train()
    loss = model(torch.ones(2, 5, dtype=torch.int64), labels=torch.full((2, 5), -100)).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_gradient_checkpointing_repeats_dropout_to_the_bit() -> None:
    config = longrope_config(32, attention_dropout=0.1, resid_pdrop=0.2, embd_pdrop=0.1)
    model = CausalLM(config).train()
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(0, 150, (2, 40), generator=torch.Generator().manual_seed(0))
    grads = []
    for enabled in (False, True):
        model.gradient_checkpointing = enabled
        model.zero_grad()
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*grads, strict=True))


def test_layernorm_biases_and_tied_head_are_config_fields() -> None:
    config = longrope_config(norm_type="layernorm", attention_bias=True, lm_head_bias=True, tie_word_embeddings=True)
    model = CausalLM(config)
    names = dict(model.named_parameters())
    assert "model.layers.0.self_attn.qkv_proj.bias" in names and "lm_head.bias" in names
    assert "model.layers.0.input_layernorm.bias" in names and "model.norm.bias" in names
    assert "lm_head.weight" not in names and model.lm_head.weight is model.model.embed_tokens.weight


def test_logits_to_keep_gives_the_last_positions() -> None:
    model = CausalLM(longrope_config()).eval()
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_inconsistent_configs_name_every_problem() -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig(num_attention_heads=32, num_key_value_heads=5, max_position_embeddings=9000, hidden_act="tanh")
    for word in ("num_key_value_heads", "max_position_embeddings", "hidden_act"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="unknown config fields.*hiden_size"):
        ModelConfig().replace(hiden_size=3)


def test_padding_on_the_right_needs_no_mask() -> None:
    model = create("tiny-phi-3.5-mini", dtype="float32", seed=0, initializer_range=0.1).train()
    ids = torch.randint(3, 1000, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[2, 2:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    plain = model(input_ids=ids, attention_mask=mask, labels=labels, return_logits=True)
    fast = model(input_ids=ids, attention_mask=mask, labels=labels, return_logits=True, padding_side="right")
    torch.testing.assert_close(fast.loss, plain.loss, rtol=1e-6, atol=0)
    real = mask.bool()
    torch.testing.assert_close(fast.logits[real], plain.logits[real], rtol=0, atol=1e-5)  # measured: 9e-7
    with pytest.raises(ValueError, match="padding_side must be 'right'"):
        model(input_ids=ids, padding_side="left")
