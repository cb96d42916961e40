"""Weights to codes and back: nearest codes, exact packing, errors, and the format of compressed-tensors."""

import itertools

import pytest
import torch

from phi35.quantization.codes import (
    QuantizedTensor,
    dequantize,
    fit_grid,
    pack,
    round_to_nearest,
    tensor_specs,
    unpack,
)
from phi35.quantization.config import GROUP_SIZES, QuantizationConfig, WeightFormat, from_entry, to_entry
from phi35.quantization.linear import plain_product, quantized_embedding, quantized_linear

FORMATS = {
    "int4": WeightFormat(),
    "int4 g64": WeightFormat(group_size=64),
    "int4 g32": WeightFormat(group_size=32),
    "int4 rows": WeightFormat(group_size=None),
    "int4 zero points": WeightFormat(symmetric=False),
    "int4 g32 zero points": WeightFormat(group_size=32, symmetric=False),
    "int4 byte scales": WeightFormat(scale_bits=8),
    "int4 byte scales, zero points": WeightFormat(scale_bits=8, symmetric=False),
    "int8": WeightFormat(bits=8),
    "int8 rows": WeightFormat(bits=8, group_size=None),
    "int8 zero points": WeightFormat(bits=8, symmetric=False),
    "fp8": WeightFormat(bits=8, type="float", group_size=None),
    "fp8 groups": WeightFormat(bits=8, type="float", group_size=64),
}
# Relative error on normal numbers, measured.
ERRORS = {
    "int4": 0.0981,
    "int4 g64": 0.0911,
    "int4 g32": 0.0827,
    "int4 rows": 0.1266,
    "int4 zero points": 0.0955,
    "int4 g32 zero points": 0.0796,
    "int4 byte scales": 0.1016,
    "int4 byte scales, zero points": 0.0955,
    "int8": 0.0065,
    "int8 rows": 0.0085,
    "int8 zero points": 0.0060,
    "fp8": 0.0265,
    "fp8 groups": 0.0257,
}


def drawn(rows: int = 256, columns: int = 1024, std: float = 0.02) -> torch.Tensor:
    """Normal weights with a row and a group of zeros and an outlier."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * std
    weight[3] = 0
    weight[4, :128] = 0
    weight[5, 200] = 40 * std
    return weight


@pytest.mark.parametrize("name", FORMATS)
def test_error_is_that_of_the_format(name: str) -> None:
    one, weight = FORMATS[name], drawn()
    quantized = round_to_nearest(weight, one, torch.bfloat16)
    assert quantized.shape == tuple(weight.shape)
    restored = dequantize(quantized, torch.float32)
    usual = [row for row in range(256) if row != 5]
    error = float((restored - weight)[usual].norm() / weight[usual].norm())
    print(f"{name}: relative error {error:.4f}")
    assert 0.7 * ERRORS[name] < error < 1.05 * ERRORS[name]
    assert not restored[3].any()
    if one.group_size is not None:
        assert not restored[4, :128].any()
    assert restored[5, 200] == pytest.approx(0.8, rel=0.15 if one.bits == 4 else 0.02)


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_has_its_nearest_code(name: str) -> None:
    one, weight = FORMATS[name], drawn(64, 256)
    grid = fit_grid(weight, one, torch.bfloat16)
    groups = weight.view(64, grid.zero.shape[1], -1)
    scale, zero = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
    codes = grid.encode(groups, scale, zero)
    error = ((codes - zero) * scale - groups).abs()
    everything = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    choices = everything[everything.isfinite()] if one.type == "float" else torch.arange(float(1 << one.bits))
    for choice in choices:
        assert (error <= ((choice - zero) * scale - groups).abs() + 1e-7).all()


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_are_those_announced(name: str) -> None:
    one = FORMATS[name]
    quantized = round_to_nearest(torch.stack([drawn(64, 256), drawn(64, 256, 0.3)]), one, torch.float16)
    specs = tensor_specs(one, (2, 64, 256), torch.float16)
    assert {key: (tuple(t.shape), t.dtype) for key, t in quantized.tensors().items()} == specs
    assert ("_zero_point" in specs) == (not one.symmetric)
    bits = sum(t.numel() * t.element_size() * 8 for t in quantized.tensors().values()) / (2 * 64 * 256)
    groups = 256 // one.num_groups(256)
    expected = one.bits + (one.scale_bits + (0 if one.symmetric else one.bits)) / groups
    assert bits == pytest.approx(expected + (32 / 256 if one.scale_bits == 8 else 0))


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_every_code_and_puts_the_first_lowest(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 3, 64))
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape[-1] == 64 * bits // 32
    assert torch.equal(unpack(words, bits).long(), codes)
    assert int(words[0, 0, 0]) & ((1 << bits) - 1) == int(codes[0, 0, 0])


@pytest.mark.parametrize("name", [name for name in FORMATS if "byte" not in name])
def test_compressed_tensors_restores_the_same_weights(name: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    one, weight = FORMATS[name], drawn(64, 256)
    group = to_entry(QuantizationConfig(linear=one))["config_groups"]["linear"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))
    quantized = round_to_nearest(weight, one, torch.bfloat16)
    state = {f"weight{suffix}": tensor for suffix, tensor in quantized.tensors().items()}
    state["weight_shape"] = torch.tensor(weight.shape)
    compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
    restored = compressor.decompress(state, scheme)["weight"]
    # It multiplies in the scale's dtype: both are the same product, rounded to bfloat16.
    assert torch.equal(restored.float(), dequantize(quantized, torch.bfloat16).float())


@pytest.mark.parametrize("name", FORMATS)
def test_products_and_rows_are_those_of_the_restored_weight(name: str) -> None:
    quantized = round_to_nearest(drawn(64, 256), FORMATS[name], torch.bfloat16)
    restored = dequantize(quantized, torch.float32)
    hidden = torch.randn(2, 3, 256, requires_grad=True)
    bias = torch.randn(64)
    out = quantized_linear(hidden, quantized, bias)
    expected = torch.nn.functional.linear(hidden, restored, bias)
    # Measured: at most 3.1e-5; the CPU's kernel rounds activations to 16 bits.
    assert float((out - expected).detach().abs().max()) < 1e-4
    upstream = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(out, hidden, upstream)
    (wanted,) = torch.autograd.grad(expected, hidden, upstream)
    assert float((grad - wanted).abs().max()) < 5e-6
    with torch.no_grad():
        assert float((quantized_linear(hidden, quantized, bias) - out).abs().max()) < 1e-6
        exact = plain_product(hidden.view(6, 256), quantized, bias).view_as(expected)
    # Measured: at most 1.2e-6.
    assert float((exact - expected.detach()).abs().max()) < 5e-6
    ids = torch.tensor([[0, 5, 63], [63, 17, 3]])
    assert torch.equal(quantized_embedding(ids, quantized, torch.float32), restored[ids])


def test_blocks_of_rows_join_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = round_to_nearest(drawn(64, 256), WeightFormat(symmetric=False), torch.bfloat16)
    hidden = torch.randn(3, 256)
    whole = plain_product(hidden, quantized)
    monkeypatch.setattr("phi35.quantization.linear.BLOCK_VALUES", 24 * 256)
    # Measured: 0; other block sizes may sum in another order.
    assert float((plain_product(hidden, quantized) - whole).abs().max()) < 1e-6
    assert isinstance(quantized.rows(8, 24), QuantizedTensor) and quantized.rows(8, 24).shape == (16, 256)


def test_rounding_by_chunks_gives_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (WeightFormat(), WeightFormat(symmetric=False), WeightFormat(scale_bits=8)):
        whole = round_to_nearest(drawn(64, 256), one, torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr("phi35.quantization.codes.CHUNK_VALUES", 16 * 256)
            parts = round_to_nearest(drawn(64, 256), one, torch.bfloat16)
        for key, tensor in whole.tensors().items():
            assert torch.equal(tensor, parts.tensors()[key]), key


def test_entry_of_the_config_says_everything() -> None:
    formats = list(FORMATS.values())
    for linear, head in itertools.product(formats, (None, formats[8])):
        quantization = QuantizationConfig(linear=linear, head=head, tower=formats[0], method="gptq")
        assert from_entry(to_entry(quantization)) == quantization
    assert to_entry(QuantizationConfig())["quant_method"] == "compressed-tensors"
    assert to_entry(QuantizationConfig(linear=FORMATS["int4 byte scales"]))["quant_method"] == "phi35"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, "int takes 4 or 8"),
        ({"bits": 4, "type": "float"}, "float .e4m3. takes 8"),
        ({"group_size": 48}, "group_size must be one of"),
        ({"bits": 8, "type": "float", "symmetric": False}, "no zero points"),
        ({"scale_bits": 4}, "scale_bits must be"),
        ({"scale_bits": 8, "group_size": None}, "in groups"),
        ({"bits": 5, "group_size": 7}, "is unknown.*group_size must"),
    ],
)
def test_impossible_formats_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightFormat(**fields)
    assert GROUP_SIZES == (32, 64, 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "awq"}, "method must be one of"),
        ({"scale_dtype": "float32"}, "scale_dtype must be one of"),
        ({"linear": None}, "nothing is to be quantized"),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**fields)


@pytest.mark.parametrize("entry", [{"quant_method": "gptq", "bits": 4}, "int4", {"phi35": {"formats": {"linear": {}}}}])
def test_entries_of_other_programs_are_refused(entry: object) -> None:
    with pytest.raises(ValueError, match="quantization_config"):
        from_entry(entry)
