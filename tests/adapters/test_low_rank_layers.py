"""Adapters on the modules of this package, against merged weights and naive sums."""

import pytest
import torch
from adapted_models import EVERYWHERE, IDS, adapted, draw_second_factors, in_few_bits_and_restored, inputs
from torch.nn import functional as F

import phi35
from moe.low_rank import LowRank, adapted_experts
from phi35.adapters.config import AdapterConfig
from phi35.adapters.inject import add_adapter, disabled, inject, is_adapter, merge
from phi35.quantization.config import WeightFormat


@pytest.mark.parametrize("name", EVERYWHERE)
def test_merging_gives_the_logits_of_the_adapted_model(name: str) -> None:
    model, plain = adapted(name), phi35.create(name, seed=0)
    given = inputs(model)
    with torch.no_grad():
        before, base = model(**given).logits, plain(**given).logits
        with disabled(model):
            assert torch.equal(model(**given).logits, base)
        assert (before - base).abs().max() > 1e-3
        merged = merge(model)
        after = merged(**given).logits
    assert set(merged.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(after, before, atol=2e-6, rtol=0)  # measured 4e-7


def test_dora_merges_too() -> None:
    model = adapted("tiny-phi-3.5-mini", dora=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.1
    with torch.no_grad():
        before = model(IDS).logits
        after = merge(model)(IDS).logits
    torch.testing.assert_close(after, before, atol=2e-6, rtol=0)  # measured 4e-7


@pytest.mark.parametrize("name", EVERYWHERE)
def test_only_the_adapter_is_trained_and_all_of_it(name: str) -> None:
    model = adapted(name).train()
    given = inputs(model)
    model(**given, labels=given["input_ids"]).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter(parameter_name)
        assert (parameter.grad is not None) == is_adapter(parameter_name), parameter_name
    places = {
        "experts.lora_A",
        "experts.base_layer.lora_A",
        "router.lora_A",
        "qkv_proj.lora_A",
        "fc1.lora_A",
        "mlp.down_proj",
    }
    found = {place for place in places if any(place in one for one, _ in model.named_parameters())}
    assert len(found) >= {"tiny-phi-3.5-mini": 2, "tiny-phi-3.5-moe": 4, "tiny-phi-3.5-vision": 3}[name]


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_experts_follow_a_naive_sum_with_gradients(dtype: torch.dtype, rank: int) -> None:
    """Every token's experts one by one, with the whole matrices W + s B A; the last expert gets no token."""
    draw = torch.Generator().manual_seed(0)
    num_tokens, experts, width, inner = 23, 4, 16, 24

    def tensor(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    hidden, weights = tensor(num_tokens, width), tensor(num_tokens, 2)
    gate_up, down = tensor(experts, 2 * inner, width), tensor(experts, width, inner)
    factors = [tensor(experts, rank, width), tensor(experts, 2 * inner, rank)]
    factors += [tensor(experts, rank, inner), tensor(experts, width, rank)]
    indices = torch.stack([torch.randperm(experts - 1, generator=draw)[:2] for _ in range(num_tokens)])
    first, second = LowRank(factors[0], factors[1], 1.5), LowRank(factors[2], factors[3], 0.5)
    out = adapted_experts(hidden, indices, weights, gate_up, down, "silu", [first], [second])
    leaves = [hidden, weights, *factors]
    upstream = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    grads = torch.autograd.grad(out, leaves, upstream.to(dtype))

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    h, w, a1, b1, a2, b2 = wide
    whole_up, whole_down = gate_up.double() + 1.5 * b1 @ a1, down.double() + 0.5 * b2 @ a2
    rows = []
    for token in range(num_tokens):
        total = torch.zeros(width, dtype=torch.float64)
        for choice, expert in enumerate(indices[token].tolist()):
            gate, up = (whole_up[expert] @ h[token]).chunk(2)
            total = total + w[token, choice] * (whole_down[expert] @ (F.silu(gate) * up))
        rows.append(total)
    reference = torch.stack(rows)
    expected = torch.autograd.grad(reference, wide, upstream)
    # Largest errors measured, relative to the largest value: 1e-15, 5e-7, 1e-2.
    limit = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip([out, *grads], [reference, *expected], strict=True):
        assert (got.double() - want).abs().max() <= limit * want.abs().max()
    assert all(not grad[-1].any() for grad in grads[2:])


def test_no_tokens_at_all() -> None:
    first, second = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 12, 4)
    hidden, none = torch.zeros(0, 8), torch.zeros(0, 2, dtype=torch.int64)
    weights = (torch.randn(3, 12, 8), torch.randn(3, 8, 6))
    out = adapted_experts(hidden, none, torch.zeros(0, 2), *weights, "gelu", [LowRank(first, second, 1.0)])
    out.sum().backward()
    assert out.shape == (0, 8) and first.grad is not None and not first.grad.any()


def test_dropout_is_of_training_alone_and_reaches_experts() -> None:
    model = adapted("tiny-phi-3.5-moe", ("experts",), dropout=0.5)
    with torch.no_grad():
        once, again = model(IDS).logits, model(IDS).logits
        assert torch.equal(once, again)
        experts = model.model.layers[0].mlp.experts.train()
        hidden, chosen = torch.randn(8, 64), torch.tensor([[0, 1]] * 8)
        one, other = (experts(hidden, chosen, torch.ones(8, 2)) for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_weights_in_few_bits_are_restored_for_the_products(name: str) -> None:
    """QLoRA: logits and the adapter's gradients are those of the same adapter on the restored weights."""
    few_bits, plain = in_few_bits_and_restored(name, WeightFormat(bits=4, group_size=32, symmetric=False))
    losses, grads = [], []
    for model in (few_bits, plain):
        places = ("attention", "experts", "router") if plain.config.is_sparse else None
        add_adapter(model, AdapterConfig(rank=4, targets=places), seed=1)
        draw_second_factors(model)
        if model is plain:  # experts in few bits come last into their model and draw other numbers
            for parameter_name, parameter in model.named_parameters():
                if is_adapter(parameter_name):
                    parameter.data.copy_(few_bits.get_parameter(parameter_name))
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert set(grads[0]) == set(grads[1]) and all(is_adapter(one) for one in grads[0])
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=0)  # measured 0
    for parameter_name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][parameter_name], atol=1e-6, rtol=1e-3)  # measured 0
    with pytest.raises(ValueError, match="few bits"):
        merge(few_bits)


def test_peft_alone_computes_the_same_from_the_same_names() -> None:
    """PEFT's own wrappers, which add B A to the whole stack, have our names, shapes and results."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    ours = adapted("tiny-phi-3.5-moe", ("attention", "experts", "router"))
    theirs = phi35.create("tiny-phi-3.5-moe", seed=0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["qkv_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
    )
    inject_adapter_in_model(config, theirs)
    state = get_peft_model_state_dict(ours, save_embedding_layers=False)
    assert {key: one.shape for key, one in state.items()} == {
        key: one.shape for key, one in get_peft_model_state_dict(theirs, save_embedding_layers=False).items()
    }
    loaded = set_peft_model_state_dict(theirs, state)
    assert not loaded.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=2e-6, rtol=0)  # measured 3e-7


def test_mistakes_are_named_before_anything_changes() -> None:
    with pytest.raises(ValueError, match="rank must be.*dropout must be.*targets must be"):
        AdapterConfig(rank=0, dropout=1.0, targets=("heads",))
    with pytest.raises(ValueError, match="dora is for linear layers"):
        AdapterConfig(dora=True, targets=("experts",))
    with pytest.raises(ValueError, match="unknown keys.*'r'"):
        AdapterConfig.of({"r": 8})
    model = phi35.create("tiny-phi-3.5-mini", seed=0)
    with pytest.raises(ValueError, match="no experts, projector.*can be"):
        add_adapter(model, AdapterConfig(targets=("attention", "experts", "projector")))
    config = add_adapter(model, AdapterConfig())
    with pytest.raises(ValueError, match="has an adapter"):
        inject(model, config)
    with pytest.raises(ValueError, match="no adapter"):
        merge(phi35.create("tiny-phi-3.5-mini", seed=0))
