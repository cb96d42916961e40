"""DoRA beside weights in few bits, against PEFT's own DoRA on the weights that the codes stand for."""

import pytest
import torch
from adapted_models import draw_second_factors, in_few_bits_and_restored, inputs

from phi35.adapters.config import AdapterConfig
from phi35.adapters.dora import RowSquares, row_lengths
from phi35.adapters.inject import add_adapter, disabled, inject, is_adapter, lora_config_of, merge
from phi35.quantization.codes import dequantize, round_to_nearest
from phi35.quantization.config import WeightFormat

FORMATS = {
    "int4": WeightFormat(bits=4, group_size=32),
    "int4-zeros": WeightFormat(bits=4, group_size=32, symmetric=False),
    "int8": WeightFormat(bits=8, group_size=32),
    "fp8": WeightFormat(bits=8, type="float", group_size=None),
}
PLACES = {
    "tiny-phi-3.5-mini": ("attention", "feed_forward"),
    "tiny-phi-3.5-moe": ("attention",),
    "tiny-phi-3.5-vision": ("attention", "feed_forward", "projector"),
}


def adapted_pair(name: str, one: WeightFormat, **options):
    few_bits, plain = in_few_bits_and_restored(name, one)
    for model in (few_bits, plain):
        add_adapter(model, AdapterConfig(rank=4, targets=PLACES[name], dora=True, **options), seed=1)
    return few_bits, plain


def disturb(model: torch.nn.Module) -> None:
    """Second factors and lengths as training might leave them."""
    draw_second_factors(model)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", PLACES)
def test_logits_gradients_and_merged_logits_are_those_of_the_restored_weights(name: str, kind: str) -> None:
    few_bits, plain = adapted_pair(name, FORMATS[kind])
    given = inputs(few_bits)
    with torch.no_grad(), disabled(few_bits):
        base = few_bits(**given).logits
    with torch.no_grad():  # a fresh adapter changes nothing
        torch.testing.assert_close(few_bits(**given).logits, base, atol=1e-6, rtol=0)  # measured 0
    outputs = []
    for model in (few_bits, plain):
        disturb(model)
        output = model(**given, labels=given["input_ids"])
        output.loss.backward()
        outputs.append(output.logits.detach())
    assert (outputs[0] - base).abs().max() > 1e-2
    # Measured 1e-6, behind routers 1e-5, at a deviation of 0.16: the kernel of the CPU rounds A to 16 bits.
    torch.testing.assert_close(*outputs, atol=4e-5, rtol=0)
    grads = {one: parameter.grad for one, parameter in plain.named_parameters() if parameter.requires_grad}
    assert any("magnitude" in one for one in grads) and all(is_adapter(one) for one in grads)
    for one, parameter in few_bits.named_parameters():
        assert parameter.requires_grad == (one in grads)
        if one in grads:
            # Measured 2e-6 where the largest is 0.2.
            torch.testing.assert_close(parameter.grad, grads[one], atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="few bits"):
        merge(few_bits)
    with torch.no_grad():
        torch.testing.assert_close(merge(plain)(**given).logits, outputs[0], atol=4e-5, rtol=0)


def test_dropped_inputs_are_dropped_for_the_base_product_too() -> None:
    few_bits, plain = adapted_pair("tiny-phi-3.5-moe", FORMATS["int4"], dropout=0.5)
    results = []
    for model in (few_bits, plain):
        disturb(model)
        layer = model.model.layers[0].self_attn.qkv_proj.train()
        torch.manual_seed(4)
        hidden_states = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(5))
        results.append(layer(hidden_states))
        assert not torch.equal(results[-1], layer(hidden_states))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_several_adapters_act_alone_and_together() -> None:
    results: dict[str, list[torch.Tensor]] = {"default": [], "other": [], "both": []}
    hidden_states = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(5))
    for model in adapted_pair("tiny-phi-3.5-mini", FORMATS["int8"]):
        config = AdapterConfig(rank=2, targets=("attention",), dora=True)
        torch.manual_seed(7)
        inject(model, lora_config_of(config, model), "other")
        disturb(model)
        layer = model.model.layers[0].self_attn.qkv_proj
        for active in results:
            layer.set_adapter(["default", "other"] if active == "both" else active)
            trained = {one.split(".")[1] for one, parameter in layer.named_parameters() if parameter.requires_grad}
            assert trained == ({"default", "other"} if active == "both" else {active})
            results[active].append(layer(hidden_states).detach())
    for pair in results.values():
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results["default"][0], results["other"][0], atol=1e-2)


@pytest.mark.parametrize("kind", FORMATS)
def test_row_lengths_need_no_restored_weight(kind: str) -> None:
    generator = torch.Generator().manual_seed(6)
    first, second = torch.nn.Linear(96, 4, bias=False), torch.nn.Linear(4, 160, bias=False)
    source = torch.randn(160, 96, generator=generator)
    weight, squares = round_to_nearest(source, FORMATS[kind], torch.bfloat16), RowSquares()
    for step in range(3):
        whole = dequantize(weight, torch.float32) + 0.7 * second.weight @ first.weight
        expected = torch.linalg.vector_norm(whole, dim=1)
        got = row_lengths(weight, squares(weight), first, second, 0.7)
        torch.testing.assert_close(got, expected, atol=0, rtol=1e-4)
        changed = weight.scale if step else weight.codes  # squares follow either
        changed.copy_(changed.flip(0))
